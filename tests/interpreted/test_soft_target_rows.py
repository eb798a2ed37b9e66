"""The soft_target_rows kernels: every flag, rows of one tile and of several."""

import math

import pytest
import torch
from fastkd.kernels import launch, soft_target_rows
from torch import Tensor

from fastkd.backends.triton import soft_target_rows as triton
from fastkd.functional import kd
from tests.helpers.checks import ROW_OPTIONS, assert_close, logits, row_results, row_temperatures


def check(student: Tensor, teacher: Tensor, labels: Tensor, **options: bool) -> None:
    T = row_temperatures(len(student))
    exact = row_results(student.double(), teacher.double(), labels, T, backend="reference", **options)
    low = row_results(student, teacher, labels, T, backend="reference", **options)
    actual = row_results(student, teacher, labels, T, backend="triton", **options)
    for a, e, of_torch, dtype in zip(actual, exact, low, (student.dtype, *[torch.float32] * 6), strict=True):
        assert_close(a, e, dtype, of_torch)


@pytest.mark.parametrize("flags", ROW_OPTIONS, ids=str)
@pytest.mark.parametrize(("n", "classes"), [(5, 33), (3, 70)])
@pytest.mark.usefixtures("poison")
def test_equals_the_definition(n: int, classes: int, flags: dict[str, bool]) -> None:
    check(*logits(n, classes, dtype=torch.float32 if classes == 33 else torch.float16), **flags)


def test_several_temperatures_without_labels() -> None:
    student, teacher, _ = logits(3, 70, dtype=torch.float32)
    leaf, other = (student.clone().requires_grad_() for _ in range(2))
    found, expected = (
        kd.soft_target_rows(x, teacher, [1.0, 2.0, 6.0], backend=backend)
        for x, backend in ((leaf, "triton"), (other, "reference"))
    )
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, torch.float32)
    for rows in (found, expected):
        rows.divergence.sum().backward()
    assert_close(leaf.grad, other.grad, torch.float32)


def test_strided_rows_columns_and_labels() -> None:
    student, teacher, labels = logits(12, 90, dtype=torch.float32)
    check(student[::2, 3:80], teacher.T.contiguous().T[::2, 3:80], (labels % 77)[::2], exclude_label=True)
    check(student[:1].expand(3, 90), teacher[:1].expand(3, 90), labels[:1].expand(3), standardize=True)


def test_certain_networks_and_constant_rows_are_finite() -> None:
    student, teacher, labels = torch.zeros(3, 70), logits(3, 70)[1].float(), torch.tensor([1, 69, 0])
    student[0, 1], student[1, 2] = 120.0, 120.0
    T = torch.ones(3), torch.ones(3)
    for flags in ROW_OPTIONS[::3]:
        assert all(x.isfinite().all() for x in row_results(student, teacher, labels, T, backend="triton", **flags))


@pytest.mark.parametrize("label", [-100, 70, 1 << 40])
def test_a_label_that_is_none_makes_its_row_nan(label: int) -> None:
    student, teacher, labels = logits(4, 70, dtype=torch.float32)
    labels[1] = label
    inputs = student, teacher, labels, torch.ones(1, 4), torch.ones(1, 4)
    found, kept = triton.soft_target_rows_forward(*inputs, True, False, False)
    assert found[2:].isnan().any(dim=(0, 1)).tolist() == [False, True, False, False]
    grad = triton.soft_target_rows_backward(*inputs, kept, torch.ones_like(found), True, False)
    assert grad.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_impossible_classes_keep_the_label_finite() -> None:
    student, teacher, labels = logits(3, 200, dtype=torch.float32)
    labels[:], student[:, :130] = 199, -math.inf
    found = kd.soft_target_rows(student, teacher, labels=labels, backend="triton")
    expected = kd.soft_target_rows(student, teacher, labels=labels, backend="reference")
    assert_close(found.student_label, expected.student_label, torch.float32)
    assert not found.divergence.isfinite().any()


def test_bfloat16_and_tiles_of_the_gpu_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_target_rows, "hardware_of", lambda device: "sm_90")
    for classes in (9, 300):
        tile = soft_target_rows.tile_of(launch.launch_config("soft_target_forward", width=classes, hardware="sm_90"))
        assert classes <= tile.BLOCK_N <= 256 * tile.num_warps // tile.BLOCK_M
        student, teacher, labels = logits(5, classes, dtype=torch.bfloat16)
        inputs = student, teacher, labels, torch.full((1, 5), 0.25), torch.full((1, 5), 0.5)
        found, kept = triton.soft_target_rows_forward(*inputs, True, True, True)
        grad = triton.soft_target_rows_backward(*inputs, kept, torch.ones_like(found), True, True)
        leaf = student.double().requires_grad_()
        T = {"temperature": [4.0], "teacher_temperature": [2.0], "labels": labels}
        exact = kd.soft_target_rows(leaf, teacher.double(), **T, exclude_label=True, standardize=True)
        (exact.divergence + exact.student_label).sum().backward()
        for a, e in zip(found, exact, strict=True):
            assert_close(a, e, torch.float32)
        assert_close(grad, leaf.grad, torch.bfloat16)
