"""The labels of a data set, and subsets drawn by them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from fastkd.trainer.data.memory import TensorImages


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


def normalization_of(dataset: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(means, standard deviations) by which a dataset, or that of a Subset, has normalised the channels, if it says."""
    if isinstance(dataset, Subset):
        return normalization_of(dataset.dataset)
    return getattr(dataset, "normalization", None)


def labels_hash(dataset: Any) -> str | None:
    """sha256 of the labels, which tells most datasets apart cheaply; None for a dataset that does not expose them."""
    try:
        labels = labels_of(dataset).to("cpu", torch.long)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()


def labelled_subset(dataset: Any, count: int, seed: int) -> Any:
    """``count`` samples, as equally many of each class as possible, drawn without replacement with ``seed``."""
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
