"""pytest-benchmark cases: the KD family on logits [4096, 1000], forward + backward, fp32, on this machine's CPU.

The eager code is careful: each softmax is taken once, the teacher's without a graph, and KL is torch's fused function.
MLKD is its KD at five temperatures; its products of matrices are the same in both. Run by ``make bench``.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.measure import run_case
from fastkd import kd_loss
from fastkd.functional.kd import soft_target_rows
from fastkd.losses import CTKDLoss, DKDLoss, LSKDLoss, WSLDLoss, total_loss

SHAPE = 4096, 1000
# Times faster than eager code at least, and parts of its memory at most.
PROMISES = dict.fromkeys(("KD", "DKD", "LSKD", "MLKD"), (2.0, 1.0))
TEMPERATURES = 4.0, 3.0, 5.0, 2.0, 6.0
THETA = torch.ones((), requires_grad=True)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    with torch.no_grad():
        q = F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(F.log_softmax(student / temperature, dim=1), q, reduction="batchmean")


def eager_lskd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = _standardized(teacher)
    return eager_kd(_standardized(student), teacher, labels, 2.0)


def _standardized(logits: Tensor) -> Tensor:
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (1e-7 + std)


def eager_dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """As mdistiller does it, by -1000 on the label, but with log-sum-exps, which stay finite."""
    index = labels[:, None]
    with torch.no_grad():
        margin_t, others_t = _margin_and_others(teacher / temperature, index)
    margin_s, others_s = _margin_and_others(student / temperature, index)
    target = F.binary_cross_entropy_with_logits(margin_s, margin_t.sigmoid())
    target = target - F.binary_cross_entropy_with_logits(margin_t, margin_t.sigmoid())
    non_target = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (target + 8 * non_target)


def _margin_and_others(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    own, others = logits.gather(1, index)[:, 0], logits.scatter_add(1, index, logits.new_full(index.shape, -1000.0))
    lse = others.logsumexp(dim=1)
    return own - lse, others - lse[:, None]


def eager_wsld(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    with torch.no_grad():
        ce = [F.cross_entropy(z, labels, reduction="none") for z in (student, teacher)]
        weight = -torch.expm1(-ce[0] / (ce[1] + 1e-7))
        q = F.softmax(teacher / temperature, dim=1)
    rows = -torch.linalg.vecdot(q, F.log_softmax(student / temperature, dim=1))
    return temperature**2 * (weight * rows).mean()


def eager_ctkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The temperature's gradient needs the teacher's softmax too."""
    T = 1 + 20 * torch.sigmoid(THETA)
    log_t = F.log_softmax(teacher / T, dim=1)
    return T**2 * F.kl_div(F.log_softmax(student / T, dim=1), log_t, reduction="batchmean", log_target=True)


def eager_mlkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([eager_kd(student, teacher, labels, T) for T in TEMPERATURES]).sum()


def _mlkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    means = soft_target_rows(student, teacher, TEMPERATURES).divergence.mean(dim=1)
    return means @ means.new_tensor(TEMPERATURES) ** 2


DKD, LSKD, WSLD, CTKD = DKDLoss(), LSKDLoss(), WSLDLoss(), CTKDLoss()
CASES: dict[str, tuple[Loss, Loss]] = {
    "KD": (eager_kd, lambda s, t, labels: kd_loss(s, t)),
    "DKD": (eager_dkd, lambda s, t, labels: total_loss(DKD(s, t, labels))),
    "LSKD": (eager_lskd, lambda s, t, labels: LSKD(s, t)["kd"]),
    "WSLD": (eager_wsld, lambda s, t, labels: WSLD(s, t, labels)["wsld"]),
    "CTKD": (eager_ctkd, lambda s, t, labels: CTKD(s, t, 10)["ctkd"]),
    "MLKD, five temperatures": (eager_mlkd, _mlkd),
}


@pytest.mark.parametrize("provider", ["eager", "fastkd"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(benchmark: BenchmarkFixture, case: str, provider: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(SHAPE, generator=generator) for _ in range(2))
    labels = torch.randint(SHAPE[1], SHAPE[:1], generator=generator)
    student.requires_grad_()
    eager, ours = CASES[case]
    (expected,) = torch.autograd.grad(eager(student, teacher, labels), student)

    def step() -> None:
        student.grad = None
        (eager if provider == "eager" else ours)(student, teacher, labels).backward()

    step()
    assert student.grad is not None
    assert (student.grad - expected).norm() <= 1e-5 * expected.norm()
    run_case(benchmark, step, rounds=15, provider=provider, case=case)
