"""Workers that cannot start, interrupts, ending processes and forks: tiles are computed, and nobody waits for ever."""

import concurrent.futures.thread
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import dcd_loss
from fastkd.backends.blocked import tiles
from tests.helpers.checks import embeddings, value_and_grads

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "MIN_PARALLEL_ROWS", 600)
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def compute() -> tuple[Tensor, ...]:
    return value_and_grads(lambda *x: dcd_loss(*x, 4.0, backend="blocked"), *embeddings(1200, 8, dtype=torch.float32))


def started_after(count: int, fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``fail`` in the place of every start of a thread but the first ``count``."""
    start, calls = threading.Thread.start, []

    def failing(thread: threading.Thread) -> None:
        calls.append(thread)
        if len(calls) > count:
            fail()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)


def no_thread() -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_workers_that_cannot_start_leave_the_work_to_the_caller(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, before = compute(), threading.active_count()
    with monkeypatch.context() as patches:
        started_after(count, no_thread, patches)
        actual = compute()
    assert threading.active_count() == before
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(compute(), expected, strict=True))


class Interrupted(BaseException):
    """What a handler of a signal raises."""


@pytest.mark.parametrize("where", ["first start", "second start", "barrier"])
def test_an_interrupt_while_workers_start_reaches_the_caller(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, before, main = compute(), threading.active_count(), threading.main_thread()

    def interrupt() -> None:
        raise Interrupted

    with monkeypatch.context() as patches:
        if where == "barrier":
            wait = threading.Barrier.wait
            patches.setattr(
                threading.Barrier,
                "wait",
                lambda *args: interrupt() if threading.current_thread() is main else wait(*args),
            )
        else:
            started_after(int(where == "second start"), interrupt, patches)
        with pytest.raises(Interrupted):
            compute()
    assert threading.active_count() == before
    assert all(torch.equal(a, e) for a, e in zip(compute(), expected, strict=True))


def test_an_error_of_a_handler_is_not_taken_for_a_missing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler() -> None:
        raise RuntimeError("time is up")

    started_after(1, handler, monkeypatch)
    with pytest.raises(RuntimeError, match="time is up"):
        compute()


def test_signals_at_any_moment_leave_nothing_waiting() -> None:
    expected = compute()

    def handler(*_: Any) -> None:
        raise Interrupted

    old = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for attempt in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (1 + attempt))
                compute()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 0
    assert all(torch.equal(a, e) for a, e in zip(compute(), expected, strict=True))


def test_after_the_main_thread_has_ended_the_caller_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compute()
    monkeypatch.setattr(concurrent.futures.thread, "_shutdown", True)
    assert all(torch.equal(a, e) for a, e in zip(compute(), expected, strict=True))


def test_a_forked_process_has_workers_whoever_held_the_lock() -> None:
    like, seen = torch.zeros(1200, 1), []
    rounds = tiles.pair_rounds(tiles.blocks(len(like), like.device))
    with tiles._thread_count_lock:
        child = os.fork()
        if child == 0:  # no mathematics: OpenMP's own threads do not survive a fork
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # ends it if it waits
            try:
                tiles.for_each_tile(rounds, lambda *_: seen.append(threading.get_ident()), like, buffers=1)
                os._exit(0 if seen and threading.get_ident() not in seen else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
