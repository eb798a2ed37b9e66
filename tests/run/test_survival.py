"""What a run does on a bad day: steps that are not finite, signals, restarts, folders that cannot be written."""

import dataclasses
import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from fastkd.cli import main
from fastkd.trainer import CheckpointError, NonFiniteLossError, ObjectiveConfig, OptimConfig, load_weights, train
from fastkd.trainer.run.saved.checkpoint import EMA, LOSS, STUDENT, find_checkpoint, list_checkpoints, read_checkpoint
from tests.helpers.ranks import under_torchrun
from tests.helpers.trainer_runs import lines, one_thread, run_python, same, tiny_config  # noqa: F401

pytestmark = pytest.mark.slow


class Bursts:
    """A term that is NaN at some steps, in the loss or in its gradient alone; and spoils running statistics."""

    def __init__(self, *steps: int, in_gradient: bool = False) -> None:
        self.steps, self.count, self.in_gradient = steps, 0, in_gradient

    def __call__(self, student, teacher, labels):
        self.count += 1
        bad = self.count in self.steps
        zero = student.logits.float().sum() * 0
        if not bad:
            return {"burst": zero}
        # The gradient of sqrt at 0 is infinite, and 0 * inf is NaN.
        return {"burst": zero.square().sqrt() if self.in_gradient else zero * torch.nan}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, capsys, in_gradient, name):
    config = tiny_config(
        tmp_path,
        objective=ObjectiveConfig(terms="kd+burst"),
        optim=OptimConfig(name=name, lr=0.05, clip_norm=None),
        save_every_steps=1,
        keep=100,
        max_skipped=2,
        quiet=False,
        epochs=1,
    )
    result = train(config, terms={"burst": Bursts(3, 7, in_gradient=in_gradient)})
    for before, after, changed in ((1, 2, True), (2, 3, False), (3, 4, True), (6, 7, False)):
        first, second = (
            read_checkpoint(Path(config.run_dir) / "checkpoints" / f"step-{step:08d}") for step in (before, after)
        )
        weights = [
            {k: v for k, v in part.weights[STUDENT].items() if "num_batches" not in k} for part in (first, second)
        ]
        assert same(*weights) != changed
        assert same(first.state["optimizer"]["state"], second.state["optimizer"]["state"]) != changed
    assert all(torch.isfinite(value).all() for value in load_weights(config.run_dir).values())
    assert result.history[-1]["loss"] < 10
    printed = capsys.readouterr().out
    what = "gradient" if in_gradient else "loss"
    assert f"step 3 skipped, the {what} is not finite (1 of 2)" in printed
    assert f"step 7 skipped, the {what} is not finite (2 of 2)" in printed
    assert read_checkpoint(result.path).state["meter"]["skipped"] == 2


def test_a_batch_that_spoils_the_running_statistics_is_undone(tmp_path):
    """NaN images: the forward pass itself writes NaN into batch norm's buffers."""
    from tests.helpers.trainer_runs import noisy_data

    class Poisoned(type(noisy_data()[0])):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image * torch.nan if index == 5 else image), label

    images, held_out = noisy_data()
    config = tiny_config(tmp_path, epochs=2, max_skipped=2)
    data = Poisoned(images.images, images.labels)
    result = train(config, train_data=data, eval_data=held_out)
    assert all(torch.isfinite(value).all() for value in load_weights(config.run_dir).values())
    assert result.history[-1]["eval_loss"] < 10
    assert read_checkpoint(result.path).state["meter"]["skipped"] == 2


def test_too_many_such_steps_end_the_run_and_the_count_survives_a_resume(tmp_path):
    config = tiny_config(
        tmp_path, objective=ObjectiveConfig(terms="kd+burst"), max_skipped=2, save_every_steps=1, epochs=1
    )
    with pytest.raises(NonFiniteLossError, match=r"at step 7, after 2 that were skipped: loss = nan.*step-00000006"):
        train(config, terms={"burst": Bursts(2, 4, 7)})
    with pytest.raises(NonFiniteLossError, match="at step 9, after 2 that were skipped"):
        train(dataclasses.replace(config, resume=True), terms={"burst": Bursts(3)})
    more = dataclasses.replace(config, resume=True, max_skipped=3)
    assert train(more, terms={"burst": Bursts(2)}).accuracy >= 0


