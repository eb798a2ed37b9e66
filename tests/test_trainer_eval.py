"""Evaluation of runs whose student or data no config names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastkd.trainer import CheckpointError, DataConfig, ModelConfig, ObjectiveConfig, evaluate_checkpoint, train
from fastkd.trainer.cli import main
from tests.trainer_runs import DropoutNet, noisy_data, one_thread, tiny_config  # noqa: F401


def test_a_student_given_as_a_module_must_be_given_again(tmp_path):
    config = tiny_config(tmp_path, student=None, teacher=None, objective=ObjectiveConfig(terms="ce"), epochs=1)
    result = train(config, student=DropoutNet())
    with pytest.raises(CheckpointError, match="given as a module"):
        evaluate_checkpoint(result.path, trust_code=True)
    assert evaluate_checkpoint(result.path, model=DropoutNet(), trust_code=True).accuracy == result.accuracy


def test_what_was_given_as_objects_is_never_replaced_by_what_the_config_names(tmp_path, capsys):
    own = ModelConfig(name="fastkd.trainer.nets:SmallConvNet", options={"width": 2})
    config = tiny_config(tmp_path, student=own, teacher=None, objective=ObjectiveConfig(terms="ce"), epochs=1)
    config = dataclasses.replace(config, data=DataConfig(batch_size=4))  # names the digits
    data = dict(zip(("train_data", "eval_data"), noisy_data(), strict=True))
    result = train(config, **data)
    assert json.loads(Path(config.run_dir, "run.json").read_text())["given_as_objects"] == ["data"]
    with pytest.raises(CheckpointError, match=r"its data was given as objects; pass it as eval_data="):
        evaluate_checkpoint(result.path)
    assert main(["eval", str(result.path)]) == 1
    assert "given as objects" in capsys.readouterr().err
    assert evaluate_checkpoint(result.path, eval_data=data["eval_data"]).accuracy == result.accuracy

    config = dataclasses.replace(config, run_dir=str(tmp_path / "module"))
    torch.manual_seed(0)
    result = train(config, student=DropoutNet(), **data)
    described = json.loads(Path(config.run_dir, "run.json").read_text())
    assert described["given_as_objects"] == ["student", "data"]
    assert described["student"]["name"] == "DropoutNet"
    with pytest.raises(CheckpointError, match="its student was given as a module"):
        evaluate_checkpoint(result.path, eval_data=data["eval_data"])
    found = evaluate_checkpoint(result.path, model=DropoutNet(), eval_data=data["eval_data"])
    assert found.accuracy == result.accuracy
