"""``train``: one loop from the config to the last checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.config import TrainConfig, without_initial_weights
from fastkd.trainer.data.datasets import choose_data
from fastkd.trainer.data.labels import labels_hash, normalization_of
from fastkd.trainer.data.loader import eval_loader, first_images, train_loader
from fastkd.trainer.objective.terms import TermFunction
from fastkd.trainer.optim import Schedule
from fastkd.trainer.precision import choose_device
from fastkd.trainer.rng import resume_generators, rng_state, seed_everything
from fastkd.trainer.run.check import check_fit, check_teacher, report_broken
from fastkd.trainer.run.checkpoint import CheckpointFolder
from fastkd.trainer.run.describe import describe, header
from fastkd.trainer.run.distiller import build_distiller, weights_hash
from fastkd.trainer.run.evaluate import evaluate
from fastkd.trainer.run.folder import (
    Progress,
    TrainResult,
    check_same_run,
    given_as_objects,
    open_run,
    pack,
    unpack,
    write_run_file,
)
from fastkd.trainer.run.log import RunLog
from fastkd.trainer.run.meter import Clock, Meter, NonFiniteLossError, check_finite
from fastkd.trainer.run.prepare import prepare
from fastkd.trainer.run.ranks import join_ranks
from fastkd.trainer.run.step import TrainStep
from fastkd.trainer.signals import StopRequest


def train(
    config: TrainConfig,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    terms: Mapping[str, nn.Module | TermFunction] | None = None,
) -> TrainResult:
    """Train ``config.student`` by ``config.objective``; objects given as arguments replace what the config would build.

    ``student`` / ``teacher`` are modules, or ``FeatureModel(module, classifier)`` to name the classifier layer. A given
    teacher is left frozen: in eval mode and without gradient. ``train_data`` / ``eval_data`` are map-style datasets of
    (image, label), given together. ``terms`` are own objective terms. Reseeds torch's, Python's and numpy's generators.
    Under ``torchrun`` every rank calls this and gets the same result: see ``fastkd.trainer.run.ranks``. SIGTERM and
    SIGUSR1 end the run after the step they fall into, with a checkpoint to resume from.

    Raises:
        ValueError, TypeError: a setting that is wrong, or does not fit the others.
        CheckpointError: run folder in use; a checkpoint or weights missing, damaged, of another run, or not writable.
        NonFiniteLossError: the loss became NaN or infinite too often; the last good checkpoint stays.
        BrokenImagesError: too many images cannot be read.
    """
    ranks = join_ranks()
    device = ranks.place(choose_device(config.device, config.precision))
    folder, checkpoint = ranks.on_main(lambda: open_run(config))
    quiet = config.quiet or not ranks.is_main
    seed_everything(config.seed)
    train_set, eval_set = choose_data(config.data, train_data, eval_data)
    place = (ranks.rank, ranks.world_size)
    loader, set_epoch = train_loader(train_set, config.data, config.seed, device, *place)
    test_loader = eval_loader(eval_set, config.data, device, *place)
    sample = first_images(train_set)
    initial = config if checkpoint is None else without_initial_weights(config)
    distiller = build_distiller(initial, sample, student=student, teacher=teacher, terms=terms).to(device)
    check_fit(config, distiller, sample, loader.batch_sampler, train_set, eval_set)
    prepared = prepare(distiller, initial, device, ranks, normalization_of(train_set))
    per_epoch = len(loader)
    total = per_epoch * config.epochs
    schedule = Schedule(
        config.optim, steps_per_epoch=per_epoch, epochs=config.epochs, global_batch=config.data.batch_size
    )
    step = TrainStep(distiller, config, device, ranks)
    meter = Meter(ranks.mean, max_skipped=config.max_skipped, scaled=config.precision == "fp16")
    identity = {
        "config": config.to_dict(),
        "given_as_objects": given_as_objects(student=student, teacher=teacher, data=train_data),
        "train_samples": len(train_set),
        "labels_sha256": labels_hash(train_set),
        "teacher_sha256": None if distiller.teacher is None else weights_hash(distiller.teacher.model.model),
    }
    ranks.check_same(identity)
    info = describe(config, distiller, device, schedule, len(eval_set), identity, ranks.world_size)

    if checkpoint is None:
        check_teacher(distiller, config, test_loader, device, config.precision, ranks)

    # The same generator state begins every run of a seed, whatever the construction above drew from it.
    seed_everything(config.seed, ranks.rank)
    progress = Progress()
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
        progress = unpack(checkpoint, distiller, meter, step)
        if progress.loader is not None:
            loader.load_state_dict(progress.loader)
    result = TrainResult(
        accuracy=progress.history[-1].get("accuracy", math.nan) if progress.history else math.nan,
        history=progress.history,
        seconds=progress.seconds,
        parameters=info["student"]["parameters"],
        path=None if checkpoint is None else checkpoint.path,
        distiller=distiller,
        deployed=step.deployed,
        resumed_from=None if checkpoint is None else progress.step,
        already_finished=progress.epoch >= config.epochs,
    )
    if result.already_finished:
        distiller.eval()
        if not quiet:
            print(f"{folder}: the run is already finished ({total} steps, accuracy {result.accuracy:.4f})")
        ranks.close()
        return result

    saver: CheckpointFolder | None = None

    def open_folder() -> None:
        nonlocal saver
        if folder is not None:
            saver = CheckpointFolder(folder / "checkpoints", config.keep)  # locks it before anything in it changes
            write_run_file(folder, info)

    ranks.on_main(open_folder)
    log = RunLog(
        folder if ranks.is_main else None,
        size=progress.metrics_bytes,
        step=progress.step,
        steps=total,
        tensorboard=config.tensorboard,
        progress=config.progress,
        quiet=quiet,
    )
    meter.report = log.print
    begun = time.perf_counter() - progress.seconds

    def save(accuracy: float | None = None) -> None:
        if folder is None:
            return
        meter.flush()
        generators = ranks.gather(rng_state(device))

        def write() -> Path:
            assert saver is not None
            check_finite(distiller, progress.step)
            progress.metrics_bytes = log.sync()
            progress.seconds = time.perf_counter() - begun
            return saver.save(
                progress.step,
                student=distiller.student.model,
                ema=None if step.ema is None else step.ema.module,
                again=checkpoint is not None and progress.step == result.resumed_from,
                loss=distiller.objective,
                state=pack(progress, meter, step, generators),
                manifest={**identity, "epoch": progress.epoch, "accuracy": accuracy, "versions": info["versions"]},
            )

        result.path = ranks.on_main(write)

    try:
        for line in (*header(info), *prepared):
            log.print(line)
        if checkpoint is None:
            save()
        else:
            resume_generators(checkpoint.state, config.seed, ranks.rank, device)
            log.print(f"resumed from {checkpoint.path} at step {progress.step} of {total}")

        stop, stopping = StopRequest(), 0
        with stop:
            for epoch in range(progress.epoch, config.epochs):
                end = (epoch + 1) * per_epoch
                if progress.loader is None and progress.step < end:
                    meter.reset()
                progress.loader = None
                set_epoch(epoch)
                distiller.begin_epoch(epoch)
                clock = Clock()
                # A run that was stopped before its evaluation has the steps of this epoch behind it.
                for images, labels in clock.watch(loader) if progress.step < end else ():
                    lr = schedule(progress.step)
                    rows = loader.batch_sampler.rows(progress.step % per_epoch)
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    meter.add(progress.step + 1, *step(images, labels, ranks.share(len(labels), rows), lr))
                    clock.images += rows
                    progress.step += 1

                    if progress.step % config.log_every == 0:
                        meter.flush()
                        values = {"epoch": epoch, "lr": lr, **meter.latest, **distiller.scalars()}
                        log.record("step", progress.step, values)
                    stopping = ranks.largest(stop.signal)
                    by_step = config.save_every_steps and progress.step % config.save_every_steps == 0
                    if (by_step or stopping) and progress.step < end:
                        progress.loader = loader.state_dict()
                        save()
                        progress.loader = None
                    if stopping:
                        break

                meter.flush()
                if clock.images:
                    log.speed(progress.step, clock.values())
                    report_broken(train_set, log.print)
                if stopping and progress.step < end:
                    break
                record = {"epoch": epoch, "lr": schedule(end - 1), **meter.means(), **distiller.scalars()}
                finished = epoch + 1 == config.epochs
                if finished or (epoch + 1) % config.eval_every == 0:
                    record.update(evaluate(step.deployed, test_loader, device, config.precision, ranks, stop=stop))
                    stopping = ranks.largest(stop.signal)
                    if stopping:
                        save()
                        break
                    result.accuracy = record["accuracy"]
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
                    log.print(f"epoch {epoch + 1}/{config.epochs}  {shown}")
                progress.epoch = epoch + 1
                log.record("epoch", progress.step, record)
                progress.history.append({"step": progress.step, **record})
                by_epoch = config.save_every_epochs and progress.epoch % config.save_every_epochs == 0
                by_step = config.save_every_steps and progress.step % config.save_every_steps == 0
                if finished or by_epoch or by_step or stopping:
                    save(record.get("accuracy"))
                if stopping:
                    break
            if progress.epoch < config.epochs:
                result.stopped_by = signal.Signals(stopping)
                log.print(f"stopped at step {progress.step} of {total}; resume from {result.path}")
    except NonFiniteLossError as error:
        kept = f"the last good checkpoint is {result.path}" if result.path else "no checkpoint was kept"
        raise NonFiniteLossError(f"{error}; {kept}") from None
    finally:
        log.close()
        if saver is not None:
            saver.close()
    distiller.eval()
    step.deployed.eval()
    result.seconds = time.perf_counter() - begun
    step.close()
    ranks.close()
    return result
