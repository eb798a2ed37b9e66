"""Which samples CRD contrasts a sample with (arXiv 1910.10699)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.validate import check_choice, check_int

Mode = Literal["exact", "relax"]


class CRDIndices:
    r"""Draws the numbers of the samples that :class:`fastkd.losses.CRDLoss` contrasts a sample with.

    The first number is the positive's. It is the sample's own with ``mode="exact"``, the default and the one of
    published tables, and a random sample of its class with ``mode="relax"``. The K others are of other classes. They
    are drawn without replacement, or with replacement where there are fewer. A data set calls it in ``__getitem__``, so
    that the workers of the loader do the work.

    Source: arXiv 1910.10699, as in the authors' data set of CIFAR-100.

    Args:
        labels: [n], int64, the label of every sample of the data set.
        negatives: K; >= 1.
        mode: see above.

    Raises:
        TypeError, ValueError: ``labels`` are no int64 vector, all samples are of one class, or another argument is out
            of range.

    Example:
        >>> import torch
        >>> from fastkd.losses import CRDIndices
        >>> draw = CRDIndices(torch.tensor([0, 0, 1, 2]), negatives=2)
        >>> draw(1).tolist() in ([1, 2, 3], [1, 3, 2])
        True
    """

    def __init__(self, labels: Tensor, negatives: int = 16384, mode: Mode = "exact") -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels: got {got}, expected an int64 tensor")
        if labels.ndim != 1 or len(labels.unique()) < 2:
            raise ValueError(f"labels: got shape {list(labels.shape)} of {len(labels.unique())} classes, expected [n] "
                             "of at least two")  # fmt: skip
        check_int("negatives", negatives, minimum=1)
        check_choice("mode", mode, get_args(Mode))
        self.negatives, self.mode = negatives, mode
        self._by_class = labels.argsort(stable=True)  # a class is a slice of it
        sizes = labels.unique(return_inverse=True, return_counts=True)
        self._class_of, self._sizes = sizes[1], sizes[2]
        self._starts = self._sizes.cumsum(0) - self._sizes

    def __call__(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """The numbers [K + 1], int64, for the sample of this number; ``generator``: None for torch's own."""
        check_int("index", index, minimum=0)
        if index >= len(self._class_of):
            raise ValueError(f"index: got {index}, expected a number of a sample, < {len(self._class_of)}")
        own = self._class_of[index]
        start, size = int(self._starts[own]), int(self._sizes[own])
        others = len(self._class_of) - size
        if others >= self.negatives:
            places = torch.randperm(others, generator=generator)[: self.negatives]
        else:
            places = torch.randint(others, (self.negatives,), generator=generator)
        negatives = self._by_class[torch.where(places < start, places, places + size)]
        positive = torch.tensor([index])
        if self.mode == "relax":
            positive = self._by_class[start + torch.randint(size, (1,), generator=generator)]
        return torch.cat([positive, negatives])
