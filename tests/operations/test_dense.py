"""Few rows on a CPU: the extension computes what Python does, bit for bit."""

import itertools

import pytest
import torch

from fastkd import native
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.backends.blocked import gemm
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense
from fastkd.backends.inputs import ContrastRows, DualRows
from fastkd.backends.masks import Mask
from tests.helpers.checks import embeddings

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
