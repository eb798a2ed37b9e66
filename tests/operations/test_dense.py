"""Few rows on a CPU: the extension computes what Python does, bit for bit."""

import itertools

import pytest
import torch

from fastkd import kd_loss, native
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.backends.blocked import gemm
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense
from fastkd.backends.blocked.dense import soft_target
from fastkd.backends.inputs import ContrastRows, DualRows
from fastkd.backends.masks import Mask
from tests.helpers.checks import assert_close, embeddings, logits, terms_and_gradient

SIDES = [None, (True, True), (True, False), (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 7, 200])
@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_the_extension_gives_the_bits_of_python(
    dtype: torch.dtype, n: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    units, inverse_norm = blocked.units(*embeddings(n, 64, dtype=dtype))
    w, k = torch.rand(2, n, dtype=dtype)
    for needs, is_swapped, linear in itertools.product(SIDES, (False, True), (gemm._LINEAR, None)):
        monkeypatch.setattr(gemm, "_LINEAR", linear)
        rows = DualRows(units, torch.tensor(scale, dtype=dtype), scale, n, False)
        arguments = rows, w, k, is_swapped, inverse_norm, needs
        *actual, gradients = dense.computed(*arguments)
        *expected, by_python = dense._computed(*arguments)
        assert len(gradients) == len(by_python) == (2 if needs else 0)
        for a, e in zip((*actual, *gradients), (*expected, *by_python), strict=True):
            assert torch.equal(a, e)


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
def test_the_extension_gives_the_bits_of_python_for_contrast(
    dtype: torch.dtype, n: int, N: int, scale: float, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = dense_contrast.extension()
    if native is None:
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
            for library in (native, None):
                monkeypatch.setattr(dense_contrast, "extension", lambda library=library: library)
                total, stats, gradients = dense_contrast.computed(rows, weight, 0.5, needs)
                assert len(gradients) == (3 if needs else 0)
                results.append((total, stats, *gradients))
            for a, e in zip(*results, strict=True):
                assert torch.equal(a.nan_to_num(), e.nan_to_num())
                assert torch.equal(a.isnan(), e.isnan())


def test_without_the_extension_python_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    units, inverse_norm = blocked.units(*embeddings(9, 8))
    rows = DualRows(units, torch.tensor(3.0, dtype=torch.float64), 3.0, 9, False)
    arguments = rows, *torch.rand(2, 9, dtype=torch.float64), False, inverse_norm, (True, True)
    expected = dense.computed(*arguments)
    monkeypatch.setattr(dense, "extension", lambda: None)
    assert torch.equal(dense.computed(*arguments)[3][0], expected[3][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("label_smoothing", [None, 0.0, 0.1])
def test_the_extension_gives_the_bits_of_python_for_logits(
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
        assert len(gradients) == len(by_python) == needs_grad * (1 if given is None else 2)
        for a, e in zip((*actual, *gradients), (*expected, *by_python), strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e)


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_label_that_is_none_makes_its_row_nan_among_few_logits(
    with_extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_extension:
        monkeypatch.setattr(soft_target, "extension", lambda: None)
    student, teacher, labels = logits(4, 5)
    labels[1], labels[2] = 5, -100
    ce, kd, (of_kd, of_ce) = soft_target.computed(0.25, True, student, teacher, labels, None, 3.0, 0.1)
    assert ce.isnan()
    assert kd.isfinite()
    assert of_kd.isfinite().all()
    assert of_ce.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("upstream", [(1.0, 1.0), (0.3, -2.0)])
def test_few_logits_give_what_blocks_of_them_give(
    upstream: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = logits(20, 9)
    inputs[0][:] += 1000
    options = {"label_smoothing": 0.1, "sample_weight": torch.rand(20, dtype=torch.float64), "backend": "blocked"}
    of_few = terms_and_gradient(*inputs, upstream, **options)
    monkeypatch.setattr(soft_target, "MAX_ELEMENTS", 0)
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
