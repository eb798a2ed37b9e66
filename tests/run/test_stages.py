"""Stages: runs one after the other, killed anywhere and resumed with the bits of those that nothing interrupted."""

import dataclasses
import json
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from fastkd.trainer import (
    RECIPES,
    Callback,
    CheckpointError,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    TrainResult,
    find_checkpoint,
    train,
    train_stages,
)
from fastkd.trainer.commands.train import parse_stages
from fastkd.trainer.recipes import STAGED_RECIPES
from fastkd.trainer.recipes.stages import pretrained
from fastkd.trainer.report.records import read_groups
from fastkd.trainer.run import stages as runner
from fastkd.trainer.run.saved.checkpoint import read_checkpoint
from tests.helpers.trainer_runs import lines, one_thread, same, tiny_config  # noqa: F401 (used by being imported)


def two_stages(folder: Path, **changes: Any) -> dict[str, TrainConfig]:
    """DCD alone, which does not train the classifier, and then cross-entropy alone. 13 steps each."""
    changes = {"epochs": 1, "keep": 9, "save_every_steps": 5, "run_dir": str(folder / "both"), **changes}
    config = tiny_config(folder, **changes)
    linked = dataclasses.replace(config.student, weights="stage:pretrain")
    return {
        "pretrain": dataclasses.replace(config, objective=ObjectiveConfig(terms="0*ce + dcd")),
        "train": dataclasses.replace(config, objective=ObjectiveConfig(terms="ce"), student=linked, teacher=None),
    }


def recipe() -> dict[str, TrainConfig]:
    """Two stages.

    More about them.
    """
    return two_stages(Path(tempfile.mkdtemp()), quiet=False)


