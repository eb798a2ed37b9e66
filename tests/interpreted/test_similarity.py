"""What holds of ``dual_softmax`` and ``contrast`` alike: every direction, scale and mask, on small tiles."""

import math

import pytest
import torch
from fastkd.kernels import tiles
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.dual_softmax import streaming as dual_softmax
from torch import Tensor

from fastkd.backends.triton import contrast as contrast_backend
from fastkd.backends.triton import dual_softmax as dual_softmax_backend
from fastkd.backends.triton import rows as rows_backend
from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, check_against_definition
from tests.helpers.contrast_cases import problem as contrast_problem
from tests.helpers.dual_cases import DUAL_MODES, any_problem, dual_problem

LOW = (torch.float32, torch.float16)
WEIGHT = torch.tensor([0.0, 5.0, 1.0])
# One column, either side of a 16-row tile's edge, widths that are no multiple of 8 or 16.
DUAL_SHAPES = [(2, 1), (3, 5), (15, 16), (17, 20), (35, 40)]
SHAPES = [(2, 2, 1), (15, 15, 5), (17, 17, 40), (35, 35, 20), (1, 40, 7), (33, 2, 8)]
DUAL_CASES = [(mode, n, n, d, dtype, "streaming") for mode in DUAL_MODES for n, d in DUAL_SHAPES for dtype in LOW]
# The dtypes alternate: every mode meets both, every shape both on either route.
CONTRAST_CASES = [
    (mode, *shape, LOW[(turn + number) % 2], route)
    for turn, (mode, (*_, is_self)) in enumerate(MODES.items())
    for number, shape in enumerate(SHAPES)
    for route in ("streaming", "wide")
    if shape[0] == shape[1] or not (is_self or mode in NEEDS_PAIRS)
]


@pytest.mark.parametrize("kernel", [dual_softmax.forward_kernel, contrast.forward_kernel])
def test_the_kernels_are_interpreted(kernel: object) -> None:
    """What follows would also hold for a backend that fell back to another: these kernels must have run."""
    assert type(kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize(
    ("mode", "n", "N", "d", "dtype", "route"), DUAL_CASES + CONTRAST_CASES, ids=str, indirect=["route"]
)
def test_value_and_gradients(
    mode: str, n: int, N: int, d: int, dtype: torch.dtype, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if d == 40:
        monkeypatch.setattr("fastkd.kernels.normalize.BLOCK_ELEMENTS", 32)  # a row is several pieces
    check_against_definition(any_problem(mode, n, d, dtype) if n == N else contrast_problem(mode, n, N, d, dtype))


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        *((mode, dtype) for mode in DUAL_MODES if "online" in mode for dtype in LOW),
        *((mode, torch.float32) for mode in ("index", "masked, given index", "label", "self label")),
    ],
    ids=str,
)
def test_a_scale_that_needs_the_running_maximum(mode: str, dtype: torch.dtype, route: str) -> None:
    # exp(120) overflows float32. Few dimensions, so that the softmax does not saturate.
    check_against_definition(any_problem(mode, 50 if mode in DUAL_MODES else 35, 6, dtype, scale=120.0))


