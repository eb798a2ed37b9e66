"""Few rows on a CPU: the extension computes what Python does, bit for bit."""

import itertools

import pytest
import torch

from fastkd import native
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.backends.blocked import gemm
from fastkd.backends.blocked.dense import dual_softmax as dense
from fastkd.backends.inputs import DualRows
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


def test_without_the_extension_python_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    units, inverse_norm = blocked.units(*embeddings(9, 8))
    rows = DualRows(units, torch.tensor(3.0, dtype=torch.float64), 3.0, 9, False)
    arguments = rows, *torch.rand(2, 9, dtype=torch.float64), False, inverse_norm, (True, True)
    expected = dense.computed(*arguments)
    monkeypatch.setattr(dense, "extension", lambda: None)
    assert torch.equal(dense.computed(*arguments)[3][0], expected[3][0])
