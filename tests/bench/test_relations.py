"""The table of the losses that relate samples: its eager code is our losses, and broken promises are told."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import bench_relations as cases
from bench.report import broken
from fastkd.losses import DISTLoss, PKTLoss, RKDLoss, SPLoss
from tests.helpers.checks import assert_close, value_and_grads


@pytest.mark.parametrize(
    ("eager", "module"),
    [
        (partial(cases.eager_rkd, cases._published_angles), RKDLoss()),
        (partial(cases.eager_rkd, cases._careful_angles), RKDLoss()),
        (cases.eager_sp, SPLoss()),
        (cases.eager_pkt, PKTLoss()),
        (cases.eager_dist, DISTLoss(cases.TEMPERATURE)),
    ],
    ids=["rkd", "rkd careful", "sp", "pkt", "dist"],
)
def test_eager_code_computes_the_same(eager: cases.Loss, module: torch.nn.Module) -> None:
    student, teacher = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = student, teacher
    expected = value_and_grads(eager, *given)[:2]
    for actual, exact in zip(value_and_grads(cases.ours(module), *given)[:2], expected, strict=True):
        assert_close(actual, exact, torch.float32)  # eager code has constants of its own beside ours


def test_a_broken_promise_is_told(tmp_path: Path) -> None:
    def row(provider: str, case: str, seconds: float, mib: float) -> dict[str, object]:
        info = {"provider": provider, "case": case, "peak_extra_mib": mib}
        return {"extra_info": info, "stats": {"median": seconds, "min": seconds}}

    rows = [row("eager", case, 3.0, 100.0) for case in ("A, B = 1", "B, B = 1", "C")]
    rows += [row("fastkd", "A, B = 1", 1.0, 5.0), row("fastkd", "B, B = 1", 1.1, 5.0), row("fastkd", "C", 9.0, 900.0)]
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"benchmarks": rows}))
    assert broken(path, "case", {"A": (3.0, 0.05), "B": (2.0, 0.05)}) == []
    expected = "A, B = 1: 3.00x with 5.0% of the memory, expected 3.1x with 5%"
    assert broken(path, "case", {"A": (3.1, 0.05)}) == [expected]
    assert len(broken(path, "case", {"A": (3.0, 0.04), "B": (3.0, 1.0)})) == 2
