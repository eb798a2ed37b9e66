"""The ranks of a run, as ``torchrun`` starts them; with one process, everything here does nothing.

W ranks take the same steps as one process. Every global batch is split over them. A term that is a mean over a rank's
rows is weighted so that its average over the ranks is the mean over the global batch. DistributedDataParallel averages
the gradients, and metrics are averaged too. Every rank evaluates its part of the evaluation set. Rank 0 logs and writes
the checkpoints, which another number of ranks can resume. Two things differ from one process: batch norm normalises
with a rank's own rows, and dropout and augmentations draw from a generator of each rank.

A rank that raises, hangs or dies ends the others: at once where their connections break, else after
``TrainConfig.rank_timeout``. They raise a RankLostError that names the rank. (A process group that a program started
itself keeps its own time-out and torch's own exceptions.)
"""

from __future__ import annotations

import gc
import os
import pickle
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.trainer.pulse import Pulse
from fastkd.trainer.signals import StopRequest

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, of how many. Every method is called by all ranks, in the same order."""

    rank: int = 0
    world_size: int = 1
    started_here: bool = False
    pulse: Pulse | None = None

    @classmethod
    def present(cls) -> Self:
        """The ranks of the default process group, where there is one."""
        several = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if several else cls()

    def __enter__(self) -> Self:
        if self.pulse is not None:
            self.pulse.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the process group if it was started here, or tell the other ranks why this one ends."""
        try:
            if error is None:
                self.close()
        except RuntimeError as found:
            error = found
            raise
        finally:
            if self.pulse is not None:
                with StopRequest():  # torchrun ends the ranks that are left by SIGTERM, which must not come first
                    lost = None if error is None else self.pulse.tell(error)
                self.pulse.stop()
                if lost is not None:
                    raise lost from error

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes checkpoints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returns on rank 0, on every rank; an exception there is raised on every rank."""
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as error:
                failure, answer[1] = error, _as_sent(error)
        dist.broadcast_object_list(answer, 0)
        if failure is not None or answer[1] is not None:
            raise failure or answer[1]
        return answer[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks."""
        return self.sum(value) / self.world_size if self.world_size > 1 else value

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise ValueError, which names what differs in nested dicts, on every rank when the values differ."""
        first, *rest = self.gather(values)
        for rank, others in enumerate(rest, 1):
            if found := [f"{name}: got {a} on rank 0, {b} on rank {rank}" for name, a, b in _differing(first, others)]:
                more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
                raise ValueError(f"{'; '.join(found[:4])}{more}; expected the same on every rank")

    def weight(self, rows: int, global_rows: int) -> float:
        """W n / N, the weight of this rank's means.

        A mean over this rank's n of N rows times W n / N, averaged over the W ranks, is the mean over the global batch.
        """
        return rows * self.world_size / global_rows

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank: its own GPU of this machine if ``device`` is CUDA without an index."""
        if self.world_size > 1 and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            torch.cuda.set_device(device)
        return device

    def wrap(self, trained: nn.Module) -> nn.Module:
        """``trained``, under DistributedDataParallel if there are several ranks.

        That gives every rank the weights of rank 0 now, and the mean of all ranks' gradients in each backward pass.
        """
        if self.world_size == 1:
            return trained
        # What all ranks compute alike (the memories of CRD) is sent once, and not before every step.
        alike = [f"{name}.{buffer}" for name, module in trained.named_modules()
                 for buffer in getattr(module, "same_on_ranks", ())]  # fmt: skip
        for name in alike:
            dist.broadcast(trained.get_buffer(name), 0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, alike)
        # static_graph: parameters that no term uses (a classifier without cross-entropy) are found once.
        return DistributedDataParallel(trained, static_graph=True)

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: int) -> int:
        """The sum of ``value`` over the ranks."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: int, operation: Any) -> int:
        if self.world_size == 1:
            return value
        on_cpu = "cpu:" in dist.get_backend_config()
        found = torch.tensor(value, device=None if on_cpu else torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(found, operation)
        return int(found)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0 (the running statistics of batch norm), which checkpoints hold."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        """End the process group if it was started here."""
        global _pulse
        if self.started_here:
            _pulse = None
            gc.collect()  # DistributedDataParallel lies in reference cycles, and holds the group
            dist.barrier()
            dist.destroy_process_group()


def _as_sent(error: Exception) -> Exception:
    """``error``, or what says the same where ``error`` does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _differing(left: Any, right: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """The dotted name and both values, shortened, of all that differs."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        for key in left:
            yield from _differing(left[key], right[key], f"{name}.{key}" if name else str(key))
    elif left != right:
        yield name, reprlib.repr(left), reprlib.repr(right)


_pulse: Pulse | None = None  # of the process group that was started here


def join_ranks(timeout: float) -> Ranks:
    """The ranks of the default process group, or those that torchrun's environment names; else this process alone.

    ``timeout``: how long a rank waits for the others, in seconds, in a process group that is started here.
    """
    global _pulse
    if not dist.is_available():
        return Ranks()
    started_here = False
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return Ranks()
        # With a CPU backend beside NCCL, what the ranks agree on beforehand does not wait for the device.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # torchrun's store outlives a restart: without a prefix, ranks read the addresses of those that died.
        limit = timedelta(seconds=timeout)
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=limit)))
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        started_here = True
        _pulse = Pulse(dist.PrefixStore("pulse", store), rank, world_size, timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), started_here, _pulse)
