"""Recall@k: how often a sample of the same class is among the k nearest neighbours of a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.trainer.ranks import Ranks
from fastkd.validate import NO_LABEL

# So many similarities are in memory at a time: the rows of a block times all samples.
BLOCK = 2**22

# Which of all samples are right for the samples of a block: a mask [rows, N].
Right = Callable[[slice], Tensor]


def recall(
    embeddings: Tensor, right: Right, ranks: Ranks, at: Sequence[int] = (1, 5), block: int = BLOCK
) -> tuple[dict[int, float], int]:
    """The recall at every k of ``at``, in [0, 1], and the number of samples that have no right neighbour at all.

    A neighbour of sample i is any other sample, and near is what has a large cosine with it. Sample i is a hit at k if
    fewer than k wrong neighbours are as near as its nearest right one. So a tie counts against the model, and a model
    that gives one embedding for everything scores zero. Samples without any right neighbour are left out.

    Similarities are computed in float32, for a block of samples at a time, with all others as columns. All ranks hold
    all ``embeddings`` [N, D] and share the blocks, so that every number of ranks gets the same result.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> recall(rows, same_label(labels), Ranks())
        ({1: 1.0, 5: 1.0}, 0)
    """
    rows = F.normalize(embeddings.float(), dim=1)
    count = len(rows)
    hits = torch.zeros(len(at) + 1, dtype=torch.long, device=rows.device)  # and the samples with a right neighbour
    size = max(1, block // max(count, 1))
    for start in range(ranks.rank * size, count, ranks.world_size * size):
        part = slice(start, min(start + size, count))
        near = rows[part] @ rows.T
        itself = torch.arange(part.start, part.stop, device=rows.device)[:, None]
        is_right = right(part).scatter(1, itself, False)
        best = near.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        # Not ``near >= best``: where an embedding is not finite, neither is true, and the sample is no hit.
        wrong = (~(near < best) & ~is_right).scatter(1, itself, False).sum(1)
        has_right = is_right.any(1)
        hits += torch.stack([*((has_right & (wrong < k)).sum() for k in at), has_right.sum()])
    *found, queries = ranks.sum(hits).tolist()
    return {k: hit / max(queries, 1) for k, hit in zip(at, found, strict=True)}, count - queries


def same_label(labels: Tensor) -> Right:
    """A neighbour is right if it has the sample's label. A sample without a label (-1) is right for no other."""
    known = labels != NO_LABEL
    return lambda part: (labels[part, None] == labels) & known


def nearest_of(embeddings: Tensor) -> Right:
    """A neighbour is right if no other sample is nearer to the sample in ``embeddings``, such as the teacher's."""
    rows = F.normalize(embeddings.float(), dim=1)

    def right(part: slice) -> Tensor:
        itself = torch.arange(part.start, part.stop, device=rows.device)[:, None]
        near = (rows[part] @ rows.T).scatter(1, itself, -torch.inf)
        return near == near.amax(1, keepdim=True)

    return right
