"""Recall@k against a search of all pairs in float64: ties, blocks, ranks, samples without a right neighbour."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd.trainer.ranks import Ranks
from fastkd.trainer.tasks.recall import nearest_of, recall, same_label

# The cosines of these are multiples of one half, also in float32, and many are equal.
CORNERS = torch.cat([torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4))), torch.eye(4), -3 * torch.eye(4)])


def cosines(x: Tensor) -> np.ndarray:
    rows = x.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def brute_force(embeddings: Tensor, right: np.ndarray, k: int) -> tuple[float, int]:
    """The wrong ones of equal cosine stand before the right ones, and k neighbours are looked at."""
    near, hits, queries = np.round(cosines(embeddings), 12), 0, 0
    for i in range(len(near)):
        others = [j for j in range(len(near)) if j != i]
        if any(right[i, j] for j in others):
            others.sort(key=lambda j: (-near[i, j], right[i, j]))
            hits += any(right[i, j] for j in others[:k])
            queries += 1
    return hits / queries, len(near) - queries


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (41,), generator=generator)
    labels[[3, 17, 29, 30]] = torch.tensor([7, 8, -1, -1])  # two classes of one sample, two samples without a label
    embeddings = torch.randn(41, 5, generator=generator)
    return {
        "random": (embeddings, labels),
        "duplicates": (torch.cat([embeddings[:20], embeddings[:21]]), labels),
        "ties": (CORNERS, (CORNERS[:, 0] > 0).long()),
    }


@pytest.mark.parametrize("block", [1, 100, 2**22])
@pytest.mark.parametrize("case", cases())
def test_recall_is_that_of_a_search_of_all_pairs(case: str, block: int) -> None:
    embeddings, labels = cases()[case]
    numbers = labels.numpy()
    right = (numbers[:, None] == numbers) & (numbers >= 0)
    found, left_out = recall(embeddings, same_label(labels), Ranks(), at=(1, 2, 5), block=block)
    for k, value in found.items():
        assert (value, left_out) == brute_force(embeddings, right, k)
    assert found[1] <= found[2] < found[5]


def test_without_labels_the_nearest_of_the_teacher_are_right() -> None:
    """Of a tie at the teacher each is right."""
    teacher, embeddings = CORNERS, torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    near = np.round(cosines(teacher), 12)
    np.fill_diagonal(near, -np.inf)
    right = near == near.max(1, keepdims=True)
    assert right.sum() > len(right)
    found, left_out = recall(embeddings, nearest_of(teacher), Ranks(), block=100)
    for k, value in found.items():
        assert (value, left_out) == brute_force(embeddings, right, k)
    assert found[1] < found[5]
    assert recall(teacher, nearest_of(teacher), Ranks())[0] == {1: 1.0, 5: 1.0}


def test_ranks_share_the_blocks() -> None:
    embeddings, labels = cases()["random"]
    parts: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Recorded(Ranks):
        def sum(self, value: Tensor) -> Tensor:
            parts.append(value)
            return value

    for rank in range(3):
        recall(embeddings, same_label(labels), Recorded(rank, 3), block=200)
    assert all(bool(part.any()) for part in parts)
    recall(embeddings, same_label(labels), Recorded(), block=200)
    assert torch.equal(sum(parts[:3]), parts[3])


def test_a_model_that_gives_one_embedding_for_all_scores_nothing() -> None:
    labels = torch.arange(12) % 2
    assert recall(torch.ones(12, 4), same_label(labels), Ranks())[0] == {1: 0.0, 5: 0.0}
    assert recall(torch.full((12, 4), torch.nan), same_label(labels), Ranks())[0] == {1: 0.0, 5: 0.0}
