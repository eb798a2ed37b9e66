"""What holds of ``dual_softmax`` alone: launches per side, chunks of columns, zero rows."""

import dataclasses
import math
from types import ModuleType

import pytest
import torch
import triton
from fastkd.kernels import launch, tiles
from fastkd.kernels.dual_softmax import streaming, wide
from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
from fastkd.kernels.normalize import padded_width, unit_rows

from fastkd import dcd_loss
from fastkd.backends import reference
from fastkd.ops import dual_softmax as op
from tests.helpers.checks import assert_close, embeddings, value_and_grads
from tests.helpers.dual_cases import dual_problem


def test_one_launch_a_side_equals_one_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    p = dual_problem("dcd bounded", 33, 20, scale=9.0)
    together = value_and_grads(p.kernel, *p.inputs)
    launch.clear_caches()
    find = tiles.launch_config
    monkeypatch.setattr(tiles, "launch_config", lambda *a, **b: dataclasses.replace(find(*a, **b), apart=True))
    for a, b in zip(value_and_grads(p.kernel, *p.inputs), together, strict=True):
        assert torch.equal(a, b)


# The last: a row-block's last positive is the first column of a whole tile.
FEW_ROWS, ONE_ROW, EDGE = (13, 37, (19, 20)), (36, 37, (19, 20)), (1, 37, (33, 34))


