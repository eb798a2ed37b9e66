"""pytest-benchmark cases: ``multiscale_pool`` with normalisation, forward + backward, fp32, on this machine's CPU.

The eager code is avg_pool2d at every scale, cat, transpose and F.normalize. Run by ``make bench``.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.measure import run_case
from bench.providers import compiled, eager_pool
from fastkd import multiscale_pool

Pool = Callable[[Tensor, list[int], list[int]], Tensor]
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
# (shape, windows, strides): MSDCRD's last map twice, a ViT's grid, and a map so large that each axis is pooled apart.
CASES = (
    ((256, 512, 7, 7), [7, 4, 2], [1, 1, 1]),
    ((256, 512, 7, 7), [7, 4, 2], [7, 2, 1]),
    ((64, 384, 14, 14), [14, 7, 4], [14, 4, 2]),
    ((4, 256, 56, 56), [56, 28, 14], [56, 14, 7]),
)


PROVIDERS: dict[str, Callable[[], Pool]] = {
    "eager": lambda: eager_pool,
    "torch.compile(eager)": lambda: compiled(eager_pool),
    "fastkd blocked": lambda: partial(multiscale_pool, normalize=True, backend="blocked"),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "windows", "strides"), CASES, ids=str)
def test_forward_and_backward(
    benchmark: BenchmarkFixture,
    shape: tuple[int, ...],
    windows: list[int],
    strides: list[int],
    memory_format: str,
    provider: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).contiguous(memory_format=FORMATS[memory_format])
    features.requires_grad_()
    expected = eager_pool(features, windows, strides)
    upstream = torch.randn(expected.shape, generator=generator)
    (exact,) = torch.autograd.grad(expected, features, upstream)
    del expected
    pool = PROVIDERS[provider]()

    def step() -> None:
        features.grad = None
        pool(features, windows, strides).backward(upstream)

    step()
    assert features.grad is not None
    assert (features.grad - exact).norm() <= 1e-5 * exact.norm()
    case = f"{list(shape)}, windows {windows}, strides {strides}, {memory_format}"
    run_case(benchmark, step, rounds=15, provider=provider, case=case)