def stopping_at(step: int, number: signal.Signals):
    """A term that sends this process a signal in one step."""
    count = 0

    def term(student, teacher, labels):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return {"stop": student.logits.sum() * 0}

    return term


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (13, signal.SIGTERM), (14, signal.SIGUSR1)])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted_one(tmp_path, step, number):
    objective = ObjectiveConfig(terms="dcd+kd+stop")
    whole = tiny_config(tmp_path, objective=objective, run_dir=str(tmp_path / "whole"))
    quiet = stopping_at(-1, number)
    expected = train(whole, terms={"stop": quiet})
    config = dataclasses.replace(whole, run_dir=str(tmp_path / "cut"))
    handler = signal.getsignal(number)
    result = train(config, terms={"stop": stopping_at(step, number)})
    assert signal.getsignal(number) is handler
    assert result.stopped_by == number
    assert not result.already_finished
    assert result.path.name == f"step-{step:08d}"
    resumed = train(dataclasses.replace(config, resume=True), terms={"stop": quiet})
    assert resumed.stopped_by is None
    assert resumed.resumed_from == step
    assert resumed.history == expected.history
    assert same(read_checkpoint(resumed.path).weights[STUDENT], read_checkpoint(expected.path).weights[STUDENT])


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch, epochs):
    """The epoch's steps are saved; the other checkpoint of that step has the evaluation too."""
    from fastkd.trainer.models.features import FeatureModel

    whole = tiny_config(tmp_path, epochs=epochs, run_dir=str(tmp_path / "whole"))
    expected = train(whole)
    config = dataclasses.replace(whole, run_dir=str(tmp_path / "cut"), data=dataclasses.replace(whole.data))
    forward = FeatureModel.forward

    def stop_when_evaluated(self, images):
        # The forward passes that look at the models before the run have one or two images.
        if not self.training and self.model.fc.in_features == 12 and len(images) > 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    monkeypatch.setattr(FeatureModel, "forward", stop_when_evaluated)
    result = train(config)
    monkeypatch.undo()
    assert result.stopped_by == signal.SIGTERM
    assert result.history == []
    assert result.path.name == "step-00000013"
    again = train(dataclasses.replace(config, resume=True))
    assert again.stopped_by is None
    assert again.history == expected.history
    assert again.path.name == ("step-00000013-evaluated" if epochs == 1 else "step-00000026")
    assert same(read_checkpoint(again.path).weights[STUDENT], read_checkpoint(expected.path).weights[STUDENT])
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    assert train(dataclasses.replace(config, resume=True)).already_finished


def test_a_resumed_run_that_stops_before_it_logs_can_be_resumed(tmp_path):
    """metrics.jsonl was longer than the checkpoint knew; its size must be what it is after the cut."""
    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="dcd+kd+stop"), save_every_steps=0, log_every=5)
    train(config, terms={"stop": stopping_at(3, signal.SIGTERM)})
    with (Path(config.run_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4}\n' * 1000)
    again = dataclasses.replace(config, resume=True)
    assert train(again, terms={"stop": stopping_at(1, signal.SIGTERM)}).path.name == "step-00000004"
    assert train(again, terms={"stop": stopping_at(-1, signal.SIGTERM)}).resumed_from == 4


def test_many_skipped_steps_do_not_wear_out_the_loss_scale(tmp_path):
    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="kd+burst"), epochs=20, max_skipped=200)
    bursts = Bursts(*range(1, 180))
    train(config, terms={"burst": bursts})
    state = read_checkpoint(find_checkpoint(config.run_dir)).state
    assert state["scaler"]["scale"] == 1.0
    assert state["meter"]["skipped"] == 179


