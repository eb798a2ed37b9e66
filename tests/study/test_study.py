"""Studies: a table of runs that is killed and resumed, failures beside results, numbers, and what a dry run says."""

import csv
import doctest
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from fastkd.cli import main
from fastkd.study import aggregate, runner
from fastkd.study.aggregate import entries, improvements, paired
from fastkd.study.cached import as_begun, cache_key
from fastkd.study.command import run_study
from fastkd.study.grid import Cell, Options, Outcome, Study
from fastkd.study.plan import plan
from fastkd.study.records import RESULT, check_same_settings, job_of, read_record
from fastkd.study.runner import run_cells
from fastkd.study.studies import STUDIES
from fastkd.study.studies.cifar import CifarOptions
from fastkd.study.studies.digits import DigitsOptions, digits
from fastkd.study.studies.pictures import class_means, correlation_differences, embeddings_of_logits
from fastkd.study.studies.published import PAIRS, TABLE1
from fastkd.trainer.files import FolderLock
from fastkd.trainer.run.step import TrainStep
from tests.helpers.pages import read_page
from tests.helpers.trainer_runs import one_thread  # noqa: F401

CIFAR = "--pairs resnet8-resnet8 resnet14-resnet8 --methods teacher ce kd --seeds 1 --epochs 2 --train-teachers"


def write_cifar(root: Path) -> None:
    """CIFAR-100's binary layout with a few noisy images, whose brightness tells the class."""
    rng = np.random.default_rng(0)
    (root / "cifar-100-binary").mkdir(parents=True)
    for name, rows in (("train", 64), ("test", 20)):
        labels = np.arange(rows, dtype=np.uint8) % 5
        pixels = (40 * labels[:, None] + rng.integers(0, 90, (rows, 3072))).astype(np.uint8)
        np.concatenate([labels[:, None], labels[:, None], pixels], axis=1).tofile(
            root / "cifar-100-binary" / f"{name}.bin"
        )


def table1(data: Path, out: Path) -> int:
    flags = [*CIFAR.split(), "--data", str(data), "--out", str(out), "--workers", "1", "--device", "cpu"]
    return main(["study", "dcd-table1", *flags])


