"""Evaluation of runs whose student or data no config names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.cli import main
from fastkd.trainer import CheckpointError, DataConfig, ModelConfig, ObjectiveConfig, evaluate_checkpoint, train
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.data.memory import TensorImages
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.run.evaluate import evaluate
from tests.helpers.trainer_runs import DropoutNet, noisy_data, one_thread, tiny_config  # noqa: F401


def test_what_was_given_as_objects_is_never_replaced_by_what_the_config_names(tmp_path, refused):
    own = ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 2})
    config = tiny_config(tmp_path, student=own, teacher=None, objective=ObjectiveConfig(terms="ce"), epochs=1)
    config = dataclasses.replace(config, data=DataConfig(batch_size=4))  # names the digits
    data = dict(zip(("train_data", "eval_data"), noisy_data(), strict=True))
    result = train(config, **data)
    assert json.loads(Path(config.run_dir, "run.json").read_text())["given_as_objects"] == ["data"]
    with pytest.raises(CheckpointError, match=r"its data was given as objects; pass it as eval_data="):
        evaluate_checkpoint(result.path)
    assert "given as objects" in refused("eval", result.path)
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


class Fixed(nn.Module):
    """Logits that the images themselves are; a layer that is never anything else keeps its last row apart."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, 7, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def test_top5_confusion_and_classes_are_counted() -> None:
    scores = torch.randn(40, 7, 1, 1)
    labels = torch.randint(6, (40,))
    data = TensorImages(scores, labels)
    confusion = torch.zeros(7, 7, dtype=torch.long)
    loader = eval_loader(data, DataConfig(eval_batch_size=16), torch.device("cpu"))
    values = evaluate(FeatureModel(Fixed()), loader, torch.device("cpu"), confusion=confusion)
    order = scores.flatten(1).argsort(1, descending=True)
    assert values["accuracy"] == (order[:, 0] == labels).double().mean().item()
    assert values["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    for label in range(7):
        for found in range(7):
            assert confusion[label, found] == ((labels == label) & (order[:, 0] == found)).sum()


def test_eval_names_the_hardest_classes_and_writes_everything(tmp_path, capsys) -> None:
    config = tiny_config(tmp_path, teacher=None, objective=ObjectiveConfig(terms="ce"), epochs=1)
    result = train(config)
    assert main(["eval", str(result.path), "--trust-code", "--json", str(tmp_path / "eval.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["accuracy"] == result.accuracy
    assert f"top-5 {written['top5']:.4f}" in printed
    confusion = torch.tensor(written["confusion"])
    assert confusion.sum() == written["samples"]
    assert confusion.diagonal().sum() / confusion.sum() == pytest.approx(result.accuracy)
    worst = min(written["per_class"], key=lambda name: written["per_class"][name])
    assert f"lowest accuracy: {worst} {written['per_class'][worst]:.3f}" in printed
    wrong = confusion.fill_diagonal_(0)
    place = int(wrong.argmax())
    assert f"{place // len(wrong)} as {place % len(wrong)} {int(wrong.max())}" in printed
