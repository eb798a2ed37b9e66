"""What make runs on a machine with a GPU."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")


ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands() -> str:
    """What make would run for gpu-test in an environment that is there already."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--no-print-directory", "-n", "gpu-test", f"PY={sys.executable}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_existing_environment_is_used_as_it_is(commands: str) -> None:
    assert "venv" not in commands.replace(sys.executable, "")
    assert "pip install --quiet" not in commands


@pytest.mark.slow
def test_every_operation_has_cases_for_the_sanitizer(commands: str) -> None:
    named = re.findall(r"pytest -m sanitizer --timeout \d+ (.*)", commands)[0].split()
    names = ("hypothesis", "timm", "torchvision", "torchdata", "tyro", "rich", "safetensors", "sklearn", "jinja2")
    without = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-m", "sanitizer", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    collected = subprocess.run(
        [sys.executable, "-c", without, *arguments, *named],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-2000:]
    cases = Counter(Path(line.split("::")[0]).stem for line in collected.stdout.splitlines() if "::" in line)
    operations = ("dual_softmax", "contrast", "soft_target", "multiscale_pool", "pack")
    assert set(cases) == {f"test_{name}" for name in operations}
    assert all(3 <= count <= 40 for count in cases.values()), cases
    assert "131072_classes_split" in collected.stdout


def test_every_gpu_test_is_where_the_makefile_looks(commands: str) -> None:
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    marked = {path for path, text in tests.items() if "mark.gpu" in text or "@gpu" in text}
    assert len(marked) == 8
    named = [ROOT / name for name in re.findall(r"pytest -m gpu (.*)", commands)[0].split()]
    assert all(any(path.is_relative_to(name) for name in named) for path in marked)
