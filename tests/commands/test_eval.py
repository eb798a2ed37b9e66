"""Evaluation of checkpoints, weights files and published models, on their own and on other data."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastkd.cli import main
from fastkd.trainer import (
    CheckpointError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    build_model,
    evaluate_checkpoint,
    train,
)
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.data.readers.memory import TensorImages
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.tasks.evaluate import evaluate
from tests.helpers.trainer_runs import DropoutNet, noisy_data, one_thread, seal, tiny_config  # noqa: F401


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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 training and 12 evaluation images, each class of a colour of its own."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(90, (12, 12, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def coloured(pictures, tmp_path_factory):
    """A finished run on the pictures."""
    folder = tmp_path_factory.mktemp("coloured")
    options = {"root": str(pictures), "image_size": 8, "min_scale": 1.0}
    config = tiny_config(
        folder,
        student=ModelConfig(
            name="fastkd.trainer.models.small:SmallConvNet",
            num_classes=3,
            options={"in_channels": 3, "width": 4},
        ),
        teacher=None,
        data=DataConfig(name="images", options=options, batch_size=6),
        objective=ObjectiveConfig(terms="ce"),
        epochs=4,
    )
    return train(config)


def test_eval_prints_the_classes_and_takes_other_images(coloured, pictures, tmp_path, capsys, refused) -> None:
    run = coloured.path.parents[1]
    manifest = json.loads((coloured.path / "manifest.json").read_text())
    assert manifest["classes"] == ["blue", "green", "red"]
    assert main(["eval", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy {coloured.accuracy:.4f}" in printed
    assert "classes: blue, green, red" in printed

    # Two of the classes, in a folder without parts: their numbers there are not those of the run.
    for name in ("green", "red"):
        shutil.copytree(pictures / "val" / name, tmp_path / "two" / name)
    written = tmp_path / "eval.json"
    assert main(["eval", str(run), "--root", str(tmp_path / "two"), "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    whole = evaluate_checkpoint(run).to_dict()
    assert found["samples"] == 8
    assert {name: found["per_class"][name] for name in ("green", "red")} == {
        name: whole["per_class"][name] for name in ("green", "red")
    }
    assert found["confusion"][1:] == whole["confusion"][1:]
    # The run's own options hold, and can be changed one by one.
    options = json.dumps({"image_size": 10})
    assert main(["eval", str(run), "--root", str(pictures), "--data.options", options]) == 0
    assert "on 12 samples" in capsys.readouterr().out

    (tmp_path / "two" / "red").rename(tmp_path / "two" / "violet")
    assert "has the classes violet, which" in refused("eval", run, "--root", tmp_path / "two")
    assert "cannot take images of [1, 8, 8]" in refused("eval", run, "--data.name", "digits")


def test_eval_export_and_probe_take_the_best_checkpoint(coloured, tmp_path, capsys) -> None:
    run = Path(shutil.copytree(coloured.path.parents[1], tmp_path / "run"))
    better = {"best": run / "checkpoints" / "step-00000012", "last": run / "checkpoints" / "step-00000016"}
    for which, path in better.items():
        if not path.exists():
            shutil.copytree(coloured.path, path)
        seal(path, lambda body, which=which, path=path: body.update(
            accuracy=0.9 if which == "best" else 0.1, step=int(path.name[5:])
        ))  # fmt: skip
    for flags, which in (([], "last"), (["--best"], "best")):
        step = better[which].name
        assert main(["eval", str(run), *flags]) == 0
        assert step in capsys.readouterr().out
        assert main(["probe", str(run), *flags, "--data", "images", "--options", json.dumps(
            {**json.loads((coloured.path / "manifest.json").read_text())["config"]["data"]["options"], "augment": False}
        )]) == 0  # fmt: skip
        assert step in capsys.readouterr().out
        out = tmp_path / f"{which}.safetensors"
        assert main(["export", str(run), str(out), *flags]) == 0
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert int(metadata["step"]) == int(step[5:])
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert json.loads(metadata["mean"]) == pytest.approx([0.485, 0.456, 0.406])


def test_eval_takes_weights_files_and_published_models(pictures, tmp_path, capsys, refused, monkeypatch) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="timm:test_resnet", num_classes=3))
    weights = tmp_path / "model.pth.tar"
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, weights)
    arguments = ["eval", str(weights), "--model", "timm:test_resnet", "--root", str(pictures)]
    arguments += ["--data.options", '{"image_size": 16}']
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "key state_dict, prefix module." in printed
    assert "on 12 samples" in printed
    assert "classes: blue, green, red" in printed
    assert "--model: got nothing" in refused("eval", weights, "--root", pictures)

    asked = []

    def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return timm_create(name, pretrained=False, **options)

    timm_create = timm.create_model
    monkeypatch.setattr("timm.create_model", create)
    error = refused("eval", "timm:test_resnet", "--root", pictures, "--data.options", '{"image_size": 16}')
    assert "has 1000 outputs and the data have 3 classes" in error
    assert asked[-1]
    arguments = ["eval", "timm:test_resnet", "--num-classes", "3", *arguments[4:]]
    assert main(arguments) == 0
    assert "\ntimm:test_resnet: accuracy " in capsys.readouterr().out
    assert "--root: got nothing" in refused("eval", "timm:test_resnet")


def test_a_checkpoints_config_starts_no_download(coloured, tmp_path, monkeypatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    path = Path(shutil.copytree(coloured.path, tmp_path / coloured.path.name))
    forged = {"name": "torchvision:fcn_resnet50", "options": {"weights_backbone": "DEFAULT"}}
    seal(path, lambda body: body["config"].update(student=forged))
    with pytest.raises(CheckpointError, match=r"manifest\.json: .* load something by the option 'weights_backbone'"):
        evaluate_checkpoint(path)
    seal(path, lambda body: body["config"].update(student={"name": "timm:resnet18", "options": {"depth": 10**12}}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: its student .* cannot be built \(.*"):
        evaluate_checkpoint(path)


def test_weights_that_are_not_finite_are_neither_evaluated_nor_exported(coloured, tmp_path, refused) -> None:
    path = Path(shutil.copytree(coloured.path, tmp_path / coloured.path.name))
    weights = load_file(path / "student.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, path / "student.safetensors")
    seal(path)
    for command in (["eval", path], ["export", path, tmp_path / "student.safetensors"]):
        assert "student.safetensors: classifier.bias has values that are not finite" in refused(*command)
    assert not (tmp_path / "student.safetensors").exists()
