"""pytest-benchmark cases: ``dcd_loss`` forward + backward, fp32, D = 128, on this machine's CPU.

Run by ``make bench``, which also writes the tables; ``pytest bench/bench_dcd.py -k 8192`` runs a part.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.providers import PROVIDERS

SIZES = (256, 512, 1024, 2048, 4096, 8192)
WIDTH = 128
_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, provider: str, n: int) -> None:
    benchmark.group = f"dcd_loss forward + backward, N = {n}"
    benchmark.extra_info.update(provider=provider, n=n, d=WIDTH, dtype="float32", threads=torch.get_num_threads())
    generator = torch.Generator().manual_seed(n)
    teacher = torch.randn(n, WIDTH, generator=generator)
    student = (teacher + torch.randn(n, WIDTH, generator=generator)).requires_grad_()
    teacher.requires_grad_()
    logit_scale = torch.tensor(2.718, requires_grad=True)
    loss = PROVIDERS[provider]()

    def step() -> None:
        for leaf in (student, teacher, logit_scale):
            leaf.grad = None
        loss(student, teacher, logit_scale).backward()

    step()  # compiles, and allocates what stays
    # What earlier steps freed must not be resident still: a step that is served from it would seem to need nothing.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _RESET_PEAK.write_text("5")  # the peak of resident memory starts again at what is resident now
    before = _resident_bytes("VmRSS")
    step()
    benchmark.extra_info["peak_extra_mib"] = (_resident_bytes("VmHWM") - before) / 2**20
    benchmark.pedantic(step, rounds=5 if n >= 4096 else 15, warmup_rounds=1)
