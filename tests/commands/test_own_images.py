"""A user's own images: teacher and student by two commands without JSON, then every command on the finished runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastkd.cli import main
from fastkd.trainer import DataConfig, TrainConfig
from fastkd.trainer.commands.train import parse_flags
from fastkd.trainer.config import differences
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.data.images import load_images, split_by_class
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, load_weights
from fastkd.trainer.run.saved.config_file import read_config
from tests.helpers.images import write_classes
from tests.helpers.trainer_runs import one_thread, same  # noqa: F401

CLASSES = ("ant", "bee", "cat", "dog", "elk")
FAST = ("--device", "cpu", "--no-tensorboard", "--epochs", "2", "--data.num-workers", "0", "--data.batch-size", "16")
IMAGES = ("--data.options.root", "data", "--data.options.image-size", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a teacher and a student that was distilled from it."""
    folder = tmp_path_factory.mktemp("own")
    write_classes(folder / "data", CLASSES, 12)
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "path", list(sys.path))
        student = ("--student.name", "timm:test_resnet")
        assert main(["train", "images", *IMAGES, *student, *FAST, "--run-dir", "runs/teacher"]) == 0
        teacher = ("--teacher.name", "timm:test_resnet", "--teacher.weights", "runs/teacher")
        mix = ("--data.mixup", "0.2", "--data.cutmix", "1")  # and all that timm's transforms offer
        strong = ("--data.options.randaugment", "2", "--data.options.erasing", "0.5", "--data.options.max-aspect", "2")
        flags = (*teacher, *student, *FAST, *mix, *strong, "--run-dir", "runs/student")
        assert main(["train", "images-kd", *IMAGES, *flags]) == 0
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return place


def test_the_data_say_how_many_classes_both_models_have_and_what_they_are_called(inside, capsys):
    config = json.loads((find_checkpoint("runs/student") / "manifest.json").read_text())["config"]
    assert config["student"]["num_classes"] == config["teacher"]["num_classes"] == 5
    assert main(["eval", "runs/student", "--json", "eval.json"]) == 0
    assert list(json.loads(Path("eval.json").read_text())["per_class"]) == list(CLASSES)
    assert main(["report", "runs/student", "runs/teacher"]) == 0
    assert main(["export", "runs/student", "student.safetensors"]) == 0
    assert "checked bit for bit" in capsys.readouterr().out


def test_weights_that_were_exported_are_evaluated_as_they_were_trained(inside, capsys):
    assert main(["export", "runs/student", "exported.safetensors"]) == 0
    assert main(["eval", "runs/student", "--root", "data", "--json", "run.json"]) == 0
    file = ["eval", "exported.safetensors", "--model", "timm:test_resnet", "--root", "data", "--json", "file.json"]
    assert main(file) == 0
    run, found = (json.loads(Path(name).read_text()) for name in ("run.json", "file.json"))
    assert found["loss"] == pytest.approx(run["loss"], rel=1e-5)  # at the model's own 160 pixels it is another
    assert found["confusion"] == run["confusion"]
    told = capsys.readouterr().out
    assert "images of 32 x 32, crop 0.875" in told
    assert "data: the run was trained on most of these images" in told


def test_a_teacher_of_other_classes_is_refused_and_one_of_another_normalization_gets_its_own(inside, capsys, refused):
    shutil.copytree("data", "renamed/data")
    Path("renamed/data/ant").rename("renamed/data/fox")  # as many classes, in another order
    assert main(["export", "runs/teacher", "teacher.safetensors"]) == 0
    flags = ("images-kd", *FAST, "--student.name", "timm:test_resnet", "--teacher.name", "timm:test_resnet")
    for weights in ("runs/teacher", "teacher.safetensors"):
        line = refused(
            "train", *flags, "--data.options.root", "renamed/data", "--data.options.image-size", "32",
            "--teacher.weights", weights,
        )  # fmt: skip
        assert f"teacher.weights: {weights} was trained on other classes, its class 0 is 'ant'" in line
    half = ("--data.options.mean", *["0.5"] * 3, "--data.options.root", "data", "--data.options.image-size", "48")
    assert main(["train", *flags, *half, "--teacher.weights", "runs/teacher", "--run-dir", "runs/half"]) == 0
    told = capsys.readouterr().out
    assert "the student's with the data's mean 0.5 0.5 0.5, " in told
    assert "teacher: was trained on images of 32 pixels, the data's have 48" in told


