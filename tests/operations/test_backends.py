"""The streaming backend against the float64 definition on random sizes, and in bounded memory."""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import dcd_loss
from tests.helpers.checks import assert_close, embeddings, value_and_grads
from tests.helpers.contract import OPERATIONS, Size, always_in_tiles

# Either side of a tile's edge, one row, one column, widths that are no multiple of 8.
ROWS = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 600, 1023, 1025, 1100]))
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([128, 131, 300]))
SCALES = st.sampled_from([0.05, 2.7, 10.0, 39.0, 41.0, 100.0])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(OPERATIONS)),
    n=ROWS,
    N=ROWS,
    D=WIDTHS,
    scale=SCALES,
    weighted=st.booleans(),
    tiled=st.booleans(),
    upstream=st.sampled_from([1.0, -0.37, 1e4]),
    seed=st.integers(0, 99),
)
@example(name="raw given index", n=1, N=2, D=1, scale=39.0, weighted=False, tiled=False, upstream=1.0, seed=0)
def test_float64_equals_the_definition(
    name: str, n: int, N: int, D: int, scale: float, weighted: bool, tiled: bool, upstream: float, seed: int
) -> None:
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) if weighted else None
    case = OPERATIONS[name](Size(n=n, N=N, D=D, scale=scale, weight=weight, seed=seed))
    with always_in_tiles() if tiled else contextlib.nullcontext():
        value, *grads = case.results("blocked", upstream=upstream)
    exact = case.exact(upstream)
    # A loss is a difference of logits: where it cancels, the definition's error is relative to them. So is that of a
    # probability, by which its gradients multiply the scale: at scale 39 and logits of 75, 2e-16 * 75 * 39 = 6e-13.
    assert_close(value, exact[0], torch.float64, floor=1e-3 * case.largest)
    floor = 1e-5 * max(1.0, abs(upstream)) * max(1.0, case.largest) * max(1.0, scale)
    for a, e in zip(grads, exact[1:], strict=True):
        assert_close(a, e, torch.float64, floor=floor)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_zero_rows_get_no_gradient_in_half_precision(backend: str) -> None:
    student, teacher = embeddings(9, 6, dtype=torch.float16)
    student[3] = 0
    _, grad, *_ = value_and_grads(
        lambda *x: dcd_loss(*x, alpha=0.5, backend=backend), student, teacher, torch.tensor(5.0), upstream=65536.0
    )
    assert grad.isfinite().all()
    assert grad[3].abs().max() == 0
    assert grad[4].abs().max() > 0


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns, also inside a custom one."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = torch._library.custom_ops._maybe_get_opdef(func)
        if operation is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = operation._init_fn(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("scale", [5.0, pytest.param(100.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if not name.startswith("raw")])
def test_no_tensor_grows_with_the_number_of_pairs(name: str, scale: float) -> None:
    case = OPERATIONS[name](Size(n=4096, N=3000, D=16, scale=scale, dtype=torch.float32))
    leaves = [x.requires_grad_(index not in case.frozen) for index, x in enumerate(case.inputs)]
    with LargestTensor() as largest:
        case.compute("blocked", *leaves).backward()
    assert max(x.numel() for x in leaves) <= largest.elements <= 1 << 20  # four tiles of 512 x 512
