"""Tiles in rounds: every tile once, no conflicts inside a round, results that do not depend on the workers."""

import math
import threading

import pytest
import torch

from fastkd import dcd_loss, info_nce_loss
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import dual_softmax as blocked_dual_softmax
from fastkd.backends.blocked import tiles
from tests.helpers.checks import assert_close, embeddings, value_and_grads

CPU = torch.device("cpu")


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
def test_results_are_the_same_bits_for_any_number_of_workers(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1100
    student, teacher = embeddings(n, 24, dtype=torch.float32)
    inputs = student, teacher, torch.tensor(scale)
    row_blocks = tiles.blocks(n, CPU)
    for module in (blocked_dual_softmax, blocked_contrast, tiles):
        monkeypatch.setattr(module, "blocks", lambda *_: row_blocks)
    results = []
    for workers in (2, 3, 4):
        monkeypatch.setattr(tiles, "worker_count", lambda *_, workers=workers: workers)
        results.append(
            [
                *value_and_grads(lambda *x: dcd_loss(*x, backend="blocked"), *inputs),
                *value_and_grads(lambda *x: info_nce_loss(*x, backend="blocked"), *inputs),
            ]
        )
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_many_rows_on_many_workers_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "worker_count", lambda *_: 3)
    inputs = *embeddings(1500, 20), torch.tensor(4.0, dtype=torch.float64)
    expected = value_and_grads(lambda *x: dcd_loss(*x, backend="reference"), *inputs)
    actual = value_and_grads(lambda *x: dcd_loss(*x, backend="blocked"), *inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64)


def test_the_callers_threads_and_modes_are_left_alone() -> None:
    student, teacher = embeddings(2 * tiles.MIN_PARALLEL_ROWS, 8, dtype=torch.float32)
    threads, alive = torch.get_num_threads(), threading.active_count()
    expected = dcd_loss(student, teacher, 4.0, backend="reference")
    with torch.inference_mode():
        inside = dcd_loss(student, teacher, 4.0, backend="blocked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = dcd_loss(student, teacher, 4.0, backend="blocked")
    for value in (inside, autocast):
        assert_close(value, expected, torch.float32)
    assert (torch.get_num_threads(), threading.active_count()) == (threads, alive)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "worker_count", lambda *_: 2)
    like = torch.zeros(4 * tiles.MAX_ROWS, 1)

    def fail(rows: slice, cols: slice, workspace: tiles.Workspace) -> None:
        raise MemoryError(f"tile {rows.start}")

    with pytest.raises(MemoryError, match="tile 0"):
        tiles.for_each_tile(tiles.pair_rounds(tiles.blocks(len(like), CPU)), fail, like, buffers=1)
    assert math.isfinite(dcd_loss(*embeddings(9, 4), 2.0).item())
