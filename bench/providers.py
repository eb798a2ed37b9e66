"""What is measured: every way to compute a loss, by name. A case's baseline is what every ratio is against.

``PROVIDERS``: the DCD loss on a CPU. A provider takes (student [N, D], teacher [N, D], logit_scale 0-dim) and returns
the loss of ``fastkd.dcd_loss`` with its defaults. ``GPU_PROVIDERS``: the losses of bench/gpu.py, by case; those on
logits take (student [B, C], teacher [B, C], labels [B]), those of ``POOLS`` (features [B, C, H, W], their rows'
gradient, which is not for them) and return rows. What builds a provider raises ImportError where the peer is
not installed; a provider raises Unsupported where our backend has no kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import (
    ckd_loss,
    dcd_loss,
    info_nce_loss,
    kd_loss,
    masked_contrast_loss,
    multiscale_pool,
    sup_con_loss,
)
from fastkd.functional.dcd import dcd_terms
from fastkd.functional.kd import ce_kd_terms

Loss = Callable[..., Tensor]
Providers = dict[str, Callable[[], Loss]]


def eager(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    """Careful eager code: normalise, one product, cross_entropy, two log_softmax."""
    logits = logit_scale * F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    log_p, log_q = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
    return contrast + 0.5 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def eager_kl_div(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    """The same with torch's fused KL in log space: the fastest eager code we know."""
    logits = logit_scale * F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    log_p, log_q = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
    return contrast + 0.5 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def compiled(loss: Any) -> Any:
    torch.compiler.reset()  # one shape at a time: no recompilation into dynamic shapes
    return torch.compile(loss, fullgraph=True, dynamic=False)


PROVIDERS: Providers = {
    "eager": lambda: eager,
    "eager kl_div": lambda: eager_kl_div,
    "reference": lambda: partial(dcd_loss, backend="reference"),
    "torch.compile(eager kl_div)": lambda: compiled(eager_kl_div),
    "torch.compile(reference)": lambda: compiled(partial(dcd_loss, backend="reference")),
    "fastkd blocked": lambda: partial(dcd_loss, backend="blocked"),
}
BASELINE = "eager"


TEMPERATURE = 4.0
LOGIT_SCALE = 10.0  # of the losses on embeddings


