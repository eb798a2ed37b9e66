"""Multi-level logit distillation (Jin et al., CVPR 2023)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import backends
from fastkd.distributed.group import Group
from fastkd.functional.kd import soft_target_rows
from fastkd.losses.pairs import Pair, logit_pair
from fastkd.losses.relational import RelationalLoss
from fastkd.validate import Backend, check_choice, check_temperature, check_type

Reading = Literal["code", "paper"]
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)
STRONG = 3  # so many of the temperatures are those of the strong view in the public code


class MLKDLoss(RelationalLoss):
    r"""MLKD: KD, and relations of samples and of classes, at several temperatures and of two views of every image.

    .. code-block:: text

        P = softmax(logits / T), [B, C]
        KD_T    = T^2 * mean_i KL(P^t_i || P^s_i)
        Batch_T = |P^s (P^s)^T - P^t (P^t)^T|_F^2 / B
        Class_T = |(P^s)^T P^s - (P^t)^T P^t|_F^2 / C

        reading="code":   instance = sum_T m KD_T(weak) + sum_{first three T} KD_T(strong) + sum_{other T} KD_T(weak)
                          batch    = sum_T m Batch_T(weak)
                          class    = sum_T m_c Class_T(weak)
        reading="paper":  instance, batch, class = sum_T of KD_T, Batch_T, Class_T, each over both views

    m is the fraction of samples whose teacher is at most as confident as the median of the batch. m_c is the fraction
    of classes whose probabilities, summed over the batch, are at most their median. The public code means to leave out
    the other samples and classes, but it multiplies a mean that is already taken. It drops the strong view's relations,
    too. Published numbers come from that code, so ``"code"`` is the default. ``"paper"`` is the intended sum, without
    masks.

    The authors weigh this loss with 0.9, and the cross-entropies of both views with 0.1.

    Source: Jin et al., "Multi-Level Logit Distillation", CVPR 2023, as in the authors' code.

    Args:
        temperatures: divide the logits; each in [1e-4, 1e4]. ``"code"`` needs more than three of them.
        reading: see above.
        group: as for :class:`fastkd.DCDLoss`; relations, masks and means span the rows of all its ranks.
        backend: of the ``instance`` term, see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: a temperature is out of range, there are too few of them, or ``reading``, ``group`` or
            ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import MLKDLoss, total_loss
        >>> weak, strong = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10, requires_grad=True)
        >>> terms = MLKDLoss()(weak, torch.randn(6, 10), strong, torch.randn(6, 10))
        >>> list(terms)
        ['instance', 'batch', 'class']
        >>> (0.9 * total_loss(terms)).backward()
    """

    def __init__(
        self,
        temperatures: Sequence[float] = TEMPERATURES,
        reading: Reading = "code",
        *,
        group: Group = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(group)
        backends.check_name(backend)
        check_type("temperatures", temperatures, (list, tuple))
        check_choice("reading", reading, get_args(Reading))
        for temperature in temperatures:
            check_temperature(temperature)
        fewest = STRONG + 1 if reading == "code" else 1
        if len(temperatures) < fewest:
            raise ValueError(f"temperatures: got {len(temperatures)}, expected at least {fewest} for {reading!r}")
        self.temperatures, self.reading, self.backend = tuple(temperatures), reading, backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_logits_strong: Tensor | None = None,
        teacher_logits_strong: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``instance``, ``batch`` and ``class``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], of the weak view, in float64, float32, bf16 or fp16. The others: the
        same for the strong view; both may be left out with ``reading="paper"``.
        """
        return self._over_ranks(student_logits, teacher_logits, student_logits_strong, teacher_logits_strong)

    def _rows(self, *inputs: Tensor | None, may_be_empty: bool) -> tuple[Tensor, ...]:
        weak_s, weak_t, strong_s, strong_t = inputs
        assert weak_s is not None
        assert weak_t is not None
        weak = logit_pair(weak_s, weak_t, may_be_empty=may_be_empty)
        if strong_s is None and strong_t is None and self.reading == "paper":
            return weak
        for name, logits in (("student_logits_strong", strong_s), ("teacher_logits_strong", strong_t)):
            if logits is None:
                raise ValueError(f"{name}: got None, expected the logits of the strong view, [B, C]")
            if logits.shape != weak_s.shape:
                raise ValueError(f"{name}: got shape {list(logits.shape)}, expected that of student_logits, "
                                 f"{list(weak_s.shape)}")  # fmt: skip
        assert strong_s is not None
        assert strong_t is not None
        return *weak, *logit_pair(strong_s, strong_t, may_be_empty=may_be_empty)

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        views = list(zip(rows[::2], rows[1::2], strict=True))
        if self.reading == "paper":
            parts = [torch.stack((self._instances(*view).sum(), *self._relations(*view))) for view in views]
            return dict(zip(("instance", "batch", "class"), torch.stack(parts).sum(dim=0), strict=True))
        weak, strong = views
        p = F.softmax(weak[1], dim=1)
        samples, classes = _part_below_median(p.amax(dim=1)), _part_below_median(p.sum(dim=0))
        instances, (batch, of_classes) = self._instances(*weak), self._relations(*weak)
        again = self._instances(*strong, STRONG).sum() + instances[STRONG:].sum()
        return {
            "instance": samples * instances.sum() + again,
            "batch": samples * batch,
            "class": classes * of_classes,
        }

    def _instances(self, student: Tensor, teacher: Tensor, count: int | None = None) -> Tensor:
        """KD at the first ``count`` temperatures, or at all, [K]; one read of the logits."""
        T = self.temperatures[:count]
        rows = soft_target_rows(student, teacher, T, backend=self.backend).divergence
        return rows.mean(dim=1) * rows.new_tensor(T) ** 2

    def _relations(self, student: Tensor, teacher: Tensor) -> Pair:
        """The sums over the temperatures of the relations of samples and of classes."""
        batch, of_classes = student.new_zeros(2)
        for T in self.temperatures:
            p, q = F.softmax(student / T, dim=1), F.softmax(teacher / T, dim=1)
            batch = batch + (p @ p.T - q @ q.T).square().sum() / len(p)
            of_classes = of_classes + (p.T @ p - q.T @ q).square().sum() / p.shape[1]
        return batch, of_classes

    def extra_repr(self) -> str:
        return f"temperatures={self.temperatures}, reading={self.reading!r}"


def _part_below_median(x: Tensor) -> Tensor:
    """The fraction of the entries that are at most the median, which is between two entries of an even number."""
    middle = x.sort().values[[(len(x) - 1) // 2, len(x) // 2]].mean()
    return (x <= middle).to(x.dtype).mean()
