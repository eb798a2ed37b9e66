"""The report: statistics, and a page that is complete, self-contained and escaped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastkd.demo import results as report
from fastkd.demo.config import DemoConfig
from fastkd.study.costs import Cost
from tests.helpers.pages import read_page

pytestmark = pytest.mark.slow
METHODS = ("ce", "kd", "dcd", "dcd+kd", "100*ckd", "msdcrd")


def synthetic(*, seeds: int = 3, methods: tuple[str, ...] = METHODS, epochs: int = 6) -> report.Results:
    generator = np.random.default_rng(0)
    runs = []
    for index, method in enumerate(methods):
        for seed in range(seeds):
            gap = generator.random((10, 10)) * 0.3
            np.fill_diagonal(gap, 0.0)
            runs.append(
                report.Run(
                    method=method,
                    seed=seed,
                    seconds=1.0 + index,
                    curve=(90 + index + generator.normal(size=epochs)).tolist(),
                    scale=np.linspace(2.7, 5, epochs).tolist() if "dcd" in method else [],
                    correlation_gap=gap.tolist(),
                )
            )
    labels = np.repeat(np.arange(10), 3)
    return report.Results(
        teacher=report.Teacher(accuracy=98.25, parameters=57_594, seconds=3.0),
        student_parameters=1_442,
        runs=runs,
        costs={
            method: Cost(milliseconds=1.5 + index, peak_bytes=2048 * (1 + index))
            for index, method in enumerate(dict.fromkeys(("ce", *methods)))
        },
        embeddings={name: generator.normal(size=(30, 2)) for name in ("teacher", *methods)},
        labels=labels,
        test_images=600,
        max_scale=10.0,
        settings={"student": "A tiny network", "seed": "initial weights", "first seed": "0"},
        environment={"workers": "2 processes", "command": "fastkd demo"},
    )


def with_accuracies(results: report.Results, accuracies: dict[str, list[float]]) -> report.Results:
    """The results with these last accuracies, by method and seed."""
    return replace(results, runs=[replace(run, curve=[accuracies[run.method][run.seed]]) for run in results.runs])


def test_page_holds_every_figure_and_number(tmp_path: Path) -> None:
    results = synthetic()
    page = read_page(report.write_report(results, tmp_path))
    text = page.words
    # Curves, dots and scale; a map and an embedding of every method, and an embedding of the teacher.
    assert len(page.pictures) == 3 + len(METHODS) + 1 + len(METHODS)
    for heading in ("Learning curves", "seed by seed", "Temperature of the contrast", "Correlation", "Features in two"):
        assert heading in text
    saved = json.loads((tmp_path / "results.json").read_text())
    for row in saved["summary"]:
        assert f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}" in text
        assert report.display_name(row["method"]) in text
    for difference in saved["differences"]:
        assert report.signed(difference["mean"]) in text
    for number in ("98.25", "57,594", "1,442"):
        assert number in text
    last = [run.curve[-1] for run in results.runs if run.method == "kd"]
    row = next(row for row in saved["summary"] if row["method"] == "kd")
    assert row["accuracy_mean"] == pytest.approx(sum(last) / len(last))
    assert row["accuracy_std"] == pytest.approx(np.std(last, ddof=1))
    assert len(saved["runs"]) == 3 * len(METHODS)


def test_paired_difference_matches_a_hand_computed_interval() -> None:
    accuracies = {"ce": [90.0, 91.0, 92.0], "kd": [91.0, 93.0, 95.0]}
    difference = report.paired_difference(with_accuracies(synthetic(methods=("ce", "kd")), accuracies), "kd", "ce")
    assert difference is not None
    assert difference.mean == pytest.approx(2.0)
    assert difference.error == pytest.approx(1 / np.sqrt(3))
    assert difference.low == pytest.approx(2.0 - 4.302653 / np.sqrt(3), abs=1e-5)
    assert not difference.exceeds_noise
    assert "does not differ" in report.verdict(difference)


def test_a_worse_method_is_called_worse() -> None:
    accuracies = {"ce": [90.0, 91.0, 92.0], "dcd": [85.0, 86.1, 86.9]}
    (difference,) = report.differences(with_accuracies(synthetic(methods=("ce", "dcd")), accuracies))
    sentence = report.verdict(difference)
    assert sentence.startswith("DCD is 5.00 points worse than training from scratch")


def test_methods_within_the_noise_share_a_sentence_and_the_others_have_their_own() -> None:
    accuracies = {"ce": [90.0, 91.0, 92.0], "kd": [95.0, 96.1, 97.2], "dcd": [90.1, 90.9, 92.1]}
    accuracies |= {"100*ckd": [91.0, 90.5, 92.5], "pckd": [95.2, 96.0, 97.1]}
    sentences = report.verdicts(with_accuracies(synthetic(methods=tuple(accuracies)), accuracies))
    assert len(sentences) == 6
    assert sentences[0].startswith("KD is 5.10 points better than training from scratch (95 % interval ")
    assert sentences[2] == (
        "Not different from training from scratch by more than the noise, in points: DCD (+0.03), CKD (+0.33)."
    )
    assert sentences[3].startswith("DCD is 5.07 points worse than KD")
    assert sentences[5].startswith("PCKD does not differ from KD by more than the noise (0.00 points;")


def test_costs_are_those_beyond_a_step_from_scratch() -> None:
    results = synthetic(methods=("kd", "pckd"))  # the one from scratch is measured in any case
    rows = report.summary(results)
    assert [row["memory"] for row in rows] == ["", "2", "4"]
    assert [row["time"] for row in rows] == ["", "2.5", "3.5"]
    assert [row["scratch"] for row in rows] == ["", "", ""]
    assert rows[2]["kd"] == rows[2]["kd"].strip() != ""
    width = Console(width=80).measure(report.console_table(synthetic(methods=DemoConfig().methods)))
    assert width.maximum <= 80


def test_one_seed_has_no_spread_and_claims_nothing(tmp_path: Path) -> None:
    text = read_page(report.write_report(synthetic(seeds=1), tmp_path)).text
    assert "says nothing about noise" in text
    assert "1 seed each" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert all(row["accuracy_std"] is None for row in saved["summary"])
    assert not any(difference["exceeds_noise"] for difference in saved["differences"])


def test_identical_runs_of_one_epoch_still_draw(tmp_path: Path) -> None:
    results = synthetic(epochs=1)
    zeros = np.zeros((10, 10)).tolist()
    runs = [replace(run, curve=[100.0], correlation_gap=zeros) for run in results.runs]
    assert "100.00 ± 0.00" in read_page(report.write_report(replace(results, runs=runs), tmp_path)).words


def test_methods_without_a_baseline_or_a_scale(tmp_path: Path) -> None:
    text = report.write_report(synthetic(methods=("kd",)), tmp_path).read_text()
    assert "What can be said" not in text
    assert "Temperature of the contrast" not in text


def test_names_with_markup_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("x")</script> & $a_b$'
    results = synthetic(methods=("ce", name))
    results = replace(results, environment={**results.environment, "<b>": "<img src=http://example.org/x>"})
    text = read_page(report.write_report(results, tmp_path)).text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_value_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    results = synthetic()
    runs = [replace(results.runs[0], curve=[float("nan")] * 6), *results.runs[1:]]
    with pytest.raises(ValueError, match="ce, seed 0"):
        report.write_report(replace(results, runs=runs), tmp_path)


def test_a_second_report_replaces_the_first_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    report.write_report(synthetic(seeds=1), tmp_path)
    report.write_report(synthetic(seeds=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "report.html", "results.json"]
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2 * len(METHODS)


def test_console_table_shows_the_same_numbers() -> None:
    results = synthetic()
    table = report.console_table(results)
    assert table.row_count == 1 + len(METHODS)
    assert list(table.columns[1].cells) == [row["accuracy"] for row in report.summary(results)]


@pytest.mark.parametrize(("value", "text"), [(1.234, "+1.23"), (-1.234, "\N{MINUS SIGN}1.23"), (-0.001, "0.00")])
def test_signed_numbers(value: float, text: str) -> None:
    assert report.signed(value) == text
