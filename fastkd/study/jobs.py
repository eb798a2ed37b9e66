"""The work of a cell: a training run, a linear probe of one, or the measurement of a step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastkd.study.costs import measure_costs
from fastkd.study.grid import Outcome
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.run.loop import train


@dataclass(frozen=True)
class Training:
    """A run of the trainer in the folder of the cell, resumed from its newest checkpoint if there is one.

    Its values: ``accuracy`` after the last epoch and ``best``, both in percent, ``seconds``, ``parameters``, and
    ``teacher_accuracy`` where the run has measured it.
    """

    config: TrainConfig

    def run(self, folder: Path) -> Outcome:
        config = replace(self.config, run_dir=str(folder), resume=False, resume_or_start=True, keep=1)
        result = train(replace(config, quiet=True, progress=False, tensorboard=False))
        if result.stopped_by is not None:
            return Outcome({}, int(result.stopped_by))
        evaluated = [record["accuracy"] for record in result.history if "accuracy" in record]
        values = {"accuracy": 100 * result.accuracy, "best": 100 * max(evaluated), "seconds": result.seconds}
        return Outcome(values | {"parameters": result.parameters})

    def settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def needed(self) -> list[Path]:
        teacher = None if self.config.teacher is None else self.config.teacher.weights
        root = None if self.config.data.options.get("download") else self.config.data.options.get("root")
        return [Path(path) for path in (root, teacher) if path is not None]


@dataclass(frozen=True)
class Probing:
    """A linear probe of the student of another cell, on other data. Its value is ``accuracy``, in percent."""

    run_dir: Path
    data: DataConfig
    device: str = "auto"
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, folder: Path) -> Outcome:
        from fastkd.trainer.commands.linear_probe import linear_probe
        from fastkd.trainer.commands.reopen import reopen
        from fastkd.trainer.data.datasets import build_datasets
        from fastkd.trainer.models.features import FeatureModel
        from fastkd.trainer.precision import choose_device

        opened = reopen(str(self.run_dir), best=False, with_data=False, trust_code=False)
        model = FeatureModel(opened.model, None if opened.config.student is None else opened.config.student.classifier)
        data, device = build_datasets(self.data), choose_device(self.device)
        result = linear_probe(model, *data, self.data, device, **dict(self.options))
        return Outcome({"accuracy": 100 * result.accuracy})

    def settings(self) -> dict[str, Any]:
        return {"data": dataclasses.asdict(self.data), "options": dict(self.options)}

    def needed(self) -> list[Path]:
        root = self.data.options.get("root")
        return [] if root is None or self.data.options.get("download") else [Path(root)]


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
