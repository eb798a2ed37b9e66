"""Resume: the continued run equals the uninterrupted one in every bit, wherever it was stopped."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastkd.trainer import (
    CheckpointError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PCKDConfig,
    TensorImages,
    TrainConfig,
    evaluate_checkpoint,
    train,
)
from fastkd.trainer.imports import import_object
from fastkd.trainer.run.saved.checkpoint import LOSS, STUDENT, find_checkpoint, read_checkpoint
from tests.helpers.trainer_runs import DropoutNet, convolutional, lines, noisy_data, one_thread, same, seal, tiny_config  # noqa: F401

pytestmark = pytest.mark.slow


class Stop(Exception):
    """Stands for the kill in the tests that need no second process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run dies in the optimiser step ``step``, after its forward and backward."""
    count = 0
    original = torch.amp.GradScaler.step

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler, "step", counted)


def assert_same_run(left: TrainConfig, right: TrainConfig) -> None:
    """Weights, heads, tau, optimiser, scaler, generators, loader, sums and metrics lines."""
    a, b = (read_checkpoint(find_checkpoint(config.run_dir)) for config in (left, right))
    assert a.manifest["step"] == b.manifest["step"]
    assert {name.split(".")[-1] for name in a.weights[LOSS]} >= {"tau", "weight"}
    assert same(a.weights, b.weights)
    assert a.state.keys() == b.state.keys()
    for key in a.state.keys() - {"seconds"}:
        assert same(a.state[key], b.state[key]), key
    assert lines(left.run_dir) == lines(right.run_dir)
    steps = [line["step"] for line in lines(left.run_dir) if line["kind"] == "step"]
    assert steps == list(range(1, a.manifest["step"] + 1))


def interrupted(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int, **given: Any) -> TrainConfig:
    """Train until ``step``, where the run dies; returns the config to resume with."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            train(config, **given)
    return dataclasses.replace(config, resume=True)


@pytest.fixture
def reference(tmp_path: Path) -> TrainConfig:
    """An uninterrupted run that saves every 3 steps."""
    config = tiny_config(tmp_path, save_every_steps=3, run_dir=str(tmp_path / "whole"))
    train(config)
    return config


@pytest.mark.parametrize("step", [2, 5, 13, 14, 17, 26])
def test_resume_equals_the_uninterrupted_run(reference, tmp_path, monkeypatch, step):
    config = interrupted(monkeypatch, dataclasses.replace(reference, run_dir=str(tmp_path / "cut")), step)
    # The process that resumes has used its generators in its own way.
    torch.rand(7), random.random(), np.random.rand(3)  # noqa: NPY002
    # Saved every 3 steps and after each epoch of 13.
    assert train(config).resumed_from == max(s for s in [*range(0, 26, 3), 13] if s < step)
    assert_same_run(reference, config)


ADAMW = OptimConfig(name="adamw", lr=1e-2, schedule="step", milestones=(0.5, 1.2))
DATA = DataConfig(name="tests.helpers.trainer_runs:noisy_data", batch_size=4)


@pytest.mark.parametrize("step", [8, 19])
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "optim": ADAMW},
        {"precision": "fp16", "optim": ADAMW},
        {"chunks": 2},
        # A preview that changes much from epoch to epoch.
        {"objective": ObjectiveConfig(terms="dcd + pckd", pckd=PCKDConfig(preview_base=1.5))},
        {"objective": ObjectiveConfig(terms="dcd + msdcrd + 0.5*kd")},
        {"objective": ObjectiveConfig(terms="dcd + 100*ckd")},
    ],
    ids=["bf16", "fp16", "chunks", "pckd", "msdcrd", "ckd"],
)
def test_resume_within_an_epoch_is_exact(tmp_path, monkeypatch, changes, step):
    whole = tiny_config(tmp_path, save_every_steps=5, run_dir=str(tmp_path / "whole"), **changes)
    given = convolutional if "objective" in changes else dict
    train(whole, **given())
    config = interrupted(monkeypatch, dataclasses.replace(whole, run_dir=str(tmp_path / "cut")), step, **given())
    assert train(config, **given()).resumed_from == (step - 1) // 5 * 5
    assert_same_run(whole, config)
    state = read_checkpoint(find_checkpoint(config.run_dir)).state
    assert (state["scaler"]["scale"] > 1) == (config.precision == "fp16")


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
def test_resume_with_other_workers_within_an_epoch_is_exact(reference, tmp_path, monkeypatch, workers):
    """The images are augmented with random numbers, and the student has dropout."""
    before, after = (dataclasses.replace(DATA, num_workers=number) for number in workers)
    config = dataclasses.replace(reference, run_dir=str(tmp_path / "cut"), data=before)
    config = interrupted(monkeypatch, config, 9)
    assert train(dataclasses.replace(config, data=after)).resumed_from == 6
    assert_same_run(reference, config)


