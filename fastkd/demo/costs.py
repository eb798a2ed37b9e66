"""Measures what a training step costs: its time, and the most memory that it holds at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import choose_data
from fastkd.trainer.data.loader import fetch
from fastkd.trainer.optim import build_optimizer
from fastkd.trainer.run.distiller import build_distiller

WARM_UP, ROUNDS = 5, 41


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one step on a CPU: forward, backward and update for one batch."""

    milliseconds: float  # the median
    peak_bytes: int  # the most that torch held at once beyond what it held before: no weights, no optimiser state


def measure_costs(configs: Mapping[str, TrainConfig]) -> dict[str, Cost]:
    """The cost of a step of every config. The configs take turns step by step, so that all see the same load."""
    steps = {name: training_step(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {
        name: Cost(milliseconds=statistics.median(times[name]), peak_bytes=peak_bytes(step))
        for name, step in steps.items()
    }


def training_step(config: TrainConfig) -> Callable[[], None]:
    """A function that trains one step on the first batch of ``config``'s data, on the CPU and in float32.

    It is the bare step of forward, backward and update. The trainer's ``TrainStep`` also checks for losses that are not
    finite, clips and averages, which costs about the same for every method.
    """
    torch.manual_seed(config.seed)
    data, _ = choose_data(config.data, None, None)
    images, labels = fetch(data, list(range(config.data.batch_size)))
    distiller = build_distiller(config, images)
    distiller.begin_epoch(0)
    optimizer = build_optimizer(distiller, config.optim, torch.device("cpu"))

    def step() -> None:
        loss, _ = distiller(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # last, so that a step frees the gradients that it made

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that ``step`` has allocated and not yet freed at once, as torch's CPU allocator reports them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # otherwise it reports that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    live = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