def test_the_config_of_a_run_repeats_it_and_flags_have_the_last_word(inside):
    file = "runs/student/config.yaml"
    saved = yaml.safe_load(Path(file).read_text())
    assert "resume" not in saved
    assert main(["train", "--config", file, "--run-dir", "runs/again"]) == 0
    assert same(load_weights("runs/again"), load_weights("runs/student"))
    again = yaml.safe_load(Path("runs/again/config.yaml").read_text())
    assert again == saved | {"run_dir": "runs/again"}
    chosen = parse_flags(["--config", file, "--epochs", "7", "--data.options.erasing", "0"]).settings
    assert (chosen.epochs, chosen.data.mixup) == (7, 0.2)
    assert chosen.data.options == saved["data"]["options"] | {"erasing": 0.0}


def test_a_file_lies_between_a_recipe_and_the_flags(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\noptim: {lr: 1e-3}\nstudent: {name: timm:resnet10t}\ndata: {labelled: 100}\n")
    config = parse_flags(["digits-scratch", "--config", str(file), "--seed", "3"]).settings
    assert (config.epochs, config.seed, config.optim.lr, config.optim.warmup_epochs) == (7, 3, 1e-3, 1)
    assert (config.student.name, config.student.options) == ("timm:resnet10t", {})  # not those of another model
    assert (config.data.name, config.data.labelled, config.data.batch_size) == ("digits", 100, 50)
    file.write_text("student: {width: 3}")
    with pytest.raises(ValueError, match=r"mine\.yaml: config\.student: got unknown fields \['width'\]"):
        read_config(str(file), config)


def test_every_class_gives_its_share_for_evaluation_and_the_seed_draws_it(inside):
    train, val = load_images("data", image_size=8)
    assert (train.classes, len(train), len(val)) == (list(CLASSES), 50, 10)
    assert val.labels.bincount().tolist() == [2] * 5
    names = [{dataset.describe(index) for index in range(len(dataset))} for dataset in (train, val)]
    assert (len(names[0] & names[1]), len(names[0] | names[1])) == (0, 60)
    other = load_images("data", image_size=8, split_seed=1)[1]
    assert names[1] != {other.describe(index) for index in range(len(other))}
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    kept, held_out = split_by_class(labels, 0.5, 0)
    assert (labels[kept].tolist(), labels[held_out].tolist()) == ([0, 1, 2, 2], [1, 2, 2])  # a single sample is kept


def test_options_of_the_data_are_checked_and_complete_when_compared():
    with pytest.raises(ValueError, match=r"data\.options: got size, expected options of 'images': augment, "):
        DataConfig(name="images", options={"size": 32})
    with pytest.raises(
        ValueError, match=r"data\.options\.root: is missing for 'images'; give --data\.options\.root DIR"
    ):
        build_datasets(DataConfig(name="images"))
    old = TrainConfig(data=DataConfig(name="images", options={"root": "a", "augment": True})).to_dict()
    new = TrainConfig(data=DataConfig(name="images", options={"root": "b"})).to_dict()
    del old["data"]["mixup"]  # as an earlier version saved it
    old["student"] = {"name": "x", "num_classes": 5}
    new["student"] = {"name": "x", "num_classes": None}
    assert differences(old, new) == []
    new["data"]["options"]["augment"] = False
    new["student"]["num_classes"] = 6
    assert differences(old, new) == ["data.options.augment: True -> False", "student.num_classes: 5 -> 6"]