def test_resume_may_extend_the_epochs_and_says_what_that_means_for_the_learning_rate(tmp_path, capsys):
    """With a constant rate the extended run is the long run; with the cosine the schedule follows the new total."""
    constant = OptimConfig(lr=0.05, schedule="constant")
    whole, cut = (tiny_config(tmp_path, optim=constant, run_dir=str(tmp_path / name), epochs=3) for name in "ab")
    train(whole)
    first = train(dataclasses.replace(cut, epochs=2))
    assert train(dataclasses.replace(cut, resume=True)).history[:2] == first.history
    assert_same_run(whole, cut)
    config = tiny_config(tmp_path)
    train(config)
    longer = dataclasses.replace(config, epochs=4, resume=True, quiet=False)
    capsys.readouterr()
    assert [record["epoch"] for record in train(longer).history] == [0, 1, 2, 3]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epochs"))
    rates = [record["lr"] for record in lines(config.run_dir) if record["kind"] == "step"]
    assert len(rates) == 52
    assert rates[25] < 0.001 < 0.02 < rates[26]
    expected = f"follows the schedule of 4 epochs from here on; the next step has lr {rates[26]:.4g} "
    assert expected + f"(the last step had {rates[25]:.4g})" in line
    with pytest.raises(ValueError, match="epochs: got 3, expected at least the 4 that the checkpoint has begun"):
        train(dataclasses.replace(longer, epochs=3))


def test_resume_on_another_number_of_threads_warns(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    train(config)
    longer = dataclasses.replace(config, epochs=2, resume=True)
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match=r"was written on 1 thread\(s\), this process has 2.*OMP_NUM_THREADS=1"):
        train(longer)


def test_a_crash_at_every_point_of_a_save_leaves_a_run_that_resumes(tmp_path, monkeypatch):
    """Dies at the k-th fsync, rename or removal of the third save, for every k."""
    whole = tiny_config(tmp_path, save_every_steps=4, keep=1, run_dir=str(tmp_path / "whole"), epochs=1)
    train(whole)
    points = 0
    while True:
        config = dataclasses.replace(whole, run_dir=str(tmp_path / f"cut{points}"))
        calls = 0

        def crashing(original, limit=points):
            def call(*args, **kwargs):
                nonlocal calls
                if len(list(Path(config.run_dir).glob("checkpoints/step-00000004"))):  # noqa: B023
                    calls += 1
                    if calls > limit:
                        raise Stop
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("fastkd.trainer.run.saved.checkpoint.os.fsync", crashing(os.fsync))
            patch.setattr("fastkd.trainer.run.saved.checkpoint.Path.rename", crashing(Path.rename))
            patch.setattr("fastkd.trainer.run.saved.checkpoint.shutil.rmtree", crashing(shutil.rmtree))
            try:
                train(config)
                break
            except Stop:
                points += 1
        train(dataclasses.replace(config, resume=True))
        assert_same_run(whole, config)
        left = {path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()}
        assert left == {".lock", "step-00000013"}
    assert points >= 8


def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path, capsys):
    config = tiny_config(tmp_path)
    first = train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")}
    again = train(dataclasses.replace(config, resume=True, quiet=False))
    assert again.already_finished
    assert again.accuracy == first.accuracy
    assert again.history == first.history
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")} == before


def test_a_new_run_never_falls_on_an_old_one(tmp_path):
    config = tiny_config(tmp_path)
    train(config)
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(config)


