"""A teacher that is run once for a study: which runs can share a cache, whether it pays, and how they get it."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fastkd.study.costs import teaching_step, timed, training_step
from fastkd.study.grid import Job, Study
from fastkd.study.jobs import Training
from fastkd.study.records import job_of, one_line
from fastkd.trainer.commands.cache_teacher import cache_teacher
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import choose_data, without_download
from fastkd.trainer.models.weights import CheckpointError
from fastkd.trainer.run.saved.checkpoint import CHECKPOINTS, list_checkpoints
from fastkd.trainer.run.saved.log import RUN
from fastkd.trainer.run.teacher_cache import every_epoch_alike, why_not_cached
from fastkd.trainer.strict_json import read_json_object

PAYS = 0.05  # share of the time of the runs that a cache must save
_PAUSE = 1.0  # seconds between two looks at a cache that another process writes
_MODEL = ("name", "num_classes", "options", "weights", "pretrained", "classifier", "normalization", "dtype", "fold")
_DATA = ("name", "options", "labelled", "unlabelled", "subset_seed", "batch_size", "drop_last", "shuffle_shards")


def cache_key(job: Job | str) -> str | None:
    """What runs have in common that can read one cache, as text. None for a job that can read none."""
    if not isinstance(job, Training) or job.stages or job.config.teacher is None or job.config.task != "classification":
        return None
    config = job.config
    if config.data.mixup or config.data.cutmix or why_not_cached(config) is not None:
        return None
    values = config.to_dict()
    parts = {name: values[name] for name in ("seed", "precision", "chunks")}
    parts |= {f"teacher.{name}": values["teacher"][name] for name in _MODEL}
    return json.dumps(parts | {f"data.{name}": values["data"][name] for name in _DATA}, sort_keys=True)


def sharing(jobs: Iterable[Job | str]) -> dict[str, list[TrainConfig]]:
    """The configs of the runs that can read one cache, by their ``cache_key``; those of a single run are left out."""
    found: dict[str, list[TrainConfig]] = {}
    for job in jobs:
        if (key := cache_key(job)) is not None and isinstance(job, Training):
            found.setdefault(key, []).append(job.config)
    return {key: configs for key, configs in found.items() if len(configs) > 1}


def lines(study: Study, jobs: Mapping[str, Job | str], rows: int, steps: int) -> list[str]:
    """What a cache of each teacher would come to, for the dry run. A few steps of ``rows`` images are timed."""
    by_teacher: dict[str, list[list[TrainConfig]]] = {}
    for configs in sharing(jobs.values()).values():
        assert configs[0].teacher is not None
        # The seeds of a study have a cache each, because they augment the images differently.
        by_teacher.setdefault(f"{configs[0].teacher.name} {configs[0].teacher.weights}", []).append(configs)
    told = []
    for name, caches in by_teacher.items():
        try:
            told.append(f"teacher {name}: {_worth(study, caches, rows, steps)}")
        except Exception as error:  # of models and data that are not there
            told.append(f"teacher {name}: a cache of unknown worth ({one_line(error)})")
    return told


def _worth(study: Study, caches: list[list[TrainConfig]], rows: int, steps: int) -> str:
    configs = max(caches, key=len)
    config, runs = configs[0], len(configs)
    teach, step = teaching_step(config, rows), training_step(config, rows)
    features = teach()
    step()
    alone = statistics.median(timed(teach) for _ in range(steps))
    saved = (runs - 1) / runs * min(1.0, alone / statistics.median(timed(step) for _ in range(steps)))
    epochs = max(config.epochs for config in configs)
    try:
        train_set, _ = choose_data(without_download(config.data), None, None)
        samples, epochs = len(train_set), 1 if every_epoch_alike(config, train_set, given=False) else epochs
    except (ValueError, OSError):
        if study.samples is None:
            raise
        samples = study.samples
    size = f"{2 * features * samples * epochs / 1e9:,.3g} GB"
    shared = f"{runs} runs share it, {size}"
    if len(caches) > 1:
        shared = f"{runs} runs of a seed share it, {len(caches)} caches of {size} each"
    pays = "it pays: --cache-teacher FOLDER" if saved >= PAYS else "it does not pay"
    return f"{shared} in float16, {saved:.0%} of their time saved; {pays}"


def as_begun(job: Job, folder: Path) -> Job | None:
    """The job with the cache that its run in ``folder`` has begun with, or without one; None if no run has begun there.

    A resumed run keeps its cache, because one in float16 changes a little what it computes.
    """
    if not isinstance(job, Training) or job.config.teacher is None or not list_checkpoints(folder / CHECKPOINTS):
        return None
    begun = read_json_object(folder / RUN, {"config": dict})["config"]["teacher"]
    cache = None if begun is None else begun.get("cache")
    return replace(job, config=replace(job.config, teacher=replace(job.config.teacher, cache=cache)))


def cache_of(job: Job | int) -> str | None:
    """The folder that the job reads its teacher from. None for a signal."""
    return None if not isinstance(job, Training) or job.config.teacher is None else job.config.teacher.cache


class Caches:
    """The caches in ``folder`` that the runs of ``study`` share; each is written when the first of them needs it."""

    def __init__(self, folder: Path, study: Study, study_folder: Path) -> None:
        self.folder = folder
        self._written: set[str] = set()
        self.shared = sharing(job_of(cell, study_folder) for cell in study.in_order_of_need())

    def place(self, job: Job) -> Path | None:
        """The folder of the job's cache. None for a job that shares its teacher with no other."""
        key = cache_key(job)
        if key is None or key not in self.shared or not isinstance(job, Training) or job.config.teacher is None:
            return None
        name = job.config.teacher.name.rpartition(":")[2]
        return self.folder / f"{name}-seed-{job.config.seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def give(self, job: Job) -> Job | int:
        """The job with its teacher's cache, which is written first; or the signal that stopped the writing.

        A job that shares its teacher with no other stays as it is.
        """
        key, place = cache_key(job), self.place(job)
        if key is None or place is None or not isinstance(job, Training):
            return job
        config = job.config
        assert config.teacher is not None
        longest = replace(config, epochs=max(other.epochs for other in self.shared[key]), quiet=True, progress=False)
        while key not in self._written:
            try:
                if stopped := cache_teacher(longest, place):
                    return stopped
                self._written.add(key)
            except CheckpointError as error:
                if "another process is writing" not in str(error):
                    raise
                time.sleep(_PAUSE)
        return replace(job, config=replace(config, teacher=replace(config.teacher, cache=str(place))))
