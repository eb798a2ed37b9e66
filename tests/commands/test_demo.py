"""The demo end to end, as short as it gets; and what holds its comparison fair."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.demo import digits as demo
from fastkd.demo.config import DemoConfig
from fastkd.demo.describe import command_line
from fastkd.study.grid import place
from fastkd.study.studies.digits import STEPS, DigitsOptions, objective_of, student_config
from fastkd.study.studies.methods import display
from fastkd.trainer.data.datasets import choose_data
from fastkd.trainer.data.loader import train_loader
from tests.helpers.pages import read_page

pytestmark = pytest.mark.slow
METHODS = ("ce", "dcd-e", "100*ckd+pckd+msdcrd")  # few, because each has runs, figures and a measurement of costs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a demo of two seeds and two epochs, beside a file of the user's."""
    out = tmp_path_factory.mktemp("demo")
    (out / "notes.txt").write_text("mine")
    return demo.run_demo(DemoConfig(methods=METHODS, seeds=2, epochs=2, teacher_epochs=1, workers=2, out=out))


def last_epoch(path: Path) -> list[dict[str, Any]]:
    """The last record of an epoch in a run's metrics."""
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "epoch"][-1:]


def last_accuracies(folder: Path) -> dict[tuple[str, int], float]:
    """(method, seed) -> accuracy after the last step in percent, read from the trainer's own run folders."""
    files = {(m, seed): folder / place("digits", m, seed) / "metrics.jsonl" for m in METHODS for seed in range(2)}
    return {key: 100 * last_epoch(file)[0]["accuracy"] for key, file in files.items()}


def test_values_and_curves_come_from_the_runs(finished: Path) -> None:
    accuracies = last_accuracies(finished.parent)
    assert len(accuracies) == 2 * len(METHODS)
    page = read_page(finished)
    assert len(page.pictures) == 3 + len(METHODS) + 1 + len(METHODS)
    saved = json.loads((finished.parent / "results.json").read_text())
    for row in saved["summary"]:
        values = [accuracies[row["method"], seed] for seed in range(2)]
        assert row["accuracy_mean"] == pytest.approx(np.mean(values))
        assert row["accuracy_std"] == pytest.approx(np.std(values, ddof=1))
        assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in page.words
        assert display(row["method"]) in page.text

    for run in saved["runs"]:
        assert len(run["scale"]) == (2 if "dcd" in run["method"] else 0)
        assert len(run["curve"]) == 2
    scales = [value for run in saved["runs"] for value in run["scale"]]
    assert scales == pytest.approx([math.e] * 4)  # two seeds, two evaluations: it is fixed
    steps = {
        line["step"] for path in finished.parent.glob("digits/[!t]*/seed-0/metrics.jsonl") for line in last_epoch(path)
    }
    assert steps == {2 * STEPS}  # from scratch, too
    assert "chosen after a trial that had seen test accuracy" in page.words


def test_users_files_stay_and_latest_leads_to_the_report(finished: Path) -> None:
    out = finished.parent.parent
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "latest" / "report.html").samefile(finished)


def test_new_folders_never_collide(tmp_path: Path) -> None:
    first, second = demo.new_folder(tmp_path), demo.new_folder(tmp_path)
    assert first != second
    demo.link_latest(tmp_path, first)
    demo.link_latest(tmp_path, second)
    assert (tmp_path / "latest").resolve() == second.resolve()


def test_a_folder_of_the_users_called_latest_stays(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    demo.link_latest(tmp_path, demo.new_folder(tmp_path))
    assert not (tmp_path / "latest").is_symlink()


def test_methods_differ_in_nothing_but_the_objective() -> None:
    scratch, *configs = [student_config(DigitsOptions(), Path("runs"), method, 3) for method in METHODS]
    same = [replace(c, objective=scratch.objective, teacher=None, run_dir=None) for c in configs]
    assert all(config == same[0] for config in same)
    assert all(config.teacher is not None for config in configs)
    # From scratch: the same labelled images alone, in as many steps, with as many evaluations.
    passes = scratch.epochs // same[0].epochs
    expected = replace(same[0], epochs=scratch.epochs, eval_every=passes, data=replace(same[0].data, unlabelled=False))
    assert replace(scratch, run_dir=None) == expected
    (whole, _), (few, _) = (choose_data(config.data, None, None) for config in (same[0], scratch))
    assert torch.equal(whole.images[whole.labels >= 0], few.images)
    loaders = [train_loader(data, same[0].data, 3, torch.device("cpu"))[0] for data in (whole, few)]
    assert len(loaders[0]) == STEPS == passes * len(loaders[1])


def test_the_ablation_is_dcd_with_its_scale_at_e() -> None:
    ablation, plain = objective_of("dcd-e"), objective_of("dcd")
    assert replace(ablation.dcd, learnable=True, temperature=plain.dcd.temperature) == plain.dcd
    assert ablation.weights == plain.weights
    assert 1 / ablation.dcd.temperature == pytest.approx(math.e)


def test_correlation_of_a_constant_logit_is_finite() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(demo.class_correlation(logits), np.corrcoef(logits.T), atol=1e-12)
    logits[:, 2] = 0.25
    assert np.isfinite(demo.class_correlation(logits)).all()


def test_command_repeats_the_run() -> None:
    assert command_line(DemoConfig()) == "fastkd demo"
    assert command_line(DemoConfig(seeds=2, methods=("ce", "kd"))) == "fastkd demo --seeds 2 --methods ce kd"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"epochs": 0}, "epochs"),
        ({"workers": 0}, "workers"),
        ({"methods": ()}, "methods"),
        ({"methods": ("kd", "kd")}, "methods"),
        ({"methods": ("kd+",)}, "kd+"),
        ({"methods": ("ce", "nonsense")}, "nonsense"),
    ],
)
def test_bad_settings_are_refused_before_any_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DemoConfig(**options)
