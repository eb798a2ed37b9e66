"""``fastkd report``: pages of real tiny runs, and of folders made by hand for what a real run rarely leaves."""

import html
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fastkd.cli import main
from fastkd.trainer import ObjectiveConfig, train
from fastkd.trainer.report.curves import COLOURS, MAX_POINTS, thin
from fastkd.trainer.report.page import write_run_report
from fastkd.trainer.report.records import read_run
from tests.helpers.pages import Page, read_page
from tests.helpers.trainer_runs import lines, one_thread, tiny_config  # noqa: F401 (one_thread is used by being imported)

pytestmark = pytest.mark.slow

ODD_COUNTS = json.dumps({"step": 1, "classes": ["a"], "right": [-1], "samples": [2]})
ODD = '<script>alert("x")</script> & $a_b$ \ud800\x00'


def page_of(*runs: Path, out: Path | None = None) -> Page:
    page = read_page(write_run_report(runs, out))
    assert len(page.pictures) <= len(page.captions)
    return page


def write_lines(run: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with all three terms."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(folder))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "copy")


def test_the_page_holds_every_value_of_the_last_and_the_best_epoch(run):
    page = page_of(run)
    epochs = [record for record in lines(run) if record["kind"] == "epoch"]
    best = max(epochs, key=lambda record: record["accuracy"])
    titles = {"accuracy": "Accuracy, top-1 (%)", "eval_loss": "Evaluation loss (nats)"}
    titles |= {"loss": "Training loss, weighted sum", "lr": "Learning rate"}
    titles |= {"dcd/tau": "dcd/tau: τ", "dcd/scale": "dcd/scale: logit scale, exp(τ)"}
    for name in sorted(set(epochs[-1]) - {"kind", "step", "epoch", "top5"}):
        title = titles.get(name, name)
        assert page.numbers(title) == [epochs[-1][name], best[name]]
        assert any(caption.startswith(title) for caption in page.captions)
    assert "Gradient norm before clipping" in page.captions
    assert f"{100 * epochs[-1]['accuracy']:.2f}</data>" in page.text
    assert "top-5" not in page.text  # of four classes it is always 100 %
    assert len(page.pictures) == len(page.captions) == len(epochs[-1]) - 4 + 3  # each value, gradient norm, speed
    teacher = json.loads((run / "run.json").read_text())["teacher_accuracy"]
    gaps = [record["accuracy"] - teacher for record in (epochs[-1], best)]
    assert page.numbers("Accuracy minus the teacher's (points)") == pytest.approx(gaps)
    assert f"Accuracy, top-1 (%) (dashed: teacher {100 * teacher:.2f})" in page.captions
    (panel,) = (part for part in page.text.split("<figure>") if part.startswith("<figcaption>Accuracy, top-1"))
    hovered = re.findall(r"<title>(.*?)</title>", panel)
    assert hovered == [f"copy, epoch {n + 1}: {100 * epochs[n]['accuracy']:.4g}" for n in (0, 1)]
    (lr,) = (part for part in page.text.split("<figure>") if part.startswith("<figcaption>Learning rate"))
    assert lr.count("<title>") == 28  # every step and epoch
    assert not re.search(r">0\.\d+</text>", panel), "half an epoch"


def test_the_page_says_what_the_run_was(run):
    page = page_of(run)
    info = json.loads((run / "run.json").read_text())
    assert f"{info['student']['parameters']:,} parameters" in page.text
    for text in (info["teacher_sha256"], info["learning_rate"], info["versions"]["torch"]):
        assert text in page.text
    for text in ("1 x ce + 1 x dcd + 1 x kd", "52 training samples, 20 evaluation samples", "fp32", "finished: all 26"):
        assert text in page.text
    manifest = json.loads((run / "checkpoints/step-00000026/manifest.json").read_text())
    assert manifest["labels_sha256"] in page.text
    assert "resumed" not in page.text
    assert "optim.clip_norm" in page.text
    assert html.escape(info["command"]) in page.text
    assert info["command"].endswith(shlex.join(sys.argv[1:]))


def test_an_unfinished_and_a_resumed_run_say_so(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "stopped")
    shutil.rmtree(run / "checkpoints/step-00000026")
    recorded = lines(run)
    half = json.dumps(recorded[20])[:50]
    write_lines(run, recorded[:20], half)
    page = page_of(run)
    assert "not finished: last record at step 19 of 26" in page.text
    assert "newest checkpoint at step 13" in page.text
    assert "is incomplete" in page.text
    assert page.numbers("ce") == [recorded[13]["ce"]] * 2
    config = tiny_config(tmp_path, run_dir=str(run), resume=True)
    shutil.copy(trained.parent / "teacher.safetensors", tmp_path / "teacher.safetensors")
    train(config)
    page = page_of(run)
    assert "finished: all 26 steps, 2 epochs; resumed at least once" in page.text
    assert "is incomplete" not in page.text


def test_one_epoch_without_a_teacher(tmp_path):
    train(tiny_config(tmp_path, epochs=1, teacher=None, log_every=1000, objective=ObjectiveConfig(terms="ce")))
    page = page_of(tmp_path / "run")
    assert "1 epoch of 13 steps" in page.text
    assert "Temperature" not in page.text
    colour = f"stroke: {COLOURS[0]}"
    dots = [figure for figure in page.text.split("<figure>")[1:] if re.search(f"<use [^>]*{colour}", figure)]
    assert len(dots) == len(page.pictures), "a curve of one point is not visible"


def test_several_runs_share_panels_and_tell_what_differs(trained, tmp_path):
    other = tiny_config(tmp_path, seed=5, run_dir=str(tmp_path / "seed5"))
    train(other)
    page = page_of(trained, tmp_path / "seed5", out=tmp_path / "sub" / "both.html")
    assert len(page.pictures) == len(page_of(trained, out=tmp_path / "one.html").pictures)
    for name, folder in (("run", trained), ("seed5", tmp_path / "seed5")):
        epochs = [record for record in lines(folder) if record["kind"] == "epoch"]
        row = page.numbers(name)
        best = max(record["accuracy"] for record in epochs)
        teacher = json.loads((folder / "run.json").read_text())["teacher_accuracy"]
        assert row[:3] == [epochs[-1]["accuracy"], pytest.approx(epochs[-1]["accuracy"] - teacher), best]
        assert row[3:5] == [epochs[-1][key] for key in ("eval_loss", "loss")]
        assert all(name in picture for picture in page.pictures)
    differing = page.text[page.text.index("Settings that differ") : page.text.index("All settings")]
    assert ">seed<" in differing
    assert "run_dir" not in differing
    assert "optim.lr" not in differing


def test_runs_of_one_name_are_told_apart_by_their_folders(trained, tmp_path):
    copies = [shutil.copytree(trained, tmp_path / name / "run") for name in ("a", "b")]
    page = page_of(*copies, out=tmp_path / "x.html")
    assert page.numbers("a/run") == page.numbers("b/run")


def test_odd_names_are_escaped(tmp_path):
    def odd(student: Any, teacher: Any, labels: Any) -> dict[str, Any]:
        return {ODD: nn.functional.cross_entropy(student.logits, labels)}

    odd.needs_teacher = False  # type: ignore[attr-defined]
    run = tmp_path / "<b> & $x$"
    objective = ObjectiveConfig(terms="mine")
    train(tiny_config(tmp_path, epochs=1, teacher=None, objective=objective, run_dir=str(run)), terms={"mine": odd})
    page = page_of(run)
    shown = "mine/" + ODD.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    assert shown in page.captions
    assert len(page.numbers(shown)) == 2
    assert "b" not in page.tags


def test_names_of_classes_are_escaped_and_have_their_accuracies(run):
    odd = ["<script>alert(1)</script>", "\x1b[2Jred\u202e", "twice", "twice", "empty"]
    counts = {"step": 26, "classes": odd, "right": [1, 2, 3, 4, 0], "samples": [4, 4, 4, 4, 0]}
    (run / "classes.json").write_text(json.dumps(counts))
    page = page_of(run)
    names = ["<script>alert(1)</script>", "\ufffd[2Jred\ufffd", "twice (2)", "twice (3)"]
    assert [page.numbers(name) for name in names] == [[0.25], [0.5], [0.75], [1.0]]
    assert page.numbers("empty") == []
    many = {"step": 26, "classes": list(range(30)), "right": list(range(30)), "samples": [30] * 30}
    (run / "classes.json").write_text(json.dumps(many))
    page = page_of(run)
    assert "These are the 20 classes with the lowest values of 30" in page.text
    assert page.numbers("19") == [19 / 30]
    assert "20" not in [heading for heading, _ in page.rows]


def test_what_the_evaluation_counted_by_class_is_the_accuracy(trained):
    counts = json.loads((trained / "classes.json").read_text())
    last = lines(trained)[-1]
    assert counts["samples"] == [5, 5, 5, 5]
    assert sum(counts["right"]) / 20 == last["accuracy"]
    assert (counts["step"], counts["classes"]) == (26, ["0", "1", "2", "3"])


def test_the_runs_of_several_seeds_are_one_row_and_one_colour(trained, tmp_path):
    found = []
    for seed in (0, 10, 2):
        copy = shutil.copytree(trained, tmp_path / "all" / f"seed-{seed}")
        recorded = lines(copy)
        for record in recorded:
            if record["kind"] == "epoch":
                record["accuracy"] = 0.5 + seed / 100 + record["epoch"] / 10
        write_lines(copy, recorded)
        found.append(recorded[-1]["accuracy"])
    page = page_of(tmp_path / "all")
    assert (tmp_path / "all" / "report.html").exists()
    assert page.numbers("all (3 seeds)")[0] == pytest.approx(np.mean(found))
    assert f"{100 * np.mean(found):.2f}</data><small>± {100 * np.std(found, ddof=1):.2f}</small>" in page.text
    (panel,) = (part for part in page.text.split("<figure>") if part.startswith("<figcaption>Accuracy, top-1"))
    assert set(re.findall(r"stroke: (#2b8fd9|#e08a12|#2fa37c)", panel)) == {COLOURS[0]}
    titles = re.findall(r"<title>(.*?)</title>", panel)
    assert titles[:2] == ["all, seed 0, epoch 1: 50", "all, seed 0, epoch 2: 60"]
    assert titles[-1] == f"all, mean of 3 seeds, epoch 2: {100 * np.mean(found):.4g}"
    assert titles[2].startswith("all, seed 2,")
    both = page_of(tmp_path / "all", trained, out=tmp_path / "both.html")
    assert len(both.numbers("run")) == len(both.numbers("all (3 seeds)"))


def test_a_folder_that_cannot_be_read_does_not_cost_the_others(run, tmp_path, capsys, refused):
    (tmp_path / "<bad>").mkdir()
    arguments = ["report", str(run), str(tmp_path / "<bad>"), "--out", str(tmp_path / "x.html")]
    assert main(arguments) == 0
    assert capsys.readouterr().err == f"fastkd report: {tmp_path}/<bad>/run.json: is missing; left out\n"
    page = read_page(tmp_path / "x.html")
    assert "/&lt;bad&gt;/run.json: is missing; this run is left out." in page.text
    assert len(page.numbers("Accuracy, top-1 (%)")) == 2
    assert "run.json: is missing" in refused("report", tmp_path / "<bad>")


def test_null_is_a_gap_and_is_counted(run):
    recorded = lines(run)
    for record in recorded[2:5]:
        record["grad_norm"] = None
    for record in recorded:
        record["kd"] = None
        record.update({"accuracy": 1.0} if record["kind"] == "epoch" else {})
    write_lines(run, recorded)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"teacher_accuracy": None}))
    page = page_of(run)
    assert "Gradient norm before clipping (3 of 26 values are not finite: gaps)" in page.captions
    assert "kd (none of its 28 values is finite)" in page.captions
    assert len(page.pictures) == len(page.captions) - 1
    assert page.numbers("kd") == []
    assert "dashed" not in page.text
    (panel,) = (part for part in page.text.split("<figure>") if part.startswith("<figcaption>Accuracy, top-1"))
    assert ">100</text>" in panel
    assert not re.search(r">10[1-9](\.\d)?</text>", panel), "an axis beyond 100 %"


