"""``fastkd cache-teacher``: runs the teacher once over the training data and keeps what its classifier reads."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastkd.trainer.commands.train import check_teacher_is_there, parse_stages
from fastkd.trainer.config import TrainConfig, without_initial_weights
from fastkd.trainer.data.additions import Additions
from fastkd.trainer.data.loader import GlobalBatches, SeededFetch, train_loader
from fastkd.trainer.files import FolderLock, writing
from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.precision import autocast, choose_device
from fastkd.trainer.ranks import Ranks, join_ranks
from fastkd.trainer.rng import seed_everything
from fastkd.trainer.run.accumulate import in_chunks
from fastkd.trainer.run.check import check_teacher
from fastkd.trainer.run.distiller import FrozenModel
from fastkd.trainer.run.prepare import RunData, build_models, identify, open_data, with_classes
from fastkd.trainer.run.saved.checkpoint import file_hash
from fastkd.trainer.run.saved.folder import CONFIG
from fastkd.trainer.run.teacher_cache import (
    CACHE_DTYPES,
    FORMAT,
    MANIFEST,
    TeacherCache,
    check_data,
    check_made_of,
    every_epoch_alike,
    file_name,
    layout,
    made_of,
    packed,
    write_manifest,
)
from fastkd.trainer.signals import StopRequest
from fastkd.trainer.tasks.base import find_task
from fastkd.validate import check_choice

_USAGE = """\
usage: fastkd cache-teacher RECIPE --output FOLDER [--dtype float16|float32|int8] [flags of fastkd train]
       fastkd cache-teacher RUN --output FOLDER ...   the settings of a run folder

