"""From generated images in ImageNet's layout to an exported student: the whole command line, folders and shards."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fastkd.cli import main
from fastkd.trainer import load_weights, train
from tests.helpers.imagenet_like import CLASSES, student, teacher, write_images
from tests.helpers.trainer_runs import one_thread  # noqa: F401
from tests.robustness.soak import DISK, OVERLAP, soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """``fastkd train`` puts the current folder on the import path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_whole_command_line(images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    assert main(["train", "tests.helpers.imagenet_like:teacher"]) == 0
    assert main(["train", "tests.helpers.imagenet_like:student", "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "global batch 40" in out
    assert "lr 0.25 = 0.5 x 40 / 80" in out
    assert main(["eval", "runs/student-folder", "--json", "eval.json"]) == 0
    result = json.loads(Path("eval.json").read_text())
    assert len(result["per_class"]) == CLASSES
    assert next(iter(result["per_class"])) == "n00000000"
    assert main(["export", "runs/student-folder", "student.safetensors"]) == 0
    assert main(["export", "runs/student-folder", "student.onnx"]) == 0
    assert main(["report", "runs/student-folder", "runs/teacher", "--out", "report.html"]) == 0
    assert "test_efficientnet" in Path("report.html").read_text()
    options = json.dumps({"root": "folder", "image_size": 32, "augment": False})
    assert main(["probe", "runs/student-folder", "--data", "images", "--options", options]) == 0
    assert "linear probe on images: accuracy" in capsys.readouterr().out


def test_shards_train_as_the_folder_does(images, tmp_path):
    quiet = {"quiet": True}
    if not (images / "runs" / "teacher").exists():
        train(dataclasses.replace(teacher(str(images)), **quiet))
    results = [
        train(dataclasses.replace(student(str(images), form), run_dir=str(tmp_path / form), **quiet))
        for form in ("folder", "shards")
    ]
    weights = [load_weights(result.path) for result in results]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results[0].history == results[1].history


def test_images_that_cannot_be_read_are_reported(tmp_path, capsys):
    write_images(tmp_path)
    for name in ("n00000003/0001.JPEG", "n00000007/0000.JPEG"):
        (tmp_path / "folder" / "train" / name).write_bytes(b"")
    config = dataclasses.replace(teacher(str(tmp_path)), epochs=1)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        train(config)
    assert "2 of 120 training images cannot be read; others took their places" in capsys.readouterr().out


def test_after_other_faults_than_kills_nothing_that_was_saved_is_lost(tmp_path):
    # `make soak` does it 50 times, with kills at all moments; test_survival.py holds a few of them.
    assert soak(2, 3, tmp_path, workers=1, images=3, of=(OVERLAP, DISK)) == {OVERLAP: 1, DISK: 1}
