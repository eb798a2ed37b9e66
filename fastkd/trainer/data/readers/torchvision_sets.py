"""Labelled image sets of torchvision that it reads without unpickling, with the augmentation of ``images``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from fastkd.trainer.data.images import Transform, evaluation_transform, training_transform
from fastkd.trainer.data.options import TorchvisionOptions

# The names of the parts for training and for evaluation; True and False where the set is asked for ``train=...``.
PARTS: dict[str, tuple[str | bool, str | bool]] = {
    "MNIST": (True, False),
    "FashionMNIST": (True, False),
    "KMNIST": (True, False),
    "QMNIST": (True, False),
    "USPS": (True, False),
    "SVHN": ("train", "test"),
    "STL10": ("train", "test"),
    "GTSRB": ("train", "test"),
    "Food101": ("train", "test"),
    "Flowers102": ("train", "test"),
    "DTD": ("train", "test"),
    "Country211": ("train", "test"),
    "RenderedSST2": ("train", "test"),
    "FGVCAircraft": ("trainval", "test"),
    "OxfordIIITPet": ("trainval", "test"),
}


class TorchvisionImages(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of torchvision as RGB images, uint8 [3, H, W].

    ``labels`` and ``classes`` are there if torchvision says them.
    """

    def __init__(self, dataset: Any, transform: Transform, options: TorchvisionOptions) -> None:
        self.dataset, self.transform = dataset, transform
        self.normalization = (tuple(options.mean), tuple(options.std))
        self.classes = list(getattr(dataset, "classes", ()))
        for name in ("targets", "labels", "_labels"):
            if hasattr(dataset, name):
                self.labels = torch.as_tensor(getattr(dataset, name), dtype=torch.long)
                break

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.dataset[index]
        return self.transform(pil_to_tensor(image.convert("RGB"))), torch.tensor(int(label))


def load_torchvision(name: str, root: str, **options: Any) -> tuple[TorchvisionImages, TorchvisionImages]:
    """(training set, test set) of the data set ``name`` of torchvision, with the options of ``TorchvisionOptions``.

    Raises:
        ValueError: the set is not among ``PARTS``; or it is not in ``root``, and is not or cannot be downloaded.
    """
    chosen = TorchvisionOptions(root=root, **options)
    if name not in PARTS:
        hint = "; --data.name cifar reads CIFAR" if name.startswith("CIFAR") else ""
        raise ValueError(f"data.name: got 'torchvision:{name}', expected one of {', '.join(PARTS)}{hint}")
    kind = getattr(datasets, name)
    key = "train" if "train" in inspect.signature(kind).parameters else "split"
    try:
        parts = [kind(root, **{key: part}, download=chosen.download) for part in PARTS[name]]
    except (RuntimeError, OSError) as error:  # not there, or not to be had
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data.options.root: cannot read torchvision's {name} from {root} ({reason}); expected its files there, or "
            "--data.options.download"
        ) from None
    transforms = (training_transform(chosen), evaluation_transform(chosen))
    train_set, eval_set = (
        TorchvisionImages(part, transform, chosen) for part, transform in zip(parts, transforms, strict=True)
    )
    return train_set, eval_set
