"""What holds of every operation, whichever backend computes it."""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.checks import assert_close, poison_empty_tensors, relative_error, value_and_grads
from tests.helpers.contract import OPERATION_ALONE, OPERATIONS, Case, Size

LOW = (torch.float32, torch.float16, torch.bfloat16)
UNSCALED = ("kd", "ce and kd", "rows", "ckd", "pool", "pool of unit rows")
SCALED = [name for name in OPERATIONS if name not in UNSCALED]
UNIT = [name for name in SCALED if not name.startswith("raw")]
BY_INDEX = [name for name in UNIT if name.startswith(("dcd", "index", "given", "masked"))]
WEIGHTED = [name for name in OPERATIONS if not name.startswith("pool")]

every_operation = pytest.mark.parametrize("name", OPERATIONS)
# The kernels need a GPU, or float32 and Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
STREAMING = ["blocked", *([pytest.param("triton", marks=pytest.mark.gpu)] if has_triton else [])]
every_streaming_backend = pytest.mark.parametrize("backend", STREAMING)
every_backend = pytest.mark.parametrize("backend", ["reference", *STREAMING])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def case_for(backend: str, name: str, **size: Any) -> Case:
    """In float64 where the backend computes it, unless ``size`` says otherwise."""
    if backend == "triton":
        size = {"dtype": torch.float32, "device": DEVICE, **size}
        if size["dtype"] == torch.bfloat16 and DEVICE == "cpu":
            pytest.skip("the interpreter multiplies bfloat16 wrongly")
    return OPERATIONS[name](Size(**size))


@every_operation
def test_the_definition_passes_gradcheck(name: str) -> None:
    case = OPERATIONS[name](Size(n=6, N=4, D=3, scale=2.0, weight=torch.rand(6, dtype=torch.float64)))
    grads = case.exact()[1:]
    assert all(bool(grad.any()) != (index in case.frozen) for index, grad in enumerate(grads))
    inputs = [x.requires_grad_(index not in case.frozen) for index, x in enumerate(case.inputs)]
    assert torch.autograd.gradcheck(lambda *x: case.compute("reference", *x), inputs)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("n", "N", "D", "scale"), [(2, 3, 1, 3.0), (65, 20, 33, 10.0), slow(530, 65, 128, 10.0), slow(100, 600, 300, 100.0)]
)
@every_operation
@every_streaming_backend
def test_low_precision_is_no_worse_than_torch(
    backend: str, name: str, n: int, N: int, D: int, scale: float, dtype: torch.dtype
) -> None:
    scale = scale / 10 if name.startswith("raw") else scale
    case = case_for(backend, name, n=n, N=N, D=D, scale=scale, dtype=dtype)
    # By label, a loss is a difference: the one that cancels here is zero in exact arithmetic.
    case.check(backend, 0.5 if "label" in name and n == 2 else 1e-5)


@pytest.mark.parametrize(("scale", "noise"), [(10.0, 0.05), (1 / 0.07, 0.05), (39.0, 1.0), (41.0, 1.0)])
@pytest.mark.parametrize(("n", "N"), [(256, 300), (1100, 600)])
@pytest.mark.parametrize("name", BY_INDEX)
def test_gradients_keep_their_digits_where_the_loss_has_almost_vanished(
    name: str, n: int, N: int, scale: float, noise: float
) -> None:
    case = OPERATIONS[name](Size(n=n, N=N, D=128, scale=scale, noise=noise, dtype=torch.float32))
    # A logit's rounding is relative to its size, and becomes the exponential's relative error. Plain float32 code loses
    # p_ii - 1 in rounding here: its error is up to ten thousand times as large.
    allowed = 8 * scale * torch.finfo(torch.float32).eps
    for a, e in zip(case.results("blocked"), case.exact(), strict=True):
        assert relative_error(a, e, floor=1e-30) < allowed


@every_operation
def test_sliced_and_transposed_inputs_give_the_same(name: str) -> None:
    case = OPERATIONS[name](Size(n=40, N=24))
    leaves, views = [], []
    for x in case.inputs:
        leaf = x.new_zeros([size + 3 for size in x.shape[:0:-1]] + [2 * x.shape[0]]) if x.ndim else x.clone()
        view = leaf.requires_grad_()
        if x.ndim:
            view = leaf.permute(*range(x.ndim)[::-1])[(slice(None, None, 2), *[slice(3, None)] * (x.ndim - 1))]
            view.data.copy_(x)
            assert not view.is_contiguous()
        leaves.append(leaf)
        views.append(view)
    value = case.compute("blocked", *views)
    grads = torch.autograd.grad(value, views, materialize_grads=True)
    for a, e in zip((value, *grads), case.exact(), strict=True):
        assert_close(a, e, torch.float64)


