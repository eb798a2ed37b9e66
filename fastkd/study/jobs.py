"""The work of a cell: a training run, a linear probe of one, or the measurement of a step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastkd.study.costs import measure_costs
from fastkd.study.grid import Outcome
from fastkd.trainer.commands.linear_probe import SGDProbe, linear_probe_by_sgd
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.trainer.precision import choose_device
from fastkd.trainer.recipes.methods import PRETRAINING
from fastkd.trainer.recipes.stages import pretrained
from fastkd.trainer.run.loop import train
from fastkd.trainer.run.stages import train_stages
from fastkd.trainer.tasks.base import find_task


@dataclass(frozen=True)
class Training:
    """A run of the trainer in the folder of the cell, resumed from its newest checkpoint if there is one.

    Its values: ``accuracy`` after the last epoch (for another task its metric, such as ``map`` of detectors) and
    ``best``, both in percent, ``seconds`` and ``parameters``.

    With ``stages``, which are in ``config``'s place, they are run one after the other, as ``train_stages`` does it. The
    values are those of the last one, and ``seconds`` are of all.
    """

    config: TrainConfig
    stages: tuple[tuple[str, TrainConfig], ...] = ()

    def run(self, folder: Path) -> Outcome:
        if not self.stages:
            results = [train(_in(folder, self.config))]
        else:
            results = train_stages({name: _in(folder, stage) for name, stage in self.stages})
        result = results[-1]
        if result.stopped_by is not None:
            return Outcome({}, int(result.stopped_by))
        metric = find_task(self.config).metric
        evaluated = [record[metric] for record in result.history if metric in record]
        seconds = sum(one.seconds for one in results)
        values = {metric: 100 * result.accuracy, "best": 100 * max(evaluated), "seconds": seconds}
        return Outcome(values | {"parameters": result.parameters})

    def settings(self) -> dict[str, Any]:
        return self.config.to_dict() | ({"stages": {k: s.to_dict() for k, s in self.stages}} if self.stages else {})

    def needed(self) -> list[Path]:
        teacher = None if self.config.teacher is None else self.config.teacher.weights
        root = None if self.config.data.options.get("download") else self.config.data.options.get("root")
        return [Path(path) for path in (root, teacher) if path is not None]


def training(config: TrainConfig, method: str) -> Training:
    """The training of ``config``, or its stages if the method begins with a run of its own (AB, FSP, FT).

    The first stage has as large a share of the epochs as RepDistiller's 30 of 240. ValueError for a term that the
    trainer does not have.
    """
    stages = pretrained(config, method) if method in PRETRAINING else {"train": config}
    for stage in stages.values():
        for term in stage.objective.weights:
            if term not in TERMS:
                raise ValueError(f"the trainer has no term {term!r}")
    if method not in PRETRAINING:
        return Training(config)
    first = replace(stages["pretrain"], epochs=max(1, round(config.epochs * 30 / 240)))
    return Training(config, tuple((stages | {"pretrain": first}).items()))


def _in(folder: Path, config: TrainConfig) -> TrainConfig:
    """The config for a quiet run in ``folder`` that goes on where it stands."""
    config = replace(config, run_dir=str(folder), resume=False, resume_or_start=True, keep=1)
    return replace(config, quiet=True, progress=False, tensorboard=False)


@dataclass(frozen=True)
class Probing:
    """The linear probe of DCD's authors: of the student of another cell, on other data.

    Its value is ``accuracy``, in percent. The probe begins anew when it is interrupted.
    """

    run_dir: Path
    data: DataConfig
    probe: SGDProbe
    device: str = "auto"

    def run(self, folder: Path) -> Outcome:
        opened = reopen(self.run_dir, with_data=False)
        model = FeatureModel(opened.model, None if opened.config.student is None else opened.config.student.classifier)
        sets, device = build_datasets(self.data), choose_device(self.device)
        result = linear_probe_by_sgd(model, *sets, self.data, device, self.probe)
        return Outcome({"accuracy": 100 * result.accuracy})

    def settings(self) -> dict[str, Any]:
        return {"data": dataclasses.asdict(self.data), "probe": dataclasses.asdict(self.probe)}

    def needed(self) -> list[Path]:
        return [Path(self.data.options["root"])]


@dataclass(frozen=True)
class Costing:
    """What a training step costs on this machine: ``time`` in milliseconds, or ``memory`` in MiB beyond ``without``.

    Its value is ``cost``. The weights and the images are random, which changes neither.
    """

    config: TrainConfig
    without: TrainConfig
    measure: Literal["time", "memory"]

    def run(self, folder: Path) -> Outcome:
        costs = measure_costs({"step": self.config, "without": self.without})
        bytes_more = costs["step"].peak_bytes - costs["without"].peak_bytes
        value = costs["step"].milliseconds if self.measure == "time" else bytes_more / 2**20
        return Outcome({"cost": value})

    def settings(self) -> dict[str, Any]:
        return {"step": self.config.to_dict(), "measure": self.measure}

    def needed(self) -> list[Path]:
        return []
