"""The losses over one softmax a row on a CPU: what computes the same, each as a loss of (rows, rows, labels)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import Loss, Providers, compiled, eager_info_nce
from fastkd import ckd_loss, info_nce_loss, masked_contrast_loss, sup_con_loss

CONTRAST_SCALE = 1 / 0.07


def eager_sup_con(features: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrast of unit rows: one product, logsumexp over the others, mean over the positives."""
    logits = CONTRAST_SCALE * features @ features.T
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    positive = (labels[:, None] == labels) & ~own
    lse = logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    count = positive.sum(dim=1)
    rows = lse - logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp_min(1)
    return rows.masked_fill(count == 0, 0).sum() / (count > 0).sum()


def eager_masked_contrast(query: Tensor, key: Tensor, labels: Tensor) -> Tensor:
    logits = CONTRAST_SCALE * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    same = (labels[:, None] == labels).fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(query), device=query.device))


def eager_ckd(student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    return eager_info_nce(teacher, student, torch.ones((), device=student.device))


def metric_learning_sup_con() -> Loss:
    """It normalises its features, which takes it little of its time; the other providers are given unit rows."""
    from pytorch_metric_learning.losses import SupConLoss

    module = SupConLoss(temperature=1 / CONTRAST_SCALE)
    return lambda features, _, labels: module(features, labels)


def metric_learning_info_nce() -> Loss:
    """NTXent with the rows' numbers as labels; it lists every pair."""
    from pytorch_metric_learning.losses import NTXentLoss

    module = NTXentLoss(temperature=1 / CONTRAST_SCALE)

    def loss(query: Tensor, key: Tensor, _: Tensor) -> Tensor:
        rows = torch.arange(len(query), device=query.device)
        return module(query, rows, ref_emb=key, ref_labels=rows)

    return loss


def _on_cpu(eager_loss: Loss, ours: Loss, **peers: Callable[[], Loss]) -> Providers:
    return {
        "eager": lambda: eager_loss,
        "torch.compile(eager)": lambda: compiled(eager_loss),
        **peers,
        "fastkd blocked": lambda: ours,
    }


CONTRAST_PROVIDERS: dict[str, Providers] = {
    "sup_con_loss": _on_cpu(
        eager_sup_con,
        lambda a, _, labels: sup_con_loss(a, labels, CONTRAST_SCALE, backend="blocked"),
        **{"pytorch-metric-learning": metric_learning_sup_con},
    ),
    "info_nce_loss": _on_cpu(
        lambda a, b, _: eager_info_nce(a, b, torch.full((), CONTRAST_SCALE, device=a.device)),
        lambda a, b, _: info_nce_loss(a, b, CONTRAST_SCALE, backend="blocked"),
        **{"pytorch-metric-learning": metric_learning_info_nce},
    ),
    "ckd_loss": _on_cpu(eager_ckd, lambda a, b, _: ckd_loss(a, b, backend="blocked")),
    "masked_contrast_loss": _on_cpu(
        eager_masked_contrast,
        lambda a, b, labels: masked_contrast_loss(a, b, CONTRAST_SCALE, labels, labels, backend="blocked"),
    ),
}
