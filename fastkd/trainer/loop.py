"""``train``: one loop from the config to the last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.trainer.checkpoint import CheckpointFolder
from fastkd.trainer.config import TrainConfig, without_initial_weights
from fastkd.trainer.data import choose_data, eval_loader, first_images, labels_hash, train_loader
from fastkd.trainer.distiller import Distiller, build_distiller, weights_hash
from fastkd.trainer.evaluation import DTYPES, choose_device, evaluate
from fastkd.trainer.log import Meter, NonFiniteLossError, RunLog, check_finite, describe, header
from fastkd.trainer.optim import Schedule, build_optimizer, set_learning_rate
from fastkd.trainer.ranks import join_ranks
from fastkd.trainer.state import (
    Progress,
    check_same_run,
    given_as_objects,
    open_run,
    pack,
    resume_generators,
    rng_state,
    seed_everything,
    unpack,
    write_run_file,
)
from fastkd.trainer.terms import TermFunction


@dataclass
class TrainResult:
    """What ``train`` returns.

    ``accuracy``: top-1 on the evaluation set after the last epoch, in [0, 1]. ``history``: one dict per epoch (epoch,
    step, lr, the epoch's means of loss and terms, ``dcd/tau``, ``dcd/scale``, accuracy, eval_loss). ``seconds``:
    wall-clock of training, resumed parts included. ``parameters``: of the student. ``path``: the last checkpoint, None
    without run_dir. ``distiller``: student, teacher and objective, in eval mode. ``resumed_from``: the step, None for a
    new run. ``already_finished``: there was nothing left to do.
    """

    accuracy: float
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    path: Path | None
    distiller: Distiller
    resumed_from: int | None
    already_finished: bool


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
    Under ``torchrun`` every rank calls this and gets the same result: see ``fastkd.trainer.ranks``.

    Raises:
        ValueError, TypeError: a setting that is wrong, or does not fit the others.
        CheckpointError: run folder in use, or a checkpoint or weights file missing, damaged or not belonging to this
            run.
        NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint stays.
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
    per_epoch = len(loader)
    total = per_epoch * config.epochs
    schedule = Schedule(
        config.optim, steps_per_epoch=per_epoch, epochs=config.epochs, global_batch=config.data.batch_size
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer = build_optimizer(distiller, config.optim, device)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    meter = Meter(ranks.mean)
    identity = {
        "config": config.to_dict(),
        "given_as_objects": given_as_objects(student=student, teacher=teacher, data=train_data),
        "train_samples": len(train_set),
        "labels_sha256": labels_hash(train_set),
        "teacher_sha256": None if distiller.teacher is None else weights_hash(distiller.teacher.model.model),
    }
    ranks.check_same(identity)
    info = describe(config, distiller, device, schedule, len(eval_set), identity, ranks.world_size)

    # The same generator state begins every run of a seed, whatever the construction above drew from it.
    seed_everything(config.seed, ranks.rank)
    progress = Progress()
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
        progress = unpack(checkpoint, distiller, meter, optimizer, scaler)
        if progress.loader is not None:
            loader.load_state_dict(progress.loader)
    result = TrainResult(
        accuracy=progress.history[-1].get("accuracy", math.nan) if progress.history else math.nan,
        history=progress.history,
        seconds=progress.seconds,
        parameters=info["student"]["parameters"],
        path=None if checkpoint is None else checkpoint.path,
        distiller=distiller,
        resumed_from=None if checkpoint is None else progress.step,
        already_finished=progress.step >= total,
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
    step = ranks.step(distiller)
    begun = time.perf_counter() - progress.seconds

    def save() -> None:
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
                loss=distiller.objective,
                state=pack(progress, meter, optimizer, scaler, generators),
                manifest={**identity, "epoch": progress.epoch, "versions": info["versions"]},
            )

        result.path = ranks.on_main(write)

    try:
        for line in header(info):
            log.print(line)
        if checkpoint is None:
            save()
        else:
            resume_generators(checkpoint.state, config.seed, ranks.rank, device)
            log.print(f"resumed from {checkpoint.path} at step {progress.step} of {total}")

        for epoch in range(progress.epoch, config.epochs):
            if progress.loader is None:
                meter.reset()
            progress.loader = None
            set_epoch(epoch)
            distiller.begin_epoch(epoch)
            for images, labels in loader:
                lr = schedule(progress.step)
                share = ranks.share(len(labels), loader.batch_sampler.rows(progress.step % per_epoch))
                set_learning_rate(optimizer, lr)
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                    loss, parts = step(images, labels, share)
                meter.add(progress.step + 1, loss, parts)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                norm = None
                if config.optim.clip_norm is not None:
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(trainable, config.optim.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                progress.step += 1

                last = progress.step == (epoch + 1) * per_epoch
                if progress.step % config.log_every == 0:
                    meter.flush()
                    values = {"epoch": epoch, "lr": lr, **meter.latest, **distiller.scalars()}
                    if norm is not None:
                        values["grad_norm"] = norm.item()
                    log.record("step", progress.step, values)
                if config.save_every_steps and progress.step % config.save_every_steps == 0 and not last:
                    progress.loader = loader.state_dict()
                    save()
                    progress.loader = None

            meter.flush()
            record = {"epoch": epoch, "lr": lr, **meter.means(), **distiller.scalars()}
            progress.epoch = epoch + 1
            finished = progress.epoch == config.epochs
            if finished or progress.epoch % config.eval_every == 0:
                record.update(evaluate(distiller.student, test_loader, device, config.precision, ranks))
                result.accuracy = record["accuracy"]
                shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
                log.print(f"epoch {progress.epoch}/{config.epochs}  {shown}")
            log.record("epoch", progress.step, record)
            progress.history.append({"step": progress.step, **record})
            by_epoch = config.save_every_epochs and progress.epoch % config.save_every_epochs == 0
            by_step = config.save_every_steps and progress.step % config.save_every_steps == 0
            if finished or by_epoch or by_step:
                save()
    except NonFiniteLossError as error:
        kept = f"the last good checkpoint is {result.path}" if result.path else "no checkpoint was kept (no run_dir)"
        raise NonFiniteLossError(f"{error}; {kept}") from None
    finally:
        log.close()
        if saver is not None:
            saver.close()
    distiller.eval()
    result.seconds = time.perf_counter() - begun
    del step
    ranks.close()
    return result
