"""The study ``shapes``, with a few images: what its arms are, and that it runs and goes on."""

import json
from pathlib import Path

import pytest

from fastkd.study.aggregate import entries
from fastkd.study.command import run_study
from fastkd.study.jobs import Training
from fastkd.study.records import read_record
from fastkd.study.studies.shapes import ARMS, TEACHER_PLACE, ShapesOptions, shapes
from fastkd.trainer.config import TrainConfig


def configs(**options) -> dict[tuple[str, int], TrainConfig]:
    cells = shapes(ShapesOptions(**options)).cells
    jobs = {(cell.row, cell.seed): cell.make(Path("out")) for cell in cells}
    return {place: job.config for place, job in jobs.items() if isinstance(job, Training)}


def test_the_arms_of_a_seed_differ_in_terms_regions_and_teacher_alone() -> None:
    found = configs()
    assert found.keys() == {("teacher", 0), *((arm, seed) for arm in ARMS for seed in range(3))}
    assert {arm: list(found[arm, 1].objective.weights) for arm in ARMS} == {
        "scratch": ["detector"],
        "kd": ["detector", "kd"],
        "dcd-foreground": ["detector", "dcd"],
        "dcd": ["detector", "dcd"],
        "dcd+kd": ["detector", "dcd", "kd"],
    }
    assert {arm: found[arm, 1].detection.regions for arm in ARMS if arm != "dcd-foreground"} == dict.fromkeys(
        (arm for arm in ARMS if arm != "dcd-foreground"), "all"
    )
    assert found["dcd-foreground", 1].detection.regions == "foreground"
    assert found["kd", 1].objective.kd.temperature == 1.0
    assert found["scratch", 1].teacher is None
    assert found["dcd", 1].teacher is not None
    assert found["dcd", 1].teacher.weights == f"out/{TEACHER_PLACE}"
    apart = ("objective", "detection", "teacher", "seed")
    rest = [
        {k: v for k, v in config.to_dict().items() if k not in apart}
        for (arm, _), config in found.items()
        if arm in ARMS
    ]
    assert rest == rest[:1] * len(rest)
    assert rest[0]["data"]["options"]["limit"] == 300


@pytest.mark.slow
def test_a_small_one_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"images": 16, "student_images": 16, "eval_images": 4, "teacher_epochs": 1, "epochs": 1}
    options = ShapesOptions(seeds=1, methods=("scratch",), out=tmp_path, workers=1, **small)
    assert run_study(shapes, options, "fastkd study shapes") == 0
    assert "1/3  shapes, data, seed 0: done\n" in capsys.readouterr().out
    before = (tmp_path / "shapes/data/seed-0/images/train.json").stat().st_mtime_ns

    options = ShapesOptions(seeds=1, methods=("scratch", "dcd"), out=tmp_path, workers=1, **small)
    assert run_study(shapes, options, "fastkd study shapes") == 0
    assert "4/4  shapes, dcd, seed 0: " in capsys.readouterr().out
    assert (tmp_path / "shapes/data/seed-0/images/train.json").stat().st_mtime_ns == before
    table = entries(shapes(options), tmp_path)
    for row in ("teacher", "scratch", "dcd"):
        record = read_record(tmp_path / "shapes" / row / "seed-0")
        assert record is not None
        assert table[row, "shapes"].mean == record.values["map"]
        classes = json.loads((tmp_path / "shapes" / row / "seed-0/classes.json").read_text())
        assert classes["classes"] == ["circle", "square", "triangle", "cross"]
    assert "| DCD, all regions |" in (tmp_path / "table.md").read_text()


def test_more_images_for_a_student_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="student_images: got 20, expected at most images=10"):
        ShapesOptions(images=10, student_images=20)
