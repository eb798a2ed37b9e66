"""What is measured: every way to compute a loss, by name.

``PROVIDERS`` compute ``fastkd.dcd_loss`` with its defaults on a CPU. ``GPU_PROVIDERS`` are the losses of bench/gpu.py,
by case. All ratios of a case are against its baseline. The function that builds a provider raises ImportError where the
package is not installed. The provider itself raises Unsupported where our backend has no kernel.

Losses on rows take (student [N, D], teacher [N, D], logit_scale 0-dim). Losses on logits take (student [B, C], teacher
[B, C], labels [B]). The cases of ``POOLS`` take (features [B, C, H, W], and the gradient of the rows, which they
ignore) and return rows.
"""

from collections.abc import Callable
from functools import partial
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ckd_loss, dcd_loss, info_nce_loss, kd_loss, masked_contrast_loss, multiscale_pool, sup_con_loss
from fastkd.functional.dcd import dcd_terms
from fastkd.functional.kd import ce_kd_terms
from fastkd.validate import Backend

Loss = Callable[..., Tensor]
Providers = dict[str, Callable[[], Loss]]


def _contrast_and_logs(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logit_scale * F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    return contrast, logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)


def eager(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    """Careful eager code: normalise, one product, cross_entropy, two log_softmax."""
    contrast, log_p, log_q = _contrast_and_logs(student, teacher, logit_scale)
    return contrast + 0.5 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def eager_kl_div(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    """The same with torch's fused KL in log space: the fastest eager code we know."""
    contrast, log_p, log_q = _contrast_and_logs(student, teacher, logit_scale)
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


def eager_ckd(student: Tensor, teacher: Tensor, logit_scale: Tensor) -> Tensor:
    return eager_info_nce(teacher.detach(), student, torch.ones_like(logit_scale))


def labels_of(rows: Tensor, labels: Tensor | None = None) -> Tensor:
    """``labels``, or where there are none, labels that give every class eight rows."""
    return torch.arange(len(rows), device=rows.device) % (len(rows) // 8) if labels is None else labels


def eager_sup_con(
    features: Tensor, _: Tensor, logit_scale: Tensor | float, labels: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Supervised contrast: one product, logsumexp over the others, mean over the positives."""
    labels = labels_of(features, labels)
    features = F.normalize(features, dim=1) if normalize else features
    logits = (logit_scale * features @ features.T).float()
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    positive = (labels[:, None] == labels) & ~own
    lse = logits.masked_fill(own, -torch.inf).logsumexp(dim=1)
    count = positive.sum(dim=1)
    rows = lse - logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp_min(1)
    return rows.masked_fill(count == 0, 0).sum() / (count > 0).sum().clamp_min(1)


def eager_masked(query: Tensor, key: Tensor, logit_scale: Tensor | float, labels: Tensor | None = None) -> Tensor:
    labels = labels_of(query, labels)
    logits = logit_scale * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    false_negative = (labels[:, None] == labels).fill_diagonal_(False)
    return F.cross_entropy(
        logits.masked_fill(false_negative, -torch.inf), torch.arange(len(query), device=query.device)
    )


def eager_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, dim=1) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def eager_ce_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float(), labels) + eager_kd(student, teacher, labels)


# Windows and strides by the map's side. 7: a network's last map, at every position. 56: an early map.
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
    """The mean of both directions. Of InfoNCE this is the loss of CLIP, as open_clip computes it: two products."""
    return lambda a, b, c, **options: (loss(a, b, c, **options) + loss(b, a, c, **options)) / 2


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


_dcd_contrast = partial(dcd_loss, alpha=0.0)  # InfoNCE


def _dcd_bounded(student: Tensor, teacher: Tensor, logit_scale: Tensor, backend: Backend) -> Tensor:
    """As ``DCDLoss`` calls it: the module bounds the scale, so the kernels need no running maximum."""
    contrast, consistency = dcd_terms(student, teacher, logit_scale, max_scale=10.0, backend=backend)
    return contrast + consistency


def _pool_providers(normalize: bool) -> Providers:
    """Eager code stands here twice: in float32 as ours accumulates, and in the map's own dtype, which moves less."""

    def eager_pooled(features: Tensor, _: Tensor) -> Tensor:
        return eager_pool(features, *POOL_SCALES[features.shape[2]], normalize=normalize)

    def pooled(features: Tensor, _: Tensor, backend: Backend) -> Tensor:
        return multiscale_pool(features, *POOL_SCALES[features.shape[2]], normalize=normalize, backend=backend)

    return {
        "eager fp32": lambda: lambda x, upstream: eager_pooled(x.float(), upstream).to(x.dtype),
        "eager": lambda: eager_pooled,
        "torch.compile": lambda: compiled(eager_pooled),
        **_ours(pooled),
    }


def metric_learning_sup_con(temperature: float) -> Loss:
    """Supervised contrast that normalises its features and stores several N x N tensors. No scale gets a gradient."""
    from pytorch_metric_learning.losses import SupConLoss

    module = SupConLoss(temperature=temperature)
    return lambda student, teacher, logit_scale, labels=None: module(student, labels_of(student, labels))


def inf_cl() -> Loss:
    """InfoNCE in Triton. It converts to fp32 and multiplies in tf32. D must be a multiple of a power of two <= 256."""
    from inf_cl import cal_flash_loss

    def loss(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
        head_dim = min(256, query.shape[1])
        unit = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return cal_flash_loss(*unit, scale=logit_scale, head_dim=head_dim).mean()

    return loss


def cut_cross_entropy(filter_eps: str | None) -> Loss:
    """InfoNCE as a classifier whose weights are the keys. Its default, ``filter_eps="high"``, drops small gradients."""
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
    """KD. The package's KL takes log-probabilities, so torch's log_softmax comes first."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, dim=1) for x in (student, teacher))
        return TEMPERATURE**2 * LigerKLDivLossFunction.apply(log_s, log_t, "batchmean", True)

    return loss


def liger_ce_kd() -> Loss:
    """Cross-entropy and KD. The cross-entropy overwrites the logits with their gradient, so it comes last."""
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


def _ours(loss: Loss) -> Providers:
    return {"fastkd blocked": lambda: on_backend(loss, "blocked"), "fastkd triton": lambda: on_backend(loss, "triton")}


# What bench/host.py compares with: the eager code alone, in the dtype of its inputs.
EAGER: dict[str, Loss] = {
    "dcd_loss": eager_kl_div,
    "info_nce_loss": eager_info_nce,
    "clip_loss": both_directions(eager_info_nce),
    "ckd_loss": eager_ckd,
    "sup_con_loss": eager_sup_con,
    "masked_contrast_loss": eager_masked,
    "kd_loss": eager_kd,
    "ce_kd_terms": eager_ce_kd,
    **{
        name: lambda x, _, normalize=normalize: eager_pool(x, *POOL_SCALES[x.shape[2]], normalize=normalize)
        for name, (_, normalize) in POOLS.items()
    },
}
GPU_BASELINE = "eager fp32"
# Names that begin like this may be captured in a CUDA graph. A peer may wait for the host, and one failed capture ends
# all captures. "fastkd blocked" would be one node per block, 10^5 of them at 8192 x 131072 logits.
CAPTURED = ("eager", "torch.compile", "fastkd triton")
GPU_PROVIDERS: dict[str, Providers] = {
    "dcd_loss": {
        **_with_torch(eager_kl_div),
        **_ours(_dcd_bounded),
        "fastkd triton, unbounded scale": lambda: on_backend(dcd_loss, "triton"),
    },
    "info_nce_loss": {
        **_with_torch(eager_info_nce),
        "inf-cl": inf_cl,
        "cut-cross-entropy": lambda: cut_cross_entropy(None),
        "cut-cross-entropy, filtered": lambda: cut_cross_entropy("high"),
        **_ours(info_nce_loss),
        "fastkd triton (dcd_loss, alpha 0)": lambda: on_backend(_dcd_contrast, "triton"),
    },
    "clip_loss": {
        **_with_torch(both_directions(eager_info_nce)),
        "open_clip_torch bf16 autocast": lambda: in_autocast(open_clip()),
        **_ours(both_directions(info_nce_loss)),
        "fastkd triton (dcd_loss, alpha 0)": lambda: on_backend(both_directions(_dcd_contrast), "triton"),
    },
    "ckd_loss": {**_with_torch(eager_ckd), **_ours(lambda a, b, _, backend: ckd_loss(a, b, backend=backend))},
    "sup_con_loss": {
        **_with_torch(eager_sup_con),
        "pytorch-metric-learning": lambda: in_float32(metric_learning_sup_con(1 / LOGIT_SCALE)),
        **_ours(lambda a, _, scale, backend: sup_con_loss(a, labels_of(a), scale, normalize=True, backend=backend)),
    },
    "masked_contrast_loss": {
        **_with_torch(eager_masked),
        **_ours(lambda a, b, scale, backend: masked_contrast_loss(a, b, scale, *[labels_of(a)] * 2, backend=backend)),
    },
    "kd_loss": {
        "eager fp32": lambda: eager_kd,
        "torch.compile fp32": lambda: compiled(eager_kd),
        "liger-kernel": liger_kd,
        **_ours(lambda a, b, _, backend: kd_loss(a, b, TEMPERATURE, backend=backend)),
    },
    "ce_kd_terms": {
        "eager fp32": lambda: eager_ce_kd,
        "torch.compile fp32": lambda: compiled(eager_ce_kd),
        "liger-kernel": liger_ce_kd,
        **_ours(lambda a, b, labels, backend: add(*ce_kd_terms(a, b, labels, TEMPERATURE, backend=backend))),
    },
    **{name: _pool_providers(normalize) for name, (_, normalize) in POOLS.items()},
}
ON_LOGITS = frozenset({"kd_loss", "ce_kd_terms"})
MEMORY_BOUND = ON_LOGITS | POOLS.keys()  # whose bandwidth is reported
