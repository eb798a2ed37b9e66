"""Which keys are a query's positives, and which take part in its softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The positives ``P_i`` and the denominator ``D_i`` of query i, among the keys j.

    ============================  ====================================  ======================================
    labels, ``by_label``          ``P_i``                               ``D_i``
    ============================  ====================================  ======================================
    none                          the key ``positive_index[i]``         all keys
    labels                        the key ``positive_index[i]``         that key, and all of another label
    labels, ``by_label``          all keys of the query's label         all keys
    ============================  ====================================  ======================================

    ``exclude_self``, where queries are contrasted with themselves: key i is in ``D_i`` only if ``positive_index`` names
    it, and never in a ``P_i`` that is formed by label.

    query_labels [n], key_labels [N], positive_index [n]: int64; without the last one, query i's positive is key i.
    """

    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive_index: Tensor | None = None
    by_label: bool = False
    exclude_self: bool = False

    def dense(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """P and D as boolean matrices [n, N]."""
        rows, columns = (torch.arange(count, device=device) for count in (queries, keys))
        others = torch.ones((queries, keys), dtype=torch.bool, device=device)
        if self.exclude_self:
            others = rows[:, None] != columns
        if self.query_labels is None or self.key_labels is None:
            same_label = torch.zeros_like(others)
        else:
            same_label = self.query_labels[:, None] == self.key_labels
        if self.by_label:
            return same_label & others, others
        index = rows if self.positive_index is None else self.positive_index
        positive = index[:, None] == columns
        return positive, positive | (others & ~same_label)
