"""Decoupled knowledge distillation (arXiv 2203.08679)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.inputs import check_part_weights
from fastkd.losses.pairs import Pair, logit_pair
from fastkd.validate import check_labels, check_temperature


class DKDLoss(LossModule):
    r"""DKD: the divergence of the label's probability, and that of all other classes among themselves.

    .. code-block:: text

        p_i = softmax(logits_i / temperature) at the label     q_i = softmax(logits_i / temperature) without the label

        target     = alpha * temperature^2 * mean_i KL((p^t_i, 1 - p^t_i) || (p^s_i, 1 - p^s_i))
        non_target = beta  * temperature^2 * mean_i KL(q^t_i || q^s_i)

    The authors train with cross-entropy of weight 1, and multiply this loss by ``min(epoch / 20, 1)``, epochs from 1.
    On CIFAR-100 beta is 8, and 6 or 2 for some pairs. On ImageNet the temperature is 1 and beta is 0.5 or 2.

    The public code takes logarithms of sums of probabilities, which overflow in float32 where a network is certain.
    Here log-sum-exps take their place. They are the same function, and finite.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: arXiv 2203.08679. The authors' code has alpha 1. The paper has 0.5 on ImageNet.

    Args:
        temperature: divides the logits; in [1e-4, 1e4].
        alpha, beta: weights of the two parts; >= 0, and not both 0.

    Raises:
        TypeError, ValueError: a number is out of range.

    Example:
        >>> import torch
        >>> from fastkd.losses import DKDLoss, total_loss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = DKDLoss(beta=8.0)(student_logits, teacher_logits, labels=torch.arange(6))
        >>> list(terms)
        ['target', 'non_target']
        >>> total_loss(terms).backward()
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        check_temperature(temperature)
        check_part_weights(alpha=alpha, beta=beta)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns ``target`` and ``non_target``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], at least two classes, in float64, float32, bf16 or fp16. labels: [B],
        int64, in [0, C); on CUDA another label makes the loss NaN.
        """
        student, teacher = logit_pair(student_logits, teacher_logits, classes=2)
        check_labels(labels, student_logits)
        is_label = labels[:, None] == torch.arange(student.shape[1], device=labels.device)
        margin_s, others_s = _label_and_others(student / self.temperature, is_label)
        margin_t, others_t = _label_and_others(teacher / self.temperature, is_label)
        # p = sigmoid(margin), and 1 - p = sigmoid(-margin).
        target = sum(F.logsigmoid(m_t).exp() * (F.logsigmoid(m_t) - F.logsigmoid(m_s))
                     for m_t, m_s in ((margin_t, margin_s), (-margin_t, -margin_s)))  # fmt: skip
        assert isinstance(target, Tensor)
        non_target = (others_t.exp() * (others_t - others_s)).masked_fill(is_label, 0).sum(dim=1)
        square = self.temperature**2
        return {"target": self.alpha * square * target.mean(), "non_target": self.beta * square * non_target.mean()}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}"


def _label_and_others(logits: Tensor, is_label: Tensor) -> Pair:
    """The log of p / (1 - p), [B], and log q, [B, C], which means nothing at the label."""
    others = torch.logsumexp(logits.masked_fill(is_label, -torch.inf), dim=1)
    own = logits.masked_fill(~is_label, -torch.inf).amax(dim=1)  # -inf, hence NaN, where the label is no class
    return own - others, logits - others[:, None]