def eager_info_nce(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def eager_clip(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE in both directions, as open_clip computes it: two products."""
    return (eager_info_nce(query, key, logit_scale) + eager_info_nce(key, query, logit_scale)) / 2


def eager_ckd(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    return eager_info_nce(teacher.detach(), student, torch.ones_like(logit_scale))


def labels_of(rows: Tensor) -> Tensor:
    """For the losses that take labels beside the inputs of the others: eight rows of every class."""
    return torch.arange(len(rows), device=rows.device) % (len(rows) // 8)


def eager_sup_con(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    features, labels = F.normalize(student, dim=1), labels_of(student)
    diagonal = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~diagonal
    logits = (logit_scale * features @ features.T).float().masked_fill(diagonal, -torch.inf)
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    count = positive.sum(dim=1)
    rows = log_p.masked_fill(~positive, 0).sum(dim=1) / count.clamp_min(1)
    return -rows.sum() / (count > 0).sum().clamp_min(1)


def eager_masked(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    labels, index = labels_of(query), torch.arange(len(query), device=query.device)
    logits = logit_scale * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    false_negative = (labels[:, None] == labels) & (index[:, None] != index)
    return F.cross_entropy(logits.masked_fill(false_negative, -torch.inf), index)


def eager_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, dim=1) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def eager_ce_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float(), labels) + eager_kd(student, teacher, labels)


# Windows and strides by the map's side: of a network's last map, every position, and of an early one.
POOL_SCALES = {7: ([7, 4, 2], [1, 1, 1]), 56: ([56, 28, 14], [56, 14, 7])}


def pooled_rows(side: int) -> int:
    return multiscale_pool(torch.empty(1, 1, side, side), *POOL_SCALES[side]).shape[1]


def eager_pool(features: Tensor, windows: list[int], strides: list[int], normalize: bool = True) -> Tensor:
    """avg_pool2d at every scale, cat, transpose and F.normalize."""
    scales = [F.avg_pool2d(features, w, s).flatten(2) for w, s in zip(windows, strides, strict=True)]
    rows = torch.cat(scales, dim=2).transpose(1, 2)
    return F.normalize(rows, dim=2) if normalize else rows


def in_float32(loss: Loss) -> Loss:
    return lambda a, b, c: loss(a.float(), b.float(), c)


def in_autocast(loss: Loss) -> Loss:
    def autocast(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        with torch.autocast(a.device.type, torch.bfloat16):
            return loss(a, b, c)

    return autocast


def both_directions(loss: Loss) -> Loss:
    return lambda a, b, c: (loss(a, b, c) + loss(b, a, c)) / 2


class Unsupported(Exception):
    """The backend has no kernel for these inputs."""


def on_backend(loss: Loss, backend: str) -> Loss:
    def with_backend(*inputs: Tensor) -> Tensor:
        try:
            return loss(*inputs, backend=backend)
        except ValueError as error:
            if str(error).startswith("backend:"):
                raise Unsupported(error) from error
            raise

    return with_backend


def _dcd_bounded(student: Tensor, teacher: Tensor, logit_scale: Tensor, backend: str | None = None) -> Tensor:
    """As ``DCDLoss`` calls it: its clamp bounds the scale, so that the kernels need no running maximum."""
    contrast, consistency = dcd_terms(student, teacher, logit_scale, max_scale=10.0, backend=backend)
    return contrast + consistency


def _kd(student: Tensor, teacher: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
    return kd_loss(student, teacher, TEMPERATURE, backend=backend)


def _ce_kd(student: Tensor, teacher: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
    ce, kd = ce_kd_terms(student, teacher, labels, TEMPERATURE, backend=backend)
    return ce + kd


def _ckd(student: Tensor, teacher: Tensor, logit_scale: Tensor, backend: str | None = None) -> Tensor:
    return ckd_loss(student, teacher, backend=backend)


def _sup_con(student: Tensor, teacher: Tensor, logit_scale: Tensor, backend: str | None = None) -> Tensor:
    return sup_con_loss(student, labels_of(student), logit_scale, normalize=True, backend=backend)


def _masked(query: Tensor, key: Tensor, logit_scale: Tensor, backend: str | None = None) -> Tensor:
    return masked_contrast_loss(query, key, logit_scale, labels_of(query), labels_of(key), backend=backend)


def _pool_providers(normalize: bool) -> Providers:
    """Eager code twice: as careful as ours, and in the map's own dtype, which moves less."""

    def eager_pooled(features: Tensor, _: Tensor) -> Tensor:
        return eager_pool(features, *POOL_SCALES[features.shape[2]], normalize=normalize)

    def pooled(features: Tensor, _: Tensor, backend: str | None = None) -> Tensor:
        return multiscale_pool(features, *POOL_SCALES[features.shape[2]], normalize=normalize, backend=backend)

    return {
        "eager fp32": lambda: lambda x, upstream: eager_pooled(x.float(), upstream).to(x.dtype),
        "eager": lambda: eager_pooled,
        "torch.compile": lambda: compiled(eager_pooled),
        "fastkd blocked": lambda: on_backend(pooled, "blocked"),
        "fastkd triton": lambda: on_backend(pooled, "triton"),
    }


def metric_learning_sup_con(temperature: float) -> Loss:
    """Its temperature is a number, so the scale gets no gradient; several N x N tensors."""
    from pytorch_metric_learning.losses import SupConLoss

    module = SupConLoss(temperature=temperature)
    return lambda student, teacher, logit_scale: module(student, labels_of(student))


def inf_cl() -> Loss:
    """InfoNCE in Triton; converts to fp32 and multiplies in tf32. D must be a multiple of a power of two <= 256."""
    from inf_cl import cal_flash_loss

    def loss(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
        head_dim = min(256, query.shape[1])
        unit = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return cal_flash_loss(*unit, scale=logit_scale, head_dim=head_dim).mean()

    return loss


def cut_cross_entropy(filter_eps: str | None) -> Loss:
    """InfoNCE as a classifier whose weights are the keys. ``filter_eps="high"``, its default, drops small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
        q, k = (logit_scale * F.normalize(query, dim=1)).to(query.dtype), F.normalize(key, dim=1)
        return linear_cross_entropy(q, k, torch.arange(len(q), device=q.device), filter_eps=filter_eps)

    return loss


def open_clip() -> Loss:
    """InfoNCE in both directions: two N x N products."""
    from open_clip.loss import ClipLoss

    module = ClipLoss()
    return lambda a, b, c: module(F.normalize(a, dim=1), F.normalize(b, dim=1), c)


def liger_kd() -> Loss:
    """Its KL takes log-probabilities: torch's log_softmax comes first."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, dim=1) for x in (student, teacher))
        return TEMPERATURE**2 * LigerKLDivLossFunction.apply(log_s, log_t, "batchmean", True)

    return loss


def liger_ce_kd() -> Loss:
    """Its cross-entropy overwrites the logits with their gradient, so it comes last."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    kd = liger_kd()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        first = kd(student, teacher, labels)
        return first + LigerCrossEntropyFunction.apply(student, labels, None, -100, 0.0, 0.0, "mean")[0]

    return loss


PEERS = ("inf-cl", "cut-cross-entropy", "liger-kernel", "open_clip_torch", "pytorch-metric-learning")
# The memory format of the map and whether the rows are normalised.
POOLS = {
    "multiscale_pool_nchw": (torch.contiguous_format, False),
    "multiscale_pool_nhwc": (torch.channels_last, False),
    "multiscale_pool_nchw_unit": (torch.contiguous_format, True),
    "multiscale_pool_nhwc_unit": (torch.channels_last, True),
}


def _with_torch(loss: Loss) -> Providers:
    return {
        "eager fp32": lambda: in_float32(loss),
        "eager bf16 autocast": lambda: in_autocast(loss),
        "torch.compile fp32": lambda: compiled(in_float32(loss)),
        "torch.compile bf16 autocast": lambda: compiled(in_autocast(loss)),
    }


GPU_BASELINE = "eager fp32"
# How the names of what may be captured in a CUDA graph begin. A peer may wait for the host, and one failed capture ends
# them all; "fastkd blocked" is a node a block, 10^5 of them at 8192 x 131072 logits.
CAPTURED = ("eager", "torch.compile", "fastkd triton")
GPU_PROVIDERS: dict[str, Providers] = {
    "dcd_loss": {
        **_with_torch(eager_kl_div),
        "fastkd blocked": lambda: on_backend(_dcd_bounded, "blocked"),
        "fastkd triton": lambda: on_backend(_dcd_bounded, "triton"),
        "fastkd triton, unbounded scale": lambda: on_backend(dcd_loss, "triton"),
    },
    "info_nce_loss": {
        **_with_torch(eager_info_nce),
        "inf-cl": inf_cl,
        "cut-cross-entropy": lambda: cut_cross_entropy(None),
        "cut-cross-entropy, filtered": lambda: cut_cross_entropy("high"),
        "fastkd blocked": lambda: on_backend(info_nce_loss, "blocked"),
        "fastkd triton": lambda: on_backend(info_nce_loss, "triton"),
        "fastkd triton (dcd_loss, alpha 0)": lambda: on_backend(partial(dcd_loss, alpha=0.0), "triton"),
    },
    "clip_loss": {
        **_with_torch(eager_clip),
        "open_clip_torch bf16 autocast": lambda: in_autocast(open_clip()),
        "fastkd blocked": lambda: both_directions(on_backend(info_nce_loss, "blocked")),
        "fastkd triton": lambda: both_directions(on_backend(info_nce_loss, "triton")),
        "fastkd triton (dcd_loss, alpha 0)": lambda: both_directions(
            on_backend(partial(dcd_loss, alpha=0.0), "triton")
        ),
    },
    "ckd_loss": {
        **_with_torch(eager_ckd),
        "fastkd blocked": lambda: on_backend(_ckd, "blocked"),
        "fastkd triton": lambda: on_backend(_ckd, "triton"),
    },
    "sup_con_loss": {
        **_with_torch(eager_sup_con),
        "pytorch-metric-learning": lambda: in_float32(metric_learning_sup_con(1 / LOGIT_SCALE)),
        "fastkd blocked": lambda: on_backend(_sup_con, "blocked"),
        "fastkd triton": lambda: on_backend(_sup_con, "triton"),
    },
    "masked_contrast_loss": {
        **_with_torch(eager_masked),
        "fastkd blocked": lambda: on_backend(_masked, "blocked"),
        "fastkd triton": lambda: on_backend(_masked, "triton"),
    },
    "kd_loss": {
        "eager fp32": lambda: eager_kd,
        "torch.compile fp32": lambda: compiled(eager_kd),
        "liger-kernel": liger_kd,
        "fastkd blocked": lambda: on_backend(_kd, "blocked"),
        "fastkd triton": lambda: on_backend(_kd, "triton"),
    },
    "ce_kd_terms": {
        "eager fp32": lambda: eager_ce_kd,
        "torch.compile fp32": lambda: compiled(eager_ce_kd),
        "liger-kernel": liger_ce_kd,
        "fastkd blocked": lambda: on_backend(_ce_kd, "blocked"),
        "fastkd triton": lambda: on_backend(_ce_kd, "triton"),
    },
    **{name: _pool_providers(normalize) for name, (_, normalize) in POOLS.items()},
}
ON_LOGITS = frozenset({"kd_loss", "ce_kd_terms"})
MEMORY_BOUND = ON_LOGITS | POOLS.keys()  # whose bandwidth is reported
