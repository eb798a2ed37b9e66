"""What watches a run: callbacks are told everything in order, lose nothing when they raise, and trackers use them."""

import dataclasses
import json
import math
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastkd.trainer import Callback, train
from fastkd.trainer.callbacks import TRACKERS, MLflow, built_in
from fastkd.trainer.run.saved.checkpoint import find_checkpoint
from tests.helpers.trainer_runs import lines, one_thread, tiny_config  # noqa: F401 (one_thread is used by being imported)


class Recorder(Callback):
    """Keeps what it was told; raises at the record ``fail_at`` (kind, step)."""

    def __init__(self, fail_at: tuple[str, int] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail_at = fail_at

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        self.calls.append(("start", info["steps"], folder, step))
        if self.fail_at == ("start", step):
            raise LookupError("no room for records")

    def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.calls.append((kind, step, values))
        if (kind, step) == self.fail_at:
            raise LookupError("no room for records")

    def on_end(self, outcome: str, checkpoint: Path | None) -> None:
        self.calls.append((outcome, checkpoint))
        if self.fail_at == ("end", 0):
            raise LookupError("no room for records")


def test_a_callback_is_told_of_start_every_record_and_end(tmp_path):
    config = tiny_config(tmp_path)
    recorder = Recorder()
    result = train(config, callbacks=[recorder])
    start, *records, end = recorder.calls
    assert start == ("start", 26, Path(config.run_dir), 0)
    assert end == ("finished", result.path)
    told = [{"kind": kind, "step": step, **values} for kind, step, values in records if kind != "speed"]
    assert told == lines(config.run_dir)
    assert [(kind, step) for kind, step, _ in records if kind != "step"] == [
        *(("speed", 13), ("epoch", 13)),
        *(("speed", 26), ("epoch", 26)),
    ]
    again = Recorder()
    train(dataclasses.replace(config, resume=True), callbacks=[again])
    assert again.calls == []  # it was finished


@pytest.mark.parametrize("fail_at", [("step", 5), ("speed", 13), ("epoch", 13), ("epoch", 26), ("end", 0)])
def test_a_callback_that_raises_ends_the_run_and_loses_nothing(tmp_path, fail_at):
    whole = tiny_config(tmp_path, run_dir=str(tmp_path / "whole"))
    train(whole)
    config = tiny_config(tmp_path)
    first, failing, last = Recorder(), Recorder(fail_at), Recorder()
    with pytest.raises(LookupError, match="no room for records") as caught:
        train(config, callbacks=[first, failing, last])
    checkpoint = find_checkpoint(config.run_dir)
    assert caught.value.__notes__ == [f"A callback raised this; the run is saved and can be resumed: {checkpoint}"]
    step = fail_at[1] or 26
    assert int(checkpoint.name.removeprefix("step-")) == step
    assert lines(config.run_dir) == lines(whole.run_dir)[: step + step // 13]
    for recorder in (first, failing, last):
        assert recorder.calls[-1] == ("finished" if fail_at == ("end", 0) else "failed", checkpoint)
    assert sum(call[0] in ("finished", "failed", "stopped") for call in failing.calls) == 1
    resumed = train(dataclasses.replace(config, resume=True))
    assert lines(config.run_dir) == lines(whole.run_dir)
    assert resumed.accuracy == lines(whole.run_dir)[-1]["accuracy"]


def test_callbacks_hear_of_a_signal_and_of_a_failure(tmp_path, monkeypatch):
    class Stop(Recorder):
        def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

    stopped = Stop()
    result = train(tiny_config(tmp_path), callbacks=[stopped])
    assert result.stopped_by == signal.SIGTERM
    assert stopped.calls[-1] == ("stopped", find_checkpoint(tmp_path / "run"))
    failed, late = Recorder(), Recorder(("start", 0))
    config = tiny_config(tmp_path, run_dir=str(tmp_path / "other"))
    with pytest.raises(LookupError, match="no room"):
        train(config, callbacks=[failed, late])
    assert [call[0] for call in failed.calls] == ["start", "failed"]
    assert [call[0] for call in late.calls] == ["start"]
    config = dataclasses.replace(config, resume=True, optim=dataclasses.replace(config.optim, lr=1e38))
    failed = Recorder()
    with pytest.raises(ValueError, match="logit_scale"):
        train(config, callbacks=[failed])
    assert failed.calls[-1][0] == "failed"


def stub(calls: list[tuple[Any, ...]], name: str, **returns: Any) -> types.ModuleType:
    """A module every function of which is noted down with its arguments, and returns what ``returns`` says."""
    module = types.ModuleType(name)
    module.__dict__["__getattr__"] = lambda method: (
        lambda *args, **named: (calls.append((method, args, named)), returns.get(method))[1]
    )
    return module


def test_a_run_and_its_resumption_are_one_run_in_wandb(tmp_path, monkeypatch):
    calls: list[tuple[Any, ...]] = []
    run: Any = stub(calls, "run")
    run.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", stub(calls, "wandb", init=run))
    config = tiny_config(tmp_path, epochs=1, track="wandb")
    train(config)
    names = [name for name, *_ in calls]
    assert names == ["init", "define_metric", "define_metric", *["log"] * 15, "finish"]
    assert calls[0][2]["config"] == json.loads((tmp_path / "run" / "run.json").read_text())
    assert (calls[0][2]["id"], calls[0][2]["resume"]) == (None, "allow")
    first = lines(config.run_dir)[0].items()
    expected = {f"step/{name}": value for name, value in first if name not in ("kind", "step")}
    assert calls[3][1][0] == {**expected, "step": 1}
    assert calls[-1][2] == {"exit_code": 0}
    calls.clear()
    train(dataclasses.replace(config, epochs=2, resume=True))
    assert calls[0][2]["id"] == "abc"


def test_a_run_and_its_resumption_are_one_run_in_mlflow(tmp_path, monkeypatch):
    calls: list[tuple[Any, ...]] = []
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    monkeypatch.setitem(sys.modules, "mlflow", stub(calls, "mlflow", start_run=run))
    config = tiny_config(tmp_path, epochs=1, track="mlflow")
    train(config)
    (start,) = (named for name, _, named in calls if name == "start_run")
    assert start == {"run_id": None, "run_name": config.run_dir, "nested": False}
    settings = [args[0] for name, args, _ in calls if name == "log_params"]
    assert all(len(part) <= 100 for part in settings)
    assert {"optim.lr": "0.05", "seed": "0"}.items() <= {**settings[0], **settings[-1]}.items()
    metrics = [(args[0], named["step"]) for name, args, named in calls if name == "log_metrics"]
    assert len(metrics) == 15
    assert metrics[-1][0]["epoch/accuracy"] == lines(config.run_dir)[-1]["accuracy"]
    assert calls[-1][:2] == ("end_run", ("FINISHED",))
    calls.clear()
    train(dataclasses.replace(config, epochs=2, resume=True))
    assert [named["run_id"] for name, _, named in calls if name == "start_run"] == ["r1"]
    assert not [name for name, *_ in calls if name == "log_params"]
    tracker = MLflow()
    tracker.on_record("step", 3, {"mine/<b>": math.nan})
    assert list(calls[-1][1][0]) == ["step/mine/_b_"]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch):
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
        with pytest.raises(ValueError, match=f"track: got '{name}', expected it to be installed.*pip install {name}"):
            train(tiny_config(tmp_path, track=name))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="track: got 'neptune', expected one of"):
        tiny_config(tmp_path, track="neptune")


def test_without_tensorboard_its_curves_are_left_out(monkeypatch):
    assert [type(callback).__name__ for callback in built_in(True, None)] == ["TensorBoard"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert built_in(True, None) == []
