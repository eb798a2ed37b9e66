"""Data sets that are held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.trainer.extras import require_extras
from fastkd.validate import check_int


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of ``images`` [N, C, H, W] and ``labels`` [N] held in memory; it indexes a whole batch at once.

    Example:
        >>> data = TensorImages(torch.randn(100, 3, 32, 32), torch.randint(10, (100,)))
        >>> image, label = data[0]
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.shape[0] != labels.shape[0] or labels.ndim != 1:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({images.shape[0]},)")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def load_digits(train_size: int = 1400, seed: int = 0) -> tuple[TensorImages, TensorImages]:
    """(training set, test set) of scikit-learn's 1,797 handwritten digits, 1x8x8 with pixels in [-1, 1].

    The split is stratified by class and depends on ``seed`` alone.

    Example:
        >>> train_set, test_set = load_digits()
        >>> len(train_set), len(test_set)
        (1400, 397)
    """
    require_extras("report", by="the data set digits")
    from sklearn import datasets, model_selection  # takes a second, which other data need not wait for

    check_int("data.options.train_size", train_size, 10)
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    parts = model_selection.train_test_split(
        np.arange(len(labels)), train_size=train_size, random_state=seed, stratify=bunch.target
    )
    train, test = (torch.from_numpy(np.sort(part)) for part in parts)
    return TensorImages(images[train], labels[train]), TensorImages(images[test], labels[test])
