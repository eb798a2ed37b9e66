"""What a row of logits says at several temperatures; what holds of every operation is in test_contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import kd_loss, native
from fastkd.backends.blocked import soft_target_rows as blocked
from fastkd.functional.kd import SoftTargetRows, ce_kd_terms, soft_target_rows
from tests.helpers.checks import assert_close, logits, relative_error
from tests.helpers.rows_cases import FLAGS, results, temperatures


@pytest.fixture(params=["loops", "blocks"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the extension's loops, and in blocks of at most two of the widest rows here."""
    if request.param == "loops" and native.extension() is None:
        pytest.skip("the extension is not built")
    if request.param == "blocks":
        monkeypatch.setattr(blocked, "loops", lambda _: None)
        monkeypatch.setattr("fastkd.backends.blocked.sums.BLOCK_ELEMENTS", 5000)


def test_the_definition_is_made_of_torchs_functions() -> None:
    student, teacher, labels = logits(6, 5)
    found = soft_target_rows(
        student, teacher, [2.0, 3.0], teacher_temperature=[1.0, 4.0], labels=labels, backend="reference"
    )
    for k, (of_student, of_teacher) in enumerate(((2.0, 1.0), (3.0, 4.0))):
        p, q = F.softmax(student / of_student, dim=1), F.softmax(teacher / of_teacher, dim=1)
        assert_close(found.divergence[k], F.kl_div(p.log(), q, reduction="none").sum(dim=1), torch.float64)
        assert_close(found.entropy[k], torch.distributions.Categorical(q).entropy(), torch.float64)
        assert_close(-found.student_label[k], F.nll_loss(p.log(), labels, reduction="none"), torch.float64)
        assert_close(-found.teacher_label[k], F.nll_loss(q.log(), labels, reduction="none"), torch.float64)
    standardized = [(z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True)) for z in (student, teacher)]
    others = torch.arange(5) != labels[:, None]
    without = [z[others].view(6, 4) for z in standardized]
    expected = soft_target_rows(*without, 2.0, backend="reference")
    found = soft_target_rows(
        student, teacher, 2.0, labels=labels, exclude_label=True, standardize=True, backend="reference"
    )
    assert_close(found.divergence, expected.divergence, torch.float64)
    assert_close(found.entropy, expected.entropy, torch.float64)
    p = F.softmax(standardized[0] / 2, dim=1).gather(1, labels[:, None]).T
    assert_close(found.student_label, (p / (1 - p)).log(), torch.float64)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_definition_has_the_gradients_of_both_temperatures(flags: dict[str, bool]) -> None:
    student, teacher, labels = logits(3, 4)

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        of_student, of_teacher = x[1:]
        options = {"teacher_temperature": of_teacher, "labels": labels, "backend": "reference", **flags}
        found = soft_target_rows(x[0], teacher, of_student, **options)
        return found.divergence, found.student_label

    inputs = [x.requires_grad_() for x in (student, *temperatures(3))]
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize(("n", "classes"), [(7, 3), (9, 2500)])
@pytest.mark.usefixtures("ways")
def test_equals_the_definition(n: int, classes: int, flags: dict[str, bool], dtype: torch.dtype) -> None:
    student, teacher, labels = logits(n, classes, dtype=dtype)
    T = temperatures(n)
    exact = results(student.double(), teacher.double(), labels, T, backend="reference", **flags)
    low = results(student, teacher, labels, T, backend="reference", **flags)
    actual = results(student, teacher, labels, T, backend="blocked", **flags)
    sums = torch.promote_types(dtype, torch.float32)
    for a, e, of_torch, expected in zip(actual, exact, low, (dtype, *[sums] * 6), strict=True):
        assert_close(a, e, expected, of_torch)
    assert actual[0].dtype == dtype
    assert {x.dtype for x in actual[3:]} == {sums}


@pytest.mark.usefixtures("ways")
def test_several_temperatures_at_once_are_each_alone() -> None:
    student, teacher, labels = logits(5, 9)
    leaf = student.clone().requires_grad_()
    found = soft_target_rows(leaf, teacher, [4.0, 1.0, 2.5], labels=labels, exclude_label=True)
    alone = [soft_target_rows(leaf, teacher, T, labels=labels, exclude_label=True) for T in (4.0, 1.0, 2.5)]
    for rows, single in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(rows, torch.cat(single))
    (grad,) = torch.autograd.grad(found.divergence.sum() - found.student_label.sum(), leaf)
    parts = [torch.autograd.grad(x.divergence.sum() - x.student_label.sum(), leaf)[0] for x in alone]
    assert_close(grad, sum(parts), torch.float64)


