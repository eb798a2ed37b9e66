"""The contrast kernels in Triton's interpreter, against the float64 definition: every mask, small tiles.

Run by tests/test_triton_contrast.py in its own process: TRITON_INTERPRET must be set before Triton is imported.
bfloat16 is left to the tests on a GPU, because the interpreter multiplies it wrongly.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fastkd.kernels.contrast import per_row as contrast_rows
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.contrast import wide as contrast_wide
from fastkd.kernels.contrast.per_row import Side, coefficients, gradients, statistics, vectors
from torch import Tensor

from fastkd import numerics
from fastkd.backends import reference
from fastkd.backends.triton import contrast as triton_contrast
from fastkd.ops import contrast as op
from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, Problem, check_against_definition, problem

LOW = (torch.float32, torch.float16)
# One column, either side of a 16-row tile's edge, widths that are no multiple of 8 or 16.
SHAPES = [(2, 2, 1), (15, 15, 5), (17, 17, 40), (35, 35, 20), (1, 40, 7), (33, 2, 8)]
# The dtypes alternate: every mode meets both, every shape both on either route.
CASES = [
    (mode, *shape, LOW[(turn + number) % 2])
    for turn, (mode, (*_, is_self)) in enumerate(MODES.items())
    for number, shape in enumerate(SHAPES)
    if shape[0] == shape[1] or not (is_self or mode in NEEDS_PAIRS)
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_wide, "ROWS", 16)
    monkeypatch.setattr(contrast_wide, "COLUMNS", 24)


@pytest.fixture(params=["streaming", "wide"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(triton_contrast, "is_wide", lambda rows: request.param == "wide")
    return request.param


@pytest.mark.parametrize(("mode", "n", "N", "d", "dtype"), CASES, ids=str)
def test_value_and_gradients(
    mode: str, n: int, N: int, d: int, dtype: torch.dtype, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if d == 40:
        monkeypatch.setattr(contrast_rows, "BLOCK_ELEMENTS", 32)  # a row is several pieces
    check_against_definition(problem(mode, n, N, d, dtype))


@pytest.mark.parametrize("mode", MODES)
def test_rows_as_they_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_rows, "BLOCK_ELEMENTS", 16)
    check_against_definition(problem(mode, 18, 18, 20, torch.float16, normalize=False, scale=1.5))


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_upstream(mode: str) -> None:
    weight = torch.tensor([0.0, 5.0, 1.0]).repeat(6)
    check_against_definition(problem(mode, 18, 18, 20, weight=weight), upstream=-37.0)


@pytest.mark.parametrize("mode", ["index", "masked, given index", "label", "self label"])
def test_a_scale_that_needs_the_running_maximum(mode: str, route: str) -> None:
    # exp(120) overflows float32. Few dimensions, so that the softmax does not saturate.
    check_against_definition(problem(mode, 35, 35, 6, scale=120.0))


def test_wide_rows_go_through_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "running_statistics", None)
    monkeypatch.setattr(contrast, "gradient_sums", None)
    check_against_definition(problem("index", 35, 35, 300, torch.float16))


def test_weights_far_above_one_do_not_overflow_half_precision() -> None:
    weight = torch.tensor([0.0, 1e4, 1.0]).repeat(12)[:35]
    check_against_definition(problem("self label", 35, 35, 20, torch.float16, weight=weight))


@pytest.mark.parametrize("upstream", [0.0, 1e-6, 1e4])
def test_small_and_large_upstream_gradients_survive_half_precision(upstream: float) -> None:
    p = problem("index", 20, 20, 16, torch.float16)
    one, other = value_and_grads(p.kernel, *p.inputs), value_and_grads(p.kernel, *p.inputs, upstream=upstream)
    assert other[3].item() == pytest.approx(upstream * one[3].item(), rel=1e-4)
    # fp16 gradients of 1e-8 are subnormal: compare where the output format can hold them.
    for a, b in zip(other[1:3], one[1:3], strict=True):
        if upstream > 1:
            assert_close(a, (upstream * b.double()).half(), torch.float16)
        else:
            rounding = 2**-25 + upstream * 2**-11 * b.double().abs()
            assert ((a.double() - upstream * b.double()).abs() <= rounding).all()


@pytest.mark.parametrize("mode", ["index", "masked, given index", "label"])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_inputs_change_nothing_for_the_others(wanted: int, mode: str) -> None:
    p = problem(mode, 20, 20, 10)
    full = value_and_grads(p.kernel, *p.inputs)
    inputs = [x.clone() for x in p.inputs]
    inputs[wanted].requires_grad_()
    p.kernel(*inputs).backward()
    if wanted == 2:  # either side's dot products add up to it
        assert_close(inputs[2].grad, full[3], torch.float32, floor=2.0)
    else:
        assert torch.equal(inputs[wanted].grad, full[1 + wanted])
    assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("mode", ["index", "masked", "self index", "self masked"])
def test_losses_near_zero_keep_their_digits(mode: str, route: str) -> None:
    """Every loss is about exp(-50): 1 plus it is 1, and G of a positive would be 0."""
    n, D = 20, 24
    query = torch.eye(n, D)
    index = torch.arange(n)
    if mode.startswith("self"):
        query[1::2] = query[::2]
        index = index ^ 1
    labels = torch.arange(n) // 4
    inputs = (query,) if mode.startswith("self") else (query, query.clone())
    p = Problem(
        inputs=(*(x * 1.0 for x in inputs), torch.tensor(50.0)),
        query_labels=labels if "masked" in mode else None,
        key_labels=labels if mode == "masked" else None,
        positive_index=index,
        by_label=False,
        normalize=True,
    )
    exact = value_and_grads(stable_definition(p), *(x.double() for x in p.inputs))
    assert 0 < exact[0] < 1e-18
    for a, e in zip(value_and_grads(p.kernel, *p.inputs), exact, strict=True):
        assert_close(a, e, torch.float32, floor=1e-30)


def stable_definition(p: Problem) -> Callable[..., Tensor]:
    """By index, ``log1p(sum_{j != p} exp(x_ij - x_ip))``: the definition itself drops what is below 1e-16."""

    def loss(*inputs: Tensor) -> Tensor:
        query, key = (numerics.unit_rows(x)[0] for x in (inputs[0], inputs[-2]))
        positive, denominator = p.mask().dense(len(query), len(key), query.device)
        logits = inputs[-1] * (query @ key.T)
        others = logits.masked_fill(~denominator | positive, -torch.inf) - logits[positive][:, None]
        return others.exp().sum(1).log1p().sum()

    return loss


@pytest.mark.parametrize(
    ("mode", "splits"), [*((mode, 7) for mode in MODES), ("masked, given index", 2), ("self label", 2)]
)
def test_columns_split_over_programs(mode: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 35 columns are three tiles: with seven splits some are empty, with two one is longer.
    asked = []
    monkeypatch.setattr(contrast, "column_splits", lambda *args: asked.append(args) or splits)
    p = problem(mode, 35, 35, 20)
    check_against_definition(p)
    assert len(asked) == len(p.inputs)


@pytest.mark.parametrize(
    ("kernels", "splits", "start", "stop", "cuts"),
    # The first: a row-block's last positive is the first column of a whole tile.
    [(contrast, 1, 1, 37, (33, 34)), (contrast, 3, 13, 37, (19, 20)), (contrast_wide, 1, 13, 37, (19, 20))],
    ids=["streaming", "split", "wide"],
)
@pytest.mark.parametrize("mode", MODES)
def test_own_rows_against_columns_that_arrive_in_blocks(
    kernels: ModuleType, mode: str, splits: int, start: int, stop: int, cuts: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(contrast, "column_splits", lambda *_: splits)
    N, D = 37, 20
    weight = torch.linspace(0, 2, N)
    p = problem(mode, N, N, D, weight=weight)
    exact = value_and_grads(p.definition, *(x.double() for x in p.inputs))
    losses, _ = reference.contrast(p.inputs[0], p.inputs[-2], p.inputs[-1], True, p.mask())

    mask, scale, own = p.mask(), p.inputs[-1], slice(start, stop)
    blocks = [slice(0, cuts[0]), slice(*cuts), slice(cuts[1], N)]
    options = {"by_label": p.by_label, "exclude_self": mask.exclude_self}
    query_ids, key_ids, count = None, None, None
    if mask.query_labels is not None:
        query_ids, key_ids, count = triton_contrast.numbered(mask.query_labels, mask.key_labels)
        count = count - int(mask.exclude_self) if p.by_label else None
    (q, inverse_q), (k, inverse_k) = (vectors(x, 32, normalize=True) for x in (p.inputs[0], p.inputs[-2]))
    queries = Side(vectors=q, labels=query_ids, positive=p.positive_index)
    keys = Side(vectors=k, labels=key_ids)

    state = None
    for block in blocks:
        state = kernels.running_statistics(queries.part(own), keys.part(block), scale, state=state, **options)
    loss, own_stats = statistics(state, weight[own].contiguous(), None if count is None else count[own].contiguous())
    assert_close(loss, (weight * losses)[own].double(), torch.float32)
    whole = kernels.running_statistics(queries, keys, scale, **options)
    _, stats = statistics(whole, None, count)
    assert_close(own_stats, stats[:, own], torch.float32)

    coef, unscale = coefficients(stats, weight, torch.tensor(1.0), by_label=p.by_label)
    queries = dataclasses.replace(queries, coef=coef)
    sides = (
        [(queries, queries, inverse_q)]
        if mask.exclude_self
        else [(queries, keys, inverse_q), (keys, queries, inverse_k)]
    )
    for (rows, columns, inverse_norm), expected in zip(sides, exact[1:], strict=False):
        partial = None
        for block in blocks:
            partial = kernels.gradient_sums(rows.part(own), columns.part(block), scale, partial=partial, **options)
        grad, _ = gradients(
            partial, rows.part(own).vectors, inverse_norm[own].contiguous(), scale, unscale, D=D, dtype=torch.float32
        )
        assert_close(grad, expected[own], torch.float32)


def test_numbers_are_equal_where_labels_are() -> None:
    queries, keys = torch.tensor([5, -(2**60), 7, 2**60, 5, 6]), torch.tensor([7, 5, 5, -(2**60), 2**61])
    query_ids, key_ids, count = triton_contrast.numbered(queries, keys)
    assert torch.equal(query_ids[:, None] == key_ids, queries[:, None] == keys)
    assert torch.equal(count.long(), (queries[:, None] == keys).sum(1))
    assert query_ids.dtype == key_ids.dtype == torch.int32


def test_sliced_and_transposed_inputs(route: str) -> None:
    p = problem("masked, given index", 40, 40, 24)
    leaves = [x.T.contiguous().requires_grad_() for x in p.inputs[:2]]
    strided = dataclasses.replace(
        p,
        query_labels=p.query_labels[::2],
        key_labels=p.key_labels[::2],
        positive_index=(p.positive_index // 2)[::2],
        weight=torch.rand(40)[::2],
    )
    exact = value_and_grads(strided.definition, *(x[::2, 3:].double() for x in p.inputs[:2]), p.inputs[2].double())
    value = strided.kernel(*(leaf.T[::2, 3:] for leaf in leaves), p.inputs[2])
    value.backward()
    assert_close(value, exact[0], torch.float32)
    for leaf, expected in zip(leaves, exact[1:], strict=False):
        assert_close(leaf.grad.T[::2, 3:], expected, torch.float32)


def hard_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    p = problem("index", 18, 18, 6)
    query, key = p.inputs[:2]
    zero_rows = query.clone()
    zero_rows[[0, 4, 17]] = 0
    return {
        "zero_rows": (zero_rows, key),
        "all_zero": (torch.zeros_like(query), torch.zeros_like(key)),
        "huge": (query * 1e30, key * 1e30),
        "tiny": (query * 1e-10, key * 1e-10),
        "identical": (query[:1].expand(18, 6).contiguous(), key[:1].expand(18, 6).contiguous()),
        "equal": (query, query.clone()),
        "opposite": (query, -query),
    }


@pytest.mark.parametrize("case", hard_inputs())
@pytest.mark.parametrize("scale", [1e-9, 3000.0])
@pytest.mark.parametrize(("mode", "route"), [("masked", "streaming"), ("self label", "wide")], indirect=["route"])
def test_hard_inputs_give_finite_results(mode: str, case: str, scale: float, route: str) -> None:
    p = problem(mode, 18, 18, 6)
    inputs = hard_inputs()[case][: len(p.inputs) - 1]
    results = value_and_grads(p.kernel, *inputs, torch.tensor(scale))
    assert all(x.isfinite().all() for x in results)
    if case == "zero_rows":
        assert results[1][[0, 4, 17]].abs().max() == 0
        assert results[1].abs().max() > 0


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 10.0), (torch.float16, 40.0), (torch.float32, 200.0)])
def test_collapsed_and_opposite_rows(dtype: torch.dtype, scale: float, n: int, route: str) -> None:
    """Every similarity is near -scale: a padded column, at similarity 0, would outweigh them all."""
    student, other = torch.eye(20, dtype=dtype)[:2]
    teacher = -0.9 * student + 0.4 * other
    p = problem("index", n, n, 20, dtype)
    results = value_and_grads(p.kernel, student.repeat(n, 1), teacher.repeat(n, 1), torch.tensor(scale))
    assert results[0] == pytest.approx(n * math.log(n), abs=1e-4 * n)
    # A row's G adds up to nothing, but for its rounding.
    assert all(x.abs().max() <= 1e-3 * scale * n for x in results[1:])


@pytest.mark.parametrize("mode", ["index", "self label"])
def test_one_row_has_no_negatives(mode: str, route: str) -> None:
    p = problem(mode, 1, 1, 20)
    assert all(x.abs().max() <= 1e-5 for x in value_and_grads(p.kernel, *p.inputs))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_bad_element_makes_the_loss_bad(side: int, bad: float, route: str) -> None:
    p = problem("index", 20, 20, 6)
    inputs = [x.clone() for x in p.inputs]
    inputs[side][3, :2] = torch.tensor([0.0, bad])
    assert not p.kernel(*inputs).isfinite()


def test_a_weight_of_nan_makes_loss_and_gradient_nan() -> None:
    weight = torch.ones(20)
    weight[3] = math.nan  # what validation makes of a positive_index that it may not read
    p = problem("given index", 20, 20, 6, weight=weight)
    results = value_and_grads(p.kernel, *p.inputs)
    assert results[0].isnan()
    assert results[1].isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_an_empty_tensor_is_written(mode: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(mode, 18, 18, 7)
    expected = value_and_grads(p.kernel, *p.inputs)
    poisoned = 0

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            nonlocal poisoned
            poisoned += 1
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    actual = value_and_grads(p.kernel, *p.inputs)
    monkeypatch.undo()
    assert poisoned >= 8
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_inputs_are_left_bitwise_unchanged() -> None:
    p = problem("masked, given index", 20, 20, 8, weight=torch.rand(20))
    given = [*(x.requires_grad_() for x in p.inputs), p.weight, p.query_labels, p.key_labels, p.positive_index]
    before = [x.detach().clone() for x in given]
    p.kernel(*p.inputs).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(given, before, strict=True))


def test_gradients_of_rows_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_contrast, "rounds_to_tf32", lambda rows: True)
    check_against_definition(problem("index", 35, 35, 20), tolerance=torch.float16)  # the mantissa of fp16


def test_compiles_as_one_graph() -> None:
    p = problem("masked, given index", 20, 20, 6)
    compiled = torch.compile(p.kernel, fullgraph=True, backend="aot_eager")
    for a, e in zip(value_and_grads(compiled, *p.inputs), value_and_grads(p.kernel, *p.inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("mode", ["label", "self masked"])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_operators_keep_their_schema_and_shapes(needed: tuple[bool, bool], mode: str) -> None:
    p = problem(mode, 6, 6, 5, torch.float16, weight=torch.rand(6))
    query, key, scale = p.inputs if len(p.inputs) == 3 else (p.inputs[0], None, p.inputs[1])
    common = query, key, scale, p.weight, p.query_labels, p.key_labels, p.positive_index
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.contrast, (*common, p.by_label, True, "triton"), test_utils=checks)
    stats = op.contrast(*common, p.by_label, True, "triton")[1]
    arguments = *common, stats, torch.tensor(0.5), p.by_label, True, *needed, "triton"
    torch.library.opcheck(op.contrast_backward, arguments, test_utils=checks)


def test_the_kernels_have_run() -> None:
    """The parity above would also hold for a backend that fell back to another: the kernels must have run."""
    assert type(contrast._forward_kernel).__name__ == "InterpretedFunction"
