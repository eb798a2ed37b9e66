"""What bench/tune.py times for an entry of the launch table runs the entry's kernel, in Triton's interpreter."""

import dataclasses

import pytest
import torch

from bench import tune

NAMES = [
    *(f"dual_softmax_{name}:4:64:{mode}" for name in ("forward", "backward") for mode in ("bounded", "online")),
    *(f"contrast_{name}:4:64" for name in ("forward", "backward", "self")),
    *("multiscale_pool:4:8", "soft_target_forward:4:64:1", "soft_target_backward:4:64:1"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_runs_the_kernel_of_its_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in {"LOGITS": 256, "WIDEST_CLASSES": 128, "MAPS": 1, "CHANNELS": 8}.items():
        monkeypatch.setattr(tune, size, value)
    monkeypatch.setattr(tune.Entry, "dtype", torch.float32)  # the interpreter multiplies bfloat16 wrongly
    found = {entry.name: (entry, config) for entry, config in tune.entries("interpreter")}
    entry, config = found[name]
    precision = torch.get_float32_matmul_precision()
    try:
        step = tune.step_of(entry, 16, torch.device("cpu"))
        step()
        impossible = dataclasses.replace(config, BLOCK_M=0)
        with tune.table_with("interpreter", entry, impossible), pytest.raises(ZeroDivisionError):
            step()
    finally:
        torch.set_float32_matmul_precision(precision)
