"""Runs that distil a detector: resumed bit for bit, evaluated again, and refused where a setting makes no sense."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.trainer import TrainConfig, train
from fastkd.trainer.callbacks import Callback
from fastkd.trainer.commands.evaluate_task import evaluate_task
from fastkd.trainer.config import DetectionConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, read_checkpoint
from fastkd.trainer.tasks.detection.task import Detection
from tests.detection.conftest import configured


class _Kill(Callback):
    class Killed(BaseException):
        """No Exception, so that nothing is saved or tidied up."""

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        if step == 5:
            raise self.Killed


def test_a_resumed_run_equals_the_uninterrupted_one(root: Path, teacher: ModelConfig, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"teacher": teacher, "ema": 0.9, "detection": DetectionConfig(regions="foreground")}
    whole = configured(root, tmp_path / "whole", "dcd + kd", **changes)
    result = train(whole)
    assert {"map", "map_50", "detector/classifier", "dcd/contrast", "kd"} <= result.history[-1].keys()
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    with pytest.raises(_Kill.Killed):
        train(broken, callbacks=[_Kill()])
    workers = replace(broken.data, num_workers=1)
    again = train(replace(broken, resume=True, data=workers))
    assert again.history == result.history
    left, right = (read_checkpoint(find_checkpoint(config.run_dir or "")) for config in (whole, broken))
    assert left.manifest["step"] == right.manifest["step"] == 6
    for file, weights in left.weights.items():
        assert all(torch.equal(value, right.weights[file][name]) for name, value in weights.items()), file
    # The moving average is what is evaluated, and what a checkpoint gives back.
    found = evaluate_task(str(tmp_path / "whole"))
    assert found.values["map"] == pytest.approx(result.history[-1]["map"], abs=1e-9)


def test_maps_and_bfloat16(root: Path, teacher: ModelConfig, tmp_path: Path) -> None:
    changes = {"teacher": teacher, "precision": "bf16", "channels_last": True, "epochs": 1}
    result = train(configured(root, tmp_path, "fitnet + reviewkd", **changes))
    assert 0 < result.history[-1]["fitnet"] < 10
    assert 0 < result.history[-1]["reviewkd"] < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": 2}, "chunks: got 2 .* regions are sampled in one pass of a batch; expected 1"),
        ({"compile": True}, "compile: got True .* the number of boxes changes"),
        ({"data": DataConfig(mixup=0.2)}, "data.mixup: got 0.2 .* boxes cannot be mixed"),
        ({"data": DataConfig(cutmix=1.0)}, "data.cutmix: got 1.0 .* boxes cannot be mixed"),
        ({"data": DataConfig(unlabelled=True)}, "data.unlabelled: got True .* without boxes"),
        ({"data": DataConfig(labelled=7)}, "data.labelled: got 7 .* or --data.options.limit N"),
        ({"teacher": ModelConfig(name="faster-rcnn:small", fold=True)}, "teacher.fold: got True"),
        ({"objective": ObjectiveConfig(terms="simkd")}, "got 'simkd' .* the last map"),
        ({"objective": ObjectiveConfig(terms="norm")}, "got 'norm' .* the last map"),
        ({"objective": ObjectiveConfig(terms="msdcrd + kd")}, "got 'msdcrd' .* the last map"),
        ({"objective": ObjectiveConfig(terms="crd")}, "got 'crd' .* the number or a second view"),
    ],
)
def test_a_setting_without_meaning_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Detection(TrainConfig(task="detection", **{"objective": ObjectiveConfig(terms="detector"), **changes}))
    assert "\n" not in str(caught.value)


def test_other_data_and_other_numbers_of_classes_are_refused(root: Path, tmp_path: Path) -> None:
    config = configured(root, tmp_path, "detector")
    with pytest.raises(ValueError, match=r"data\.name: 'digits' does not give images with boxes"):
        train(replace(config, data=DataConfig(name="digits")))
    wrong = replace(config.student or ModelConfig(name="faster-rcnn:small"), num_classes=9)
    with pytest.raises(ValueError, match=r"student\.num_classes: got 9 for 4 classes of the data, expected 5"):
        train(replace(config, student=wrong))
