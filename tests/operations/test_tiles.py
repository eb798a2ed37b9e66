"""The streaming backend's own ways: tiles in rounds, workers, shared exponentials. None of them changes a result."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastkd import dcd_loss
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import dual_softmax as blocked_dual_softmax
from fastkd.backends.blocked import sums as blocked_sums
from fastkd.backends.blocked import tiles
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense_dual_softmax
from fastkd.functional.dcd import dcd_terms
from fastkd.numerics import unit_rows, unit_rows_quickly
from tests.helpers.checks import CONSISTENCIES, assert_close, embeddings, value_and_grads
from tests.helpers.contract import OPERATIONS, Size, always_in_tiles

CPU = torch.device("cpu")
TILED = ["ckd", *(name for name in OPERATIONS if not name.startswith(("k", "ce", "ckd", "pool")))]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_rounds_cover_every_tile_once_without_conflicts(count: int) -> None:
    row_blocks = [slice(i, i + 1) for i in range(count)]
    pairs, square = list(tiles.pair_rounds(row_blocks)), list(tiles.rectangle_rounds(row_blocks, row_blocks))
    assert sorted((i.start, j.start) for tile_round in pairs for i, j in tile_round) == [
        (i, j) for i in range(count) for j in range(i, count)
    ]
    assert sorted((i.start, j.start) for tile_round in square for i, j in tile_round) == [
        (i, j) for i in range(count) for j in range(count)
    ]
    for tile_round in pairs[1:]:
        touched = [block.start for tile in tile_round for block in tile]
        assert len(touched) == len(set(touched))
    for tile_round in square:
        for side in range(2):
            touched = [tile[side].start for tile in tile_round]
            assert len(touched) == len(set(touched))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (2, 7)])
def test_rectangles_are_covered_once_without_conflicts(rows: int, cols: int) -> None:
    row_blocks, col_blocks = ([slice(i, i + 1) for i in range(count)] for count in (rows, cols))
    rounds = list(tiles.rectangle_rounds(row_blocks, col_blocks))
    assert len(rounds) == max(rows, cols)
    assert sorted((i.start, j.start) for tile_round in rounds for i, j in tile_round) == [
        (i, j) for i in range(rows) for j in range(cols)
    ]
    for tile_round in rounds:
        for side in range(2):
            touched = [tile[side].start for tile in tile_round]
            assert len(touched) == len(set(touched)) == min(rows, cols)


@pytest.mark.parametrize("n", [1, 255, 512, 513, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_blocks_cover_all_rows(n: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    row_blocks = tiles.blocks(n, CPU)
    assert [row for block in row_blocks for row in range(block.start, block.stop)] == list(range(n))
    assert max(block.stop - block.start for block in row_blocks) <= tiles.MAX_ROWS


@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("name", TILED)
def test_results_are_the_same_bits_for_any_number_of_workers(
    name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = scale / 10 if name.startswith("raw") else scale
    case = OPERATIONS[name](Size(n=1100, N=1500, D=24, scale=scale, dtype=torch.float32))
    sizes = {n: tiles.blocks(n, CPU) for n in (1100, 1500)}
    for module in (blocked_dual_softmax, blocked_contrast, tiles):
        monkeypatch.setattr(module, "blocks", lambda n, _: sizes[n])
    results = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(tiles, "worker_count", lambda *_, workers=workers: workers)
        results.append(case.results("blocked"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    for a, e, low in zip(results[0], case.exact(), case.results("reference"), strict=True):
        assert_close(a, e, torch.float32, low)


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("name", TILED)
def test_running_maxima_change_nothing(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = OPERATIONS[name](Size(n=600, N=530, D=16, scale=9.0))
    with always_in_tiles() if tiled else contextlib.nullcontext():
        shared = case.results("blocked")
        # Exponentials that overflow if no maximum is subtracted.
        for module in (blocked_sums, dense_dual_softmax):
            monkeypatch.setattr(module, "MAX_SHARED_SCALE", 0.0)
        monkeypatch.setattr(blocked_sums.PlainSums, "add", None)
        for a, e in zip(case.results("blocked"), shared, strict=True):
            assert_close(a, e, torch.float64)


@pytest.mark.parametrize(("n", "N", "scale"), [(1, 2, 5.0), (9, 9, 3000.0), (65, 20, 10.0)])
@pytest.mark.parametrize("name", TILED)
def test_few_rows_give_the_same_in_tiles(name: str, n: int, N: int, scale: float) -> None:
    scale = scale / 10 if name.startswith("raw") else scale
    case = OPERATIONS[name](Size(n=n, N=N, scale=scale, weight=torch.arange(n, dtype=torch.float64) + 1))
    floor = 1e-5 * n * case.largest  # A loss is a difference of logits: where it cancels, their rounding is left.
    with always_in_tiles():
        tiled = case.results("blocked", upstream=3.0)
    for a, b, e in zip(case.results("blocked", upstream=3.0), tiled, case.exact(3.0), strict=True):
        assert_close(a, e, torch.float64, floor=floor)
        assert_close(b, e, torch.float64, floor=floor)


@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0), (0.0, 1.0)])
def test_few_rows_serve_any_upstream_gradient_any_number_of_times(
    weights: tuple[float, float], consistency: str, scale: float
) -> None:
    results = []
    for backend in ("blocked", "reference"):
        leaves = [x.requires_grad_() for x in (*embeddings(30, 8), torch.tensor(scale, dtype=torch.float64))]
        terms = dcd_terms(*leaves, consistency=consistency, backend=backend)
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        results.append([torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)])
    for actual, again, expected in zip(*results[0], results[1][0], strict=True):
        assert_close(actual, expected, torch.float64)
        assert torch.equal(again, actual)


@pytest.mark.parametrize("name", ["dcd", "ckd", "index", "masked", "label", "self label"])
def test_few_rows_compute_no_gradient_that_nobody_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = OPERATIONS[name](Size(n=12, N=9))
    expected = case.compute("blocked", *case.inputs)
    asked: list[object] = []
    for module in (dense_contrast, dense_dual_softmax):

        def spy(*arguments: Any, computed: Callable[..., Any] = module.computed) -> Any:
            asked.append(arguments[-1])
            return computed(*arguments)

        monkeypatch.setattr(module, "computed", spy)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in case.inputs]
    with torch.no_grad():
        assert torch.equal(case.compute("blocked", *leaves), expected)
    assert set(asked) == {None}
    case.compute("blocked", *leaves)
    assert asked[-1] is not None


def test_unit_rows_are_the_same_whether_their_norms_are_looked_at_or_not() -> None:
    rows = embeddings(40, 7, dtype=torch.float32)[0]
    zero, bad = rows.clone(), rows.clone()
    zero[3], bad[5, 2] = 0, torch.nan
    for x in (rows, zero, bad, rows * 1e30, rows * 1e-30, rows * 1e-13, rows[:0]):
        for a, e in zip(unit_rows_quickly(x.double()), unit_rows(x.double()), strict=True):
            assert torch.allclose(a, e, rtol=1e-15, atol=0, equal_nan=True)
        for a, e in zip(unit_rows_quickly(torch.stack([x, x])), unit_rows(x), strict=True):
            assert torch.allclose(a, e.expand_as(a), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize(("scale", "bound"), [(9.0, 10.0), (9.0, math.inf), (41.0, 50.0)])
def test_a_known_bound_of_the_scale_changes_nothing(scale: float, bound: float, consistency: str) -> None:
    inputs = *embeddings(700, 16), torch.tensor(scale, dtype=torch.float64)
    for term in range(2):
        actual, expected = (
            value_and_grads(lambda *x: dcd_terms(*x, consistency=consistency, **options)[term], *inputs)  # noqa: B023
            for options in ({"backend": "blocked", "max_scale": bound}, {"backend": "reference"})
        )
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, torch.float64)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The suite runs on one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_callers_threads_and_modes_are_left_alone(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MIN_PARALLEL_ROWS", 600)
    student, teacher = embeddings(1200, 8, dtype=torch.float32)
    assert tiles.worker_count(1200, CPU) == 2
    alive, expected = threading.active_count(), dcd_loss(student, teacher, 4.0, backend="reference")
    with torch.inference_mode():
        inside = dcd_loss(student, teacher, 4.0, backend="blocked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = dcd_loss(student, teacher, 4.0, backend="blocked")
    for value in (inside, autocast):
        assert_close(value, expected, torch.float32)
    assert (torch.get_num_threads(), threading.active_count()) == (2, alive)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "worker_count", lambda *_: 2)
    like = torch.zeros(4 * tiles.MAX_ROWS, 1)

    def fail(rows: slice, cols: slice, workspace: tiles.Workspace) -> None:
        raise MemoryError(f"tile {rows.start}")

    with pytest.raises(MemoryError, match="tile 0"):
        tiles.for_each_tile(tiles.pair_rounds(tiles.blocks(len(like), CPU)), fail, like, buffers=1)
    assert math.isfinite(dcd_loss(*embeddings(9, 4), 2.0).item())
