"""What is measured: every way to compute the DCD loss, by name. ``eager`` is the baseline of every ratio.

A provider takes (student [N, D], teacher [N, D], logit_scale 0-dim) and returns the loss of ``fastkd.dcd_loss`` with
its defaults.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import dcd_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def compiled(loss: Loss) -> Loss:
    torch.compiler.reset()  # one shape at a time: no recompilation into dynamic shapes
    return torch.compile(loss, fullgraph=True, dynamic=False)


PROVIDERS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "eager kl_div": lambda: eager_kl_div,
    "reference": lambda: partial(dcd_loss, backend="reference"),
    "torch.compile(eager kl_div)": lambda: compiled(eager_kl_div),
    "torch.compile(reference)": lambda: compiled(partial(dcd_loss, backend="reference")),
    "fastkd blocked": lambda: partial(dcd_loss, backend="blocked"),
}
BASELINE = "eager"