def test_a_temperature_for_each_row_is_that_of_the_row_alone() -> None:
    student, teacher, _ = logits(4, 6)
    T, weight = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 0.0, 2.0, 3.0])
    each = [kd_loss(student[i : i + 1], teacher[i : i + 1], T[i].item()) for i in range(4)]
    assert_close(kd_loss(student, teacher, T), sum(each) / 4, torch.float64)
    expected = sum(w * loss for w, loss in zip(weight, each, strict=True)) / 4
    assert_close(kd_loss(student, teacher, T, sample_weight=weight), expected, torch.float64)


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32])
def test_logits_of_two_dtypes_are_read_in_the_wider(teacher_dtype: torch.dtype) -> None:
    student, teacher, labels = logits(4, 5, dtype=torch.bfloat16)
    leaf = student.requires_grad_()
    found = soft_target_rows(leaf, teacher.to(teacher_dtype), labels=labels)
    assert {x.dtype for x in found} == {teacher_dtype}
    assert [x.requires_grad for x in found] == [True, False, True, False]
    found.divergence.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("ways")
def test_divergences_of_logits_that_almost_agree_keep_their_digits() -> None:
    student, teacher, labels = logits(32, 500, dtype=torch.float32)
    student = teacher + 0.01 * student
    found, exact = (
        soft_target_rows(*(z.to(dtype) for z in (student, teacher)), 20.0, labels=labels, exclude_label=True)
        for dtype in (torch.float32, torch.float64)
    )
    assert relative_error(found.divergence, exact.divergence) < 2e-3
    same = soft_target_rows(teacher, teacher, 3.0, labels=labels, exclude_label=True)
    assert not same.divergence.any()


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4, 1e30])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.usefixtures("ways")
def test_constant_tiny_and_huge_logits_are_finite(scale: float, flags: dict[str, bool]) -> None:
    student, teacher, labels = logits(5, 40, dtype=torch.float32)
    T = torch.full((5,), 2.0)
    found = results(scale * student + 1, scale * teacher, labels, (T, T), backend="blocked", **flags)
    assert all(x.isfinite().all() for x in found[:1] + found[3:])


@pytest.mark.usefixtures("ways")
def test_impossible_classes_keep_the_label_finite() -> None:
    student, teacher, labels = logits(6, 5, dtype=torch.float32)
    student[:, 2], labels[labels == 2] = -math.inf, 3
    leaf = student.requires_grad_()
    found = soft_target_rows(leaf, teacher, labels=labels)
    assert found.student_label.isfinite().all()
    assert not found.divergence.isfinite().any()
    found.student_label.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("exclude_label", [False, True])
@pytest.mark.usefixtures("ways")
def test_a_label_that_is_none_makes_its_row_nan_where_it_cannot_raise(
    exclude_label: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that may not be waited for."""
    monkeypatch.setattr("fastkd.functional.kd.check_labels", lambda *_: None)
    student, teacher, labels = logits(4, 5, dtype=torch.float32)
    labels[1], labels[2] = 5, -100
    leaf, bad = student.requires_grad_(), [False, True, True, False]
    for backend in ("reference", "blocked"):
        found: SoftTargetRows = soft_target_rows(
            leaf, teacher, 2.0, labels=labels, exclude_label=exclude_label, backend=backend
        )
        assert found.student_label[0].isnan().tolist() == found.teacher_label[0].isnan().tolist() == bad
    found.student_label.sum().backward()
    assert leaf.grad.isnan().any(dim=1).tolist() == bad


def test_without_labels_the_last_two_results_are_zero() -> None:
    student, teacher, _ = logits(4, 5)
    for backend in ("reference", "blocked"):
        found = soft_target_rows(student, teacher, backend=backend)
        assert not found.student_label.any()
        assert not found.teacher_label.any()


def test_cross_entropy_and_kd_of_one_read_are_those_of_the_fused_operation() -> None:
    student, teacher, labels = logits(6, 7)
    found = soft_target_rows(student, teacher, [1.0, 4.0], labels=labels)
    ce, kd = ce_kd_terms(student, teacher, labels, 4.0)
    assert_close(-found.student_label[0].mean(), ce, torch.float64)
    assert_close(16 * found.divergence[1].mean(), kd, torch.float64)
