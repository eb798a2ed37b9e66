"""pytest-benchmark cases: ``dcd_loss`` forward + backward, fp32, D = 128, on this machine's CPU.

Run by ``make bench``, which also writes the tables; ``pytest bench/bench_dcd.py -k 8192`` runs a part.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import rounds_for, run_case
from bench.providers import PROVIDERS

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTH = 128


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, provider: str, n: int) -> None:
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

    info = {"case": f"dcd_loss, N = {n}", "provider": provider, "n": n, "d": WIDTH}
    run_case(benchmark, step, rounds_for(n), warmup_rounds=1, **info)
