"""The case files of the classical losses, through the command that runs them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.zoo.__main__ import errors_of, main

GOLDEN = Path(__file__).parents[1] / "golden" / "zoo"
COUNT = 32


def test_every_case_is_within_the_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(GOLDEN)) == 0
    assert capsys.readouterr().out.count("   ok\n") == len(list(GOLDEN.glob("*.npz"))) == COUNT


def changed(path: Path, key: str, factor: float) -> None:
    with np.load(GOLDEN / path.name) as arrays:
        values = dict(arrays)
    values[key] = values[key] * factor
    np.savez(path, **values)


@pytest.mark.parametrize(
    ("file", "key"),
    [("vid", "case1.loss"), ("vid", "case2.grad.param.vid.log_scale"), ("crd", "case0.out.memory_teacher_step1")],
)
def test_a_wrong_number_fails(file: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "at.npz", tmp_path)
    changed(tmp_path / f"{file}.npz", key, 1 + 1e-9)
    assert main(str(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["ok", "FAILED"]
    assert max(errors_of(tmp_path / f"{file}.npz")) == pytest.approx(1e-9, rel=0.01)


def test_a_file_of_no_method_and_an_empty_folder_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(tmp_path)) == 1
    assert "has no .npz file" in capsys.readouterr().err
    shutil.copy(GOLDEN / "at.npz", tmp_path / "unheard.npz")
    assert main(str(tmp_path)) == 1
    assert "no method of this name" in capsys.readouterr().out
