"""pytest-benchmark cases: the classical losses that relate samples, forward + backward, fp32, on this machine's CPU.

Eager code is that of the methods' authors, as it is published. ``careful eager`` of RKD takes the angles from the Gram
matrix, as fastkd does, and holds all of them. Run by ``make bench``; ``python -m bench relations`` runs these alone.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.measure import run_case
from fastkd.losses import DISTLoss, PKTLoss, RKDLoss, SPLoss, total_loss

pytestmark = pytest.mark.timeout(0)  # a step of eager code takes seconds to minutes
Loss = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 4.0
# What the first letters of a case promise: times faster than eager code at least, and parts of its memory at most.
PROMISES = {"RKD": (3.0, 0.05), "SP": (1.5, 1.0)}


def _published_distances(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(dim=1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(x)))
    return distances / distances[distances > 0].mean()


def _published_angles(x: Tensor) -> Tensor:
    sides = F.normalize(x[None] - x[:, None], p=2, dim=2)
    return torch.bmm(sides, sides.transpose(1, 2))


def _careful_angles(x: Tensor) -> Tensor:
    x = x - x.mean(dim=0)
    gram = x @ x.T
    inverse = torch.cdist(x, x).clamp_min(1e-6).reciprocal() * (1 - torch.eye(len(x)))
    sides = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return sides * inverse[:, :, None] * inverse[:, None, :]


def eager_rkd(angles: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        distances_t, angles_t = _published_distances(teacher), angles(teacher)
    loss = 25 * F.smooth_l1_loss(_published_distances(student), distances_t)
    return loss + 50 * F.smooth_l1_loss(angles(student), angles_t)


def eager_sp(student: Tensor, teacher: Tensor) -> Tensor:
    gram_s, gram_t = (F.normalize(x @ x.T) for x in (student, teacher))
    return (gram_t - gram_s).pow(2).sum() / len(student) ** 2


def eager_pkt(student: Tensor, teacher: Tensor) -> Tensor:
    units = (x / (x.norm(dim=1, keepdim=True) + 1e-7) for x in (student, teacher))
    p_s, p_t = (s / s.sum(dim=1, keepdim=True) for s in ((u @ u.T + 1) / 2 for u in units))
    return (p_t * torch.log((p_t + 1e-7) / (p_s + 1e-7))).mean()


def eager_dist(student: Tensor, teacher: Tensor) -> Tensor:
    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p_s, p_t = ((x / TEMPERATURE).softmax(dim=1) for x in (student, teacher))
    return TEMPERATURE**2 * (2 - correlation(p_s, p_t) - correlation(p_s.T, p_t.T))


def ours(module: torch.nn.Module) -> Loss:
    return lambda student, teacher: total_loss(module(student, teacher))


# The rows and columns of student and teacher, and how often a provider is timed.
CASES: dict[str, tuple[tuple[int, int], dict[str, tuple[Loss, int]]]] = {
    "RKD, B = 512, D = 512": (
        (512, 512),
        {
            "eager": (partial(eager_rkd, _published_angles), 1),
            "careful eager": (partial(eager_rkd, _careful_angles), 1),
            "fastkd": (ours(RKDLoss()), 15),
        },
    ),
    "RKD, B = 64, D = 512": (
        (64, 512),
        {
            "eager": (partial(eager_rkd, _published_angles), 15),
            "careful eager": (partial(eager_rkd, _careful_angles), 30),
            "fastkd": (ours(RKDLoss()), 100),
        },
    ),
    # Of a last map of 32 x 8 x 8. With one of 256 x 8 x 8 a step of eager code takes minutes: see NOTES.md.
    "SP, B = 8192, D = 2048": ((8192, 2048), {"eager": (eager_sp, 1), "fastkd": (ours(SPLoss()), 1)}),
    "PKT, B = 4096, D = 512": ((4096, 512), {"eager": (eager_pkt, 3), "fastkd": (ours(PKTLoss()), 5)}),
    "DIST, B = 4096, C = 1000": (
        (4096, 1000),
        {"eager": (eager_dist, 7), "fastkd": (ours(DISTLoss(TEMPERATURE)), 7)},
    ),
}


@pytest.mark.parametrize(("case", "provider"), [(case, name) for case, (_, losses) in CASES.items() for name in losses])
def test_forward_and_backward(benchmark: BenchmarkFixture, case: str, provider: str) -> None:
    shape, losses = CASES[case]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).requires_grad_()
    teacher = torch.randn(shape, generator=generator)
    loss, rounds = losses[provider]

    def step() -> None:
        student.grad = None
        loss(student, teacher).backward()

    run_case(benchmark, step, rounds, provider=provider, case=case)