def test_many_step_records_are_thinned_without_losing_a_peak(run):
    recorded = lines(run)
    steps = [recorded[0] | {"step": step, "loss": 2 + math.sin(step)} for step in range(1, 20001)]
    steps[12345]["loss"] = 99.0
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"steps": 40000}))
    write_lines(run, steps)
    page = page_of(run)
    assert "thinned to at most 600 points" in page.text
    assert "has 20,000" in page.text
    assert len(page.text) < 1_500_000
    x, y = np.arange(20000.0), np.array([record["loss"] for record in steps])
    kept, values = thin(x, y)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1], values.max()) == (0, 19999, 99.0)
    assert np.array_equal(values, y[kept.astype(int)])


def test_thinning_keeps_gaps_and_short_curves():
    x = np.arange(5000.0)
    y = np.where((x > 2000) & (x < 3000), np.nan, x)
    kept, values = thin(x, y)
    assert np.isnan(values[(kept > 2020) & (kept < 2980)]).all()
    assert np.isfinite(values).sum() > 400
    assert thin(x[:600], y[:600])[0] is not x
    assert len(thin(x[:600], y[:600])[0]) == 600


def test_throughput_is_shown_where_it_was_recorded(run):
    steps = [record["step"] for record in lines(run) if record["kind"] == "epoch"]
    speeds = [{"kind": "speed", "step": step, "images_per_second": 1234.5, "data_wait": 0.25} for step in steps]
    broken_off = {**speeds[0], "step": 1, "images_per_second": 7.0}
    text = "".join(json.dumps(speed) + "\n" for speed in (broken_off, *speeds))
    (Path(run) / "speed.jsonl").write_text(text + '{"kind": "sp')
    page = page_of(run)
    assert page.numbers("Images a second") == [1234.5, 1234.5]
    assert page.numbers("Time spent waiting for data (%)") == [0.25, 0.25]
    assert "1,234</data>" in page.text
    assert "25.00</data>" in page.text


