"""``fastkd train RECIPE --seeds 0 1 2``: a run per seed in a folder of its own, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.ranks import join_ranks
from fastkd.trainer.run.loop import TrainResult, train
from fastkd.trainer.run.saved.log import RUN, SEED_FOLDER
from fastkd.trainer.run.stages import train_stages


def train_seeds(config: TrainConfig | Mapping[str, TrainConfig], seeds: Sequence[int]) -> list[TrainResult]:
    """Train ``config``, or stages, with every seed, in folders ``seed-N`` of ``run_dir``, and print what comes out.

    A run that is there goes on where it stands; one that is finished is not trained again. So the same call continues
    what was broken off. After a signal the remaining seeds are left out: the last result then has ``stopped_by``.

    Raises:
        ValueError: no seed, or one twice; and what ``train`` raises.
    """
    for place, seed in enumerate(seeds):
        if seed in seeds[:place]:
            raise ValueError(f"seeds: got {seed} twice, expected different seeds")
    if not seeds:
        raise ValueError("seeds: got none, expected at least one")
    stages = {"": config} if isinstance(config, TrainConfig) else config
    first = next(iter(stages.values()))
    if first.run_dir is not None and (Path(first.run_dir) / RUN).exists():
        raise ValueError(f"run_dir: got {first.run_dir!r}, which holds a run, expected a folder for those of --seeds")
    ranks = join_ranks(first.rank_timeout)  # once for all runs: torchrun's store serves one process group
    results: list[TrainResult] = []
    for seed in seeds:
        folder = None if first.run_dir is None else str(Path(first.run_dir) / f"{SEED_FOLDER}{seed}")
        changes: Any = {"seed": seed, "run_dir": folder, "resume": False, "resume_or_start": folder is not None}
        runs = {name: replace(stage, **changes) for name, stage in stages.items()}
        results.append(train(runs[""]) if "" in runs else train_stages(runs)[-1])
        if results[-1].stopped_by is not None:
            break
    ranks.close()
    if ranks.is_main and not first.quiet:
        if results[-1].stopped_by is not None:
            print(f"stopped in seed {seeds[len(results) - 1]}; the same command goes on from there")
        else:
            print("\n".join(summary(seeds, [result.accuracy for result in results], results[0].metric)))
    return results


def summary(seeds: Sequence[int], accuracies: Sequence[float], metric: str = "accuracy") -> list[str]:
    """A line for every seed, and one with the mean and the standard deviation of a sample (divided by n - 1)."""
    lines = [f"seed {seed}: {metric} {accuracy:.4f}" for seed, accuracy in zip(seeds, accuracies, strict=True)]
    if len(seeds) > 1:
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        lines.append(f"{metric} {mean:.4f} ± {deviation:.4f} (mean ± standard deviation of {len(seeds)} seeds)")
    return lines
