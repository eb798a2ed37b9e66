"""pytest-benchmark cases: the losses over one softmax per row, forward + backward, fp32, on this machine's CPU.

Run by ``make bench``, which also writes the tables; ``pytest bench/bench_contrast.py -k sup_con`` runs a part. A
provider takes (rows [N, D], rows [N, D], labels [N]). The first rows have unit length. At sizes below the largest, ours
is compared with eager code alone.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import providers
from bench.measure import rounds_for, run_case
from bench.providers import Loss, Providers, eager_info_nce, eager_masked, eager_sup_con, metric_learning_sup_con
from fastkd import ckd_loss, info_nce_loss, masked_contrast_loss, sup_con_loss

SIZES = (64, 128, 256, 512, 1024, 2048, 8192)
CLASSES, SCALE = 100, 1 / 0.07
AT_EVERY_SIZE = ("eager", "fastkd blocked")
WIDTHS = {"ckd_loss": 1000}  # others: 128


def sup_con_peer() -> Loss:
    """It normalises its features, which takes little of its time; the other providers use the unit rows as they are."""
    loss = metric_learning_sup_con(1 / SCALE)
    return lambda features, other, labels: loss(features, other, None, labels)


def info_nce_peer() -> Loss:
    """NTXent with the rows' numbers as labels. It lists every pair."""
    from pytorch_metric_learning.losses import NTXentLoss

    module = NTXentLoss(temperature=1 / SCALE)

    def loss(query: Tensor, key: Tensor, _: Tensor) -> Tensor:
        rows = torch.arange(len(query), device=query.device)
        return module(query, rows, ref_emb=key, ref_labels=rows)

    return loss


def on_cpu(eager: Loss, ours: Loss, peer: Callable[[], Loss] | None = None) -> Providers:
    return {
        "eager": lambda: eager,
        "torch.compile(eager)": lambda: providers.compiled(eager),
        **({"pytorch-metric-learning": peer} if peer else {}),
        "fastkd blocked": lambda: ours,
    }


LOSSES: dict[str, Providers] = {
    "sup_con_loss": on_cpu(
        lambda a, b, labels: eager_sup_con(a, b, SCALE, labels, normalize=False),
        lambda a, _, labels: sup_con_loss(a, labels, SCALE, normalize=False, backend="blocked"),
        sup_con_peer,
    ),
    "info_nce_loss": on_cpu(
        lambda a, b, _: eager_info_nce(a, b, torch.full((), SCALE)),
        lambda a, b, _: info_nce_loss(a, b, SCALE, backend="blocked"),
        info_nce_peer,
    ),
    "ckd_loss": on_cpu(
        lambda student, teacher, _: eager_info_nce(teacher, student, torch.ones(())),
        lambda student, teacher, _: ckd_loss(student, teacher, backend="blocked"),
    ),
    "masked_contrast_loss": on_cpu(
        lambda a, b, labels: eager_masked(a, b, SCALE, labels),
        lambda a, b, labels: masked_contrast_loss(a, b, SCALE, labels, labels, backend="blocked"),
    ),
}
CASES = [
    (case, provider, n)
    for case, losses in LOSSES.items()
    for n in SIZES
    for provider in losses
    if n == SIZES[-1] or provider in AT_EVERY_SIZE
]


@pytest.mark.parametrize(("case", "provider", "n"), CASES)
def test_forward_and_backward(benchmark: BenchmarkFixture, case: str, provider: str, n: int) -> None:
    D = WIDTHS.get(case, 128)
    generator = torch.Generator().manual_seed(0)
    second = torch.randn(n, D, generator=generator)
    first = F.normalize(second + torch.randn(n, D, generator=generator), dim=1).requires_grad_()
    labels = torch.randint(min(CLASSES, n // 8), (n,), generator=generator)
    second.requires_grad_(case != "ckd_loss")
    try:
        loss = LOSSES[case][provider]()
    except ImportError as error:
        pytest.skip(f"{provider}: {error}")

    def step() -> None:
        first.grad = second.grad = None
        loss(first, second, labels).backward()

    run_case(benchmark, step, rounds_for(n), provider=provider, case=f"{case}, N = {n:4}, D = {D}")
