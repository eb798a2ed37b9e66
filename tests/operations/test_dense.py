"""Few rows on a CPU: the extension's loops compute what torch's operations do."""

import itertools
import math

import pytest
import torch

from fastkd import dcd_loss, info_nce_loss, kd_loss, native
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import dense as few_rows
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.backends.blocked import gemm, sums, tiles
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense
from fastkd.backends.blocked.dense import soft_target
from fastkd.backends.inputs import ContrastRows, DualRows
from fastkd.backends.masks import Mask
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import (
    assert_close,
    embeddings,
    logits,
    relative_error,
    terms_and_gradient,
    value_and_grads,
)

SIDES = [None, (True, True), (True, False), (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 7, 200])
@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_the_extension_computes_what_python_does(
    dtype: torch.dtype, n: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    units, inverse_norm = blocked.units(*embeddings(n, 64, dtype=dtype))
    for needs, is_swapped, linear, weight in itertools.product(
        SIDES, (False, True), (gemm._LINEAR, None), (None, torch.rand(n))
    ):
        monkeypatch.setattr(gemm, "_LINEAR", linear)
        results = []
        for library, kind in ((native.extension(), dtype), (None, dtype), (None, torch.float64)):
            monkeypatch.setattr(dense, "loops", lambda _, library=library: library)
            rows = DualRows(units.to(kind), torch.tensor(scale, dtype=kind), scale, n, False)
            *found, gradients = dense.computed(rows, weight, (0.5, 0.3), is_swapped, inverse_norm.to(kind), needs)
            assert len(gradients) == (3 if needs else 0)
            results.append((*found, *gradients))
        for a, by_python, exact in zip(*results, strict=True):
            # The scale's gradient is a sum of both signs, which can come out near 0.
            assert_close(a, exact, dtype, by_python, floor=1e-5 if a.ndim else 1.0)


def _masks(n: int, N: int, is_self: bool) -> list[Mask]:
    """All that queries can be contrasted with."""
    query_labels, key_labels, index = torch.arange(n) % 4, torch.arange(N) % 5, (torch.arange(n) * 3 + 1) % N
    labels = {"query_labels": query_labels, "key_labels": query_labels if is_self else key_labels}
    masks = [Mask(**labels, by_label=True, exclude_self=is_self)]
    for indices in [{"positive_index": index}, {}] if n == N else [{"positive_index": index}]:
        masks += [Mask(**indices, **options, exclude_self=is_self) for options in [{}, labels]]
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "N"), [(1, 1), (7, 5), (160, 160), (120, 200)])
@pytest.mark.parametrize("scale", [5.0, 60.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_extension_computes_what_python_does_for_contrast(
    dtype: torch.dtype, n: int, N: int, scale: float, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    scale_tensor = torch.tensor(scale, dtype=dtype)
    (q, inverse_q), (k, inverse_k) = blocked_contrast.rows(
        (torch.randn(n, 64, dtype=dtype), torch.randn(N, 64, dtype=dtype)), normalize
    )
    for linear, is_self, needs in itertools.product((gemm._LINEAR, None), (False, True), SIDES):
        monkeypatch.setattr(gemm, "_LINEAR", linear)
        for mask, weight in itertools.product(_masks(n, n if is_self else N, is_self), (None, torch.rand(n))):
            keys, norms = (None, (inverse_q, inverse_q)) if is_self else (k, (inverse_q, inverse_k))
            columns = n if is_self else N
            rows = ContrastRows(q, keys, scale_tensor, mask, normalize, columns, False, norms, needs)
            results = []
            for library in (native.extension(), None):
                monkeypatch.setattr(dense_contrast, "loops", lambda _, library=library: library)
                total, stats, gradients = dense_contrast.computed(rows, weight, 0.5, needs)
                assert len(gradients) == (3 if needs else 0)
                results.append((total, stats, *gradients))
            for a, e in zip(*results, strict=True):
                assert torch.equal(a.isnan(), e.isnan())
                # A query with its label's keys alone loses rounding; the scale's gradient can come out near 0.
                assert_close(a.nan_to_num(), e.nan_to_num(), dtype, floor=1.0 if mask.by_label or a.ndim == 0 else 1e-5)


def test_the_loops_serve_few_elements_or_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: "the extension")
    for threads, elements, serve in ((1, 1 << 20, True), (64, few_rows.MAX_LOOP, True), (64, 1 << 20, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert few_rows.loops(elements) == ("the extension" if serve else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_rows_of_the_extension_are_those_of_python(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, one_column = torch.randn(2, 9, 40, dtype=dtype), torch.randn(2, 9, 1, dtype=dtype)
    with_zero, huge = plain.clone(), plain * 1e25
    with_zero[0, 3] = 0
    for sides in (plain, one_column, with_zero, huge, plain.transpose(1, 2)):
        found = sums.unit_rows_of(tuple(sides))
        with monkeypatch.context() as patches:
            patches.setattr(sums, "extension", lambda: None)
            for a, e in zip(found, sums.unit_rows_of(tuple(sides)), strict=True):
                assert_close(a, e, dtype)
    units, _ = sums.unit_rows_of(tuple(one_column))
    assert torch.equal(units.abs(), torch.ones_like(units))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_extension_computes_a_pair_of_tiles_as_python_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(dense, "MAX_ROWS", 0)
    monkeypatch.setattr(tiles, "MAX_ROWS", 30)
    inputs = *embeddings(100, 24, dtype=dtype), torch.tensor(9.0, dtype=dtype)
    results = []
    for library in (native.extension(), None):
        monkeypatch.setattr(blocked, "extension", lambda library=library: library)
        results.append(value_and_grads(lambda *x: dcd_loss(*x, alpha=0.7, backend="blocked"), *inputs))
    for a, e in zip(*results, strict=True):
        assert_close(a, e, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("label_smoothing", [None, 0.0, 0.1])
def test_the_extension_computes_what_python_does_for_logits(
    dtype: torch.dtype, weighted: bool, label_smoothing: float | None
) -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    student, teacher, labels = logits(33, 70, dtype=dtype)
    given = None if label_smoothing is None else labels
    weight = torch.rand(33) if weighted else None
    for needs_grad in (False, True):
        arguments = student, teacher, given, weight, 3.0, label_smoothing or 0.0
        *actual, gradients = soft_target.computed(1 / 33, needs_grad, *arguments)
        *expected, by_python = soft_target._computed(*arguments, 1 / 33, needs_grad)
        assert len(gradients) == needs_grad * (1 if given is None else 2)
        for a, e in zip((*actual, *gradients), (*expected, *by_python), strict=True):
            assert a.dtype == e.dtype
            assert_close(a, e, e.dtype)


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_label_that_is_none_makes_its_row_nan_among_few_logits(
    with_extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_extension:
        monkeypatch.setattr(soft_target, "loops", lambda _: None)
    student, teacher, labels = logits(4, 5)
    labels[1], labels[2] = 5, -100
    ce, kd, (of_kd, of_ce) = soft_target.computed(0.25, True, student, teacher, labels, None, 3.0, 0.1)
    assert ce.isnan()
    assert kd.isfinite()
    assert of_kd.isfinite().all()
    assert of_ce.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_loss_too_large_for_float32_is_infinite(with_extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_extension:
        monkeypatch.setattr(native, "extension", lambda: None)
    student, teacher, labels = logits(6, 5, dtype=torch.float32)
    labels[:], weight = student.argmin(dim=1), torch.full((6,), 3e38)
    for loss in (
        *ce_kd_terms(1e37 * student, 1e37 * teacher, labels, sample_weight=weight, backend="blocked"),
        info_nce_loss(student, -student, 30.0, sample_weight=weight, backend="blocked"),
        dcd_loss(student, teacher, 30.0, alpha=1e300, backend="blocked"),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == math.inf
    for covers in (soft_target.covers, lambda *_: False):
        monkeypatch.setattr(soft_target, "covers", covers)
        ce = ce_kd_terms(3e38 + 0 * student, teacher, labels, label_smoothing=0.5, backend="blocked")[0]
        assert ce.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_gradient_that_has_vanished_is_zero_for_short_rows_and_a_large_scale(
    with_extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_extension:
        monkeypatch.setattr(native, "extension", lambda: None)
    query = 1e-9 * embeddings(8, 4, dtype=torch.float32)[0]
    for grad in value_and_grads(lambda *x: info_nce_loss(*x, 1e32, backend="blocked"), query, query):
        assert not grad.any()


@pytest.mark.parametrize("with_extension", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_kd_of_logits_that_almost_agree_keeps_its_digits(
    with_extension: bool, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_extension:
        monkeypatch.setattr(native, "extension", lambda: None)
    student, teacher, _ = logits(32, 500, dtype=torch.float32)
    student = teacher + 0.01 * sign * student
    loss, expected = (
        kd_loss(x, t, 20.0, backend=backend)
        for x, t, backend in ((student, teacher, "blocked"), (student.double(), teacher.double(), "reference"))
    )
    assert relative_error(loss, expected) < 2e-3  # the difference of two logarithms would leave 1e-2
    # One power of the student's, and 50000 of the teacher's.
    flat, peak = torch.zeros(1, 50000), 30 * torch.eye(1, 50000)
    expected = kd_loss(peak.double(), flat.double(), 1.0, backend="reference")
    assert_close(kd_loss(peak, flat, 1.0, backend="blocked"), expected, torch.float32)


@pytest.mark.parametrize("upstream", [(1.0, 1.0), (0.3, -2.0)])
def test_few_logits_give_what_blocks_of_them_give(
    upstream: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = logits(20, 9)
    inputs[0][:] += 1000
    options = {"label_smoothing": 0.1, "sample_weight": torch.rand(20, dtype=torch.float64), "backend": "blocked"}
    of_few = terms_and_gradient(*inputs, upstream, **options)
    monkeypatch.setattr(soft_target, "covers", lambda *_: False)
    for actual, expected in zip(of_few, terms_and_gradient(*inputs, upstream, **options), strict=True):
        assert_close(actual, expected, torch.float64)


def test_few_logits_compute_no_gradient_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs, computed = [], soft_target.computed
    monkeypatch.setattr(soft_target, "computed", lambda *inputs: (needs.append(inputs[1]), computed(*inputs))[1])
    student, teacher, _ = logits(4, 5)
    kd_loss(student, teacher, backend="blocked")
    leaf = student.requires_grad_()
    with torch.no_grad():
        kd_loss(leaf, teacher, backend="blocked")
    loss = kd_loss(leaf, teacher, backend="blocked")
    assert needs == [False, False, True]
    first, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
