"""Runs of the trainer that the multi-process tests start on every rank."""

import io
import itertools
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.ranks import patches


class StopTraining(Exception):
    """What interrupts a run in the tests."""


class _Convolutions(nn.Module):
    """A network with a map of 2x2 positions, without batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.Tanh())
        self.fc = nn.Linear(channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).mean((2, 3)))


def trained(rank: int, changes: dict[str, Any], stop_at: int | None = None, bad_on: int | None = None) -> Any:
    """A run of the trainer in float64 on networks without batch norm and dropout: history, weights, what it wrote."""
    from fastkd.trainer import Callback, DataConfig, ObjectiveConfig, OptimConfig, TensorImages, TrainConfig
    from fastkd.trainer.models.small import MLP
    from fastkd.trainer.run.loop import train as run

    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(46) % 4
    images = torch.randn(46, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    if rank == bad_on:
        images = images.clone()
        images[20] = float("nan")
    torch.manual_seed(1)
    student: nn.Module
    teacher: nn.Module
    terms = changes.pop("terms", None)
    if terms is None:
        student, teacher = (MLP(num_classes=4, in_features=16, hidden=(width,)) for width in (8, 12))
    else:
        student, teacher = _Convolutions(3), _Convolutions(5)
    calls = itertools.count(1)

    class Failing(Callback):
        def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
            assert rank == 0
            if step == fails_at:
                raise LookupError("no room for records")

    fails_at = changes.pop("callback_fails_at", None)

    def stop(*_: Any) -> dict[str, Tensor]:
        if next(calls) == stop_at:
            raise StopTraining
        return {"stop": torch.zeros(())}

    config = TrainConfig(
        data=DataConfig(batch_size=8, **{"drop_last": False, **changes.pop("data", {})}),
        objective=ObjectiveConfig(terms=f"{terms or 'dcd+kd'}+stop", **changes.pop("options", {})),
        optim=OptimConfig(lr=0.05, clip_norm=1.0),
        **{"epochs": 3, "device": "cpu", "log_every": 1, "tensorboard": False, "progress": False, **changes},
    )
    data = TensorImages(images, labels), TensorImages(images[:21], labels[:21])
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            result = run(
                config,
                student=student,
                teacher=teacher,
                train_data=data[0],
                eval_data=data[1],
                terms={"stop": stop},
                callbacks=[Failing()],
            )
    except StopTraining:
        return "stopped"
    distiller = result.distiller
    state = {**dict(distiller.named_parameters()), **dict(distiller.objective.named_buffers())}
    return {
        "history": result.history,
        "weights": {name: value.detach() for name, value in state.items()},
        "path": str(result.path),
        "resumed_from": result.resumed_from,
        "printed": printed.getvalue(),
    }


def reductions(rank: int, changes: dict[str, Any]) -> tuple[int, list[int], int]:
    """The number of trained parameters, the sizes of all all-reduces of more than 64 numbers, and the steps."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from fastkd.trainer.ranks import Ranks

    sizes: list[int] = []
    all_reduce, wrap = dist.all_reduce, Ranks.wrap

    def recorded(x: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(x.numel())
        return all_reduce(x, *arguments, **options)

    def wrap_with_hook(self: Ranks, module: nn.Module) -> nn.Module:
        wrapped = wrap(self, module)
        wrapped.register_comm_hook(None, allreduce_hook)  # the gradients then go through dist.all_reduce
        return wrapped

    patches.setattr(dist, "all_reduce", recorded)
    patches.setattr(Ranks, "wrap", wrap_with_hook)
    result = trained(rank, changes)
    parameters = sum(x.numel() for name, x in result["weights"].items() if not name.startswith("teacher."))
    return parameters, [size for size in sizes if size > 64], result["history"][-1]["step"]


def trained_with_batch_norm(rank: int, folder: str) -> tuple[dict[str, float], str, Tensor]:
    """A run with batch norm, dropout and drawn augmentations: last record, checkpoint, a layer's weights."""
    from fastkd.trainer.run.loop import train as run
    from tests.helpers.trainer_runs import tiny_config

    result = run(tiny_config(Path(folder), epochs=1, save_every_steps=4))
    return result.history[-1], str(result.path), result.distiller.student.model.fc.weight.detach()


def staged(rank: int, folder: str, resume: bool) -> list[tuple[str, bool]]:
    """Two stages: of each that was trained now its last checkpoint, and whether there was nothing left to do."""
    from dataclasses import replace

    from fastkd.trainer import train_stages
    from tests.run.test_stages import two_stages

    stages = {name: replace(config, resume=resume) for name, config in two_stages(Path(folder)).items()}
    return [(str(result.path), result.already_finished) for result in train_stages(stages)]


def evaluated_detector(rank: int, world_size: int) -> Any:
    """What ``evaluate`` of a detector gives on a rank; the precisions are replaced by the scores, in their order."""
    from fastkd.trainer.ranks import Ranks
    from fastkd.trainer.tasks.detection import evaluate as evaluation
    from tests.tasks.test_average_precision import results_of

    def scores(results: Any) -> Any:
        return [found["scores"].tolist() for found, _ in results], {1: (float(rank), 2)}

    patches.setattr(evaluation, "average_precision", scores)
    return results_of(rank, world_size, Ranks(rank, world_size))
