"""Runs a function on several ranks, each a process of one thread, under a hard timeout.

The ranks exchange CPU tensors by gloo. Where there is a CUDA device for each, they can exchange CUDA tensors by NCCL.

The processes stay for the whole session, because starting them takes longer than most programs. Every call gets a
process group of its own. A call that does not end well on all ranks costs the processes, and the next starts new ones.
"""

import atexit
import datetime
import multiprocessing
import os
import pickle
import random
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastkd.distributed.group import configure

# A server that has imported torch once and forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "tests.helpers.ranks", "tests.ranks.rank_programs"])

STARTED_WITHIN = 120  # seconds
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
NCCL_SECONDS = 150  # in which communicators are made and kernels are compiled, beside what a program takes

# On a rank: what a program replaces through this is put back when the program ends.
patches = pytest.MonkeyPatch()


def run_ranks(
    world_size: int,
    program: Callable[..., Any],
    *arguments: Any,
    timeout: float = 30,
    group_timeout: float = 20,
    environment: dict[str, str] | None = None,
    device: str = "cpu",
) -> list[Any]:
    """What ``program(rank, *arguments)`` returns on every rank of a default group.

    An exception is returned as ``Failure``; a process that ends without an answer gives None. Processes that take
    longer than ``timeout`` seconds are killed, and TimeoutError is raised. With an ``environment`` the processes are
    started for this call alone, which takes seconds. On ``cuda`` every rank has a device of its own, which is its
    current one, and returns CPU tensors. The test is skipped where there are fewer devices than ranks.
    """
    if device == "cuda":
        if torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} CUDA devices")
        timeout, group_timeout = timeout + NCCL_SECONDS, group_timeout + NCCL_SECONDS
    if environment is None:
        ranks = _kept
    else:
        with mock.patch.dict(os.environ, environment):
            ranks = _Ranks(multiprocessing.get_context("spawn"))
            ranks.start(world_size)
    results: list[Any] = []
    try:
        ranks.start(world_size)
        results = ranks.run(world_size, device, group_timeout, program, arguments, time.monotonic() + timeout)
    finally:
        if environment is not None or not results or not all(map(_ended_well, results)):
            ranks.end()
    return results


def under_torchrun(program: Callable[..., Any], *arguments: Any, max_restarts: int = 0) -> list[Any]:
    """What ``program(*arguments)`` returns on two ranks that torchrun's agent starts, watches and restarts.

    The agent runs in this process, and the ranks' processes are forks of the server, because three imports of torch and
    the trainer would take most of the time. ChildFailedError where a rank failed and is not restarted.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=max_restarts, start_method="forkserver",
        run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    # In the main thread it would take over the handling of signals.
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(elastic_launch(config, program), *arguments).result()
    return [results[rank] for rank in sorted(results)]


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


class _Ranks:
    """Processes that run one program after another; the first ones of them are the ranks of a call."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._processes: list[tuple[Any, Connection]] = []

    def start(self, count: int) -> None:
        """Start processes until there are ``count``, and wait for them, which no timeout of a program includes."""
        started = len(self._processes)
        while len(self._processes) < count:
            own, other = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(other,))
            process.start()
            other.close()
            self._processes.append((process, own))
        for _, connection in self._processes[started:]:
            assert connection.poll(STARTED_WITHIN), "a rank did not start"
            connection.recv_bytes()

    def run(
        self,
        world_size: int,
        device: str,
        group_timeout: float,
        program: Callable[..., Any],
        arguments: tuple[Any, ...],
        deadline: float,
    ) -> list[Any]:
        connections = [connection for _, connection in self._processes[:world_size]]
        with tempfile.TemporaryDirectory() as folder:
            for rank, connection in enumerate(connections):
                # Plain pickling: the tensors' bytes go through the pipe, no memory is shared.
                task = (rank, world_size, device, f"{folder}/store", group_timeout, program, arguments)
                connection.send_bytes(pickle.dumps(task))
            return [_receive(connection, deadline) for connection in connections]

    def end(self) -> None:
        for process, connection in self._processes:
            connection.close()
            process.kill()
            process.join()
        self._processes = []


_kept = _Ranks(_context)
# Before multiprocessing's own handler, which would wait for the processes.
atexit.register(_kept.end)


def _ended_well(result: Any) -> bool:
    return result is not None and not isinstance(result, Failure)


def _receive(connection: Connection, deadline: float) -> Any:
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError("a rank did not answer in time")
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None


def _serve(connection: Connection) -> None:
    """A process of :class:`_Ranks`; it ends when the other side of the connection does, or after an exception."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    connection.send_bytes(b"started")
    failed = False
    while not failed:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        _as_if_just_started()
        result = _run(*task)
        failed = isinstance(result, Failure)
        connection.send_bytes(pickle.dumps(result))


def _as_if_just_started() -> None:
    """Undo what an earlier program may have left behind."""
    patches.undo()
    configure()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.compiler.reset()


def _run(
    rank: int,
    world_size: int,
    device: str,
    store: str,
    group_timeout: float,
    program: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        BACKENDS[device],
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    try:
        result = program(rank, *arguments)
    except BaseException as error:
        return Failure(error)
    dist.destroy_process_group()
    return result
