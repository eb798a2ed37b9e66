"""``train``: from the config to the last checkpoint, in one function."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.callbacks import Callback, built_in
from fastkd.trainer.config import TrainConfig, without_initial_weights
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.objective.terms.base import TermFunction
from fastkd.trainer.optim import Schedule
from fastkd.trainer.precision import choose_device
from fastkd.trainer.ranks import Ranks, join_ranks
from fastkd.trainer.rng import seed_everything
from fastkd.trainer.run.check import check_teacher, report_broken
from fastkd.trainer.run.describe import changes, describe, header
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.meter import Clock, Meter, NonFiniteLossError
from fastkd.trainer.run.prepare import build_models, identify, open_data, with_classes
from fastkd.trainer.run.saved.checkpoint import best_checkpoint, list_checkpoints, read_manifest
from fastkd.trainer.run.saved.folder import OpenRun, RunFolder, open_run
from fastkd.trainer.run.saved.log import FAILED
from fastkd.trainer.run.state import Progress, RunState
from fastkd.trainer.run.step import TrainStep
from fastkd.trainer.signals import StopRequest
from fastkd.trainer.tasks.base import find_task


@dataclass
class TrainResult:
    """What ``train`` returns::

        result = train(RECIPES["digits-teacher"]())
        print(f"{result.accuracy:.1%} after {result.seconds:.0f} s, saved in {result.path}")

    ``accuracy``: the metric of the task on the evaluation set after the last epoch, in [0, 1]: top-1 of a classifier,
    ``map`` of a detector, ``recall_1`` of embeddings. ``metric``: what people call it. ``history``: one dict per epoch
    (epoch, step, lr, the epoch's means of loss and terms, ``dcd/tau``, ``dcd/scale``, accuracy, top5, eval_loss).
    ``seconds``: wall-clock of training, resumed parts included. ``parameters``: of the student. ``path``: the last
    checkpoint, None without run_dir. ``distiller``: student, teacher and objective, in eval mode. ``deployed``: the
    model that was evaluated, the student or its moving average. ``resumed_from``: the step, None for a new run.
    ``already_finished``: there was nothing left to do. ``stopped_by``: the signal that ended the run early, else None.
    """

    accuracy: float
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    path: Path | None
    distiller: Distiller
    deployed: FeatureModel
    resumed_from: int | None
    already_finished: bool
    stopped_by: signal.Signals | None = None
    metric: str = "accuracy"

    @property
    def best(self) -> tuple[float, Path] | None:
        """Accuracy and path of the best checkpoint that was kept (``--best``). None if none was evaluated."""
        best = None if self.path is None else best_checkpoint(list_checkpoints(self.path.parent))
        return None if best is None else (read_manifest(best)["accuracy"], best)


def train(
    config: TrainConfig,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    terms: Mapping[str, nn.Module | TermFunction] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train ``config.student`` by ``config.objective``; objects given as arguments replace what the config would build.

    A run of a recipe, and one of your own modules and data::

        result = train(RECIPES["digits-teacher"]())
        config = TrainConfig(objective=ObjectiveConfig(terms="dcd+kd"), epochs=10, run_dir="runs/mine")
        result = train(config, student=student, teacher=teacher, train_data=images, eval_data=held_out)
        print(result.accuracy, result.path)

    ``student`` / ``teacher`` are modules, or ``FeatureModel(module, classifier)`` to name the classifier layer. A given
    teacher is left frozen: in eval mode and without gradient. ``train_data`` / ``eval_data`` are map-style datasets of
    (image, label), given together. ``terms`` are own objective terms. ``callbacks`` watch the run: see ``Callback``.
    Reseeds torch's, Python's and numpy's generators. Under ``torchrun`` every rank calls this and gets the same result:
    see ``fastkd.trainer.ranks``. SIGTERM and SIGUSR1 end the run after the step they fall into, with a checkpoint
    to resume from.

    Raises:
        ValueError, TypeError: a setting that is wrong, or does not fit the others.
        CheckpointError: run folder in use; a checkpoint or weights missing, damaged, of another run, or not writable.
        NonFiniteLossError: the loss became NaN or infinite too often; the last good checkpoint stays.
        BrokenImagesError: too many images cannot be read.
    """
    ranks = join_ranks(config.rank_timeout)
    with ranks:
        ranks.check_same(config.to_dict())
        with open_run(config, ranks) as opened:
            return _train(config, ranks, opened, student, teacher, train_data, eval_data, terms, callbacks)


def _train(
    config: TrainConfig,
    ranks: Ranks,
    opened: OpenRun,
    student: nn.Module | None,
    teacher: nn.Module | None,
    train_data: Any,
    eval_data: Any,
    terms: Mapping[str, nn.Module | TermFunction] | None,
    callbacks: Sequence[Callback],
) -> TrainResult:
    # Who am I: the device of this process, what watches the run, and the checkpoint to go on from.
    path, checkpoint = opened.path, opened.checkpoint
    watching = [*(built_in(config.tensorboard, config.track) if ranks.is_main else ()), *callbacks]
    device = ranks.place(choose_device(config.device, config.precision))

    # What is trained: data, models, schedule.
    seed_everything(config.seed)
    task = find_task(config)
    data = open_data(config, task, train_data, eval_data, device, ranks, terms)
    saved = None if checkpoint is None else checkpoint.manifest["config"]
    config = with_classes(config, task, data.train_set, data.eval_set, saved)
    initial = config if checkpoint is None else without_initial_weights(config)
    resumed = checkpoint is not None
    distiller, prepared = build_models(
        initial, task, data, device, ranks, resumed=resumed, student=student, teacher=teacher, terms=terms
    )
    per_epoch = len(data.batches)
    total = per_epoch * config.epochs
    schedule = Schedule(
        config.optim, steps_per_epoch=per_epoch, epochs=config.epochs, global_batch=config.data.batch_size
    )
    identity = identify(config, data, distiller, {"student": student, "teacher": teacher, "data": train_data})
    ranks.check_same(vars(identity))
    info = describe(config, distiller, device, schedule, len(data.eval_set), identity, ranks.world_size, task)
    if checkpoint is None:
        info["teacher_accuracy"] = check_teacher(distiller, task, data.eval_loader, device, ranks)
    else:
        info["teacher_accuracy"] = checkpoint.manifest.get("teacher_accuracy")

    # Where it stands: at the beginning, or as the checkpoint has it. The same generator state begins every run of a
    # seed, whatever the construction above drew from it.
    seed_everything(config.seed, ranks.rank)
    step = TrainStep(distiller, config, device, ranks, task)
    meter = Meter(ranks.mean, max_skipped=config.max_skipped, scaled=config.precision == "fp16")
    state = RunState(distiller, step, meter, Progress())
    if checkpoint is not None:
        identity.check(checkpoint)
        state.restore(checkpoint, config.seed, ranks.rank)
    progress = state.progress
    if progress.step > total:
        done = -(-progress.step // per_epoch)
        raise ValueError(f"epochs: got {config.epochs}, expected at least the {done} that the checkpoint has begun")
    result = TrainResult(
        accuracy=progress.history[-1].get(task.metric, math.nan) if progress.history else math.nan,
        history=progress.history,
        seconds=progress.seconds,
        parameters=info["student"]["parameters"],
        path=None if checkpoint is None else checkpoint.path,
        distiller=distiller,
        deployed=step.deployed,
        resumed_from=None if checkpoint is None else progress.step,
        already_finished=progress.epoch >= config.epochs,
        metric=task.title,
    )
    if result.already_finished:
        distiller.eval()
        if ranks.is_main and not config.quiet:
            print(f"{path}: the run is already finished ({total} steps, {task.title} {result.accuracy:.4f})")
        return result

    folder = RunFolder(opened, config, identity, info, state, ranks, watching)
    log = folder.log
    meter.report = log.print
    try:
        with folder, StopRequest() as stop:
            for line in (*header(info), *prepared):
                log.print(line)
            if checkpoint is None:
                folder.save()
            else:
                for line in (
                    f"resumed from {checkpoint.path} at step {progress.step} of {total}",
                    *(changes(checkpoint, config, schedule, progress.step, device) if ranks.is_main else ()),
                ):
                    log.print(line)

            stopping = 0
            for epoch in range(progress.epoch, config.epochs):
                end = (epoch + 1) * per_epoch
                if progress.step == epoch * per_epoch:
                    meter.reset()
                data.set_epoch(epoch, progress.step - epoch * per_epoch)
                distiller.begin_epoch(epoch)
                clock = Clock()
                # A run that was stopped before its evaluation has the steps of this epoch behind it.
                for batch in clock.watch(data.loader) if progress.step < end else ():
                    lr = schedule(progress.step)
                    rows = data.batches.rows(progress.step % per_epoch)
                    rank_weight = ranks.weight(task.rows(batch), rows)
                    meter.add(progress.step + 1, *step(task.to(batch, device), rank_weight, lr))
                    clock.images += rows
                    progress.step += 1

                    if progress.step % config.log_every == 0:
                        meter.flush()
                        values = {"epoch": epoch, "lr": lr, **meter.latest, **distiller.scalars()}
                        log.record("step", progress.step, values, clock.values()["images_per_second"])
                    stopping = ranks.largest(stop.signal or log.failed)
                    by_step = config.save_every_steps and progress.step % config.save_every_steps == 0
                    if (by_step or stopping) and progress.step < end:
                        folder.save()
                    if stopping:
                        break

                meter.flush()
                if clock.images:
                    log.speed(progress.step, clock.values())
                    report_broken(data.train_set, log.print)
                if stopping and progress.step < end:
                    break
                record = {"epoch": epoch, "lr": schedule(end - 1), **meter.means(), **distiller.scalars()}
                finished = epoch + 1 == config.epochs
                if finished or (epoch + 1) % config.eval_every == 0:
                    per_class: dict[str, Any] = {}
                    watched: dict[str, Any] = {"per_class": per_class, "stop": stop}
                    values = task.evaluate(step.deployed, data.eval_loader, device, config.precision, ranks, **watched)
                    record.update(values)
                    stopping = ranks.largest(stop.signal)
                    if stopping:
                        folder.save()
                        break
                    result.accuracy = record[task.metric]
                    folder.write_classes(per_class)
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
                    log.print(f"epoch {epoch + 1}/{config.epochs}  {shown}")
                progress.epoch = epoch + 1
                log.record("epoch", progress.step, record)
                stopping = ranks.largest(stop.signal or log.failed)
                progress.history.append({"step": progress.step, **record})
                by_epoch = config.save_every_epochs and progress.epoch % config.save_every_epochs == 0
                by_step = config.save_every_steps and progress.step % config.save_every_steps == 0
                if finished or by_epoch or by_step or stopping:
                    folder.save(record.get(task.metric))
                if stopping:
                    break
            if progress.epoch < config.epochs:
                log.print(f"stopped at step {progress.step} of {total}; resume from {folder.newest}")
                result.stopped_by = None if stopping == FAILED else signal.Signals(stopping)
            folder.end("failed" if stopping == FAILED else "finished" if result.stopped_by is None else "stopped")
    except NonFiniteLossError as error:
        kept = f"the last good checkpoint is {folder.newest}" if folder.newest else "no checkpoint was kept"
        raise NonFiniteLossError(f"{error}; {kept}") from None

    distiller.eval()
    step.deployed.eval()
    result.path, result.seconds = folder.newest, folder.seconds
    step.close()
    return result