class Killed(BaseException):
    """No Exception, so that nothing is saved or tidied up."""


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        if step == self.at:
            raise Killed


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = read_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    return {name: value for file in found.weights.values() for name, value in file.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_stages(two_stages(folder))
    return folder / "both"


def test_a_stage_begins_with_what_the_one_before_has_trained(uninterrupted: Path) -> None:
    first, second = uninterrupted / "1-pretrain", uninterrupted / "2-train"
    student = {name: value for name, value in weights(first, 13).items() if not name.startswith("terms.")}
    assert same(weights(second, 0), student)
    assert not same(weights(second, 13), student)
    assert torch.equal(weights(first, 13)["fc.weight"], weights(first, 0)["fc.weight"])
    assert not torch.equal(weights(first, 13)["body.1.weight"], weights(first, 0)["body.1.weight"])
    assert find_checkpoint(uninterrupted) == second / "checkpoints" / "step-00000013"


@pytest.mark.parametrize(("stage", "step"), [(1, 13), (2, 0), (2, 6)])
def test_killed_anywhere_the_same_call_goes_on(
    stage: int, step: int, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 0 of the second stage: between the two."""

    def killed(config: TrainConfig, callbacks: Sequence[Callback]) -> TrainResult:
        is_here = str(config.run_dir).endswith(f"{stage}-{list(stages)[stage - 1]}")
        if is_here and step == 0:
            raise Killed
        return train(config, callbacks=[*callbacks, Kill(step if is_here else -1)])

    stages = two_stages(tmp_path)
    monkeypatch.setattr(runner, "train", killed)
    with pytest.raises(Killed):
        train_stages(stages)
    monkeypatch.setattr(runner, "train", train)
    if stage == 1 or step == 0:
        with pytest.raises(CheckpointError, match=r"both: its last stage, 2-train, has not begun; there is 1-pretrain"):
            find_checkpoint(tmp_path / "both")
    with pytest.raises(CheckpointError, match=r"both: already holds a run; resume it \(--resume\)"):
        train_stages(stages)
    # The folder may have moved since.
    (tmp_path / "both").rename(tmp_path / "moved")
    moved = {"run_dir": str(tmp_path / "moved"), "resume": True}
    results = train_stages({name: dataclasses.replace(config, **moved) for name, config in stages.items()})
    assert len(results) == (2 if stage == 1 or step == 0 else 1)
    for name in ("1-pretrain", "2-train"):
        here, there = tmp_path / "moved" / name, uninterrupted / name
        assert lines(here) == lines(there)
        assert same(weights(here, 13), weights(there, 13))


def test_a_signal_leaves_the_other_stages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Callback):
        def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runner, "train", lambda config, callbacks: train(config, callbacks=[*callbacks, Stop()]))
    (result,) = train_stages(two_stages(tmp_path))
    assert (result.stopped_by, result.path) == (signal.SIGTERM, tmp_path / "both/1-pretrain/checkpoints/step-00000001")
    assert not (tmp_path / "both" / "2-train").exists()


def test_a_command_trains_all_stages_and_others_find_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = str(tmp_path / "all"), "tests.run.test_stages:recipe"
    flags = ["--run-dir", folder, "--data.batch-size", "13", "--train.epochs", "2", "--pretrain.optim.lr", "0.01"]
    # The stage without a teacher has no use for this flag.
    flags += ["--teacher.min-accuracy", "0.0"]
    assert main(["train", name, *flags]) == 0
    out = capsys.readouterr().out
    assert f"stage 1 of 2: pretrain, in {folder}/1-pretrain" in out
    first, second = (json.loads((tmp_path / "all" / run / "run.json").read_text())["config"] for run in
                     ("1-pretrain", "2-train"))  # fmt: skip
    assert [(run["epochs"], run["optim"]["lr"], run["data"]["batch_size"]) for run in (first, second)] == [
        (1, 0.01, 13),
        (2, 0.05, 13),
    ]
    assert second["student"]["weights"] == f"{folder}/1-pretrain"
    assert main(["eval", folder, "--trust-code"]) == 0
    assert "2-train/checkpoints/step-00000008: step 8, accuracy" in capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "x.safetensors"), "--trust-code"]) == 0
    assert read_groups([folder])[0][0].runs[0].folder == tmp_path / "all" / "2-train"
    assert main(["train", name, *flags, "--resume"]) == 0
    assert "2-train: the run is already finished (8 steps" in capsys.readouterr().out


def test_seeds_of_stages_have_folders_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "seeds"
    arguments = ["train", "tests.run.test_stages:recipe", "--run-dir", str(folder), "--seeds", "3", "1"]
    assert main([*arguments, "--data.batch-size", "52"]) == 0
    found = [lines(folder / f"seed-{seed}" / "2-train")[-1]["accuracy"] for seed in (3, 1)]
    assert f"accuracy {sum(found) / 2:.4f} ±" in capsys.readouterr().out
    ((group,), problems) = read_groups([folder])
    assert [run.name for run in group.runs] == ["seeds, seed 1", "seeds, seed 3"]
    assert [run.folder.name for run in group.runs] == ["2-train", "2-train"]
    assert problems == []


def test_what_is_wrong_with_stages_is_told_in_a_line(tmp_path: Path) -> None:
    stages = two_stages(tmp_path)
    other = dataclasses.replace(stages["train"], run_dir=str(tmp_path / "other"))
    unknown = dataclasses.replace(stages["train"], student=ModelConfig(name="x", weights="stage:first"))
    long = dataclasses.replace(stages["train"], optim=OptimConfig(warmup_epochs=90))
    for wrong, message in (
        ({**stages, "train": long}, r"optim\.warmup_epochs: got 90, expected less than"),
        ({}, "stages: got none, expected at least one"),
        ({**stages, "train": other}, r"run_dir: got '.*both' and '.*other', expected one value for all stages"),
        ({"one": dataclasses.replace(stages["pretrain"], run_dir=None)}, "run_dir: got None, expected one value"),
        ({"train": stages["train"]}, r"student\.weights: got 'stage:pretrain' in the stage 'train', .* first stage"),
        ({**stages, "train": unknown}, r"student\.weights: got 'stage:first' .*, expected stage:pretrain"),
        ({"../up": stages["pretrain"]}, r"stages: got the name '\.\./up', expected letters, digits and underscores"),
    ):
        with pytest.raises(ValueError, match=message):
            train_stages(wrong)
    resumed = {name: dataclasses.replace(config, resume=True) for name, config in stages.items()}
    with pytest.raises(CheckpointError, match="both: holds no run to resume"):
        train_stages(resumed)
    assert not (tmp_path / "both").exists()
    for flags, message in (
        (["--train.seeds", "0"], "--seeds: is for all stages, expected it without the name of one"),
        (["--method", "rkd"], "--method: got 'rkd', expected none with a recipe of stages, pretrain, train"),
        (["--train.student.weights=x"], "--train.student.weights: is given, expected it left out, .* 'stage:pretrain'"),
        (["--train.run-dir", "x", "--dry-run"], r"run_dir: got .* expected one value for all stages"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.linked({name: each.settings for name, each in
                           parse_stages(["tests.run.test_stages:recipe", *flags]).items()})  # fmt: skip
    (tmp_path / "file").mkdir()
    for text in ("[1]", '{"stages": ["../.."]}', '{"stages": []}', '{"stages": [1]}'):
        (tmp_path / "file" / "stages.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"file/stages\.json"):
            find_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("name", STAGED_RECIPES)
def test_recipes_of_stages_are_those_of_repdistiller(name: str) -> None:
    first, second = STAGED_RECIPES[name]().values()
    method = name.removeprefix("cifar100-")
    assert (first.epochs, second.epochs) == (30, 240)
    rate = 0.01 if method == "ft" else 0.05
    assert (first.optim.lr, first.optim.schedule, first.optim.decayed) == (rate, "constant", "all")
    assert second.optim == RECIPES["cifar100-resnet32x4"]().optim
    assert first.run_dir == second.run_dir == f"runs/{name}"
    links = list(runner.links_of(second.to_dict()))
    assert links == [("objective", "ft", "paraphraser") if method == "ft" else ("student", "weights")]
    assert (second.teacher is None) == (method != "ft")
    assert runner.linked({"pretrain": first, "train": second})["train"].to_dict() != second.to_dict()


def test_a_method_with_pre_training_makes_stages_of_any_recipe() -> None:
    parsed = parse_stages(["digits", "--method", "fsp", "--epochs", "3", "--teacher.weights", "runs/mine"])
    first, second = (each.settings for each in parsed.values())
    assert (first.objective.terms, second.objective.terms) == ("0*ce + fsp", "ce")
    assert (first.teacher.weights, second.teacher) == ("runs/mine", None)
    assert (first.epochs, second.epochs, first.run_dir) == (3, 3, "runs/digits-fsp")
    config = dataclasses.replace(RECIPES["digits"](), optim=OptimConfig(lr=0.3, warmup_epochs=1))
    assert pretrained(config, "ab")["pretrain"].optim == OptimConfig(lr=0.3, schedule="constant")
    # Another network leaves the link where it is.
    other = parse_stages(["digits", "--method", "fsp", "--student.name", "timm:resnet18"])["train"].settings
    assert (other.student.name, other.student.weights) == ("timm:resnet18", "stage:pretrain")
    with pytest.raises(ValueError, match="method: got 'rkd', expected one of ab, fsp, ft"):
        pretrained(config, "rkd")
