"""Runs a function on several gloo ranks, each a process of one thread, under a hard timeout."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# A server that has imported torch once and forks: a fresh process costs milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.ranks", "tests.ranks.rank_programs", "fastkd.distributed.reduce"])


def run_ranks(
    world_size: int,
    program: Callable[..., Any],
    *arguments: Any,
    timeout: float = 30,
    group_timeout: float = 20,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """What ``program(rank, *arguments)`` returns on every rank of a default gloo group.

    An exception is returned as ``Failure``; a process that ends without an answer gives None. Processes that take
    longer than ``timeout`` seconds are killed, and TimeoutError is raised. With an ``environment`` the processes start
    afresh, which takes seconds.
    """
    context: Any = multiprocessing.get_context("spawn") if environment else _context
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_run, args=(rank, world_size, f"{folder}/store", group_timeout, pair[1], program, arguments)
            )
            for rank, pair in enumerate(pairs)
        ]
        with mock.patch.dict(os.environ, environment or {}):
            for process in processes:
                process.start()
        for _, sender in pairs:
            sender.close()
        deadline = time.monotonic() + timeout
        try:
            return [_receive(receiver, deadline) for receiver, _ in pairs]
        finally:
            for process in processes:
                process.join(max(0.1, min(5, deadline - time.monotonic())))
                process.kill()
                process.join()


class Failure:
    """The exception of a rank: its type's name, its message, its traceback."""

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error).__name__
        self.message = str(error)
        self.traceback = traceback.format_exc()

    def __repr__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.traceback}"


def succeeded(results: list[Any]) -> list[Any]:
    """The results, after a check that no rank failed."""
    for rank, result in enumerate(results):
        assert not isinstance(result, Failure), f"rank {rank}: {result}"
    return results


def _receive(receiver: Connection, deadline: float) -> Any:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError("a rank did not answer in time")
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return None


def _run(
    rank: int,
    world_size: int,
    store: str,
    group_timeout: float,
    sender: Connection,
    program: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    result: Any
    try:
        result = program(rank, *arguments)
    except BaseException as error:
        result = Failure(error)
    # Plain pickling: the tensors' bytes go through the pipe, no memory is shared.
    sender.send_bytes(pickle.dumps(result))
    sender.close()
    if not isinstance(result, Failure):
        dist.destroy_process_group()
