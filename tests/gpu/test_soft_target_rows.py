"""The soft_target_rows kernels on a GPU."""

import pytest
import torch

from fastkd.functional.kd import soft_target_rows
from tests.gpu.test_soft_target import on_gpu
from tests.helpers.checks import ROW_OPTIONS, assert_close, row_results, row_temperatures
from tests.helpers.gpu import assert_replays_from_a_cuda_graph, gpu, sanitizer

pytest.importorskip("triton")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "classes"),
    [pytest.param(64, 10, marks=sanitizer), (1000, 100), (256, 1000), (33, 1001), (7, 5000), (3, 131069)],
)
@pytest.mark.parametrize("flags", ROW_OPTIONS, ids=str)
def test_equals_the_definition_on_a_gpu(n: int, classes: int, flags: dict[str, bool], dtype: torch.dtype) -> None:
    student, teacher, labels = on_gpu(n, classes, dtype)
    T = row_temperatures(n, "cuda")
    exact = row_results(student.double(), teacher.double(), labels, T, backend="reference", **flags)
    low = row_results(student, teacher, labels, T, backend="reference", **flags)
    actual, again = (row_results(student, teacher, labels, T, backend="triton", **flags) for _ in range(2))
    for a, e, of_torch, expected in zip(actual, exact, low, (dtype, *[torch.float32] * 6), strict=True):
        assert_close(a, e, expected, of_torch)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@gpu
def test_captured_in_a_cuda_graph_without_waiting_for_the_host() -> None:
    student, teacher, labels = on_gpu(128, 1000, torch.bfloat16)
    leaf = student.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        rows = soft_target_rows(leaf, teacher, [1.0, 4.0], labels=labels, standardize=True)
        total = (rows.divergence - rows.student_label).mean()
        return total, *torch.autograd.grad(total, [leaf])

    assert_replays_from_a_cuda_graph(step, leaf, student.flip(0))
