"""What is known about the samples of any data set (labels, normalisation), and subsets drawn by their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastkd.trainer.data.readers.memory import TensorImages
from fastkd.validate import NO_LABEL


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
    chosen = _balanced(labels_of(dataset), count, seed)
    if type(dataset) is TensorImages:  # a subclass may change what it returns
        return TensorImages(dataset.images[chosen], dataset.labels[chosen])
    return Subset(dataset, chosen.tolist())


def without_other_labels(dataset: Any, count: int, seed: int) -> Any:
    """``dataset`` in which the samples of ``labelled_subset(dataset, count, seed)`` alone keep their labels.

    The label of every other sample is -1. Raises what ``labelled_subset`` raises.
    """
    labels = labels_of(dataset)
    keeps = torch.zeros(len(labels), dtype=torch.bool)
    keeps[_balanced(labels, count, seed)] = True
    if type(dataset) is TensorImages:  # a subclass may change what it returns
        return TensorImages(dataset.images, labels.masked_fill(~keeps, NO_LABEL))
    return PartlyLabelled(dataset, keeps)


class PartlyLabelled(Dataset[Any]):
    """``dataset`` with the label -1 for every sample outside of ``keeps`` [N]; other attributes are the dataset's."""

    def __init__(self, dataset: Any, keeps: Tensor) -> None:
        self.dataset = dataset
        self.keeps = keeps
        self.labels = labels_of(dataset).masked_fill(~keeps, NO_LABEL)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "keeps", "labels"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.keeps)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        return image, label if self.keeps[index] else _none_like(label)

    def __getitems__(self, indices: list[int]) -> Any:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        return self.without_labels(self.dataset.__getitems__(indices), indices)

    def without_labels(self, batch: Any, indices: Sequence[int]) -> Any:
        """The samples ``indices`` of the dataset, a batch or a list of them, with the labels that are kept."""
        kept = self.keeps[torch.as_tensor(indices)]
        if isinstance(batch, list):  # samples, and no batch: as torch's Subset gives them
            return [
                (image, label if keep else _none_like(label)) for (image, label), keep in zip(batch, kept, strict=True)
            ]
        images, labels = batch
        return images, labels.masked_fill(~kept, NO_LABEL)


def _none_like(label: Any) -> Any:
    return torch.full_like(label, NO_LABEL) if isinstance(label, Tensor) else NO_LABEL


def _balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """The indices of ``count`` samples, in order: drawn without replacement, as equally many per class as possible."""
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
    return order[torch.argsort(rank, stable=True)[:count]].sort().values


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


def range_of_labels(dataset: Any) -> tuple[int, int] | None:
    """The smallest and the largest label; None where labels are not exposed, or are changed when they are read."""
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if getattr(whole, "target_transform", None) is not None:
        return None
    try:
        labels = labels_of(dataset)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    if labels.ndim != 1 or labels.numel() == 0 or labels.is_floating_point():
        return None
    return int(labels.min()), int(labels.max())


def labels_hash(dataset: Any) -> str | None:
    """The sha256 of the labels, which tells most data sets apart cheaply. None if ``dataset`` does not expose them.

    A data set whose labels are no numbers says it itself, by an attribute ``labels_sha256``.
    """
    if isinstance(own := getattr(dataset, "labels_sha256", None), str):
        return own
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
