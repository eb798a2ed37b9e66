"""The means of the logged values over an epoch, and the speed of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd.trainer.run.distiller import Distiller
from fastkd.validate import check_int, check_number, check_type


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the terms.

    Example::

        try:
            train(config)
        except NonFiniteLossError as error:
            print(f"try a lower learning rate: {error}")
    """


class Meter:
    """Sums of the loss and its terms over an epoch, without a device synchronisation per step.

    ``add`` keeps the step's values on the device; ``flush`` moves all of them to the host in one transfer and adds them
    to ``sums`` in order. Steps whose loss, or gradient norm, is not finite were skipped: they are counted and reported,
    and more than ``max_skipped`` of them raise NonFiniteLossError.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor], Tensor] = lambda values: values,
        *,
        max_skipped: int = 0,
        scaled: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        """``reduce`` is the mean over the ranks. With ``scaled``, for fp16, gradients that are not finite do not count
        as skipped steps: the loss scale is found by them."""
        self.names: list[str] = []
        self.skipped = 0
        self.max_skipped = max_skipped
        self.report = report
        self._scaled = scaled
        self.sums: dict[str, float] = {}
        self.count = 0
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, Tensor]] = []
        self._reduce = reduce

    def add(self, step: int, loss: Tensor, terms: dict[str, Tensor], norm: Tensor) -> None:
        """Take the values of ``step``, counted from 1. Checked at once on the CPU, elsewhere every 64 steps."""
        self.names = ["loss", *terms, "grad_norm"]
        values = torch.stack([value.detach().float() for value in (loss, *terms.values(), norm)])
        self._pending.append((step, values))
        if values.device.type == "cpu" or len(self._pending) >= 64:
            self.flush()

    def flush(self) -> None:
        """Bring the pending values to the host."""
        if not self._pending:
            return
        steps, pending = zip(*self._pending, strict=True)
        self._pending = []
        rows = self._reduce(torch.stack(pending)).tolist()
        for step, row in zip(steps, rows, strict=True):
            if not math.isfinite(row[0]) or not (self._scaled or math.isfinite(row[-1])):
                self._skip(step, row)
                continue
            for name, value in zip(self.names[:-1], row, strict=False):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        self.latest = dict(zip(self.names, rows[-1], strict=True))

    def _skip(self, step: int, row: list[float]) -> None:
        shown = ", ".join(f"{name} = {value}" for name, value in zip(self.names, row, strict=True))
        what = "gradient" if math.isfinite(row[0]) else "loss"
        self.skipped += 1
        if self.skipped > self.max_skipped:
            before = f", after {self.max_skipped} that were skipped" if self.max_skipped else ""
            raise NonFiniteLossError(f"the {what} is not finite at step {step}{before}: {shown}")
        self.report(f"step {step} skipped, the {what} is not finite ({self.skipped} of {self.max_skipped}): {shown}")

    def means(self) -> dict[str, float]:
        """Mean of each value over the epoch's steps so far, without those that were skipped."""
        return {name: total / self.count for name, total in self.sums.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        self.sums, self.count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums so far, over how many steps, and how many steps of the run were skipped."""
        return {"sums": dict(self.sums), "count": self.count, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict`` returned; KeyError, TypeError or ValueError for anything else."""
        check_type("meter.sums", state["sums"], dict)
        for name, value in state["sums"].items():
            check_type("meter.sums", name, str)
            if not (isinstance(value, float) and not math.isfinite(value)):  # only the total is always finite
                check_number(f"meter.sums.{name}", value)
        for name in ("count", "skipped"):
            check_int(f"meter.{name}", state[name], 0)
            check_number(f"meter.{name}", state[name], 0, 2**62)
        self.sums, self.count, self.skipped = dict(state["sums"]), state["count"], state["skipped"]


def check_finite(distiller: Distiller, step: int) -> None:
    """Raise NonFiniteLossError when a weight is not finite: a finite loss can have a gradient that is not."""
    for module in (distiller.student.model, distiller.objective):
        trained = {name for name, _ in module.named_parameters()}
        for name, tensor in module.state_dict().items():
            # A buffer may hold infinities for good, such as an attention mask.
            bad = ~tensor.isfinite() if name in trained else tensor.isnan()
            if tensor.is_floating_point() and bad.any():
                raise NonFiniteLossError(f"the weights are not finite after step {step}: {name}")


class Clock:
    """Measures images per second, and the fraction of the time in which the run waited for the next batch."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._waited = 0.0
        self.images = 0

    def watch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of ``loader``; the time that it takes to hand them out counts as waiting."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - asked
            yield batch

    def values(self) -> dict[str, float]:
        """``images_per_second`` and ``data_wait``, in [0, 1], since the beginning."""
        seconds = time.perf_counter() - self._begun
        return {"images_per_second": self.images / seconds, "data_wait": self._waited / seconds}