@pytest.mark.parametrize("mode", ["dcd bounded", "index"])
def test_wide_rows_go_through_matrix_products(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for streaming in (dual_softmax, contrast):
        monkeypatch.setattr(streaming, "running_statistics", None)
        monkeypatch.setattr(streaming, "gradient_sums", None)
    check_against_definition(any_problem(mode, 35, 300, torch.float16))


@pytest.mark.parametrize(
    ("mode", "d"),
    [("dcd bounded", 1), ("dcd bounded", 20), ("dcd online", 1), ("dcd online", 20), ("index", 20), ("self label", 20)],
)
def test_one_row_has_no_negatives(mode: str, d: int, route: str) -> None:
    p = any_problem(mode, 1, d)
    # Zero but for the rounding of numbers near the scale.
    assert all(x.abs().max() <= 1e-5 for x in value_and_grads(p.kernel, *p.inputs))


@pytest.mark.parametrize(("mode", "dtype"), [(mode, dtype) for mode in DUAL_MODES for dtype in LOW], ids=str)
def test_weights_and_upstream_of_dual_softmax(mode: str, dtype: torch.dtype, route: str) -> None:
    p = dual_problem(mode, 35, 20, dtype, scale=8.0, weight=WEIGHT.repeat(12)[:35], alpha=2.0)
    check_against_definition(p, upstream=-37.0)


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_upstream_of_contrast(mode: str) -> None:
    check_against_definition(contrast_problem(mode, 18, 18, 20, weight=WEIGHT.repeat(6)), upstream=-37.0)


@pytest.mark.parametrize("mode", ["dcd bounded", "self label"])
def test_weights_far_above_one_do_not_overflow_half_precision(mode: str) -> None:
    weight = torch.tensor([0.0, 1e4, 1.0]).repeat(12)[:35]
    check_against_definition(any_problem(mode, 35, 20, torch.float16, scale=8.0, weight=weight))


@pytest.mark.parametrize("upstream", [0.0, 1e-6, 1e4])
@pytest.mark.parametrize("mode", ["dcd bounded", "index"])
def test_small_and_large_upstream_gradients_survive_half_precision(mode: str, upstream: float) -> None:
    p = any_problem(mode, 40 if mode in DUAL_MODES else 20, 16, torch.float16)
    one, other = value_and_grads(p.kernel, *p.inputs), value_and_grads(p.kernel, *p.inputs, upstream=upstream)
    assert other[3].item() == pytest.approx(upstream * one[3].item(), rel=1e-4)
    # fp16 gradients of 1e-8 are subnormal: compare where the output format can hold them.
    for a, b in zip(other[1:3], one[1:3], strict=True):
        if upstream > 1:
            assert_close(a, (upstream * b.double()).half(), torch.float16)
        else:
            rounding = 2**-25 + upstream * 2**-11 * b.double().abs()
            assert ((a.double() - upstream * b.double()).abs() <= rounding).all()


@pytest.mark.parametrize(
    ("mode", "route"),
    [
        *((f"dcd {direction}bounded", route) for direction in ("", "swapped ") for route in ("streaming", "wide")),
        *((mode, "streaming") for mode in ("index", "masked, given index", "label")),
    ],
    indirect=["route"],
)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_inputs_change_nothing_for_the_others(wanted: int, mode: str, route: str) -> None:
    p = any_problem(mode, 20, 10, scale=4.0 if mode in DUAL_MODES else 8.0)
    full = value_and_grads(p.kernel, *p.inputs)
    inputs = [x.clone() for x in p.inputs]
    inputs[wanted].requires_grad_()
    p.kernel(*inputs).backward()
    if wanted == 2:  # either side's dot products add up to it
        assert_close(inputs[2].grad, full[3], torch.float32, floor=1e-5 if mode in DUAL_MODES else 2.0)
    else:
        assert torch.equal(inputs[wanted].grad, full[1 + wanted])
    assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize(
    ("mode", "splits"),
    [
        *((mode, splits) for mode in ("dcd bounded", "dcd online") for splits in (2, 3, 7)),
        *((mode, 7) for mode in MODES),
        ("masked, given index", 2),
        ("self label", 2),
    ],
)
def test_columns_split_over_programs(mode: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 35 columns are three tiles: with seven splits some are empty, with two one is longer.
    asked = []
    monkeypatch.setattr(tiles, "column_splits", lambda *args: asked.append(args) or splits)
    p = any_problem(mode, 35, 20)
    check_against_definition(p)
    assert len(asked) == 2  # forward and backward; for both sides of equal length it is asked once


@pytest.mark.parametrize("mode", ["dcd bounded", "dcd online", "index"])
def test_gradients_of_rows_rounded_to_tf32(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = any_problem(mode, 35, 20)
    exact = value_and_grads(p.kernel, *p.inputs)
    for module in (contrast_backend, dual_softmax_backend, rows_backend):
        monkeypatch.setattr(module, "rounds_to_tf32", lambda rows: True)
    assert not torch.equal(value_and_grads(p.kernel, *p.inputs)[1], exact[1])
    check_against_definition(p, tolerance=torch.float16)  # the mantissa of fp16


def hard_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    student, teacher = dual_problem("dcd bounded", 18, 6).inputs[:2]
    zero_rows = student.clone()
    zero_rows[[0, 4, 17]] = 0
    return {
        "zero_rows": (zero_rows, teacher),
        "all_zero": (torch.zeros_like(student), torch.zeros_like(teacher)),
        "huge": (student * 1e30, teacher * 1e30),
        "tiny": (student * 1e-10, teacher * 1e-10),
        "identical": (student[:1].expand(18, 6).contiguous(), teacher[:1].expand(18, 6).contiguous()),
        "equal": (student, student.clone()),
        "opposite": (student, -student),
    }


@pytest.mark.parametrize("case", hard_inputs())
@pytest.mark.parametrize(
    ("mode", "scale", "route"),
    [
        *(("dcd bounded", scale, route) for scale in (1e-9, 39.9) for route in ("streaming", "wide")),
        *(("dcd online", scale, route) for scale in (0.5, 3000.0) for route in ("streaming", "wide")),
        *(("masked", scale, "streaming") for scale in (1e-9, 3000.0)),
        *(("self label", scale, "wide") for scale in (1e-9, 3000.0)),
    ],
    indirect=["route"],
)
def test_hard_inputs_give_finite_results(mode: str, case: str, scale: float, route: str) -> None:
    p = any_problem(mode, 18, 6)
    inputs = hard_inputs()[case][: len(p.inputs) - 1]
    results = value_and_grads(p.kernel, *inputs, torch.tensor(scale))
    assert all(x.isfinite().all() for x in results)
    if case == "zero_rows":
        assert results[1][[0, 4, 17]].abs().max() == 0
        assert results[1].abs().max() > 0


@pytest.mark.parametrize("case", ["zero_rows", "huge", "tiny", "opposite"])
@pytest.mark.parametrize("mode", ["dcd bounded", "dcd online"])
def test_hard_inputs_have_the_definition_s_gradients(case: str, mode: str) -> None:
    p = any_problem(mode, 18, 6)
    inputs = *hard_inputs()[case], torch.tensor(5.0)
    exact = value_and_grads(p.definition, *(x.double() for x in inputs))
    for a, e in zip(value_and_grads(p.kernel, *inputs), exact, strict=True):
        assert_close(a, e, torch.float32, floor=1e-40)


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 10.0), (torch.float16, 40.0), (torch.float32, 200.0)])
@pytest.mark.parametrize("operation", ["dcd", "contrast"])
def test_collapsed_and_opposite_rows(operation: str, dtype: torch.dtype, scale: float, n: int, route: str) -> None:
    """Every similarity is near -scale: a padded column, at similarity 0, would outweigh them all."""
    student, other = torch.eye(20, dtype=dtype)[:2]
    teacher = -0.9 * student + 0.4 * other
    p = any_problem("index" if operation == "contrast" else "dcd online" if scale > 40 else "dcd bounded", n, 20, dtype)
    size = n if operation == "contrast" else 1  # a sum over the rows, not a mean
    results = value_and_grads(p.kernel, student.repeat(n, 1), teacher.repeat(n, 1), torch.tensor(scale))
    assert results[0] == pytest.approx(size * math.log(n), abs=1e-4 * size)
    # A row's G adds up to nothing, but for its rounding.
    assert all(x.abs().max() <= 1e-3 * scale * size for x in results[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("mode", ["dcd bounded", "dcd online", "index"])
def test_one_bad_element_makes_the_loss_bad(mode: str, side: int, bad: float, route: str) -> None:
    p = any_problem(mode, 20, 6, scale=3.0)
    inputs = [x.clone() for x in p.inputs]
    inputs[side][3, :2] = torch.tensor([0.0, bad])
    assert not p.kernel(*inputs).isfinite()


@pytest.mark.parametrize("mode", ["dcd bounded", "dcd online", *MODES])
def test_every_element_of_an_empty_tensor_is_written(mode: str, route: str, request: pytest.FixtureRequest) -> None:
    p = any_problem(mode, 37 if mode in DUAL_MODES else 18, 7)
    expected = value_and_grads(p.kernel, *p.inputs)
    made = request.getfixturevalue("poison")
    actual = value_and_grads(p.kernel, *p.inputs)
    assert len(made) >= 8
    request.getfixturevalue("monkeypatch").undo()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mode", ["dcd bounded", "masked, given index"])
def test_inputs_are_left_bitwise_unchanged(mode: str) -> None:
    p = any_problem(mode, 20, 8, weight=torch.rand(20))
    names = ("query_labels", "key_labels", "positive_index")
    others = [p.weight, *(getattr(p, name) for name in names if hasattr(p, name))]
    given = [*(x.requires_grad_() for x in p.inputs), *others]
    before = [x.detach().clone() for x in given]
    p.kernel(*p.inputs).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("mode", ["dcd bounded", "masked, given index"])
def test_compiles_as_one_graph(mode: str) -> None:
    p = any_problem(mode, 20, 6)
    compiled = torch.compile(p.kernel, fullgraph=True, backend="aot_eager")
    for a, e in zip(value_and_grads(compiled, *p.inputs), value_and_grads(p.kernel, *p.inputs), strict=True):
        assert torch.equal(a, e)
