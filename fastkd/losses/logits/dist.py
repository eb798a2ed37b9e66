"""Distillation of the correlations of predictions within rows and within columns (arXiv 2205.10536)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.distributed.group import Group
from fastkd.losses.inputs import check_part_weights
from fastkd.losses.pairs import logit_pair
from fastkd.losses.relational import RelationalLoss
from fastkd.validate import check_temperature

EPS = 1e-8


class DISTLoss(RelationalLoss):
    r"""DIST: student and teacher agree up to shift and scale, sample by sample and class by class.

    .. code-block:: text

        P = softmax(logits / temperature), [B, C]
        rho(a, b) = (a - mean a) . (b - mean b) / (|a - mean a| |b - mean b| + 1e-8)      Pearson's correlation

        inter = beta  * temperature^2 * (1 - mean over the rows of P    of rho(P^s, P^t))
        intra = gamma * temperature^2 * (1 - mean over the columns of P of rho(P^s, P^t))

    The authors train with cross-entropy of weight 1 and give this loss the weight 2. Their temperature is 4 on
    CIFAR-100 and 1 on ImageNet. A row or a column without variance has the correlation 0. So a batch of one row has a
    constant ``intra``. The gradient of a row whose logits are all equal is finite and very large. A classifier that is
    initialised with zeros should not begin with this loss.

    Source: arXiv 2205.10536, as in the authors' code.

    Args:
        temperature: divides the logits; in [1e-4, 1e4].
        beta, gamma: weights of the two parts; >= 0, and not both 0.
        group: as for :class:`fastkd.DCDLoss`; columns span the rows of all its ranks.

    Raises:
        TypeError, ValueError: a number is out of range, or ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import DISTLoss, total_loss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = DISTLoss(temperature=4.0)(student_logits, teacher_logits)
        >>> list(terms)
        ['inter', 'intra']
        >>> total_loss(terms).backward()
    """

    def __init__(self, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0, *, group: Group = None) -> None:
        super().__init__(group)
        check_temperature(temperature)
        check_part_weights(beta=beta, gamma=gamma)
        self.temperature, self.beta, self.gamma = temperature, beta, gamma

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """Returns ``inter`` and ``intra``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16.
        """
        return self._over_ranks(student_logits, teacher_logits)

    def _rows(self, *inputs: Tensor, may_be_empty: bool) -> tuple[Tensor, ...]:
        return logit_pair(*inputs, may_be_empty=may_be_empty)

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        p_s, p_t = (F.softmax(x / self.temperature, dim=1) for x in rows)
        square = self.temperature**2
        inter = 1 - _correlations(p_s, p_t, dim=1).mean()
        intra = 1 - _correlations(p_s, p_t, dim=0).mean()
        return {"inter": self.beta * square * inter, "intra": self.gamma * square * intra}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, gamma={self.gamma}"


def _correlations(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim=dim, keepdim=True), b - b.mean(dim=dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)  # gradient 0 at 0
    return (a * b).sum(dim=dim) / (norms + EPS)
