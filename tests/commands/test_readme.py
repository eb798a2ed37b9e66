"""The README's own method runs as it is written there."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cli import main
from tests.helpers.trainer_runs import one_thread  # noqa: F401

README = Path(__file__).parents[2] / "README.md"


def code_of(heading: str) -> str:
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return block


@pytest.mark.slow
def test_the_own_method_trains_in_at_most_twenty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits-teacher", "--epochs", "4", "--device", "cpu", "--quiet"]) == 0
    code = code_of("Bring your own method")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    result = names["result"]
    losses = [record["sup_con"] for record in result.history]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(record["loss"]) for record in result.history)
    head = result.distiller.objective.terms["sup_con"].head
    torch.manual_seed(0)
    assert not torch.equal(head.weight, names["SupConDistillation"](8, 64).head.weight)
    assert result.accuracy > 0.5
    assert (tmp_path / "runs" / "sup_con" / "checkpoints").is_dir()
