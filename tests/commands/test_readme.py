"""What README and docs/ tell a reader to type runs as it is written there."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.cli import main
from fastkd.trainer.data.coco.shapes import make_shapes
from tests.helpers.trainer_runs import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
# What is not run here begins with one of these.
NOT_RUN = {
    "make demo": "it takes minutes; tests/commands/test_demo.py runs a small one",
    "make test": "it runs this test",
    "pip install": "tests/test_packaging.py installs the package",
}
# Flags that make a command small. They are put behind the printed ones.
SMALL = {
    "images": "--data.options.image-size 32 --data.batch-size 9 --data.num-workers 0",
    "detection": "--data.options.short-side 48 --data.batch-size 8",
    "train": "--epochs 1 --optim.warmup-epochs 0 --device cpu --quiet",
    "eval": "--device cpu",
}


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[str]:
    return [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]


def run_commands_of(document: str) -> None:
    for line in commands(document):
        if line.startswith(tuple(NOT_RUN)):
            continue
        program, command, *flags = shlex.split(line, comments=True)
        if (program, *flags[:-1]) == ("python", "fastkd.trainer.data.coco.shapes"):
            make_shapes(flags[-1], train=8, val=2)
            continue
        assert program == "fastkd", line
        flags += SMALL.get(command, "").split()
        for recipe in ("images", "detection"):
            flags += SMALL[recipe].split() if command == "train" and flags[0].startswith(recipe) else []
        assert main([command, *flags]) == 0, line


def photos(folder: Path, classes: int = 3, per_class: int = 12) -> None:
    """A folder of small pictures, a folder for each class."""
    pixels = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            picture = pixels.integers(0, 100, (40, 40, 3)) + 50 * label
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"class{label}" / f"{number}.jpg")


@pytest.mark.slow
def test_own_images_and_shapes_as_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    run_commands_of("README.md")
    assert (tmp_path / "student.safetensors").exists()
    report = (tmp_path / "comparison.html").read_text()
    assert report.count("data:image/jpeg") == 2
    assert "no boxes of" not in report
    assert set(commands("docs/howto/own_data.md")) <= set(commands("README.md"))


@pytest.mark.slow
def test_the_trainers_commands_and_then_the_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits-teacher", "--epochs", "4", "--device", "cpu", "--quiet"]) == 0
    (tmp_path / "runs" / "digits_teacher").rename(tmp_path / "kept")
    run_commands_of("docs/trainer.md")
    assert (tmp_path / "mine.safetensors").exists()
    # A teacher of one epoch would not let the method below learn.
    (tmp_path / "runs" / "digits_teacher").rename(tmp_path / "runs" / "one_epoch")
    (tmp_path / "kept").rename(tmp_path / "runs" / "digits_teacher")
    (code,) = blocks("docs/howto/own_method.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    result = names["result"]
    losses = [record["sup_con"] for record in result.history]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(record["loss"]) for record in result.history)
    head = result.distiller.objective.terms["sup_con"].head
    torch.manual_seed(0)
    assert not torch.equal(head.weight, names["SupConDistillation"](8, 64).head.weight)
    assert result.accuracy > 0.5
    assert (tmp_path / "runs" / "sup_con" / "checkpoints").is_dir()


def test_python_of_the_readme_and_of_the_how_tos_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student_fc, teacher_fc = torch.nn.Linear(512, 10), torch.nn.Linear(2048, 10)
    student, teacher = torch.randn(4, 512), torch.randn(4, 2048)
    names = {
        "student": student_fc,
        "teacher": teacher_fc,
        "labels": torch.arange(4),
        "epoch": 0,
        "student_features": student,
        "student_logits": student_fc(student),
        "student_classifier": student_fc,
        "teacher_features": teacher,
        "teacher_logits": teacher_fc(teacher),
        "teacher_classifier": teacher_fc,
        "student_map": torch.randn(2, 512, 4, 4),
        "teacher_map": torch.randn(2, 2048, 4, 4),
    }
    embeddings = {"student": torch.randn(4, 8), "teacher": torch.randn(4, 8), "logit_scale": 10.0}
    first, functions, more = blocks("README.md", "python")
    exec(first, names)
    exec(functions, embeddings)
    exec(more, names)
    assert names["loss"].isfinite()
    assert embeddings["loss"].isfinite()
    assert {"sample", "feature"} == names["terms"].keys()
    _, other_methods = blocks("docs/howto/own_loop.md", "python")
    exec(other_methods, {})
    in_python, own_data = blocks("docs/howto/own_dataset.md", "python")
    exec(in_python, {})
    exec(own_data, functions_of := {})
    assert len(functions_of["blobs"](count=96)[0]) == 96
    *_, callback = blocks("docs/trainer.md", "python")
    exec(callback, {})
