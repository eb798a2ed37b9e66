"""``train``: one loop from the config to the last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.trainer.checkpoint import CheckpointFolder
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data import build_datasets, eval_loader, first_images, labelled_subset, labels_hash, train_loader
from fastkd.trainer.distiller import Distiller, build_distiller, weights_hash
from fastkd.trainer.evaluation import DTYPES, choose_device, evaluate
from fastkd.trainer.log import Meter, NonFiniteLossError, RunLog, check_finite, describe, header
from fastkd.trainer.objective import TermFunction
from fastkd.trainer.optim import Schedule, build_optimizer, set_learning_rate
from fastkd.trainer.state import (
    Progress,
    check_same_run,
    given_as_objects,
    open_run,
    pack,
    restore_rng,
    seed_everything,
    unpack,
    write_run_file,
)


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

    Raises:
        ValueError, TypeError: a setting that is wrong, or does not fit the others.
        CheckpointError: run folder in use, or a checkpoint or weights file missing, damaged or not belonging to this
            run.
        NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    device = choose_device(config.device, config.precision)
    folder, checkpoint = open_run(config)

    seed_everything(config.seed)
    train_set, eval_set = choose_data(config, train_data, eval_data)
    loader, set_epoch = train_loader(train_set, config.data, seed=config.seed, device=device)
    test_loader = eval_loader(eval_set, config.data, device)
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
    meter = Meter()
    identity = {
        "config": config.to_dict(),
        "given_as_objects": given_as_objects(student=student, teacher=teacher, data=train_data),
        "train_samples": len(train_set),
        "labels_sha256": labels_hash(train_set),
        "teacher_sha256": None if distiller.teacher is None else weights_hash(distiller.teacher.model.model),
    }
    info = describe(config, distiller, device, schedule, len(eval_set), identity)

    # The same generator state begins every run of a seed, whatever the construction above drew from it.
    seed_everything(config.seed)
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
        if not config.quiet:
            print(f"{folder}: the run is already finished ({total} steps, accuracy {result.accuracy:.4f})")
        return result

    saver = None
    if folder is not None:
        saver = CheckpointFolder(folder / "checkpoints", config.keep)  # locks the folder before anything in it changes
        write_run_file(folder, info)
    log = RunLog(
        folder,
        size=progress.metrics_bytes,
        step=progress.step,
        steps=total,
        tensorboard=config.tensorboard,
        progress=config.progress,
        quiet=config.quiet,
    )
    begun = time.perf_counter() - progress.seconds

    def save() -> None:
        if saver is not None:
            meter.flush()
            check_finite(distiller, progress.step)
            progress.metrics_bytes = log.sync()
            progress.seconds = time.perf_counter() - begun
            result.path = saver.save(
                progress.step,
                student=distiller.student.model,
                loss=distiller.objective,
                state=pack(progress, meter, optimizer, scaler, device),
                manifest={**identity, "epoch": progress.epoch, "versions": info["versions"]},
            )

    try:
        for line in header(info):
            log.print(line)
        if checkpoint is None:
            save()
        else:
            restore_rng(checkpoint.state["rng"], device)
            log.print(f"resumed from {checkpoint.path} at step {progress.step} of {total}")

        for epoch in range(progress.epoch, config.epochs):
            if progress.loader is None:
                meter.reset()
            progress.loader = None
            set_epoch(epoch)
            distiller.train()
            for images, labels in loader:
                lr = schedule(progress.step)
                set_learning_rate(optimizer, lr)
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                    loss, parts = distiller(images, labels)
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
                    values = {"epoch": epoch, "lr": lr, **meter.latest, **scalars(distiller)}
                    if norm is not None:
                        values["grad_norm"] = norm.item()
                    log.record("step", progress.step, values)
                if config.save_every_steps and progress.step % config.save_every_steps == 0 and not last:
                    progress.loader = loader.state_dict()
                    save()
                    progress.loader = None

            meter.flush()
            record = {"epoch": epoch, "lr": lr, **meter.means(), **scalars(distiller)}
            progress.epoch = epoch + 1
            finished = progress.epoch == config.epochs
            if finished or progress.epoch % config.eval_every == 0:
                record.update(evaluate(distiller.student, test_loader, device, config.precision))
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
    return result


def choose_data(config: TrainConfig, train_data: Any, eval_data: Any) -> tuple[Any, Any]:
    """The given datasets or the configured ones, cut to the labelled subset."""
    if (train_data is None) != (eval_data is None):
        raise ValueError("train_data, eval_data: got one of them, expected both or none")
    train_set, eval_set = build_datasets(config.data) if train_data is None else (train_data, eval_data)
    if config.data.labelled is not None:
        train_set = labelled_subset(train_set, config.data.labelled, config.data.subset_seed)
    return train_set, eval_set


def without_initial_weights(config: TrainConfig) -> TrainConfig:
    """For a resumed run: the student's weights come from the checkpoint, its first ones may be gone by now."""
    if config.student is None:
        return config
    return replace(config, student=replace(config.student, weights=None, pretrained=False))


def scalars(distiller: Distiller) -> dict[str, float]:
    """The objective's further values (tau and scale) on the host."""
    return {name: value.item() for name, value in distiller.objective.scalars().items()}
