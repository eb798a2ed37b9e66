"""Discriminative and consistent distillation (arXiv 2407.11802)."""

import math

import torch
from torch import Tensor, nn

from fastkd import backends
from fastkd.distributed.group import Group, check_group
from fastkd.functional.dcd import dcd_terms
from fastkd.losses.base import LossModule
from fastkd.losses.inputs import check_layer_input, check_width
from fastkd.validate import (
    CONSISTENCIES,
    Backend,
    Consistency,
    check_choice,
    check_int,
    check_number,
    check_temperature,
    check_type,
)


class DCDLoss(LossModule):
    r"""The DCD loss with its two projection heads and its learnable temperature.

    .. code-block:: text

        s, t = student_head(student_features), teacher_head(teacher_features)                [n, embed_dim] each
        p_i  = softmax_j(exp(tau) cos(s_i, t_j))      q_i = softmax_j(exp(tau) cos(t_i, s_j))

        contrast    = mean_i -log p_i(i)              consistency = alpha * mean_i KL(p_i || q_i)

    :func:`fastkd.dcd_loss` describes the loss. This module adds one linear layer for each side, and tau.

    All parameters of this module belong in the optimiser. tau should get no weight decay. With several ranks the module
    belongs inside the module that DistributedDataParallel wraps, and the loss is computed in that module's ``forward``.
    Then the parameters stay identical on all ranks, and their averaged gradients are the gradients of the global batch.

    The bounds of exp(tau) are kept by projection: every forward first sets tau back to the bound that it went beyond
    (:meth:`project_tau`). tau's gradient is never blocked. So tau leaves the bound as soon as the loss asks for it, and
    ranks that average their gradients stay exact. (The authors' code clamps instead: beyond the bound tau gets no
    gradient, and the loss cannot bring it back.)

    Source: arXiv 2407.11802, eq. 2-8. Where the paper and the authors' code differ, an argument chooses.

    Args:
        student_dim, teacher_dim: widths of the features that come in.
        embed_dim: width of the shared space; 128 in the paper.
        alpha: weight of the consistency term; >= 0.
        consistency: ``"student||teacher"`` is the paper's KL(p || q); ``"teacher||student"`` is the KL(q || p) of the
            authors' code.
        max_scale: upper bound of exp(tau). The authors' code, which produced the published numbers, has 10. ``None``
            sets no bound.
        min_scale: lower bound of exp(tau). The paper's text clamps tau to [0, tau_max]: pass ``min_scale=1.0,
            max_scale=exp(tau_max)`` for that reading.
        learnable: ``False`` fixes the scale at ``1 / temperature`` without bounds, as in the paper's ablation.
        temperature: fixes the scale if ``learnable=False``, and is unused otherwise; in [1e-4, 1e4], 0.07 in the paper.
            The authors' code multiplies the cosines by 0.07 there: ``1 / 0.07``. On ImageNet its scale stays e:
            ``exp(-1)``, with ``group="local"``.
        logit_bias: keeps a parameter ``logit_bias``, so that state dicts that hold one load. Its gradient is zero.
        group, backend: see :func:`fastkd.dcd_loss`. A module that holds a ProcessGroup, of any method, can be neither
            deep-copied nor pickled, because the group cannot. With ``None`` or ``"local"`` it can.

    Raises:
        TypeError, ValueError: a width is not an int >= 1, a number is out of range, ``min_scale`` exceeds
            ``max_scale``, or ``consistency``, ``group`` or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import DCDLoss, total_loss
        >>> dcd = DCDLoss(student_dim=8, teacher_dim=16)
        >>> terms = dcd(torch.randn(6, 8), torch.randn(6, 16))
        >>> list(terms)
        ['contrast', 'consistency']
        >>> total_loss(terms).backward()
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        embed_dim: int = 128,
        *,
        alpha: float = 0.5,
        consistency: Consistency = "student||teacher",
        max_scale: float | None = 10.0,
        min_scale: float | None = None,
        learnable: bool = True,
        temperature: float = 0.07,
        logit_bias: bool = False,
        group: Group = None,
        backend: Backend | None = None,
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
        check_temperature(temperature)
        check_group(group)
        backends.check_name(backend)
        self.student_head = nn.Linear(student_dim, embed_dim)
        self.teacher_head = nn.Linear(teacher_dim, embed_dim)
        self.alpha = alpha
        self.consistency = consistency
        self.max_scale = max_scale if learnable else None
        self.min_scale = min_scale if learnable else None
        # What is known of the scale without reading it from its device.
        self.scale_bound = (math.inf if max_scale is None else max_scale) if learnable else 1 / temperature
        self.group = group
        self.backend = backend
        if learnable:
            self.tau = nn.Parameter(torch.tensor(1.0))
        else:
            # Not in state dicts: one with a learnt tau must not change the fixed temperature.
            self.register_buffer("tau", torch.tensor(-math.log(temperature)), persistent=False)
        self.logit_bias = nn.Parameter(torch.tensor(0.0)) if logit_bias else None

    @property
    def _tau_bounds(self) -> tuple[float | None, float | None]:
        low, high = (None if bound is None else math.log(bound) for bound in (self.min_scale, self.max_scale))
        return low, high

    def bounded_tau(self) -> Tensor:
        """tau within its bounds, 0-dim, as the next forward uses it. Nothing is written; the gradient reaches tau."""
        if self._tau_bounds == (None, None):
            return self.tau
        return self.tau + (self.tau.clamp(*self._tau_bounds) - self.tau).detach()

    def logit_scale(self) -> Tensor:
        """``exp(tau)`` within its bounds, 0-dim, as the next forward uses it. Nothing is written."""
        return self.bounded_tau().exp()

    @torch.no_grad()
    def project_tau(self) -> None:
        """Sets tau back to the bound that the last optimiser step took it beyond. ``forward`` calls this first."""
        if self._tau_bounds != (None, None):
            self.tau.clamp_(*self._tau_bounds)

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns ``{"contrast": ..., "consistency": ...}``, 0-dim, alpha applied. Their sum is the DCD loss.

        student_features: [n, student_dim] in the dtype of the parameters, unless autocast converts. teacher_features:
        [n, teacher_dim], cast to that dtype. sample_weight: [n], >= 0.
        """
        self.project_tau()
        contrast, consistency = dcd_terms(
            student_features,
            teacher_features,
            self.tau.exp(),
            self.logit_bias,
            project=self._embed,
            alpha=self.alpha,
            consistency=self.consistency,
            sample_weight=sample_weight,
            max_scale=self.scale_bound,
            group=self.group,
            backend=self.backend,
        )
        return {"contrast": contrast, "consistency": consistency}

    def _embed(self, student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides' projections [n, embed_dim], after checks that name the features as they came."""
        check_width("student_features", student_features, self.student_head.in_features)
        check_width("teacher_features", teacher_features, self.teacher_head.in_features)
        if len(student_features) != len(teacher_features):
            expected = f"those of student_features, {len(student_features)}"
            raise ValueError(f"teacher_features: got {len(teacher_features)} rows, expected {expected}")
        teacher_features = teacher_features.to(self.teacher_head.weight.dtype)
        check_layer_input("student_features", student_features, self.student_head)
        check_layer_input("teacher_features", teacher_features, self.teacher_head)
        return self.student_head(student_features), self.teacher_head(teacher_features)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, consistency={self.consistency!r}, max_scale={self.max_scale}"
