"""Distillation of the correlations of predictions within rows and within columns (arXiv 2205.10536)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.distributed.agree import Agreement
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
    initialised with zeros should not begin with this loss. Several ranks exchange sums per class, and no logits.

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

    def _of_ranks(self, ranks: Agreement, *rows: Tensor) -> dict[str, Tensor]:
        p_s, p_t = (F.softmax(x / self.temperature, dim=1) for x in rows)
        count = len(p_s) if ranks.peers is None else ranks.peers.total
        # Without a gradient: the deviations from a mean sum to 0, so that the products do not change with the mean.
        means = ranks.sum(torch.stack([p_s.detach().sum(dim=0), p_t.sum(dim=0)])) / count
        of_rows = _correlations(*_products(_centred(p_s), _centred(p_t), dim=1)).sum()
        products = torch.stack(_products(p_s - means[0], p_t - means[1], dim=0))
        *of_columns, of_rows = ranks.sum(torch.cat([products.flatten(), of_rows[None]])).split([*3 * [p_s.shape[1]], 1])
        square = self.temperature**2
        return {
            "inter": self.beta * square * (1 - of_rows[0] / count),
            "intra": self.gamma * square * (1 - _correlations(*of_columns).mean()),
        }

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, gamma={self.gamma}"


def _centred(p: Tensor) -> Tensor:
    return p - p.mean(dim=1, keepdim=True)


def _products(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sums along ``dim`` of ``a b``, ``a^2`` and ``b^2``."""
    return (a * b).sum(dim=dim), a.square().sum(dim=dim), b.square().sum(dim=dim)


def _correlations(both: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlations of the sums of :func:`_products`; 0, without a gradient, where there is no variance."""
    norms = [x.masked_fill(x == 0, 1).sqrt().masked_fill(x == 0, 0) for x in (a, b)]
    return both / (norms[0] * norms[1] + EPS)
