"""``make gpu-test`` and ``make gpu-bench`` on a machine without a GPU: their parts, and what a failure leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import battery

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PRESENT = {"matplotlib", "pillow", "setuptools", "numpy", "pytest", "pytest-timeout", "pytest-xdist"}
MODULES = {"scikit-learn": "sklearn"}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that cannot import what a machine without a network may lack."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split(r"[<>=]", line)[0] for lines in extras.values() for line in lines} - PRESENT
    absent = [MODULES.get(name, name.replace("-", "_")) for name in sorted(packages)]
    assert {"tyro", "timm", "rich", "hypothesis", "sklearn"} <= set(absent)
    for name in absent:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(f'{__name__} is absent')")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}


def run(command: list[str], environment: dict[str, str], seconds: float = 120) -> str:
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_make_uses_an_existing_environment_as_it_is_and_passes_on_what_is_given() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    make = ["make", "--no-print-directory", "-n", f"PY={sys.executable}", "OUTPUT=/tmp/results", "SECONDS=420"]
    tests = run([*make, "gpu-test", "PARTS=smoke large", "WORKERS=8"], dict(os.environ)).split()
    given = ["--output", "/tmp/results", "--seconds", "420"]
    assert tests == [sys.executable, "-m", "tests.battery", "smoke", "large", "--workers", "8", *given]
    assert run([*make, "gpu-bench"], dict(os.environ)).split() == [sys.executable, "-m", "bench.gpu", *given]


COLLECTED = """
import json, sys, pytest
class Collected:
    def pytest_collection_finish(self, session):
        print("COLLECTED", json.dumps({x.nodeid: [mark.name for mark in x.iter_markers()] for x in session.items}))
sys.exit(pytest.main(sys.argv[1:], plugins=[Collected()]))
"""


@pytest.mark.slow
def test_every_gpu_test_is_in_one_part_and_needs_few_packages(bare: dict[str, str]) -> None:
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", *battery.FILES]
    environment = battery.environment_of(battery.PARTS["smoke"]) | bare
    output = run([sys.executable, "-c", COLLECTED, *arguments], environment)
    marks = json.loads(re.findall("^COLLECTED (.*)$", output, re.MULTILINE)[0])
    names = {name for own in marks.values() for name in own} | {"gpu", "large", "bandwidth", "smoke", "racecheck"}

    def tests_of(part: str) -> set[str]:
        expression = battery.PARTS[part].markers
        return {test for test, own in marks.items() if eval(expression, {name: name in own for name in names})}

    parts = {part: tests_of(part) for part in battery.PARTS}
    apart = [parts[name] for name in ("smoke", "correctness", "large", "bandwidth")]
    assert sum(map(len, apart)) == len(set.union(*apart))
    assert set.union(*apart) == {test for test, own in marks.items() if "gpu" in own}
    assert parts["sanitizer"] | parts["racecheck"] <= set.union(*apart)
    cases = Counter(Path(test.split("::")[0]).stem for test in parts["sanitizer"])
    operations = ("dual_softmax", "contrast", "soft_target", "multiscale_pool", "pack")
    assert all(cases[f"test_{name}"] >= 3 for name in operations)
    assert all(count <= 40 for count in cases.values()), cases
    assert any("131072_classes_split" in test for test in parts["sanitizer"])
    assert len(parts["smoke"]) >= 4
    files = {
        path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu|^@gpu", path.read_text(), re.M)
    }
    assert files - {Path(__file__)} <= {ROOT / test.split("::")[0] for test in marks}


@pytest.mark.slow
def test_the_benchmark_and_the_tuner_need_few_packages(bare: dict[str, str], tmp_path: Path) -> None:
    quick = ["--device", "cpu", "--quick", "--cases", "ce_kd_terms", "--output", str(tmp_path / "results")]
    run([sys.executable, "-m", "bench.gpu", *quick], bare)
    assert len(list((tmp_path / "results").iterdir())) == 3
    assert "LaunchConfig" in run([sys.executable, "-m", "bench.tune", "--list"], bare)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without a GPU")
def test_a_machine_without_a_gpu_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert battery.main([]) == 2
    assert re.fullmatch(r"gpu-test: .*torch\.cuda\.is_available\(\) is False here\n", capsys.readouterr().err)


# A number, a failure, tests that hang.
TESTS = """
import time, pytest

