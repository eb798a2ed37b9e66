"""Decoupled knowledge distillation (arXiv 2203.08679)."""

import torch.nn.functional as F
from torch import Tensor

from fastkd import backends
from fastkd.functional.kd import soft_target_rows
from fastkd.losses.base import LossModule
from fastkd.losses.inputs import check_part_weights
from fastkd.validate import Backend, check_temperature


class DKDLoss(LossModule):
    r"""DKD: the divergence of the label's probability, and that of all other classes among themselves.

    .. code-block:: text

        p_i = softmax(logits_i / temperature) at the label     q_i = softmax(logits_i / temperature) without the label

        target     = alpha * temperature^2 * mean_i KL((p^t_i, 1 - p^t_i) || (p^s_i, 1 - p^s_i))
        non_target = beta  * temperature^2 * mean_i KL(q^t_i || q^s_i)

    The authors train with cross-entropy of weight 1, and multiply this loss by ``min(epoch / 20, 1)``, epochs from 1.
    On CIFAR-100 beta is 8, and 6 or 2 for some pairs. On ImageNet the temperature is 1 and beta is 0.5 or 2.

    The public code takes logarithms of sums of probabilities, which overflow in float32 where a network is certain.
    Here log-sum-exps take their place, with and without the label. They are the same function, and finite.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: arXiv 2203.08679. The authors' code has alpha 1. The paper has 0.5 on ImageNet.

    Args:
        temperature: divides the logits; in [1e-4, 1e4].
        alpha, beta: weights of the two parts; >= 0, and not both 0.
        backend: see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: a number is out of range, or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import DKDLoss, total_loss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = DKDLoss(beta=8.0)(student_logits, teacher_logits, labels=torch.arange(6))
        >>> list(terms)
        ['target', 'non_target']
        >>> total_loss(terms).backward()
    """

    def __init__(
        self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0, *, backend: Backend | None = None
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_part_weights(alpha=alpha, beta=beta)
        backends.check_name(backend)
        self.temperature, self.alpha, self.beta, self.backend = temperature, alpha, beta, backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, standardize: bool = False
    ) -> dict[str, Tensor]:
        """Returns ``target`` and ``non_target``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], at least two classes, in float64, float32, bf16 or fp16. labels: [B],
        int64, in [0, C); on CUDA another label makes the loss NaN. standardize: see :func:`fastkd.kd_loss`.
        """
        rows = soft_target_rows(
            student_logits,
            teacher_logits,
            self.temperature,
            labels=labels,
            exclude_label=True,
            standardize=standardize,
            backend=self.backend,
        )
        # p = sigmoid(margin), and 1 - p = sigmoid(-margin).
        (margin_s,), (margin_t,) = rows.student_label, rows.teacher_label
        log_p, log_rest = F.logsigmoid(margin_t), F.logsigmoid(-margin_t)
        target = log_p.exp() * (log_p - F.logsigmoid(margin_s)) + log_rest.exp() * (log_rest - F.logsigmoid(-margin_s))
        non_target = rows.divergence
        square = self.temperature**2
        return {"target": self.alpha * square * target.mean(), "non_target": self.beta * square * non_target.mean()}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}"
