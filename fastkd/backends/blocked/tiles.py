"""Visits the tiles of a matrix in rounds; within a round no two tiles share a row-block or a column-block.

Workers can therefore add to per-row results without locks, and every result is summed in the same order every time. The
blocks, and with them the last bits, depend on the number of workers.

On a CPU the threads are shared out to the workers. The other way is to split every small operation over all threads. On
an idle machine that is as fast or faster. But it waits at thousands of barriers: beside busy processes on two cores it
was five to ten times slower.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MAX_ROWS = 512  # of a CPU tile: a few float32 tiles fit the L2 and L3 caches
MAX_ROWS_ACCELERATOR = 4096  # a GPU needs larger tiles to fill it
MIN_PARALLEL_ROWS = 4096  # below this, workers wait for Python's lock more than they gain
MAX_WORKERS = 4  # Python's lock again: beyond this, further threads help inside the operations
START_SECONDS = 60.0  # a worker that has not started by then is not waited for
# What Python says where a thread cannot be started: at a limit of the system, or after the main thread has ended.
NO_THREAD = re.compile("can't (start|create) new thread|interpreter shutdown")

Round = list[tuple[slice, slice]]
_thread_count_lock = threading.Lock()


class Workspace:
    """Buffers for tiles, allocated once; every call returns contiguous [rows, columns] views of them."""

    def __init__(self, like: Tensor, count: int, rows: int, cols: int | None = None) -> None:
        self._flat = like.new_empty(count, rows * (rows if cols is None else cols))

    def __call__(self, rows: slice, cols: slice) -> Iterator[Tensor]:
        m, k = rows.stop - rows.start, cols.stop - cols.start
        return (flat[: m * k].view(m, k) for flat in self._flat)


Tile = Callable[[slice, slice, Workspace], None]


def worker_count(n: int, device: torch.device) -> int:
    """Threads that compute tiles of an n x n matrix side by side; 1 means in the calling thread."""
    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" and n >= MIN_PARALLEL_ROWS else 1


def blocks(n: int, device: torch.device) -> list[slice]:
    """Row-blocks of equal size, in an even number that splits evenly over the workers; none for no rows."""
    if n == 0:
        return []
    workers = worker_count(n, device)
    largest = MAX_ROWS if device.type == "cpu" else MAX_ROWS_ACCELERATOR
    multiple = 2 * workers if workers > 1 else 1
    count = -(-n // (largest * multiple)) * multiple
    size = -(-n // count)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def pair_rounds(row_blocks: list[slice]) -> Iterator[Round]:
    """Every unordered pair of blocks once: the diagonal first, then a round-robin tournament."""
    yield [(block, block) for block in row_blocks]
    players: list[slice | None] = list(row_blocks)
    if len(players) % 2:
        players.append(None)  # whoever meets it has no tile in that round
    for _ in range(len(players) - 1):
        meetings = zip(players[: len(players) // 2], reversed(players[len(players) // 2 :]), strict=True)
        yield [(i, j) if i.start < j.start else (j, i) for i, j in meetings if i is not None and j is not None]
        players.insert(1, players.pop())


def rectangle_rounds(row_blocks: list[slice], col_blocks: list[slice]) -> Iterator[Round]:
    """Every row-block with every column-block once, shifted diagonal by shifted diagonal; the main one comes first."""
    fewer = min(len(row_blocks), len(col_blocks))
    for shift in range(max(len(row_blocks), len(col_blocks))):
        shifted = ((i + shift) for i in range(fewer))
        if fewer == len(row_blocks):
            yield [(row_blocks[i], col_blocks[j % len(col_blocks)]) for i, j in enumerate(shifted)]
        else:
            yield [(row_blocks[i % len(row_blocks)], col_blocks[j]) for j, i in enumerate(shifted)]


def for_each_tile(rounds: Iterator[Round], work: Tile, like: Tensor, buffers: int, columns: int | None = None) -> None:
    """Call ``work(rows, cols, workspace)`` for every tile, round by round, on as many workers as suit ``like``.

    The matrix has a row for each of ``like``'s, and as many columns unless ``columns`` says otherwise. Where workers
    cannot be started, the calling thread computes the same tiles, with the threads of one worker and the same bits.
    """
    n, N = len(like), len(like) if columns is None else columns
    if n == 0 or N == 0:
        return
    largest = [max(block.stop - block.start for block in blocks(count, like.device)) for count in (n, N)]
    workers = worker_count(min(n, N), like.device)
    if workers == 1 or not _on_workers(rounds, work, lambda: Workspace(like, buffers, *largest), workers):
        workspace = Workspace(like, buffers, *largest)
        with _threads(_share(workers)):
            for tiles in rounds:
                for i, j in tiles:
                    work(i, j, workspace)


def _on_workers(rounds: Iterator[Round], work: Tile, make_workspace: Callable[[], Workspace], workers: int) -> bool:
    """Whether all workers could be started; if so, they have computed everything, and otherwise nothing."""
    local = threading.local()
    inference = torch.is_inference_mode_enabled()

    def compute(tile: tuple[slice, slice]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            if not hasattr(local, "workspace"):
                local.workspace = make_workspace()
            work(*tile, local.workspace)

    with ThreadPoolExecutor(workers) as pool:
        if not _started(pool, workers):
            return False
        for tiles in rounds:
            for _ in pool.map(compute, tiles):
                pass
    return True


def _started(pool: ThreadPoolExecutor, workers: int) -> bool:
    """Whether all workers of the pool run, each with its share of the threads. Nobody waits for one that does not."""
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(share)
        ready.wait(START_SECONDS)

    # torch.set_num_threads acts on the calling thread and on threads that start later: it is set back at once.
    with _thread_count_lock:
        threads, share = torch.get_num_threads(), _share(workers)
        try:
            for _ in range(workers):
                pool.submit(start)
            ready.wait(START_SECONDS)
        except BaseException as error:  # also what a signal's handler raises
            ready.abort()
            if isinstance(error, threading.BrokenBarrierError) or NO_THREAD.search(str(error)):
                return False
            raise
        finally:
            torch.set_num_threads(threads)
    return True


def _share(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within it the calling thread computes with ``count`` threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unlock() -> None:
    """The thread that held the lock does not exist in a forked process."""
    global _thread_count_lock
    _thread_count_lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)
