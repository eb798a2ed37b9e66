"""A request to stop that comes as a signal: Ctrl-C, SIGTERM, or SIGUSR1, which SLURM sends before the time is up."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While it is entered, a signal only sets ``signal`` to its number; on leaving, the earlier handlers come back.

    A second Ctrl-C does what it did before, and usually ends the process at once. Where Ctrl-C is ignored, as in a
    background job of a shell, it stays ignored.

    Outside the main thread, where Python allows no handlers, ``signal`` stays 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            for number in SIGNALS[:-1] if ignored else SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])


def leave_signals_to_main(worker: int) -> None:
    """Make a loader's worker process ignore the signals that ask the run to stop.

    torchrun, timeout and scancel signal the whole process group, and a worker that dies takes the run with it.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # The main process itself ends its workers by SIGTERM, and would wait for one that ignored that for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main, args=(os.getppid(),), daemon=True).start()


def _end_with_main(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