def killed_at(step: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a forked process, which SIGKILL ends at the beginning of this training step of all of its runs."""
    child = os.fork()
    if child == 0:
        steps, call = iter(range(10_000)), TrainStep.__call__

        def dying(self: TrainStep, *values: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, *values)

        monkeypatch.setattr(TrainStep, "__call__", dying)
        try:
            run()
        finally:
            os._exit(0)  # it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_table_is_resumed_and_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path)
    # Of 5 runs (two teachers, one student without, two with) the third one is killed in its second epoch.
    killed_at(5, lambda: table1(tmp_path, tmp_path / "killed"), monkeypatch)
    before = {path: read_record(path.parent) for path in tmp_path.glob("killed/**/result.json")}
    assert len(before) == 2
    capsys.readouterr()
    assert table1(tmp_path, tmp_path / "killed") == 0
    assert table1(tmp_path, tmp_path / "whole") == 0
    assert all(read_record(path.parent) == record for path, record in before.items())
    texts = [(tmp_path / name / "table.md").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]
    rows = list(csv.DictReader((tmp_path / "killed" / "table.csv").open()))
    assert {(row["column"], row["row"]) for row in rows} == {
        (f"{teacher}-resnet8", method)
        for teacher in ("resnet8", "resnet14")
        for method in ("Teacher", "From scratch", "KD")
    }
    assert all(row["runs"] == "1" and row["error"] == "" for row in rows)
    runs = list((tmp_path / "killed").glob("**/run.json"))
    assert len(runs) == 5  # the student without a teacher is one run for both pairs
    page = read_page(tmp_path / "killed" / "report.html")
    assert len(page.pictures) == 4  # dots and curves of two pairs
    for path in runs:  # bit for bit
        other = tmp_path / "whole" / path.relative_to(tmp_path / "killed")
        assert path.with_name("metrics.jsonl").read_text() == other.with_name("metrics.jsonl").read_text()

    # The pictures of figures 2 and 3, from these students.
    chosen: Any = {"pairs": ("resnet8-resnet8", "resnet14-resnet8"), "methods": ("ce", "kd"), "seeds": 1, "epochs": 2}
    options = CifarOptions(**chosen, train_teachers=True, data=str(tmp_path), device="cpu")
    study = STUDIES["dcd-table1"](options)
    gaps = correlation_differences(study, tmp_path / "whole")
    assert [picture.heading.split(":")[0] for picture in gaps] == list(chosen["pairs"])  # "ce" has no teacher
    assert all(re.fullmatch(r"KD: mean 0\.\d*[1-9]\d*", picture.name) for picture in gaps)
    assert len(embeddings_of_logits(study, tmp_path / "whole")) == 4

    capsys.readouterr()
    assert table1(tmp_path, tmp_path / "killed") == 0  # nothing is left to do
    assert (
        main(
            [
                "study",
                "dcd-table1",
                *CIFAR.split(),
                "--epochs",
                "3",
                "--data",
                str(tmp_path),
                "--out",
                str(tmp_path / "killed"),
            ]
        )
        == 1
    )
    assert "; epochs: 2 -> 3), expected the same, or another --out" in capsys.readouterr().err


@dataclass
class Quick:
    """A job that takes no time: it notes its name, does what it is told, and returns a number."""

    name: str
    log: list[str]
    value: float = 1.0
    act: Callable[[], Any] = lambda: None

    def run(self, folder: Path) -> Outcome:
        self.log.append(self.name)
        self.act()
        return Outcome({"accuracy": self.value})

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    def needed(self) -> list[Path]:
        return []


def quick(log: list[str], **acts: Callable[[], Any]) -> Callable[[Options], Study]:
    """A study of two methods, two columns and two seeds; the values are 10 x column + seed, and 1 more for b."""

    def build(options: Options) -> Study:
        def job(column: int, row: str, seed: int) -> Quick:
            name = f"{column}{row}{seed}"
            return Quick(name, log, 10 * column + seed + (row == "b"), acts.get(f"at_{name}", lambda: None))

        cells = [
            Cell(row=row, column=str(c), seed=seed, make=lambda folder, c=c, row=row, seed=seed: job(c, row, seed))
            for c in (1, 2)
            for row in ("a", "b")
            for seed in (0, 1)
        ]
        return Study(name="quick", title="Quick", cells=tuple(cells), baseline="a", published={("b", "1"): 12.5})

    return build


def test_the_first_seed_of_every_row_comes_first_and_a_failure_stops_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    told: list[str] = []

    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    options = Options(out=tmp_path, workers=1)
    assert run_study(quick(log, at_1b0=fail), options, "", told.append) == 1
    assert log == ["1a0", "1b0", "2a0", "2b0", "1a1", "1b1", "2a1", "2b1"]
    assert "RuntimeError: out of memory" in "".join(told)
    assert "RuntimeError: out of memory" in (tmp_path / "report.html").read_text()
    assert "in fail" in (tmp_path / "1/b/seed-0/error.txt").read_text()
    (row,) = [
        row for row in csv.DictReader((tmp_path / "table.csv").open()) if (row["column"], row["row"]) == ("1", "b")
    ]
    assert (row["runs"], row["values"], row["published"], row["to_baseline"]) == ("1", "12", "12.5", "1.0")

    log.clear()
    assert run_study(quick(log), options, "", told.append) == 0
    assert log == ["1b0"]  # the failed one alone is run again
    table = entries(quick(log)(options), tmp_path)
    assert table["b", "1"].values == {0: 11, 1: 12}
    assert table["b", "1"].mean == 11.5
    assert table["b", "1"].deviation == pytest.approx(0.5**0.5)


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PAUSE", 0.01)
    log: list[str] = []
    lock = FolderLock(tmp_path / "1/a/seed-0")
    build = quick(log, at_2b1=lock.close)
    assert run_cells(build, Options(out=tmp_path, workers=1), lambda line: None) == 0
    assert log == ["1b0", "2a0", "2b0", "1a1", "1b1", "2a1", "2b1", "1a0"]


def test_class_means_are_those_of_standardised_logits() -> None:
    logits, labels = np.array([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0], [0.0, 1.0, 2.0]]), np.array([0, 0, 2])
    np.testing.assert_allclose(class_means(logits, labels), [[0, 0, 0], [0, 0, 0], [-1, 0, 1]], atol=1e-15)


def test_what_needs_a_failed_run_is_not_run(tmp_path: Path) -> None:
    def missing(folder: Path) -> Quick:
        raise ValueError("no such network")

    def build(options: Options) -> Study:
        teacher = Cell(row="teacher", column="c", seed=0, make=missing)
        student = Cell(row="kd", column="c", seed=0, make=lambda folder: Quick("kd", []), after=(teacher.place,))
        return Study(name="broken", title="Broken", cells=(student, teacher))

    assert run_cells(build, Options(out=tmp_path, workers=1), lambda line: None) == 0
    record = read_record(tmp_path / "c/kd/seed-0")
    assert record is not None
    assert record.error == "what it needs failed: not available: no such network"


def test_paired_differences_and_the_relative_improvement_of_the_paper() -> None:
    found = paired({0: 71.0, 1: 74.0, 2: 73.0, 9: 0.0}, {0: 70.0, 1: 71.0, 2: 71.0})
    assert found is not None
    assert (found.seeds, found.mean, found.error) == (3, 2.0, pytest.approx(1 / 3**0.5))
    assert (found.low, found.high) == (pytest.approx(2 - 4.3026527 / 3**0.5), pytest.approx(2 + 4.3026527 / 3**0.5))
    assert not found.exceeds_noise
    cells = [Cell(row=r, column=c, seed=0, make=lambda folder: Quick("", [])) for r, c in TABLE1]
    study = Study(name="t", title="t", cells=tuple(cells), baseline="kd", vanilla="ce", published=TABLE1)
    shares = improvements(study, {})
    assert shares["dcd"] == (None, pytest.approx(20.31, abs=0.005))  # as the paper says
    assert shares["dcd+kd"] == (None, pytest.approx(73.87, abs=0.005))
    assert len(PAIRS) == 13


def test_a_study_runs_its_teacher_once_for_all_methods_of_a_seed(tmp_path):
    out = tmp_path / "out"
    chosen = {"methods": ("kd", "dcd"), "seeds": 1, "epochs": 1, "teacher_epochs": 1, "workers": 1}
    options = DigitsOptions(out=out, cache_teacher=tmp_path / "caches", **chosen)
    (told,) = (line for line in plan(digits(options), out, 1) if line.startswith("teacher "))
    assert re.search(r": 2 runs share it, 0.000306 GB in float16, \d+% of their time saved; it ", told)
    run_cells(digits, options, lambda line: None)
    (cache,) = (tmp_path / "caches").iterdir()
    for method in chosen["methods"]:
        record = read_record(out / "digits" / method / "seed-0")
        assert record is not None
        assert record.status == "finished"
        assert record.settings["teacher"]["cache"] == str(cache)
    (_, *begun) = (cell for cell in digits(options).cells)
    resumed = [as_begun(job_of(cell, out), out / cell.place) for cell in begun]  # also where the option is not given
    assert [job.config.teacher.cache for job in resumed] == [str(cache)] * 2
    assert as_begun(job_of(begun[0], out), tmp_path) is None
    check_same_settings(digits(replace(options, cache_teacher=None)), out)  # a study without caches keeps them
    (cache / "epoch-0000.npy").unlink()
    (out / begun[1].place / RESULT).unlink()
    run_cells(digits, options, lambda line: None)  # a run that has begun finds its cache written again
    assert read_record(out / begun[1].place).status == "finished"
    attention = digits(replace(options, methods=("at", "mlkd")))
    assert {cache_key(job_of(cell, out)) for cell in attention.cells} == {None}


def test_a_dry_run_says_what_runs_how_long_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = ["--pairs", "resnet14-resnet8", "resnet20-resnet8", "--seeds", "2", "--device", "cpu"]
    assert main(["study", "dcd-table1", *pairs, "--methods", "ce", "kd", "nonsense"]) == 1
    assert "methods: got 'nonsense', expected methods among teacher, ce, kd" in capsys.readouterr().err
    assert main(["study", "dcd-table1", *pairs, "--methods", "ce", "kd", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 rows, 2 columns, 6 runs\n0 finished, 0 begun, 0 failed before, 6 to run in this order:" in text
    assert "1. resnet14-resnet8, ce, seed 0" in text
    assert "missing: teachers/resnet14_vanilla/ckpt_epoch_240.pth: RepDistiller's, from http" in text
    assert "missing: cifar: CIFAR-100, unpacked from" in text
    assert re.search(
        r"time of resnet14-resnet8: .* for a run of KD \(3 steps of (16 rows, .* times 4 for 64|64 rows, .*); 187,",
        text,
    )
    assert re.search(r"together: .* of runs, .* by \d processes", text)
    assert main(["study", "dcd-table1", *pairs, "--methods", "kd"]) == 1
    assert "dcd-table1: missing: cifar" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "digits"])
def test_every_study_is_built_and_says_what_it_lacks(name: str) -> None:
    study = STUDIES[name](get_type_hints(STUDIES[name])["options"](seeds=1))
    assert study.name == name
    assert study.rows
    assert study.columns
    jobs = [job_of(cell, Path("x")) for cell in study.cells if cell.column in study.columns[:1]]
    assert not [job for job in jobs if isinstance(job, str)]  # all are available
    needed = {path for job in jobs if not isinstance(job, str) for path in job.needed()}
    assert {str(path) for path in needed if not path.is_relative_to("x")} <= set(study.sources)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["dcd-tabel1"], "did you mean dcd-table1"),
        (["dcd-table1", "--sedes", "3"], "--sedes: is no flag here, did you mean --seeds"),
        (["dcd-table1", "--seeds", "0"], "seeds: got 0"),
        (["dcd-table1", "--pairs", "resnet14"], "pairs: got 'resnet14', expected TEACHER-STUDENT"),
        (["dcd-table1", "--pairs", "resnet14-nonsense"], "pairs: got 'nonsense' in 'resnet14-nonsense', expected"),
        (["dcd-table1", "--pairs", *["vgg13-vgg8"] * 2], "pairs: got vgg13-vgg8 vgg13-vgg8, expected each once"),
        (["dcd-table2", "--pairs", "vgg13-vgg8", "resnet14-resnet8"], "expected one pair for this study"),
        (["digits", "--methods", "nonsense"], "methods: got ['nonsense'] in 'nonsense'"),
    ):
        assert main(["study", *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_figures_have_one_seed_unless_more_are_asked_for() -> None:
    figure = STUDIES["dcd-figure2"]
    options = get_type_hints(figure)["options"]
    assert [len(figure(options(methods=("kd",), **seeds)).cells) for seeds in ({}, {"seeds": 5})] == [1, 5]


def test_damaged_records_and_unknown_places_are_named(tmp_path: Path) -> None:
    study = quick([])
    run_cells(study, Options(seeds=1, out=tmp_path, workers=1))
    cell = study(Options(seeds=1)).cells[0]
    record = tmp_path / cell.place / "result.json"
    for text, message in ((record.read_text().replace("accuracy", "x"), "has no accuracy"), ("{", "is not JSON")):
        record.write_text(text)
        with pytest.raises(ValueError, match=f"result.json: {message}.*; if it is deleted, its run is done again"):
            run_cells(study, Options(seeds=1, out=tmp_path, workers=1))
    with pytest.raises(ValueError, match=r"after: got .nowhere. for .*, expected the place"):
        replace(study(Options(seeds=1)), cells=(replace(cell, after=("nowhere",)),))


def test_examples_and_the_study_of_the_documentation() -> None:
    assert doctest.testmod(aggregate).failed == 0
    assert doctest.testmod(aggregate).attempted == 2
    text = (Path(__file__).parents[2] / "docs/howto/studies.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    study = names["temperatures"](Options(seeds=2))
    assert (study.rows, len(study.cells)) == (["T = 1", "T = 4", "T = 8"], 6)
    job = study.cells[-1].make(Path())
    assert (job.config.objective.kd.temperature, job.config.seed) == (8.0, 1)
    assert set(re.findall(r"`((?:dcd|ckd|pckd|msdcrd|digits)[-\w]*)`", text)) <= set(STUDIES)
