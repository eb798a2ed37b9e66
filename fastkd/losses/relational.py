"""What the losses have in common that compare the samples of a batch with each other."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd.distributed.agree import Agreement, agreeing, eagerly
from fastkd.distributed.gather import gather_rows
from fastkd.distributed.group import Group, check_group, resolve_group
from fastkd.losses.base import LossModule
from fastkd.losses.pairs import feature_pair, full_precision


class RelationalLoss(LossModule):
    """A loss over the rows of all ranks of ``group``.

    The ranks gather their rows, and each computes the whole loss of the global batch. Where that is much work,
    ``_of_ranks`` is overridden, and each computes a part. The average of the gradients over the ranks is the gradient
    of one process on all rows.
    """

    def __init__(self, group: Group = None) -> None:
        super().__init__()
        check_group(group)
        self.group = group

    def _rows(self, *inputs: Any, may_be_empty: bool) -> tuple[Tensor, ...]:
        """The inputs, checked, in the dtype that the loss is computed in; the rows of each belong to this rank."""
        raise NotImplementedError

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        """The terms of these rows, which are those of all ranks."""
        raise NotImplementedError

    def _over_ranks(self, *inputs: Any) -> dict[str, Tensor]:
        group = resolve_group(self.group)
        return eagerly(group, self._on_group)(group, *inputs)

    def _on_group(self, group: ProcessGroup | None, *inputs: Any) -> dict[str, Tensor]:
        with agreeing(group, type(self).__name__) as ranks:
            rows = self._rows(*inputs, may_be_empty=ranks.several)
            if ranks.several:
                kinds = [(tuple(x.shape[1:]), x.dtype) for x in rows]
                ranks.describe(rows[0], {"shapes and dtypes of the rows": kinds, "module": self.extra_repr()})
        with full_precision(rows[0]):
            return self._of_ranks(ranks, *rows)

    def _of_ranks(self, ranks: Agreement, *rows: Tensor) -> dict[str, Tensor]:
        """The terms of the rows of all ranks, of which ``rows`` are this rank's."""
        peers = ranks.peers
        return self._terms(*(rows if peers is None else (gather_rows(x, peers) for x in rows)))


class FeatureRelation(RelationalLoss):
    """A relational loss of pooled features, of any widths."""

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Returns the terms, 0-dim. The teacher gets no gradient.

        student_features: [B, D_s]. teacher_features: [B, D_t]. Both in float64, float32, bf16 or fp16.
        """
        return self._over_ranks(student_features, teacher_features)

    def _rows(self, *inputs: Tensor, may_be_empty: bool) -> tuple[Tensor, ...]:
        return feature_pair(*inputs, may_be_empty=may_be_empty)


def rank_of(ranks: Agreement) -> tuple[int, int]:
    """This rank's number, and how many there are."""
    return (0, 1) if ranks.peers is None else (ranks.peers.rank, ranks.peers.world_size)


def share_of(count: int, ranks: Agreement) -> slice:
    """This rank's share of so many pieces of work; all of them where it is alone."""
    rank, world_size = rank_of(ranks)
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
