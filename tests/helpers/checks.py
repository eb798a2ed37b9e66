"""What the whole suite shares: one comparison, one set of tolerances, inputs and gradients."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.functional.kd import ce_kd_terms, soft_target_rows

# Relative to the norm of the expected value; on top of the error that the definition itself makes in that dtype.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The options of soft_target_rows.
ROW_OPTIONS = [
    {"exclude_label": exclude, "standardize": standardize}
    for exclude, standardize in itertools.product((False, True), repeat=2)
]
CONSISTENCIES = ("student||teacher", "teacher||student")


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-5) -> float:
    """``|actual - expected| / max(|expected|, floor)`` in float64; inf where either is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    error = ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()
    return error if error == error else float("inf")


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, low_precision: Tensor | None = None, floor: float = 1e-5
) -> None:
    """Error against the float64 ``expected`` at most that of ``low_precision`` torch plus the dtype's tolerance."""
    allowed = TOLERANCES[dtype]
    if low_precision is not None:
        allowed += relative_error(low_precision, expected, floor)
    error = relative_error(actual, expected, floor)
    assert error <= allowed, f"relative error {error:.3g} > {allowed:.3g}"


def value_and_grads(loss: Callable[..., Tensor], *inputs: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """The loss of fresh leaves made of ``inputs``, and its gradient with respect to each."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward(value.new_tensor(upstream))
    return value.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)


def poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated without values with NaN, or -1: an element that is never written shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            return made.fill_(math.nan if made.is_floating_point() else -1)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def embeddings(
    n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64, noise: float = 1.4
) -> tuple[Tensor, Tensor]:
    """Student and teacher rows that agree in part, as they do in training; with little ``noise``, almost entirely."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, d, generator=generator, dtype=torch.float64)
    student = teacher + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (2 * student).to(dtype), teacher.to(dtype)


def logits(n: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(classes, (n,), generator=generator)


def terms_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, upstream: tuple[float, float] = (1.0, 1.0), **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """ce, kd, and the gradient of ``upstream[0] ce + upstream[1] kd``."""
    leaf = student.detach().clone().requires_grad_()
    ce, kd = ce_kd_terms(leaf, teacher, labels, **options)
    (upstream[0] * ce + upstream[1] * kd).backward()
    return ce.detach(), kd.detach(), leaf.grad


def row_temperatures(n: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Of the student and of the teacher, one for each row."""
    generator = torch.Generator().manual_seed(7)
    return tuple(1 + 3 * torch.rand(n, generator=generator, dtype=torch.float64).to(device) for _ in range(2))


def row_results(
    student: Tensor, teacher: Tensor, labels: Tensor, T: tuple[Tensor, ...], **options: object
) -> list[Tensor]:
    """The rows, and the gradients of the student and of both temperatures for some upstream gradients."""

    def loss(x: Tensor, of_student: Tensor, of_teacher: Tensor) -> Tensor:
        found = soft_target_rows(x, teacher, of_student, teacher_temperature=of_teacher, labels=labels, **options)
        wave = torch.arange(len(x), device=x.device).cos()
        rows.extend(y.detach() for y in found)
        return (found.divergence * wave + found.student_label * wave.flip(0)).sum()

    rows: list[Tensor] = []
    return [*value_and_grads(loss, student, *T)[1:], *rows]
