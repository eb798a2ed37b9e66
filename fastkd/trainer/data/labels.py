"""What is known about the samples of any data set (labels, normalisation), and subsets drawn by their labels."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from fastkd.trainer.data.memory import TensorImages


def labelled_subset(dataset: Any, count: int, seed: int) -> Any:
    """``count`` samples of ``dataset``, as equally many per class as possible.

    They are drawn without replacement, and depend on ``seed`` and the labels alone.

    Raises:
        ValueError: ``dataset`` has fewer samples.
        TypeError: ``dataset`` does not expose its labels (see ``labels_of``).

    Example:
        >>> train_set, test_set = load_digits()
        >>> few = labelled_subset(train_set, 200, seed=0)  # 20 of each digit
    """
    labels = labels_of(dataset)
    if count > len(labels):
        raise ValueError(f"data.labelled: got {count}, expected at most the {len(labels)} training samples")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Rank of each sample within its class: taking the lowest ranks first fills the classes evenly.
    shuffled = labels[order]
    rank = torch.zeros(len(labels), dtype=torch.long)
    for label in shuffled.unique():
        members = shuffled == label
        rank[members] = torch.arange(int(members.sum()))
    chosen = order[torch.argsort(rank, stable=True)[:count]].sort().values
    if isinstance(dataset, TensorImages):
        return TensorImages(dataset.images[chosen], dataset.labels[chosen])
    return Subset(dataset, chosen.tolist())


def labels_of(dataset: Any) -> Tensor:
    """The labels [N] of a dataset with ``labels`` or ``targets``, of a TensorDataset, or of a Subset of these."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name))
    if hasattr(dataset, "tensors"):
        return torch.as_tensor(dataset.tensors[1])
    raise TypeError(f"data.labelled: {type(dataset).__name__} has neither 'labels' nor 'targets' to choose a subset by")


def labels_hash(dataset: Any) -> str | None:
    """The sha256 of the labels, which tells most data sets apart cheaply. None if ``dataset`` does not expose them."""
    try:
        labels = labels_of(dataset).to("cpu", torch.long)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()


def normalization_of(dataset: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(means, standard deviations) that a dataset, or the dataset of a Subset, normalises with. None if unknown."""
    if isinstance(dataset, Subset):
        return normalization_of(dataset.dataset)
    return getattr(dataset, "normalization", None)
