"""Correlation congruence (arXiv 1904.01802)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastkd.distributed.group import Group
from fastkd.losses.inputs import check_layer_input, check_width
from fastkd.losses.pairs import feature_pair, unit
from fastkd.losses.relational import RelationalLoss
from fastkd.numerics import accumulation_dtype
from fastkd.validate import check_choice, check_int, check_number

Reading = Literal["neighbours", "kernel", "kernel-raw"]


class CCLoss(RelationalLoss):
    r"""CC: the samples of a batch are related to each other as the teacher's are.

    .. code-block:: text

        e^s, e^t = linear_s(f^s), linear_t(f^t)                                       [B, embedding_dim], both trained

        reading="neighbours":  D = |e^s - e^t|
                               cc = 1 / (B - 1) * sum_{i < B - 1} D_i . D_{i+1}
        reading="kernel":      K = exp(-2 gamma) sum_{k <= order} (2 gamma G)^k / k!   G: cosines of the rows of e
                               cc = |K^s - K^t|_F^2 / B^2
        reading="kernel-raw":  the same of raw products for G, with the norm in the place of its square

    ``"neighbours"`` is RepDistiller's code, which is that of published tables (weight 0.02), and the default. It
    depends on the order of the batch, and it is smallest where both embeddings collapse. ``"kernel"`` is the paper's
    Gaussian kernel by its Taylor series (weight 100). ``"kernel-raw"`` is torchdistill's code.

    All parameters of this module belong in the optimiser.

    Source: arXiv 1904.01802.

    Args:
        student_dim, teacher_dim: widths of the features.
        embedding_dim: width of the embeddings, or None for the features themselves, whose widths are then equal.
        reading: see above.
        gamma, order: of the kernels; gamma > 0, order >= 1.
        group: as for :class:`fastkd.DCDLoss`. The batch is that of all ranks, rank after rank.

    Raises:
        TypeError, ValueError: a number is out of range, the widths differ without embeddings, or ``reading`` or
            ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import CCLoss
        >>> cc = CCLoss(student_dim=8, teacher_dim=16)
        >>> terms = cc(torch.randn(6, 8, requires_grad=True), torch.randn(6, 16))
        >>> (0.02 * terms["cc"]).backward()
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        embedding_dim: int | None = 128,
        reading: Reading = "neighbours",
        *,
        gamma: float = 0.4,
        order: int = 2,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        check_int("student_dim", student_dim, minimum=1)
        check_int("teacher_dim", teacher_dim, minimum=1)
        check_choice("reading", reading, get_args(Reading))
        check_number("gamma", gamma, minimum=0, exclusive=True)
        check_int("order", order, minimum=1)
        self.student_dim, self.teacher_dim, self.reading, self.gamma, self.order = (
            student_dim, teacher_dim, reading, gamma, order,
        )  # fmt: skip
        self.embed_student = self.embed_teacher = None
        if embedding_dim is not None:
            check_int("embedding_dim", embedding_dim, minimum=1)
            self.embed_student = nn.Linear(student_dim, embedding_dim)
            self.embed_teacher = nn.Linear(teacher_dim, embedding_dim)
        elif student_dim != teacher_dim:
            raise ValueError(f"teacher_dim: got {teacher_dim} without embeddings, expected student_dim, {student_dim}")

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Returns ``{"cc": loss}``, 0-dim. The teacher's features get no gradient.

        student_features: [B, student_dim]. teacher_features: [B, teacher_dim]. Both in the dtype of the parameters
        unless autocast is on; without embeddings, in any float dtype. ``"neighbours"`` needs two rows.
        """
        return self._over_ranks(student_features, teacher_features)

    def _rows(self, *inputs: Tensor, may_be_empty: bool) -> tuple[Tensor, ...]:
        student, teacher = inputs
        check_width("student_features", student, self.student_dim)
        check_width("teacher_features", teacher, self.teacher_dim)
        pair = feature_pair(student, teacher, may_be_empty=may_be_empty)
        if self.embed_student is None or self.embed_teacher is None:
            return pair
        check_layer_input("student_features", student, self.embed_student)
        check_layer_input("teacher_features", teacher, self.embed_teacher)
        embeddings = self.embed_student(student), self.embed_teacher(teacher.detach())
        return tuple(e.to(accumulation_dtype(e.dtype)) for e in embeddings)

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        count = len(rows[0])
        if self.reading == "neighbours":
            if count < 2:
                raise ValueError(f"student_features: got {count} row, expected at least 2 for reading='neighbours'")
            differences = (rows[0] - rows[1]).abs()
            return {"cc": (differences[:-1] * differences[1:]).sum() / (count - 1)}
        is_raw = self.reading == "kernel-raw"
        student, teacher = (self._kernel(x if is_raw else unit(x)) for x in rows)
        distance = torch.linalg.vector_norm(student - teacher) if is_raw else (student - teacher).square().sum()
        return {"cc": distance / count**2}

    def _kernel(self, x: Tensor) -> Tensor:
        scaled = 2 * self.gamma * (x @ x.T)
        series = torch.stack([scaled**k / math.factorial(k) for k in range(self.order + 1)]).sum(dim=0)
        return math.exp(-2 * self.gamma) * series

    def extra_repr(self) -> str:
        text = f"{self.student_dim}, {self.teacher_dim}, reading={self.reading!r}"
        return text if self.reading == "neighbours" else f"{text}, gamma={self.gamma}, order={self.order}"
