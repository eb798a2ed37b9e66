"""The soft_target kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from fastkd import kd_loss
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import assert_close, terms_and_gradient
from tests.helpers.gpu import assert_replays_from_a_cuda_graph, gpu, large, sanitizer

pytest.importorskip("triton")


def on_gpu(n: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    student, teacher = (
        torch.randn(n, classes, generator=generator, device="cuda", dtype=torch.float32).mul_(3).to(dtype)
        for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (n,), generator=generator, device="cuda")


def check_on_gpu(student: Tensor, teacher: Tensor, labels: Tensor, **options: object) -> None:
    exact = terms_and_gradient(student.double(), teacher.double(), labels, (0.7, -1.3), backend="reference", **options)
    low = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="reference", **options)
    actual = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="triton", **options)
    again = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="triton", **options)
    for a, e, low_value, dtype in zip(actual, exact, low, (torch.float32, torch.float32, student.dtype), strict=True):
        assert_close(a, e, dtype, low_value)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        (5, 1), pytest.param(64, 10, marks=sanitizer), (1000, 100), (256, 1000),
        pytest.param(33, 1001, marks=sanitizer), (7, 5000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_equals_the_definition_on_a_gpu(n: int, classes: int, dtype: torch.dtype, temperature: float) -> None:
    weight = torch.rand(n, device="cuda")
    check_on_gpu(*on_gpu(n, classes, dtype), temperature=temperature, label_smoothing=0.1, sample_weight=weight)


@gpu
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        (1, 131072), (40, 131072), (600, 131072), pytest.param(1, 131069, marks=sanitizer), (40, 131069),
        (600, 131069),
    ],
)  # fmt: skip
def test_131072_classes_split_or_not(n: int, classes: int) -> None:
    check_on_gpu(*on_gpu(n, classes, torch.bfloat16), label_smoothing=0.1)


@gpu
@large
def test_offsets_beyond_two_to_the_31() -> None:
    classes = 128 * 1024
    n = 2**31 // classes + 2
    student, teacher, labels = on_gpu(n, classes, torch.bfloat16)
    leaf = student.requires_grad_()
    ce, kd = ce_kd_terms(leaf, teacher, labels, backend="triton")
    (ce + kd).backward()
    last = terms_and_gradient(student[-2:].double(), teacher[-2:].double(), labels[-2:], backend="reference")
    low = terms_and_gradient(student[-2:], teacher[-2:], labels[-2:], backend="reference")
    assert_close(leaf.grad[-2:] * (n / 2), last[2], torch.bfloat16, low[2])
    assert_close(torch.stack([ce, kd]), torch.stack(blocked_means(student, teacher, labels)), torch.float32)


def blocked_means(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(ce_kd_terms(student, teacher, labels, backend="blocked"))


@gpu
def test_captured_in_a_cuda_graph_without_waiting_for_the_host() -> None:
    student, teacher, labels = on_gpu(128, 1000, torch.bfloat16)
    weight = torch.rand(128, device="cuda")
    leaf = student.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        total = sum(ce_kd_terms(leaf, teacher, labels, label_smoothing=0.1, sample_weight=weight))
        return total, *torch.autograd.grad(total, [leaf])

    assert_replays_from_a_cuda_graph(step, leaf, student.flip(0))


@gpu
def test_a_bad_label_on_a_gpu_makes_the_cross_entropy_nan_and_nothing_else() -> None:
    student, teacher, labels = on_gpu(8, 1000, torch.float32)
    labels[3] = 1000
    for backend in ("triton", "blocked", "reference"):
        ce, kd = ce_kd_terms(student, teacher, labels, backend=backend)
        assert ce.isnan()
        assert kd.isfinite()
    assert_close(kd_loss(student, teacher), kd, torch.float32)
