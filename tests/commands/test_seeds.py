"""``fastkd train RECIPE --seeds``: a run per seed, continued by the same command, and their mean and deviation."""

import dataclasses
import signal
import statistics
import tempfile
from pathlib import Path

import pytest

from fastkd.cli import main
from fastkd.trainer import Callback, TrainConfig, train
from fastkd.trainer.commands import seeds as command
from fastkd.trainer.commands.seeds import train_seeds
from tests.helpers.trainer_runs import lines, one_thread, tiny_config  # noqa: F401 (one_thread is used by being imported)


def recipe() -> TrainConfig:
    return tiny_config(Path(tempfile.mkdtemp()), epochs=1, quiet=False)


def test_every_seed_has_a_run_and_the_mean_and_deviation_are_printed(tmp_path, capsys, refused):
    arguments = ["train", "tests.commands.test_seeds:recipe", "--run-dir", str(tmp_path / "all"), "--seeds", "3", "0"]
    assert main(arguments) == 0
    found = [lines(tmp_path / "all" / f"seed-{seed}")[-1]["accuracy"] for seed in (3, 0)]
    alone = train(tiny_config(tmp_path, epochs=1, seed=3, run_dir=str(tmp_path / "alone")))
    assert lines(tmp_path / "alone") == lines(tmp_path / "all" / "seed-3")
    assert alone.accuracy == found[0] != found[1]
    out = capsys.readouterr().out.splitlines()
    mean, deviation = statistics.mean(found), statistics.stdev(found)
    assert out[-3:] == [
        f"seed 3: accuracy {found[0]:.4f}",
        f"seed 0: accuracy {found[1]:.4f}",
        f"accuracy {mean:.4f} ± {deviation:.4f} (mean ± standard deviation of 2 seeds)",
    ]
    line = refused(*arguments[:2], "--run-dir", tmp_path / "alone", "--seeds", "0", "1")
    assert line.endswith("alone', which holds a run, expected a folder for those of --seeds")


def test_the_same_call_goes_on_where_it_was_stopped_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    class Stop(Callback):
        def on_record(self, kind: str, step: int, values: dict[str, float]) -> None:
            if step == 4 and started[-1].endswith("seed-1"):
                signal.raise_signal(signal.SIGTERM)

    started = []

    def watched(config: TrainConfig):
        started.append(str(config.run_dir))
        return train(config, callbacks=[Stop()])

    config = tiny_config(tmp_path, epochs=1, run_dir=str(tmp_path / "all"), quiet=False)
    monkeypatch.setattr(command, "train", watched)
    results = train_seeds(config, [0, 1, 2])
    assert [result.stopped_by for result in results] == [None, signal.SIGTERM]
    assert "stopped in seed 1; the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(command, "train", train)
    results = train_seeds(dataclasses.replace(config, quiet=True), [0, 1, 2])
    assert [result.already_finished for result in results] == [True, False, False]
    assert [result.resumed_from for result in results] == [13, 4, None]
    for wrong, message in (([], "got none"), ([1, 1], "got 1 twice")):
        with pytest.raises(ValueError, match=message):
            train_seeds(config, wrong)