Runs the recipe's teacher over the training images of every epoch, augmented as a run with the same seed augments them,
and keeps what its classifier reads. `fastkd train RECIPE --teacher.cache FOLDER` then runs the classifier alone. The
command goes on with what is in FOLDER; torchrun spreads it over processes. float32 gives the same run as the teacher.
"""
SAVE_EVERY = 120.0  # seconds between two notes of how far an epoch has come


def cache_teacher_command(arguments: list[str]) -> int:
    """Run ``fastkd cache-teacher`` with these arguments and return the exit status."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_USAGE, end="")
        return 0
    sys.path.insert(0, os.getcwd())
    parser = argparse.ArgumentParser(prog="fastkd cache-teacher", add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    parser.add_argument("--dtype", default="float16")
    given, rest = parser.parse_known_args(arguments)
    if given.output is None:
        raise ValueError("--output: is missing, expected the folder of the cache")
    if rest and (Path(rest[0]) / CONFIG).is_file():
        rest = ["--config", str(Path(rest[0]) / CONFIG), *rest[1:]]
    if not rest:
        raise ValueError("got no recipe, expected one (fastkd recipes lists them), or a run folder")
    stages = parse_stages(rest)
    flags = next(iter(stages.values()))
    if "" not in stages:
        raise ValueError(f"got a recipe of the stages {', '.join(stages)}, expected one of a single run")
    for flag, is_given in (("seeds", flags.seeds), ("dry-run", flags.dry_run)):
        if is_given:
            raise ValueError(f"--{flag}: is no flag here; a folder has the cache of one --seed, and is written at once")
    config = flags.settings
    check_teacher_is_there(config)
    stopped = cache_teacher(config, given.output, dtype=given.dtype)
    if os.environ.get("RANK", "0") == "0" and not config.quiet:
        again = "stopped; the same command goes on" if stopped else f"use it with --teacher.cache {given.output}"
        print(f"{given.output}: {again}")
    return 128 + stopped if stopped else 0


def cache_teacher(
    config: TrainConfig,
    folder: str | Path,
    *,
    dtype: str = "float16",
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
) -> int:
    """Write what the teacher's classifier reads in a run of ``config``; returns the signal that stopped it, else 0.

    A run then reads it in place of the teacher's forward passes::

        cache_teacher(config, "cache", dtype="float32")
        train(replace(config, teacher=replace(config.teacher, cache="cache")))

    Epochs that are in ``folder`` stay, and one that was begun is gone on with. The batches are those of the run, so
    that also a device whose last bits depend on a row's place in the batch gives what it would give in the run. Under
    ``torchrun`` every rank calls this: each computes its share, and rank 0 writes.

    Args:
        config: the settings of the run. Its loss and its student do not matter.
        folder: is made if it is not there.
        dtype: ``float32`` gives the run that the teacher itself gives. ``float16`` has half its size. ``int8`` has a
            quarter, with a scale for each row.
        student, teacher, train_data, eval_data: as in ``train``.

    Raises:
        ValueError: the folder has a cache of other settings, the disk is too small, or the teacher's logits do not
            follow from its features.
        CheckpointError: another process writes in the folder, or it cannot be written.
    """
    check_choice("dtype", dtype, CACHE_DTYPES)
    check_data(config, "cache-teacher")
    if config.teacher is None and teacher is None:
        raise ValueError("teacher: got None, expected one; give --teacher.name and --teacher.weights")
    if config.teacher is not None:
        config = replace(config, teacher=replace(config.teacher, cache=None))
    # Of the terms, DCD asks for the features, and needs no maps.
    config = replace(without_initial_weights(config), objective=ObjectiveConfig(terms="dcd"))
    ranks = join_ranks(config.rank_timeout)
    with ranks, ExitStack() as stack:
        ranks.check_same({**config.to_dict(), "cache": [str(folder), dtype]})
        ranks.on_main(lambda: stack.enter_context(_locked(Path(folder))))
        device = ranks.place(choose_device(config.device, config.precision))
        seed_everything(config.seed)
        task = find_task(config)
        data = open_data(config, task, train_data, eval_data, device, ranks)
        config = with_classes(config, task, data.train_set, data.eval_set, None)
        distiller, lines = build_models(
            config, task, data, device, ranks, resumed=True, student=student, teacher=teacher, terms=None
        )
        identity = identify(config, data, distiller, {"teacher": teacher, "data": train_data})
        ranks.check_same(vars(identity))
        for line in lines if ranks.is_main and not config.quiet else ():
            print(line)
        check_teacher(distiller, task, data.eval_loader, device, ranks)
        assert distiller.teacher is not None
        writer = _Writer(Path(folder), config, data, distiller.teacher, device, ranks)
        alike = every_epoch_alike(config, data.train_set, train_data is not None)
        made = {"made_of": made_of(identity, distiller, alike), "every_epoch_alike": alike}
        manifest = writer.described(dtype) | made
        writer.manifest = ranks.on_main(lambda: _begun(Path(folder), manifest))
        return writer.write(1 if alike else config.epochs)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with closing(FolderLock(folder, "writing a cache in this folder")) as lock:
        lock.keep()
        yield


def _begun(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest in ``folder``, or else the new one. ValueError for one of other settings."""
    if not (folder / MANIFEST).exists():
        return manifest
    found = TeacherCache(folder).manifest
    check_made_of(folder, found["made_of"], manifest["made_of"])
    for name in ("written_with", "features", "computed_in", "dtype"):
        if found[name] != manifest[name]:
            raise ValueError(
                f"output: {folder} was begun with {name} {found[name]}, this call has {manifest[name]}; expected the "
                "same, or another --output"
            )
    return found


class _Writer:
    """Writes the epochs that ``manifest`` lacks."""

    manifest: dict[str, Any]

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        data: RunData,
        teacher: FrozenModel,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.folder, self.config, self.data, self.teacher = folder, config, data, teacher
        self.device, self.ranks, self.samples = device, ranks, len(data.train_set)
        index, place = Additions(("index",), data.train_set), (ranks.rank, ranks.world_size)
        self.loader, self.set_epoch = train_loader(data.train_set, config.data, config.seed, device, *place, index)
        assert isinstance(self.loader.batch_sampler, GlobalBatches)
        self.batches = self.loader.batch_sampler

    def described(self, dtype: str) -> dict[str, Any]:
        """A manifest without epochs. ValueError for a teacher whose logits do not follow from its features."""
        again: ModelOutput | None = None
        with autocast(self.device, self.config.precision):
            output = self.teacher(self.data.sample.to(self.device))
            with suppress(RuntimeError):  # of a classifier that takes no rows
                again = None if output.classifier is None else self.teacher.finish(output.features)
        if again is None or again.logits.shape != output.logits.shape or not _close(again.logits, output.logits):
            raise ValueError(
                "teacher: its logits are not what its classifier makes of features [B, D], expected a model whose last "
                "layer is its classifier; this one cannot be cached"
            )
        batches, chunks = self.config.data.batch_size, self.config.chunks
        return {
            "format": FORMAT,
            "written_with": {"batches": batches, "ranks": self.ranks.world_size, "chunks": chunks},
            "features": output.features.shape[1],
            "computed_in": str(output.features.dtype).removeprefix("torch."),
            "dtype": dtype,
            "epochs": {},
            "begun": None,
        }

    def write(self, epochs: int) -> int:
        """Write what is missing of these epochs; a signal that stopped it, else 0."""
        todo = [epoch for epoch in range(epochs) if not self._is_written(epoch)]
        self.ranks.on_main(lambda: self._check_space(todo, epochs))
        shown = self.ranks.is_main and self.config.progress and not self.config.quiet and sys.stdout.isatty()
        columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with StopRequest() as stop, Progress(*columns, transient=True, disable=not shown) as bar:
            task = bar.add_task("", total=len(todo) * self.samples)
            for epoch in todo:
                bar.update(task, description=f"{epoch + 1}/{epochs}")
                for rows in self._epoch(epoch, stop):
                    bar.update(task, advance=rows)
                if stopping := self.ranks.largest(stop.signal):
                    return stopping
        return 0

    def _is_written(self, epoch: int) -> bool:
        """Whether rank 0 finds the epoch whole."""
        path, known = self.folder / file_name(epoch), self.manifest["epochs"].get(str(epoch))
        return self.ranks.on_main(lambda: bool(known) and path.is_file() and path.stat().st_size == known["bytes"])

    def _epoch(self, epoch: int, stop: StopRequest) -> Iterable[int]:
        """Write one epoch, batch by batch; yields how many samples are done since. Ends early after a signal."""
        path, begun = self.folder / file_name(epoch), self.manifest["begun"] or {}
        part = path.with_suffix(".part")
        kind, shape = layout(self.manifest["dtype"], self.samples, self.manifest["features"])
        arrays: list[np.memmap[Any, Any]] = []  # rank 0's

        self.set_epoch(epoch, 0)
        # Every epoch alike has no seed of its own, but the seed decides which samples the first batches held.
        place = {"epoch": epoch, "order": hashlib.sha256(np.asarray(self._order(), "<i8").tobytes()).hexdigest()}

        def begin() -> int:
            same = all(begun.get(name) == value for name, value in place.items())
            done = begun["batches"] if same and _is_array(part, kind, shape) else 0
            if begun and not done:  # what it tells of is about to be written over
                self.manifest["begun"] = None
                write_manifest(self.folder, self.manifest)
            with writing(part):
                arrays.append(_array(part, kind, shape, anew=not done))
            return done

        start = self.ranks.on_main(begin)
        array = arrays[0] if arrays else None
        self.set_epoch(epoch, start)
        yield min(start * self.batches.batch_size, self.samples)
        saved, left = time.monotonic(), self.samples - len(self.batches) * self.batches.batch_size
        for number, (images, _, added) in enumerate(itertools.chain(self.loader, self._left_over()), start):
            with autocast(self.device, self.config.precision):
                output = in_chunks(self.teacher, images.to(self.device, non_blocking=True), self.config.chunks)
            mine = added["index"].numpy(), packed(output.features, self.manifest["dtype"])
            for indices, rows in self.ranks.gather(mine):
                if array is not None:
                    keep = slice(None) if number < len(self.batches) else np.isin(indices, self._order()[-left:])
                    array[indices[keep]] = rows[keep]
            stopping = self.ranks.largest(stop.signal)
            if array is not None and (stopping or time.monotonic() - saved > SAVE_EVERY):
                array.flush()
                self.manifest["begun"] = place | {"batches": number + 1}
                write_manifest(self.folder, self.manifest)
                saved = time.monotonic()
            yield self.batches.rows(number) if number < len(self.batches) else left
            if stopping:
                return
        if array is not None:
            array.flush()
            entry = {"bytes": part.stat().st_size, "sha256": file_hash(part)}
            os.replace(part, path)
            self.manifest["epochs"][str(epoch)] = entry
            self.manifest["begun"] = None
            write_manifest(self.folder, self.manifest)

    def _left_over(self) -> Iterator[Any]:
        """The samples in no batch of the run, which other runs may read. The batch is as long as those of the run."""
        if len(self.batches) * self.batches.batch_size < self.samples:
            assert isinstance(self.loader.dataset, SeededFetch)
            batch, rank, ranks = self._order()[-self.batches.batch_size :], self.ranks.rank, self.ranks.world_size
            yield self.loader.dataset.__getitems__(batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks])

    def _order(self) -> list[int]:
        """The samples of the epoch in the order of the run."""
        return list(self.batches.sampler)

    def _check_space(self, todo: list[int], epochs: int) -> None:
        """Tell the size of the cache. ValueError if the disk has not that much left."""
        kind, shape = layout(self.manifest["dtype"], self.samples, self.manifest["features"])
        size = kind.itemsize * int(np.prod(shape))
        there = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.part"))
        needed, free = size * len(todo) - there, shutil.disk_usage(self.folder).free
        if not self.config.quiet:
            print(
                f"{self.folder}: {epochs} epoch{'s' if epochs > 1 else ''} of {self.samples:,} samples x "
                f"{self.manifest['features']} features in {self.manifest['dtype']}, {size * epochs / 1e9:,.3g} GB; "
                f"{len(todo)} to write"
            )
        if needed > free:
            raise ValueError(
                f"output: {self.folder} needs {needed / 1e9:,.3g} GB for {len(todo)} epochs of {size / 1e9:,.3g} GB, "
                f"its disk has {free / 1e9:,.3g} GB left: {(needed - free) / 1e9:,.3g} GB are missing"
            )


def _is_array(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the file holds a whole array of this kind."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return found.dtype == kind and found.shape == shape


def _array(part: Path, kind: np.dtype, shape: tuple[int, ...], *, anew: bool) -> np.memmap[Any, Any]:
    """The unfinished file of an epoch, mapped. Its blocks are reserved: a full disk is told here, and not by SIGBUS."""
    array = np.lib.format.open_memmap(part, "w+" if anew else "r+", kind if anew else None, shape if anew else None)
    if hasattr(os, "posix_fallocate"):
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left.float() - right.float()).norm() <= 1e-2 * right.float().norm())
