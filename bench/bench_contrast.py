"""pytest-benchmark cases: the losses over one softmax a row, forward + backward, fp32, on this machine's CPU.

Run by ``make bench``, which also writes the tables; ``pytest bench/bench_contrast.py -k sup_con`` runs a part.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contrast_providers import CONTRAST_PROVIDERS
from bench.measure import peak_resident_mib

ROWS, CLASSES = 8192, 100
WIDTHS = {"ckd_loss": 1000}  # others: 128
CASES = [(case, provider) for case, providers in CONTRAST_PROVIDERS.items() for provider in providers]


@pytest.mark.parametrize(("case", "provider"), CASES)
def test_forward_and_backward(benchmark: BenchmarkFixture, case: str, provider: str) -> None:
    D = WIDTHS.get(case, 128)
    benchmark.group = f"{case} forward + backward, N = {ROWS}, D = {D}"
    benchmark.extra_info.update(
        provider=provider, case=f"{case}, N = {ROWS}, D = {D}", dtype="float32", threads=torch.get_num_threads()
    )
    generator = torch.Generator().manual_seed(0)
    second = torch.randn(ROWS, D, generator=generator)
    first = F.normalize(second + torch.randn(ROWS, D, generator=generator), dim=1).requires_grad_()
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    second.requires_grad_(case != "ckd_loss")
    try:
        loss = CONTRAST_PROVIDERS[case][provider]()
    except ImportError as error:
        pytest.skip(f"{provider}: {error}")

    def step() -> None:
        first.grad = second.grad = None
        loss(first, second, labels).backward()

    step()  # compiles, and allocates what stays
    benchmark.extra_info["peak_extra_mib"] = peak_resident_mib(step)
    benchmark.pedantic(step, rounds=3)