def test_epochs_that_were_not_evaluated(run):
    recorded = lines(run)
    for key in ("accuracy", "top5", "eval_loss"):
        del recorded[-1][key]
    write_lines(run, recorded)
    page = page_of(run)
    epochs = [record for record in recorded if record["kind"] == "epoch"]
    assert page.numbers("Accuracy, top-1 (%)") == [epochs[0]["accuracy"]] * 2  # last evaluated, best
    assert page.numbers("ce") == [epochs[1]["ce"], epochs[0]["ce"], epochs[0]["ce"]]
    assert "last evaluated epoch (1)" in page.text


def test_a_run_that_has_only_begun(run):
    write_lines(run, [])
    shutil.rmtree(run / "checkpoints")
    page = page_of(run)
    assert "No epoch is finished yet" in page.text
    assert "no checkpoint in its folder" in page.text
    assert "step 0 of 26" in page.text
    assert not page.pictures


def test_a_kind_of_record_or_value_from_elsewhere_is_left_out(run):
    recorded = lines(run)
    write_lines(run, [{"kind": "note", "step": 1, "text": "x"}, recorded[0] | {"comment": "y"}, *recorded[1:]])
    found = read_run(run, "run")
    assert len(found.steps) == 26
    assert "comment" not in found.quantities


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"run\.json: is missing"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: is missing"),
        (lambda run: (run / "checkpoints/step-00000026/manifest.json").unlink(), r"manifest\.json: is missing"),
        (lambda run: (run / "run.json").write_text('{"steps": 1'), r"run\.json: is not JSON"),
        (lambda run: (run / "run.json").write_text("[]"), r"run\.json: holds list, expected an object"),
        (lambda run: (run / "run.json").write_text('{"steps": 1}'), r"run\.json: lacks config, device"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n{}\n"), r"metrics\.jsonl: line 1 is not a record"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), r"metrics\.jsonl: line 1 is not JSON"),
        (shutil.rmtree, "copy: no such run folder"),
        (lambda run: (run / "classes.json").write_text('{"step": 1}'), r"classes\.json: has no lists classes, right"),
        (lambda run: (run / "classes.json").write_text(ODD_COUNTS), r"classes\.json: right, samples and step must be"),
    ],
)
def test_what_is_missing_or_damaged_is_one_line_that_names_the_file(run, refused, spoil, message):
    spoil(run)
    assert re.match(f"fastkd report: .*{message}", refused("report", run))


def test_the_command_writes_where_it_says_and_never_over_a_run_file(run, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("copy", "second")
    assert main(["report", "copy"]) == 0
    assert capsys.readouterr().out == "copy/report.html\n"
    assert main(["report", "copy", "second"]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    before = (run / "run.json").read_bytes()
    for arguments, message in (
        (["copy", "--out", "copy/run.json"], "out: got 'copy/run.json', expected a file that ends in .html"),
        (["copy", "./copy"], "runs: got 'copy' twice"),
        ([], "runs: got none"),
    ):
        assert message in refused("report", *arguments)
    assert (run / "run.json").read_bytes() == before
