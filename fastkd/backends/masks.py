"""Which keys are a query's positives, and which take part in its softmax."""

from dataclasses import dataclass, replace
from functools import cached_property

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

    query_labels [n], key_labels [N], positive_index [n]. Without ``positive_index``, query i's positive is key i. The
    labels are any int64, or what :func:`label_codes` makes of them; of several ranks those of all queries and keys,
    this rank's first.
    """

    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive_index: Tensor | None = None
    by_label: bool = False
    exclude_self: bool = False

    @property
    def labels(self) -> tuple[Tensor, Tensor] | None:
        """The labels of queries and keys; None if labels mean nothing."""
        if self.query_labels is None or self.key_labels is None:
            return None
        return self.query_labels, self.key_labels

    @cached_property
    def coded(self) -> "Mask":
        """This mask with what :func:`label_codes` makes of the labels, as the tiles and the kernels take it."""
        if self.labels is None or self.labels[0].dtype == torch.int32:
            return self
        query_labels, key_labels = label_codes(*self.labels)
        return replace(self, query_labels=query_labels, key_labels=key_labels)

    def positive_counts(self, queries: int) -> Tensor:
        """How many positives by label each of the first ``queries`` has, int32; labels must be codes."""
        assert self.labels is not None
        codes, keys = self.labels
        members = torch.zeros(len(codes) + len(keys), dtype=torch.int32, device=keys.device)
        members.index_add_(0, keys, torch.ones_like(keys))
        return members[codes[:queries]] - int(self.exclude_self)

    def dense(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """P and D as boolean matrices [n, N]."""
        rows, columns = (torch.arange(count, device=device) for count in (queries, keys))
        others = torch.ones((queries, keys), dtype=torch.bool, device=device)
        if self.exclude_self:
            others = rows[:, None] != columns
        same_label = torch.zeros_like(others)
        if self.labels is not None:
            same_label = self.labels[0][:, None] == self.labels[1]
        if self.by_label:
            return same_label & others, others
        index = rows if self.positive_index is None else self.positive_index
        positive = index[:, None] == columns
        return positive, positive | (others & ~same_label)


def label_codes(query_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of queries and keys as int32 numbers 0, 1, ... of the different labels: equal where the labels are."""
    is_one = key_labels is query_labels
    labels, order = (query_labels if is_one else torch.cat([query_labels, key_labels])).sort()
    is_new = torch.ones_like(labels, dtype=torch.int32)
    is_new[1:] = labels[1:] != labels[:-1]
    rank = is_new.cumsum(0, dtype=torch.int32) - 1
    codes = torch.empty_like(rank).scatter_(0, order, rank)
    return (codes, codes) if is_one else (codes[: len(query_labels)], codes[len(query_labels) :])