def test_a_loss_that_is_infinite_with_finite_gradients_changes_nothing_either(tmp_path):
    """Nor do the running statistics of an own term."""

    class Term(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.count = torch.nn.BatchNorm1d(4), 0

        def forward(self, student, teacher, labels):
            self.count += 1
            bad = torch.inf if self.count == 2 else 0.0
            return {"own": self.norm(student.logits + (torch.nan if self.count == 4 else 0.0)).mean() + bad}

    config = tiny_config(
        tmp_path,
        objective=ObjectiveConfig(terms="kd+own"),
        epochs=1,
        max_skipped=2,
        save_every_steps=1,
        keep=99,
        ema=0.9,
    )
    train(config, terms={"own": Term()})
    points = [read_checkpoint(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints")]
    for step in (2, 4):
        for part in (STUDENT, LOSS, EMA):
            before, after = (
                {k: v for k, v in points[k].weights[part].items() if "num_batches" not in k} for k in (step - 1, step)
            )
            assert same(before, after), (step, part)


def test_the_moving_average_copies_integers_and_infinite_buffers():
    from fastkd.trainer.run.step import MovingAverage

    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("index", torch.arange(500) * 4801)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    average = MovingAverage(model, 0.9999)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        average.update(model, torch.tensor(True))
    assert torch.equal(average.module.index, model.index)
    assert torch.equal(average.module.mask, model.mask)
    torch.testing.assert_close(average.module.weight, torch.full((3,), 1 + 6e-4), rtol=1e-6, atol=1e-6)


def test_the_command_exits_as_a_process_that_the_signal_ended(tmp_path, capsys):
    """And --resume-or-start goes on with what it left."""
    code = (
        "import sys, fastkd.trainer.run.step as s, os, signal\n"
        "call, count = s.TrainStep.__call__, [0]\n"
        "def stop(self, *a):\n"
        "    count[0] += 1\n"
        "    if count[0] == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return call(self, *a)\n"
        "s.TrainStep.__call__ = stop\n"
        "from fastkd.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["train", "digits-scratch", "--run-dir", str(tmp_path), "--epochs", "1", "--resume-or-start"]
    flags += [
        "--data.batch-size",
        "20",
        "--optim.warmup-epochs",
        "0",
        "--device",
        "cpu",
        "--no-tensorboard",
        "--no-progress",
    ]
    first = run_python("-c", code, *flags)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert "stopped at step 5 of 10; resume from" in first.stdout
    assert main(flags) == 0
    second = capsys.readouterr().out
    assert "resumed from" in second
    assert "at step 5 of 10" in second


def test_a_restart_by_torchrun_resumes_by_itself(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="dcd+kd+stop"), save_every_steps=5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # The first attempt may have died before it wrote anything.
    train(config, terms={"stop": stopping_at(7, signal.SIGTERM)})
    assert train(config, terms={"stop": stopping_at(-1, signal.SIGTERM)}).resumed_from == 7
    for count, job in (("0", "mine"), ("1", "another")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        with pytest.raises(CheckpointError, match="already holds a run"):
            train(config)


def killed_once(config):
    """A rank of two. Rank 1 is killed at its eighth step, and not when it has been restarted."""
    import fastkd.trainer.run.step as module

    torch.set_num_threads(1)
    call, steps = module.TrainStep.__call__, itertools.count(1)

    def step(self, *arguments):
        if (next(steps), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (8, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *arguments)

    module.TrainStep.__call__ = step
    return train(config).resumed_from


def test_a_rank_that_is_killed_is_restarted_by_torchrun_and_the_run_goes_on(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=3)
    assert under_torchrun(killed_once, config, max_restarts=1) == [6, 6]
    assert [line["step"] for line in lines(config.run_dir) if line["kind"] == "step"] == list(range(1, 27))


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    """The learning rate is so large that later epochs are worse."""
    config = tiny_config(
        tmp_path, objective=ObjectiveConfig(terms="ce"), teacher=None, epochs=8, keep=1, eval_every=1,
        optim=OptimConfig(lr=0.02, schedule="constant"),
    )  # fmt: skip
    result = train(config)
    accuracies = {epoch["step"]: epoch["accuracy"] for epoch in result.history}
    best = max(accuracies, key=lambda step: (accuracies[step], step))
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(Path(config.run_dir) / "checkpoints")]
    assert kept == sorted({best, 8 * 13})
    assert find_checkpoint(config.run_dir, best=True).name == f"step-{best:08d}"
    assert find_checkpoint(config.run_dir) == result.path
    assert read_checkpoint(find_checkpoint(config.run_dir, best=True)).manifest["accuracy"] == accuracies[best]


def test_the_moving_average_is_what_is_evaluated_saved_and_resumed(tmp_path):
    config = tiny_config(tmp_path, ema=0.9, save_every_steps=1, keep=100, run_dir=str(tmp_path / "whole"))
    result = train(config)
    checkpoints = [read_checkpoint(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints")]
    expected = checkpoints[1].weights[EMA]["fc.weight"]
    for checkpoint in checkpoints[2:]:
        expected = 0.9 * expected + 0.1 * checkpoint.weights[STUDENT]["fc.weight"]
    torch.testing.assert_close(checkpoints[-1].weights[EMA]["fc.weight"], expected)
    assert not torch.equal(checkpoints[-1].weights[EMA]["fc.weight"], checkpoints[-1].weights[STUDENT]["fc.weight"])
    assert same(load_weights(config.run_dir), checkpoints[-1].weights[EMA])
    assert same(dict(result.deployed.model.state_dict()), checkpoints[-1].weights[EMA])

    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"), objective=ObjectiveConfig(terms="dcd+kd+stop"))
    train(cut, terms={"stop": stopping_at(9, signal.SIGTERM)})
    again = train(dataclasses.replace(cut, resume=True), terms={"stop": stopping_at(-1, signal.SIGTERM)})
    assert same(read_checkpoint(again.path).weights[EMA], checkpoints[-1].weights[EMA])
    assert [epoch["accuracy"] for epoch in again.history] == [epoch["accuracy"] for epoch in result.history]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    run_dir = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=re.escape(run_dir)):
        train(tiny_config(tmp_path, teacher=None, objective=ObjectiveConfig(terms="ce"), run_dir=run_dir))


def test_throughput_is_reported_apart_from_what_must_repeat(tmp_path):
    config = tiny_config(tmp_path)
    train(config)
    speeds = [json.loads(line) for line in (Path(config.run_dir) / "speed.jsonl").read_text().splitlines()]
    assert [speed["step"] for speed in speeds] == [13, 26]
    for speed in speeds:
        assert speed["images_per_second"] > 0
        assert 0 < speed["data_wait"] < 1
    assert "images_per_second" not in (Path(config.run_dir) / "metrics.jsonl").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_chunks_train_as_the_whole_batch_does_without_dropout(tmp_path, precision):
    """Nor batch norm, which normalises a chunk at a time: then the steps are the same but for rounding."""
    from fastkd.trainer import ModelConfig

    student = ModelConfig(
        name="fastkd.trainer.models.small:MLP", num_classes=4, options={"in_features": 16, "hidden": [16]}
    )
    # The noise of the images is drawn in the loader, the same for both.
    config = tiny_config(tmp_path, run_dir=None, student=student, precision=precision, epochs=1)
    whole, chunked = train(config), train(dataclasses.replace(config, chunks=2))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for name in ("loss", "ce", "kd", "dcd/contrast", "dcd/consistency"):
        assert chunked.history[-1][name] == pytest.approx(whole.history[-1][name], rel=tolerance)
