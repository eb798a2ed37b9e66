"""Every script of examples/ runs as it is, on a CPU, and what it distils learns; so does the notebook."""

import json
import random
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# Beside PyTorch, the packages that a script imports. It is skipped where one is not installed.
NEEDS = {
    "own_loop": (),
    "two_towers": (),
    "two_towers_trainer": ("safetensors",),
    "timm_task": ("timm.task",),
    "accelerate_loop": ("accelerate",),
    "lightning_module": ("lightning",),
    "hf_trainer": ("transformers", "accelerate"),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts find toy.py beside them, as they do when Python is started with one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    # A seed for every process that Lightning's ``seed_everything`` would leave behind.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")  # what other packages say about each other
def test_a_script_runs_and_its_student_learns(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"^step \d+, loss ([\d.]+)", output, re.MULTILINE)]
    accuracy = re.findall(r"^student accuracy ([\d.]+)", output, re.MULTILINE)
    assert losses or accuracy, output
    assert not losses or losses[-1] < 0.95 * losses[0]
    assert all(float(value) > 0.85 for value in accuracy), output
    assert not list(tmp_path.iterdir())


def without_numbers(text: str) -> list[str]:
    return re.sub(r"-?\d[\d.e+-]*", "#", text).split()


def test_the_notebook_runs_and_prints_what_is_stored_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
        exec("".join(cell["source"]), names)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert without_numbers(capsys.readouterr().out) == without_numbers(stored)
    accuracies = names["accuracies"]
    assert accuracies["distilled"] > accuracies["alone"]


def test_every_script_is_run_and_has_less_than_sixty_lines() -> None:
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - {"toy"} == NEEDS.keys()
    assert {name for name, path in scripts.items() if len(path.read_text().splitlines()) >= 60} == set()
