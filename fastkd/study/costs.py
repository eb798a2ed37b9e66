"""Measures what a training step costs: its time, and the most memory that it holds at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastkd.trainer.commands.dry_run import build_bare
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.additions import Additions
from fastkd.trainer.data.datasets import choose_data, without_download
from fastkd.trainer.data.labels import labels_of
from fastkd.trainer.data.loader import fetch
from fastkd.trainer.objective.objective import additions_of
from fastkd.trainer.optim import build_optimizer
from fastkd.trainer.precision import choose_device
from fastkd.trainer.run.prepare import with_samples

WARM_UP, ROUNDS = 5, 41


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one step: forward, backward and update for one batch."""

    milliseconds: float  # the median
    peak_bytes: int  # the most that torch held at once beyond what it held before: no weights, no optimiser state


def measure_costs(configs: Mapping[str, TrainConfig]) -> dict[str, Cost]:
    """The cost of a step of every config. The configs take turns step by step, so that all see the same load."""
    steps = {name: training_step(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            seconds = timed(step)
            if turn >= WARM_UP:
                times[name].append(1e3 * seconds)
    return {
        name: Cost(milliseconds=statistics.median(times[name]), peak_bytes=peak_bytes(step))
        for name, step in steps.items()
    }


def timed(step: Callable[[], object]) -> float:
    """The seconds that ``step`` takes, the work that it leaves to a GPU included."""
    _synchronize()
    begun = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - begun


def training_step(config: TrainConfig, rows: int | None = None) -> Callable[[], None]:
    """A function that trains one step on the first batch of ``config``'s data, or on its first ``rows`` images.

    It is the bare step of forward, backward and update, in float32. The trainer's ``TrainStep`` also checks for losses
    that are not finite, clips and averages, which costs about the same for every method. The weights are random, and
    the images too where the data are not there.
    """
    torch.manual_seed(config.seed)
    device = choose_device(config.device, config.precision)
    data, images, labels = _first_batch(config, rows or config.data.batch_size)
    config = with_samples(config, len(labels_of(data)))
    names, crd = additions_of(config.objective), config.objective.crd
    draw = Additions(names, data, crd.negatives, crd.mode)
    additions = {name: value.to(device) for name, value in draw(range(len(images)), 0, 0, lambda: images).items()}
    distiller = build_bare(config, images).to(device)
    distiller.begin_epoch(0)
    optimizer = build_optimizer(distiller, config.optim, device)
    labels = labels.clamp(max=distiller.classes - 1).to(device)
    images = images.to(device)

    def step() -> None:
        loss, _ = distiller(images, labels, additions=additions)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # last, so that a step frees the gradients that it made

    return step


def teaching_step(config: TrainConfig, rows: int) -> Callable[[], int]:
    """A function that runs the teacher alone on the images of ``training_step``; it returns the features' width."""
    torch.manual_seed(config.seed)
    device = choose_device(config.device, config.precision)
    _, images, _ = _first_batch(config, rows)
    distiller, images = build_bare(config, images).to(device), images.to(device)

    def step() -> int:
        output = distiller.teach(images)
        assert output is not None
        return output.features.shape[1]

    return step


class _Random:
    """Stands for data that are not there: labels of 50,000 images, as CIFAR-100 has them."""

    labels = torch.arange(50_000) % 100
    normalization = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _first_batch(config: TrainConfig, rows: int) -> tuple[Any, Tensor, Tensor]:
    """The training data with their first images and labels, or random ones where the data cannot be read."""
    try:
        data, _ = choose_data(without_download(config.data), None, None)
    except (ValueError, OSError):
        side = 32 if config.data.name == "cifar" else int(config.data.options.get("image_size", 224))
        return _Random(), torch.randn(rows, 3, side, side), _Random.labels[:rows]
    return data, *fetch(data, list(range(min(rows, len(data)))))


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that ``step`` has allocated and not yet freed at once, as torch's allocator reports them."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