def test_resume_without_a_run_or_without_its_checkpoints_raises(tmp_path):
    config = tiny_config(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train(config)
    train(dataclasses.replace(config, resume=False))
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has metrics\.jsonl but no checkpoint"):
        train(config)


def test_resume_with_another_config_names_what_differs(tmp_path):
    config = tiny_config(tmp_path)
    train(config)
    changed = dataclasses.replace(config, resume=True, seed=3, optim=dataclasses.replace(config.optim, lr=0.1))
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.05 -> 0\.1; seed: 0 -> 3"):
        train(changed)


def test_a_run_from_before_its_models_module_was_renamed_is_evaluated_and_resumed(tmp_path):
    """Its config and its checkpoints say the old name; the config to resume with says either."""
    name = "fastkd.trainer.models.small:MLP"
    student = ModelConfig(name=name, num_classes=4, options={"in_features": 16})
    config = tiny_config(tmp_path, student=student, save_every_steps=5, keep=9, epochs=1)
    expected = read_checkpoint(train(config).path).weights[STUDENT]
    shutil.rmtree(find_checkpoint(config.run_dir))
    old = dataclasses.replace(student, name="fastkd.trainer.nets:MLP")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        seal(checkpoint, lambda body: body["config"]["student"].update(name=old.name))
    for model in (student, old):
        run = shutil.copytree(tmp_path / "run", tmp_path / model.name)
        assert evaluate_checkpoint(run, eval_data=noisy_data()[1]).step == 10
        resumed = train(dataclasses.replace(config, student=model, run_dir=str(run), resume=True))
        assert resumed.resumed_from == 10
        assert same(read_checkpoint(resumed.path).weights[STUDENT], expected)
    for moved in ("fastkd.trainer.nets:MLP", "fastkd.trainer.cifar_nets:CifarResNet"):
        assert import_object(moved, "model.name").__module__.startswith("fastkd.trainer.models.")


def test_resume_with_another_teacher_or_student_raises(tmp_path):
    config = tiny_config(tmp_path, student=None, teacher=None, epochs=1, save_every_steps=2)
    teacher = DropoutNet(width=24)
    train(config, student=DropoutNet(), teacher=teacher)
    newest = find_checkpoint(config.run_dir)
    shutil.rmtree(newest)  # so that something is left to do
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(CheckpointError, match="teacher_sha256"):
        train(config, student=DropoutNet(), teacher=DropoutNet(width=24))
    with pytest.raises(CheckpointError, match=r"student\.safetensors.*body\.1\.weight: \(12, 16\).*\(9, 16\)"):
        train(config, student=DropoutNet(width=9), teacher=teacher)
    other = DropoutNet()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"2 missing \(extra\.weight, extra\.bias\)"):
        train(config, student=other, teacher=teacher)


def test_resume_with_other_data_raises(tmp_path):
    config = tiny_config(tmp_path, epochs=1, save_every_steps=5)
    images, held_out = noisy_data()
    train(config, train_data=images, eval_data=held_out)
    shutil.rmtree(find_checkpoint(config.run_dir))
    config = dataclasses.replace(config, resume=True)
    other = TensorImages(images.images, images.labels.flip(0))
    with pytest.raises(CheckpointError, match="was written with labels_sha256="):
        train(config, train_data=other, eval_data=held_out)
    with pytest.raises(CheckpointError, match=r"its data was given as objects .* that of this run is not"):
        train(config)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        seal(checkpoint, lambda body: body.pop("augmentation"))  # as versions wrote it that seeded a batch
    with pytest.raises(CheckpointError, match=r"written with augmentation=None, this run has 2: .* other random num"):
        train(config, train_data=images, eval_data=held_out)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        seal(checkpoint, lambda body: body.update(augmentation=2))
    assert train(config, train_data=images, eval_data=held_out).resumed_from == 10


def test_resume_needs_neither_the_first_weights_nor_the_old_place_of_the_teacher(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=5, epochs=1)
    save_file(DropoutNet().state_dict(), tmp_path / "first.safetensors")
    student = dataclasses.replace(config.student, weights=str(tmp_path / "first.safetensors"))
    config = dataclasses.replace(config, student=student)
    train(config)
    shutil.rmtree(find_checkpoint(config.run_dir))
    (tmp_path / "first.safetensors").unlink()
    moved = (tmp_path / "teacher.safetensors").rename(tmp_path / "moved.safetensors")
    teacher = dataclasses.replace(config.teacher, weights=str(moved))
    assert train(dataclasses.replace(config, resume=True, teacher=teacher)).resumed_from == 10


def test_resume_does_not_paper_over_metrics_that_were_lost(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=5, epochs=1)
    train(config)
    shutil.rmtree(find_checkpoint(config.run_dir))
    (Path(config.run_dir) / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: has 0 bytes, expected at least the \d+ that step-0+10"):
        train(dataclasses.replace(config, resume=True))


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=1)
    train(dataclasses.replace(config))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from fastkd.trainer.run.saved.checkpoint import CheckpointFolder as F;"
            f"f = F(pathlib.Path({config.run_dir!r}) / 'checkpoints', 2); print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    shutil.rmtree(find_checkpoint(config.run_dir))
    before = (Path(config.run_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="another process"):
        train(dataclasses.replace(config, resume=True))
    assert (Path(config.run_dir) / "metrics.jsonl").read_bytes() == before
    holder.stdin.close()
    holder.wait(timeout=20)
    train(dataclasses.replace(config, resume=True))


def test_a_run_that_cannot_open_its_records_leaves_the_folder_to_other_processes(tmp_path):
    config = tiny_config(tmp_path, tensorboard=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    with pytest.raises(OSError, match="tensorboard") as caught:
        train(config)
    take = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", take, str(tmp_path / "run" / "checkpoints" / ".lock")], check=True)
    del caught  # till here its traceback kept what the run had opened
