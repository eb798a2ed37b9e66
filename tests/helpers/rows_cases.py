"""Cases of ``soft_target_rows``: its options, temperatures for each row, and all that it gives with its gradients."""

import itertools

import torch
from torch import Tensor

from fastkd.functional.kd import soft_target_rows
from tests.helpers.checks import value_and_grads

FLAGS = [
    {"exclude_label": exclude, "standardize": standardize}
    for exclude, standardize in itertools.product((False, True), repeat=2)
]


def temperatures(n: int, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(1 + 3 * torch.rand(n, generator=generator, dtype=torch.float64).to(device) for _ in range(2))


def results(student: Tensor, teacher: Tensor, labels: Tensor, T: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """The rows, and the gradients of the student and of both temperatures for some upstream gradients."""

    def loss(x: Tensor, of_student: Tensor, of_teacher: Tensor) -> Tensor:
        found = soft_target_rows(x, teacher, of_student, teacher_temperature=of_teacher, labels=labels, **options)
        wave = torch.arange(len(x), device=x.device).cos()
        rows.extend(y.detach() for y in found)
        return (found.divergence * wave + found.student_label * wave.flip(0)).sum()

    rows: list[Tensor] = []
    return [*value_and_grads(loss, student, *T)[1:], *rows]
