"""Cross-entropy and KD in one operation, and what a row says; what holds of every operation is in test_contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import kd_loss, native
from fastkd.backends import reference
from fastkd.backends.blocked import soft_target_rows as blocked
from fastkd.functional.kd import SoftTargetRows, ce_kd_terms, soft_target_rows
from fastkd.ops.soft_target import soft_target, soft_target_backward
from tests.helpers.checks import (
    ROW_OPTIONS,
    assert_close,
    logits,
    relative_error,
    row_results,
    row_temperatures,
    terms_and_gradient,
)

BACKENDS = ("reference", "blocked")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_terms_are_torchs_cross_entropy_and_kd_loss(backend: str, label_smoothing: float) -> None:
    student, teacher, labels = logits(12, 7)
    options = {"temperature": 3.0, "label_smoothing": label_smoothing, "backend": backend}
    ce, kd, grad = terms_and_gradient(student, teacher, labels, (0.3, -2.0), **options)
    leaf = student.clone().requires_grad_()
    expected_ce = F.cross_entropy(leaf, labels, label_smoothing=label_smoothing)
    expected_kd = kd_loss(leaf, teacher, 3.0, backend="reference")
    (0.3 * expected_ce - 2.0 * expected_kd).backward()
    for actual, expected in ((ce, expected_ce), (kd, expected_kd), (grad, leaf.grad)):
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_low_precision_is_no_worse_than_torch(dtype: torch.dtype, offset: float) -> None:
    student, teacher, labels = logits(30, 10_000)  # more than one block of rows
    student, teacher = (student + offset).to(dtype), teacher.to(dtype)
    exact = terms_and_gradient(student.double(), teacher.double(), labels, backend="reference")
    torchs = terms_and_gradient(student, teacher, labels, backend="reference")
    actual = terms_and_gradient(student, teacher, labels, backend="blocked")
    assert [x.dtype for x in actual] == [torch.float32, torch.float32, dtype]
    for a, e, low, tolerance in zip(actual, exact, torchs, (torch.float32, torch.float32, dtype), strict=True):
        assert_close(a, e, tolerance, low)


@pytest.mark.parametrize("weighted", [True, False])
def test_absent_terms_are_zero_and_change_nothing(weighted: bool) -> None:
    student, teacher, labels = logits(9, 11)
    weight = torch.rand(9, dtype=torch.float64) if weighted else None
    one = torch.ones((), dtype=torch.float64)
    both = soft_target(student, teacher, labels, weight, 4.0, 0.1, "blocked")
    no_labels = soft_target(student, teacher, None, weight, 4.0, 0.0, "blocked")
    no_teacher = soft_target(student, None, labels, weight, 4.0, 0.1, "blocked")
    assert no_labels[0] == 0
    assert no_teacher[1] == 0
    assert torch.equal(no_labels[1], both[1])
    assert torch.equal(no_teacher[0], both[0])
    grads = [
        soft_target_backward(student, t, y, weight, stats, one, one, 4.0, 0.1, "blocked")
        for t, y, stats in ((teacher, labels, both[2]), (teacher, None, no_labels[2]), (None, labels, no_teacher[2]))
    ]
    assert_close(grads[0], grads[1] + grads[2], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("term", [0, 1])
def test_one_term_alone_gives_its_own_gradient(term: int, backend: str) -> None:
    student, teacher, labels = logits(6, 5)
    upstream = (1.0, 0.0) if term == 0 else (0.0, 1.0)
    expected = terms_and_gradient(student, teacher, labels, upstream, backend=backend)[2]
    leaf = student.requires_grad_()
    ce_kd_terms(leaf, teacher, labels, backend=backend)[term].backward()
    assert_close(leaf.grad, expected, torch.float64)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_for_kd_alone_leaves_the_cross_entropy(backend: str, weighted: bool, label_smoothing: float) -> None:
    student, teacher, labels = logits(6, 5)
    w, k = torch.rand(6, dtype=torch.float64) if weighted else torch.ones(6).double(), torch.arange(6).double()
    options = {"label_smoothing": label_smoothing, "backend": backend}
    weights = {"sample_weight": w if weighted else None, "kd_weight": k}
    ce, kd, grad = terms_and_gradient(student, teacher, labels, (0.3, -2.0), **weights, **options)
    leaf = student.clone().requires_grad_()
    expected_ce = ce_kd_terms(leaf, teacher, labels, sample_weight=w, **options)[0]
    expected_kd = kd_loss(leaf, teacher, sample_weight=w * k, backend="reference")
    (0.3 * expected_ce - 2.0 * expected_kd).backward()
    for actual, expected in ((ce, expected_ce), (kd, expected_kd), (grad, leaf.grad)):
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_classes_keep_the_cross_entropy_finite(backend: str) -> None:
    student, teacher, labels = logits(6, 5, dtype=torch.float32)
    student[:, 2] = -math.inf
    labels[labels == 2] = 3
    leaf = student.requires_grad_()
    ce, kd = ce_kd_terms(leaf, teacher, labels, backend=backend)
    assert ce.isfinite()
    assert not kd.isfinite()
    ce.backward()
    with_teacher_too = ce_kd_terms(student, teacher, labels, label_smoothing=0.1, backend=backend)
    assert not with_teacher_too[0].isfinite()


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_label_that_is_none_makes_its_row_nan_where_it_cannot_raise(label: int) -> None:
    """A device that may not be waited for."""
    student, teacher, labels = logits(4, 5, dtype=torch.float32)
    labels[1] = label
    assert reference.cross_entropy(student, labels).isnan().tolist() == [False, True, False, False]
    ce, kd, stats = soft_target(student, teacher, labels, None, 4.0, 0.0, "blocked")
    assert ce.isnan()
    assert kd.isfinite()
    one = torch.ones(())
    grad = soft_target_backward(student, teacher, labels, None, stats, one, one, 4.0, 0.0, "blocked")
    assert grad.isnan().any(dim=1).tolist() == [False, True, False, False]


# -- rows


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


@pytest.mark.parametrize("flags", ROW_OPTIONS, ids=str)
def test_the_definition_has_the_gradients_of_both_temperatures(flags: dict[str, bool]) -> None:
    student, teacher, labels = logits(3, 4)

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        of_student, of_teacher = x[1:]
        options = {"teacher_temperature": of_teacher, "labels": labels, "backend": "reference", **flags}
        found = soft_target_rows(x[0], teacher, of_student, **options)
        return found.divergence, found.student_label

    inputs = [x.requires_grad_() for x in (student, *row_temperatures(3))]
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", ROW_OPTIONS, ids=str)
@pytest.mark.parametrize(("n", "classes"), [(7, 3), (5, 2500)])
@pytest.mark.usefixtures("ways")
def test_equals_the_definition(n: int, classes: int, flags: dict[str, bool], dtype: torch.dtype) -> None:
    student, teacher, labels = logits(n, classes, dtype=dtype)
    T = row_temperatures(n)
    exact = row_results(student.double(), teacher.double(), labels, T, backend="reference", **flags)
    low = row_results(student, teacher, labels, T, backend="reference", **flags)
    actual = row_results(student, teacher, labels, T, backend="blocked", **flags)
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
@pytest.mark.parametrize("flags", ROW_OPTIONS, ids=str)
@pytest.mark.usefixtures("ways")
def test_constant_tiny_and_huge_logits_are_finite(scale: float, flags: dict[str, bool]) -> None:
    student, teacher, labels = logits(5, 40, dtype=torch.float32)
    T = torch.full((5,), 2.0)
    found = row_results(scale * student + 1, scale * teacher, labels, (T, T), backend="blocked", **flags)
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
def test_a_label_that_is_none_makes_its_row_nan_where_it_cannot_raise_in_rows(
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
