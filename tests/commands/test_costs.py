"""What a step costs: memory counted exactly, time in turn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastkd.study import costs
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig, build_model
from fastkd.trainer.objective.config import ObjectiveConfig
from tests.helpers.trainer_runs import one_thread  # noqa: F401


@pytest.mark.filterwarnings("ignore:.*Profiler.*")
def test_the_peak_is_what_is_held_at_once() -> None:
    mib = 1 << 20

    def step() -> None:
        first = torch.empty(mib, dtype=torch.uint8)
        second = torch.empty(2 * mib, dtype=torch.uint8)
        del first
        third = torch.empty(3 * mib, dtype=torch.uint8)
        del second, third
        torch.empty(4 * mib, dtype=torch.uint8)

    step()
    assert costs.peak_bytes(step) == 5 * mib


@pytest.mark.slow
def test_every_method_costs_more_than_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 3)
    net = "fastkd.trainer.models.small:SmallConvNet"
    configs = {}
    for terms in ("ce", "kd", "0.5*kd", "pckd"):
        objective = ObjectiveConfig(terms=terms)
        teacher = ModelConfig(name=net, options={"width": 8, "depth": 3}, weights=str(tmp_path / "teacher.safetensors"))
        configs[terms] = TrainConfig(
            student=ModelConfig(name=net, options={"width": 4}),
            teacher=None if terms == "ce" else teacher,
            data=DataConfig(batch_size=32),
            objective=objective,
        )
    save_file(build_model(teacher).state_dict(), tmp_path / "teacher.safetensors")
    found = costs.measure_costs(configs)
    assert all(cost.milliseconds > 0 for cost in found.values())
    assert 0 < found["ce"].peak_bytes < found["kd"].peak_bytes < found["pckd"].peak_bytes
    assert found["kd"].peak_bytes == found["0.5*kd"].peak_bytes  # exact: the same step twice