@pytest.mark.parametrize("name", WEIGHTED)
def test_per_sample_weights_are_the_weighted_gradients_of_single_rows(name: str) -> None:
    weight = torch.tensor([0.0, 2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64)
    total, *parts = (
        OPERATIONS[name](Size(n=6, N=4, D=5, weight=w)).results("blocked") for w in (weight, *torch.eye(6).double())
    )
    assert total[0] != 0
    for index, value in enumerate(total):
        assert_close(value, sum(w * part[index] for w, part in zip(weight, parts, strict=True)), torch.float64)


@every_operation
@every_streaming_backend
def test_frozen_inputs_get_no_gradient_and_change_nothing(backend: str, name: str) -> None:
    case = case_for(backend, name)
    full = case.results(backend)
    for wanted in range(len(case.inputs)):
        inputs = [x.clone().requires_grad_(index == wanted) for index, x in enumerate(case.inputs)]
        value = case.compute(backend, *inputs)
        if wanted in case.frozen:
            assert not value.requires_grad
            continue
        value.backward()
        assert_close(inputs[wanted].grad, full[1 + wanted], case.inputs[0].dtype)
        assert all(x.grad is None for index, x in enumerate(inputs) if index != wanted)


@every_backend
@every_operation
def test_inputs_are_left_bitwise_unchanged(name: str, backend: str) -> None:
    weight = torch.rand(600, device=DEVICE if backend == "triton" else "cpu")
    case = case_for(backend, name, n=600, N=530, D=8, weight=weight, dtype=torch.float32)
    given = [*case.inputs, *case.constants, weight]
    before = [x.clone() for x in given]
    leaves = [x.requires_grad_(index not in case.frozen) for index, x in enumerate(case.inputs)]
    case.compute(backend, *leaves).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("scale", [3.0, 100.0])
@every_operation
def test_every_element_of_an_empty_tensor_is_written(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = OPERATIONS[name](Size(n=530, N=600, D=7, scale=scale))
    expected = case.results("blocked")
    poison_empty_tensors(monkeypatch)
    actual = case.results("blocked")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_operation
@every_streaming_backend
def test_the_same_inputs_give_the_same_bits(backend: str, name: str) -> None:
    case = case_for(backend, name, n=1100, N=600, D=24, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(case.results(backend), case.results(backend), strict=True))


def hard_rows(rows: Tensor, other: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    zero = rows.clone()
    zero[[0, 4]] = 0
    return {
        "zero rows": (zero, other),
        "all zero": (torch.zeros_like(rows), torch.zeros_like(other)),
        "huge": (rows * 1e30, other * 1e30),
        "tiny": (rows * 1e-10, other * 1e-10),
        "identical": (rows[:1].expand_as(rows).clone(), other[:1].expand_as(other).clone()),
        "equal": (other, other.clone()),
        "opposite": (other, -other),
    }


@every_backend
@pytest.mark.parametrize("scale", [1e-9, 1.0, 10.0, 100.0, 3000.0])
@pytest.mark.parametrize("name", [*UNIT, "ckd"])
def test_hard_inputs_give_finite_losses_and_gradients(name: str, scale: float, backend: str) -> None:
    case = case_for(backend, name, n=9, N=9, scale=scale, dtype=torch.float32)
    rows = [x for x in case.inputs if x.ndim]
    for what, hard in hard_rows(rows[0], rows[-1]).items():
        results = case.results(backend, *hard[: len(rows)], *case.inputs[len(rows) :])
        assert all(x.isfinite().all() for x in results), what


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [5.0, 100.0])
@every_operation
def test_non_finite_inputs_give_a_non_finite_loss(name: str, scale: float, bad: float, backend: str) -> None:
    case = case_for(backend, name, n=600, N=700, scale=scale, dtype=torch.float32)
    for index, x in enumerate(case.inputs):
        if x.ndim == 0 and bad < 0:
            continue
        inputs = [y.clone() for y in case.inputs]
        inputs[index].view(-1)[x.numel() * 11 // 12] = bad
        assert not case.compute(backend, *inputs).isfinite(), index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_operation
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    case = OPERATIONS[name](Size(dtype=torch.float32))
    expected = case.results("blocked")
    with torch.autocast("cpu", dtype=dtype):
        actual = case.results("blocked")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name.removeprefix("raw ") not in OPERATION_ALONE])
def test_forward_mode_raises_instead_of_giving_a_zero_tangent(name: str) -> None:
    case = OPERATIONS[name](Size(n=6, N=4))
    first, *others = case.inputs
    tangent = torch.arange(first.numel()).view(first.shape).double().sin()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation: use backend='reference'"):
        torch.func.jvp(lambda x: case.compute("blocked", x, *others), (first,), (tangent,))
    with pytest.raises(NotImplementedError, match=r"torch\.func and .*: use backend='reference'"):
        torch.func.grad(lambda x: case.compute("blocked", x, *others))(first)
    _, derivative = torch.func.jvp(lambda x: case.compute("reference", x, *others), (first,), (tangent,))
    assert derivative.abs() > 0


@every_operation
def test_a_second_derivative_is_refused_instead_of_being_zero(name: str) -> None:
    case = OPERATIONS[name](Size(n=6, N=4))
    for backend in ("reference", "blocked"):
        first = case.inputs[0].clone().requires_grad_()
        value = case.compute(backend, first, *case.inputs[1:])
        (grad,) = torch.autograd.grad(value.square(), first, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(grad.square().sum(), first)[0].any()
        else:
            for penalised in (grad.square().sum(), grad.square().sum() + value):
                with pytest.raises(RuntimeError, match=r"differentiated again|no autograd formula"):
                    torch.autograd.grad(penalised, first, retain_graph=True)


@pytest.mark.parametrize("backend", [slow("reference"), "blocked"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if not name.startswith("raw")])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    torch.compiler.reset()
    case = OPERATIONS[name](Size(weight=torch.rand(20), dtype=torch.float32))
    compiled = torch.compile(case.compute, fullgraph=True, backend="aot_eager")
    expected = case.results(backend)
    for a, e in zip(value_and_grads(lambda *x: compiled(backend, *x), *case.inputs), expected, strict=True):
        assert_close(a, e, torch.float32)