@pytest.mark.good
def test_good(record_property):
    record_property("share", "0.93")

@pytest.mark.bad
def test_bad():
    assert 1 == 2

@pytest.mark.skipped
def test_skipped():
    pytest.skip("not here")

@pytest.mark.hung
@pytest.mark.endless
@pytest.mark.parametrize("i", range(3))
def test_hung(i):
    time.sleep(100 * (i == 1))
"""
# A device that is lost in one test, and to that process alone.
LOST = """
import pytest, torch

def synchronize():
    raise RuntimeError("an illegal memory access was encountered")

@pytest.mark.lost
@pytest.mark.parametrize("i", range(4))
def test_lost(i):
    if i == 1:
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a battery of the tests above writes."""
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "test_lost.py").write_text(LOST)
    (tmp_path / "lost" / "conftest.py").write_text("from tests.conftest import pytest_runtest_protocol\n")
    (tmp_path / "test_parts.py").write_text(TESTS)
    parts = {name: battery.Part(name, 0, 60) for name in ("good", "bad", "skipped")}
    parts["again"] = battery.Part("bad", 0, 60, is_gate=False)
    parts["tool"] = battery.Part("good", 0, 60, tool="memcheck")
    parts |= {"hung": battery.Part("hung", 1, 3), "endless": battery.Part("endless", 1, 60)}
    parts |= {"lost": battery.Part("lost", 1, 60), "lost alone": battery.Part("lost", 0, 60)}
    monkeypatch.setattr(battery, "PARTS", parts)
    monkeypatch.setattr(battery, "FILES", [str(tmp_path / "test_parts.py")])
    monkeypatch.setattr(battery.measure, "not_ready", lambda: None)
    monkeypatch.setattr(battery.gpu_report, "environment", lambda device: "a machine")
    return tmp_path / "output"


def test_parts_go_on_after_failures_and_the_status_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert battery.main(["bad", "good", "again", "--output", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split() for line in lines if re.match("bad|good|again", line)] == [
        ["bad", "0", "passed"], ["good", "1", "passed"], ["again", "0", "passed"],
    ]  # fmt: skip
    assert any("share 0.93" in line for line in lines)
    # The name has a path before it where pytest's root is near the temporary folder.
    assert any(re.search(r"FAILED \S*test_parts::test_bad: assert 1 == 2", line) for line in lines)
    assert "FAILED: bad; the log" in lines[-1]
    assert {path.name for path in folder.iterdir()} == {"bad.xml", "good.xml", "again.xml", "gpu-test.log"}
    assert "===== good" in (folder / "gpu-test.log").read_text()
    assert battery.main(["good", "again", "--output", str(folder)]) == 0


def test_a_part_whose_tests_are_all_skipped_has_not_passed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert battery.main(["skipped", "--output", str(folder)]) == 1
    assert re.search(r"skipped +0 passed, 0 failed, 1 skipped", capsys.readouterr().out)


@pytest.mark.slow
def test_a_hung_test_ends_its_worker_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert battery.main(["hung", "--output", str(folder)]) == 1
    assert re.search(r"hung +2 passed, 1 failed, 0 skipped, ", capsys.readouterr().out)


@pytest.mark.slow
def test_a_lost_device_ends_its_worker_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(battery, "FILES", [str(folder.parent / "lost")])
    assert battery.main(["lost", "lost alone", "--output", str(folder)]) == 1
    text = capsys.readouterr().out
    assert re.search(r"lost +3 passed, 1 failed, 0 skipped, ", text), text
    assert re.search(r"lost alone +1 passed, 1 failed, 0 skipped, ", text), text
    assert "the CUDA device is lost to this process" in (folder / "gpu-test.log").read_text()


@pytest.mark.slow
def test_a_part_that_is_stopped_writes_what_it_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert battery.main(["endless", "good", "--output", str(folder), "--seconds", "20"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"endless +1 passed.*stopped after 20 s", text), text
    assert re.search(r"good +not run: no time left", text), text


def test_without_the_sanitizer_its_part_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("compute-sanitizer"):
        pytest.skip("it is there")
    assert battery.main(["tool", "--output", str(folder)]) == 1
    assert "not run: compute-sanitizer is not on PATH" in capsys.readouterr().out
