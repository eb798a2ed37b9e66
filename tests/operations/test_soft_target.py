"""Cross-entropy and KD in one operation; what holds of every operation is in test_contract."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastkd import kd_loss
from fastkd.backends import reference
from fastkd.functional.kd import ce_kd_terms
from fastkd.ops.soft_target import soft_target, soft_target_backward
from tests.helpers.checks import assert_close, logits, terms_and_gradient

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