@pytest.mark.parametrize(
    ("kernels", "splits", "bounded", "start", "stop", "cuts"),
    [
        *((streaming, 1, bounded, *EDGE) for bounded in (True, False)),
        (streaming, 1, True, *ONE_ROW),
        (streaming, 3, False, *FEW_ROWS),
        *((wide, 1, bounded, *FEW_ROWS) for bounded in (True, False)),
    ],
)
def test_own_rows_against_columns_that_arrive_in_chunks(
    kernels: ModuleType, bounded: bool, start: int, stop: int, cuts: tuple[int, int], splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiles, "column_splits", lambda *_: splits)
    N, D = 37, 20
    chunks = [slice(0, cuts[0]), slice(*cuts), slice(cuts[1], N)]
    student, teacher = embeddings(N, D, dtype=torch.float32)
    weight = torch.linspace(0, 2, N)
    scale, w, k = torch.tensor(6.0), torch.tensor(0.3), torch.tensor(0.7)

    leaves = [x.double().requires_grad_() for x in (student, teacher)]
    contrast, consistency = reference.dual_softmax(*leaves, scale.double())
    (weight * (w * contrast + k * consistency)).sum().backward()

    units, inverse_norm = unit_rows(student, teacher, padded_width(D))
    own = slice(start, stop)
    rows, options = units[:, own].contiguous(), {"bounded": bounded}
    state = None
    for chunk in chunks:
        columns = units[:, chunk].contiguous()
        state = kernels.running_statistics(
            rows, columns, scale, offset=start - chunk.start, state=state, **options
        )  # fmt: skip
    loss, own_stats = statistics(state, scale, weight[own].contiguous(), swapped=False)
    assert_close(loss[0], (weight * contrast)[own], torch.float32)
    assert_close(loss[1], (weight * consistency)[own], torch.float32)

    whole_state = kernels.running_statistics(units, units, scale, offset=0, **options)
    _, stats = statistics(whole_state, scale, None, swapped=False)
    assert_close(own_stats, stats[:, own].double(), torch.float32)

    def coef_of(cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return coefficients(
            stats[:, cols], weight[cols], weight.amax(), w, k, scale, swapped=False,
            tile=kernels.tile_columns(rows, **options), **options,
        )  # fmt: skip

    row_coef, unscale = coef_of(own)
    partial = None
    for chunk in chunks:
        columns = units[:, chunk].contiguous()
        partial = kernels.gradient_sums(
            rows, columns, row_coef, coef_of(chunk)[0], scale, offset=start - chunk.start, need_a=True, need_b=True,
            partial=partial, **options,
        )  # fmt: skip
    grads = gradients(
        partial, rows, inverse_norm[:, own].contiguous(), scale, unscale, D=D, dtype=torch.float32, need_a=True,
        need_b=True,
    )  # fmt: skip
    assert_close(grads[0], leaves[0].grad[own], torch.float32)
    assert_close(grads[1], leaves[1].grad[own], torch.float32)


def test_sliced_and_transposed_inputs(route: str) -> None:
    p = dual_problem("dcd bounded", 40, 24, scale=4.0)
    student, teacher, scale = p.inputs
    exact = value_and_grads(p.definition, *(x[::2, 3:].double() for x in (student, teacher)), scale.double())
    leaves = [x.T.contiguous().requires_grad_() for x in (student, teacher)]
    value = p.kernel(*(leaf.T[::2, 3:] for leaf in leaves), scale)
    value.backward()
    assert_close(value, exact[0], torch.float32)
    for leaf, expected in zip(leaves, exact[1:], strict=False):
        assert_close(leaf.grad.T[::2, 3:], expected, torch.float32)


def test_a_row_of_zeros_and_one_nan_is_no_zero_row() -> None:
    p = dual_problem("dcd bounded", 5, 4, scale=3.0)
    p.inputs[0][2] = torch.tensor([0.0, math.nan, 0.0, 0.0])
    assert not p.kernel(*p.inputs).isfinite()


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_operators_keep_their_schema_and_shapes(needed: tuple[bool, bool]) -> None:
    student, teacher = embeddings(6, 5, dtype=torch.float16)
    common = student, teacher, torch.tensor(5.0), torch.rand(6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.dual_softmax, (*common, "student||teacher", 40.0, "triton"), test_utils=checks)
    stats = op.dual_softmax(*common, "student||teacher", 40.0, "triton")[2]
    grads = torch.tensor(0.5), torch.tensor(2.0)
    arguments = *common, stats, *grads, "student||teacher", 40.0, *needed, "triton"
    torch.library.opcheck(op.dual_softmax_backward, arguments, test_utils=checks)


def test_what_the_interpreter_cannot_compute_raises() -> None:
    student, teacher = embeddings(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        dcd_loss(student, teacher, 3.0, backend="triton")


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "online"])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_factors_by_tile_are_those_of_one_tile_and_finite_beyond_the_last_column(n: int, bounded: bool) -> None:
    stats, weight = torch.rand(3, 50)[:, 50 - n :] + 3, torch.rand(50)[50 - n :]
    arguments = stats, weight, weight.amax(), torch.tensor(0.3), torch.tensor(0.7), torch.tensor(6.0)
    options = {"swapped": False, "bounded": bounded}
    tiles_of_16, unscale = coefficients(*arguments, tile=16, **options)
    plain, same = coefficients(*arguments, tile=None, **options)
    numbers = 4 if bounded else 6
    assert tiles_of_16.shape == (-(-n // 16), 4 if bounded else 8, 16)
    assert torch.equal(tiles_of_16[:, :numbers].transpose(0, 1).flatten(1)[:, :n], plain[0, :numbers, :n])
    assert tiles_of_16[:, :numbers].isfinite().all()
    assert torch.equal(unscale, same)


@triton.jit(do_not_specialize=["n_cols", "first_positive", "tiles_per_split"])
def visits_kernel(
    VISITS, n_cols, first_positive, tiles_per_split, BLOCK_M: triton.language.constexpr,
    BLOCK_N: triton.language.constexpr,
):  # fmt: skip
    """VISITS [2, tiles]: how often the programs visit each tile, in the loop over the edge and in the other loop."""
    split, count = triton.language.program_id(0), triton.language.cdiv(n_cols, BLOCK_N)
    bounds = tiles.split_tiles(split, tiles_per_split, n_cols, first_positive, BLOCK_M, BLOCK_N)
    for turn in triton.language.static_range(2):
        low, high = tiles.loop_bounds(bounds, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
        for index in range(low, high, BLOCK_N):
            start = tiles.first_column(index, bounds, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
            place = VISITS + turn * count + start // BLOCK_N
            triton.language.store(place, triton.language.load(place) + 1)


@pytest.mark.parametrize("n_cols", [1, 16, 50, 112])
@pytest.mark.parametrize(("splits", "BLOCK_M"), [(1, 16), (1, 32), (3, 16), (7, 32)])
def test_every_tile_is_visited_once_and_those_with_positives_or_masks_on_the_edge(
    splits: int, BLOCK_M: int, n_cols: int
) -> None:
    count = -(-n_cols // 16)
    for first_positive in (-BLOCK_M, 1 - BLOCK_M, -5, 0, 7, 16, 40, n_cols - 1, n_cols, 10**6):
        visits = torch.zeros(2, count, dtype=torch.int32)
        visits_kernel[(splits,)](visits, n_cols, first_positive, -(-count // splits), BLOCK_M=BLOCK_M, BLOCK_N=16)
        assert visits.sum(0).eq(1).all(), (first_positive, visits)
        first, last = torch.arange(count) * 16, torch.arange(count) * 16 + 15
        needs_mask = (first <= first_positive + BLOCK_M - 1) & (last >= first_positive) | (last >= n_cols)
        assert visits[0][needs_mask].eq(1).all(), (first_positive, visits)
        # No more than the positives can take, and the last one: the other loop is the fast one.
        assert visits[0].sum() <= splits * tiles.edge_tiles(BLOCK_M, 16) + 1
