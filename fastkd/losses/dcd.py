"""Discriminative and consistent distillation (arXiv 2407.11802): the module with its heads and its temperature."""

import math

import torch
from torch import Tensor, nn

from fastkd import backends
from fastkd.distributed.group import Group, check_group
from fastkd.functional.dcd import dcd_terms
from fastkd.validate import CONSISTENCIES, check_choice, check_int, check_number, check_type


class DCDLoss(nn.Module):
    """Contrast each student embedding with every teacher embedding of the batch, and keep both directions consistent.

    One linear head each projects the features of student and teacher to ``embed_dim``; the loss is
    :func:`fastkd.dcd_loss` of the projections, with ``logit_scale = exp(tau)`` learnt along with the heads.
    All parameters of this module (both heads and tau) belong in the optimiser, tau without weight decay. With several
    ranks they belong inside the module that DistributedDataParallel wraps, and the loss is computed in its ``forward``:
    then they stay identical on all ranks, and their averaged gradients are those of the global batch.

    The clamp is a projection: before each use, tau is set back to its bound if it went beyond. Its gradient is never
    blocked, so it comes back as soon as the loss asks for it, and ranks that average gradients stay exact.

    Args:
        student_dim, teacher_dim: widths of the features that come in.
        embed_dim: width of the shared space, 128 in the paper.
        alpha: weight of the consistency term.
        consistency: ``"student||teacher"``, the paper's KL(p || q), or ``"teacher||student"``, the authors' code.
        max_scale: upper bound of exp(tau); 10 in the authors' code, which produced the published numbers.
            ``None``: no bound.
        min_scale: lower bound of exp(tau). The paper's text clamps tau to [0, tau_max]: pass ``min_scale=1.0,
            max_scale=exp(tau_max)`` for that reading.
        learnable: ``False`` fixes the scale at ``1 / temperature`` without a clamp, the paper's ablation.
        temperature: of the fixed scale; 0.07 in the paper. Used only if ``learnable=False``.
        logit_bias: keep a ``logit_bias`` parameter, so that state dicts which hold one load. Its gradient is zero.
        group, backend: see :func:`fastkd.dcd_loss`. A module that holds a ProcessGroup, of any method, can be neither
            deep-copied nor pickled, as the group cannot; with ``None`` or ``"local"`` it can.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        embed_dim: int = 128,
        *,
        alpha: float = 0.5,
        consistency: str = "student||teacher",
        max_scale: float | None = 10.0,
        min_scale: float | None = None,
        learnable: bool = True,
        temperature: float = 0.07,
        logit_bias: bool = False,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("student_dim", student_dim), ("teacher_dim", teacher_dim), ("embed_dim", embed_dim)):
            check_int(name, value, minimum=1)
        check_type("learnable", learnable, bool)
        check_type("logit_bias", logit_bias, bool)
        check_number("alpha", alpha, minimum=0)
        check_choice("consistency", consistency, CONSISTENCIES)
        for name, bound in (("max_scale", max_scale), ("min_scale", min_scale)):
            if bound is not None:
                check_number(name, bound, minimum=0, exclusive=True)
        if max_scale is not None and min_scale is not None and min_scale > max_scale:
            raise ValueError(f"min_scale: got {min_scale}, expected at most max_scale, {max_scale}")
        check_number("temperature", temperature, minimum=0, exclusive=True)
        check_group(group)
        backends.check_name(backend)
        self.student_head = nn.Linear(student_dim, embed_dim)
        self.teacher_head = nn.Linear(teacher_dim, embed_dim)
        self.alpha = alpha
        self.consistency = consistency
        self.max_scale = max_scale if learnable else None
        self.min_scale = min_scale if learnable else None
        self.fixed_scale = math.inf if learnable else 1 / temperature
        self.group = group
        self.backend = backend
        if learnable:
            self.tau = nn.Parameter(torch.tensor(1.0))
        else:
            # Not in state dicts: one with a learnt tau must not change the fixed temperature.
            self.register_buffer("tau", torch.tensor(-math.log(temperature)), persistent=False)
        self.logit_bias = nn.Parameter(torch.tensor(0.0)) if logit_bias else None

    def logit_scale(self) -> Tensor:
        """``exp(tau)``, 0-dim, within its bounds; sets tau back to a bound that it went beyond."""
        low, high = (None if bound is None else math.log(bound) for bound in (self.min_scale, self.max_scale))
        if low is not None or high is not None:
            with torch.no_grad():
                self.tau.clamp_(low, high)
        return self.tau.exp()

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """student_features: [n, student_dim]; teacher_features: [n, teacher_dim]; sample_weight: [n].

        Returns ``{"contrast": ..., "consistency": ...}`` with alpha applied; their sum is the DCD loss.
        """
        contrast, consistency = dcd_terms(
            self.student_head(student_features),
            self.teacher_head(teacher_features),
            self.logit_scale(),
            self.logit_bias,
            alpha=self.alpha,
            consistency=self.consistency,
            sample_weight=sample_weight,
            max_scale=self.fixed_scale if self.max_scale is None else self.max_scale,
            group=self.group,
            backend=self.backend,
        )
        return {"contrast": contrast, "consistency": consistency}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, consistency={self.consistency!r}, max_scale={self.max_scale}"
