"""Contrastive representation distillation (arXiv 1910.10699)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastkd.distributed.agree import Agreement, agreeing, eagerly
from fastkd.distributed.gather import gather_rows
from fastkd.distributed.group import Group, check_group, resolve_group
from fastkd.losses.base import LossModule
from fastkd.losses.inputs import check_layer_input, check_width
from fastkd.losses.pairs import feature_pair, full_precision, unit
from fastkd.numerics import accumulation_dtype
from fastkd.validate import check_choice, check_int, check_number, check_row_labels, check_temperature

Reading = Literal["code", "paper"]
EPS = 1e-7


class CRDLoss(LossModule):
    r"""CRD: a student's sample is told apart from thousands of others by the teacher's memory of it, and vice versa.

    .. code-block:: text

        u, v = linear_s(f^s), linear_t(f^t), of norm 1, [B, embedding_dim]            both trained
        M^s, M^t: memories of all samples of the data set, [samples, embedding_dim]
        P_ik = exp(u_i . M^t_k / temperature) / Z^s     k: 0 is the positive, 1..K are the negatives of sample i
        Z^s  = samples * (mean of the first batch's exponentials), a constant from then on

        c       = K / samples
        student = -mean_i [ln(P_i0 / (P_i0 + c + 1e-7)) + sum_k ln(c / (P_ik + c + 1e-7))]
        teacher = the same of v, M^s and Z^t

    After that, M_index becomes ``unit(momentum M_index + (1 - momentum) row)``, in training mode only. Where an index
    occurs twice in a batch, its last row counts. The memories and both Z are buffers, so they are in the state dict.
    The authors weigh the sum of the terms with 0.8; "CRD + KD" adds :class:`fastkd.KDLoss` with weight 1.

    The scores are one product of the batch with the whole memory, of which the K + 1 of each sample are taken. That
    reads the memory once. Gathering the K + 1 rows of every sample first would take 537 MB for 64 samples.

    With several ranks every rank has all memories. Rows and indices travel, and all ranks make the same update. The
    average over the ranks of a term is that of the global batch. The memories begin with random rows, which have to be
    equal on all ranks: seed the ranks alike before the module is made. DistributedDataParallel copies the buffers of
    rank 0 instead, before every step unless ``broadcast_buffers=False``. All parameters of this module belong in the
    optimiser.

    Source: arXiv 1910.10699, as in the authors' code. In the paper there is no Z: P is the exponential alone, which
    ``reading="paper"`` gives.

    Args:
        student_dim, teacher_dim: widths of the features.
        samples: n, the size of the data set; >= 2.
        negatives: K; >= 1.
        embedding_dim: width of the embeddings.
        temperature: divides the products; in [1e-4, 1e4].
        momentum: of the memories; in [0, 1].
        reading: ``"code"`` divides by Z, ``"paper"`` does not.
        group: as for :class:`fastkd.DCDLoss`.

    Raises:
        TypeError, ValueError: a number is out of range, or ``reading`` or ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import CRDIndices, CRDLoss, total_loss
        >>> labels = torch.arange(50) % 5                                             # of the whole data set
        >>> crd, draw = CRDLoss(8, 16, samples=50, negatives=12), CRDIndices(labels, negatives=12)
        >>> index = torch.tensor([3, 14, 15, 42])                                     # of the batch's samples
        >>> contrast_index = torch.stack([draw(int(i)) for i in index])               # in a loader's workers
        >>> terms = crd(torch.randn(4, 8, requires_grad=True), torch.randn(4, 16), index, contrast_index)
        >>> (0.8 * total_loss(terms)).backward()
    """

    memory_student: Tensor
    memory_teacher: Tensor
    normalizers: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        samples: int,
        *,
        negatives: int = 16384,
        embedding_dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        reading: Reading = "code",
        group: Group = None,
    ) -> None:
        super().__init__()
        widths = {"student_dim": student_dim, "teacher_dim": teacher_dim, "embedding_dim": embedding_dim}
        for name, value in {**widths, "negatives": negatives}.items():
            check_int(name, value, minimum=1)
        check_int("samples", samples, minimum=2)
        check_temperature(temperature)
        check_number("momentum", momentum, minimum=0, maximum=1)
        check_choice("reading", reading, get_args(Reading))
        check_group(group)
        self.student_dim, self.teacher_dim, self.samples, self.negatives = student_dim, teacher_dim, samples, negatives
        self.temperature, self.momentum, self.reading, self.group = temperature, momentum, reading, group
        self.embed_student = nn.Linear(student_dim, embedding_dim)
        self.embed_teacher = nn.Linear(teacher_dim, embedding_dim)
        bound = 1 / math.sqrt(embedding_dim / 3)
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(samples, embedding_dim).uniform_(-bound, bound))
        self.register_buffer("normalizers", torch.zeros(2))  # Z^s and Z^t; 0 until the first batch

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, index: Tensor, contrast_index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns ``student`` and ``teacher``, 0-dim. Teacher features that require a gradient get one.

        student_features: [B, student_dim]. teacher_features: [B, teacher_dim]. Both in the dtype of the parameters
        unless autocast is on. index: [B], int64, each sample's number in the data set. contrast_index: [B, K + 1],
        int64, the positive's number first, as :class:`fastkd.losses.CRDIndices` draws them. Without it the positive is
        the sample and the others are drawn from all samples.
        """
        group = resolve_group(self.group)
        return eagerly(group, self._forward)(student_features, teacher_features, index, contrast_index, group)

    def _forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        index: Tensor,
        contrast_index: Tensor | None,
        group: ProcessGroup | None,
    ) -> dict[str, Tensor]:
        with agreeing(group, "CRDLoss") as ranks:
            check_width("student_features", student_features, self.student_dim)
            check_width("teacher_features", teacher_features, self.teacher_dim)
            feature_pair(student_features, teacher_features, may_be_empty=ranks.several)
            check_layer_input("student_features", student_features, self.embed_student)
            check_layer_input("teacher_features", teacher_features, self.embed_teacher)
            check_row_labels("index", index, student_features)
            self._check_range("index", index)
            contrast_index = self._contrast_index(index, contrast_index)
            if ranks.several:
                ranks.describe(student_features, {"dtype": student_features.dtype, "module": self.extra_repr()})
        u, v = self.embed_student(student_features), self.embed_teacher(teacher_features)
        u, v = (unit(x.to(accumulation_dtype(x.dtype))) for x in (u, v))
        with full_precision(u):
            # Copies, because the backward needs the memories as they were.
            scores = (self._scores(u, self.memory_teacher.clone(), contrast_index),
                      self._scores(v, self.memory_student.clone(), contrast_index))  # fmt: skip
            normalizers = self._normalizers(scores, ranks).log()
            part = ranks.part_per_row(len(u))
            losses = [part * self._sum_of_rows(x - z) for x, z in zip(scores, normalizers, strict=True)]
            if self.training:
                self._remember(index, u.detach(), v.detach(), ranks)
        return {"student": losses[0], "teacher": losses[1]}

    def _check_range(self, name: str, index: Tensor) -> None:
        if index.device.type == "cpu" and index.numel() > 0 and not torch.compiler.is_compiling():
            for value in index.aminmax():
                if not 0 <= value.item() < self.samples:
                    raise ValueError(f"{name}: got {value.item()}, expected numbers of samples, in [0, {self.samples})")

    def _contrast_index(self, index: Tensor, contrast_index: Tensor | None) -> Tensor:
        shape = len(index), self.negatives + 1
        if contrast_index is None:
            drawn = torch.randint(self.samples, shape, device=index.device)
            return torch.cat([index[:, None], drawn[:, 1:]], dim=1)
        if not isinstance(contrast_index, Tensor) or contrast_index.dtype != torch.int64:
            got = getattr(contrast_index, "dtype", type(contrast_index).__name__)
            raise TypeError(f"contrast_index: got {got}, expected an int64 tensor")
        if contrast_index.shape != shape or contrast_index.device != index.device:
            got, expected = list(contrast_index.shape), f"{list(shape)} on {index.device}"
            raise ValueError(f"contrast_index: got shape {got} on {contrast_index.device}, expected {expected}")
        self._check_range("contrast_index", contrast_index)
        return contrast_index

    def _scores(self, rows: Tensor, memory: Tensor, contrast_index: Tensor) -> Tensor:
        """The logarithms of the exponentials, [B, K + 1]."""
        return (rows @ memory.to(rows.dtype).T).gather(1, contrast_index) / self.temperature

    @torch.no_grad()
    def _normalizers(self, scores: tuple[Tensor, Tensor], ranks: Agreement) -> Tensor:
        """Z^s and Z^t: those of the first batch, whose exponentials are averaged over all ranks."""
        if self.reading == "paper":
            return torch.ones(2, dtype=scores[0].dtype, device=scores[0].device)
        total = len(scores[0]) if ranks.peers is None else ranks.peers.total
        sums = ranks.sum(torch.stack([x.exp().sum() for x in scores]))
        first = sums * self.samples / (total * (self.negatives + 1))
        found = torch.where(self.normalizers > 0, self.normalizers.to(first.dtype), first)
        if self.training:
            self.normalizers.copy_(found)
        return found

    def _sum_of_rows(self, log_p: Tensor) -> Tensor:
        noise = self.negatives / self.samples
        log_sums = (log_p.exp() + noise + EPS).log()
        return log_sums.sum() - log_p[:, 0].sum() - math.log(noise) * log_p[:, 1:].numel()

    @torch.no_grad()
    def _remember(self, index: Tensor, u: Tensor, v: Tensor, ranks: Agreement) -> None:
        if ranks.peers is not None:
            index, u, v = (gather_rows(x, ranks.peers) for x in (index, u, v))
        numbers = torch.arange(len(index), device=index.device)
        last = index.new_zeros(self.samples).scatter_reduce_(0, index, numbers, "amax")[index]  # [N]
        for memory, rows in ((self.memory_student, u), (self.memory_teacher, v)):
            mixed = self.momentum * memory[index].to(rows.dtype) + (1 - self.momentum) * rows[last]
            memory[index] = unit(mixed).to(memory.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.student_dim}, {self.teacher_dim}, samples={self.samples}, negatives={self.negatives}, "
            f"temperature={self.temperature}, momentum={self.momentum}, reading={self.reading!r}"
        )
