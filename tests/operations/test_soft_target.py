"""Cross-entropy and KD in one operation: the definition against torch, the streaming backend against the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import kd_loss
from fastkd.backends import reference
from fastkd.backends.blocked import soft_target as blocked_soft_target
from fastkd.functional.kd import ce_kd_terms
from fastkd.ops.soft_target import soft_target, soft_target_backward
from tests.helpers.checks import assert_close, logits, relative_error, terms_and_gradient

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


def test_cross_entropy_passes_gradcheck() -> None:
    student, _, labels = logits(4, 5)
    assert torch.autograd.gradcheck(lambda x: reference.cross_entropy(x, labels, 0.2), (student.requires_grad_(),))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.sampled_from([1, 2, 10, 100, 1000]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    upstream=st.sampled_from([(1.0, 1.0), (0.0, 1.0), (1e4, 0.0), (-0.3, 2.0)]),
    block=st.sampled_from([64, 3000, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_blocked_equals_the_definition(
    n: int, classes: int, temperature: float, label_smoothing: float, weighted: bool,
    upstream: tuple[float, float], block: int, seed: int,
) -> None:  # fmt: skip
    inputs = logits(n, classes, seed)
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) if weighted else None
    options = {"temperature": temperature, "label_smoothing": label_smoothing, "sample_weight": weight}
    expected = terms_and_gradient(*inputs, upstream, backend="reference", **options)
    original, blocked_soft_target.BLOCK_ELEMENTS = blocked_soft_target.BLOCK_ELEMENTS, block
    try:
        actual = terms_and_gradient(*inputs, upstream, backend="blocked", **options)
    finally:
        blocked_soft_target.BLOCK_ELEMENTS = original
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_low_precision_is_no_worse_than_torch(dtype: torch.dtype, offset: float) -> None:
    student, teacher, labels = logits(30, 100)
    student, teacher = (student + offset).to(dtype), teacher.to(dtype)
    exact = terms_and_gradient(student.double(), teacher.double(), labels, backend="reference")
    torchs = terms_and_gradient(student, teacher, labels, backend="reference")
    ce, kd, grad = terms_and_gradient(student, teacher, labels, backend="blocked")
    assert ce.dtype == kd.dtype == torch.float32
    assert grad.dtype == dtype
    assert_close(ce, exact[0], torch.float32, torchs[0])
    assert_close(kd, exact[1], torch.float32, torchs[1])
    assert_close(grad, exact[2], dtype, torchs[2])


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
def test_a_label_that_is_none_raises_or_is_nan(label: int) -> None:
    student, teacher, labels = logits(4, 5, dtype=torch.float32)
    labels[1] = label
    with pytest.raises(ValueError, match=rf"labels: got {label}, expected class indices in \[0, 5\)"):
        ce_kd_terms(student, teacher, labels)
    # What a device that may not be waited for gets.
    assert reference.cross_entropy(student, labels).isnan().tolist() == [False, True, False, False]
    ce, kd, stats = soft_target(student, teacher, labels, None, 4.0, 0.0, "blocked")
    assert ce.isnan()
    assert kd.isfinite()
    one = torch.ones(())
    grad = soft_target_backward(student, teacher, labels, None, stats, one, one, 4.0, 0.0, "blocked")
    assert grad.isnan().any(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels: got list, expected a torch.Tensor"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got torch.float32, expected int64"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"labels: got shape \[4, 1\], expected \[4\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels: got device meta"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing: got 1.1, expected a finite number >= 0 and <= 1"),
        ({"label_smoothing": True}, TypeError, "label_smoothing: got True"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"teacher_logits": torch.zeros(4, 6)}, ValueError, r"teacher_logits: got shape \[4, 6\]"),
        ({"sample_weight": -torch.ones(4)}, ValueError, "sample_weight: got -1.0"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    student, teacher, labels = logits(4, 5, dtype=torch.float32)
    with pytest.raises(error, match=message):
        ce_kd_terms(**{"student_logits": student, "teacher_logits": teacher, "labels": labels} | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_and_ignores_autocast(backend: str) -> None:
    torch.compiler.reset()
    student, teacher, labels = logits(8, 5, dtype=torch.float32)
    expected = terms_and_gradient(student, teacher, labels, (0.5, 2.0), backend=backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(x: Tensor) -> Tensor:
        ce, kd = ce_kd_terms(x, teacher, labels, backend=backend)
        return 0.5 * ce + 2.0 * kd

    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = total(leaf)
    value.backward()
    assert relative_error(value, 0.5 * expected[0] + 2.0 * expected[1]) < 1e-6
    assert relative_error(leaf.grad, expected[2]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_bitwise_unchanged(backend: str) -> None:
    student, teacher, labels = logits(20, 9, dtype=torch.float32)
    weight = torch.rand(20)
    inputs = student.requires_grad_(), teacher, labels, weight
    before = [x.detach().clone() for x in inputs]
    sum(ce_kd_terms(student, teacher, labels, sample_weight=weight, backend=backend)).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before, strict=True))
