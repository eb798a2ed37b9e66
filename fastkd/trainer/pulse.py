"""Signs of life of the ranks: by them the others know which rank has ended, or hangs, when they lose contact."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 4.0  # seconds in which a rank that lives must give one
# What a collective raises when another rank does not take part: torch has no exception of its own for it.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|timed? ?out|broken pipe", re.IGNORECASE)


class RankLostError(RuntimeError):
    """Another rank has ended with an exception, was killed, or does not answer; the message names it.

    Example::

        try:
            train(config)  # under torchrun
        except RankLostError as error:
            print(error)  # rank 1 of 2 ended with OSError: cannot read images/train
    """


class Pulse:
    """Tells the other ranks through ``store`` that this one lives, and with which exception it ended."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        """``timeout``: of the process group, in seconds."""
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._store = store.clone()  # type: ignore[attr-defined]  # a connection of its own
        self._store.set_timeout(timedelta(seconds=PATIENCE))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Give a sign of life now and then, from a thread of its own, until ``stop``."""
        for kind in ("ended", "waits"):  # of an earlier run of the same process
            self._store.delete_key(f"{kind}/{self._rank}")
        self._stopped.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has ended with the run
            while not self._stopped.is_set():
                self._store.set(f"beat/{self._rank}", repr(time.monotonic()))
                self._stopped.wait(BEAT)

    def stop(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join(PATIENCE)
            self._thread = None

    def tell(self, error: BaseException) -> RankLostError | None:
        """Tell the others that this rank ends with ``error``.

        What is returned is not None where ``error`` only says that the contact was lost: it names the rank at fault.
        """
        try:
            if (type(error) is RuntimeError or isinstance(error, dist.DistError)) and _LOST.search(str(error)):
                return self._find_lost()
            self._store.set(f"ended/{self._rank}", f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000])
        except RuntimeError:
            return RankLostError(f"the process in which torchrun or rank 0 of {self._world_size} ran has ended")
        return None

    def _find_lost(self) -> RankLostError | None:
        self._store.set(f"waits/{self._rank}", "")
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        before = {rank: self._get(f"beat/{rank}") for rank in others}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for rank in others:
                if (line := self._get(f"ended/{rank}")) is not None:
                    return self._lost([rank], f"ended with {line}")
            time.sleep(0.1)
        if silent := [rank for rank in others if self._get(f"beat/{rank}") == before[rank]]:
            return self._lost(silent, f"gave no sign of life for {PATIENCE:g} s: killed, stopped, or out of reach")
        if busy := [rank for rank in others if self._get(f"waits/{rank}") is None]:
            return self._lost(busy, f"did not answer within {self._timeout:g} s (rank_timeout), but its process lives")
        return None

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _lost(self, ranks: list[int], what: str) -> RankLostError:
        shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
        return RankLostError(f"rank {shown} of {self._world_size} {what}")
