"""Mixup and CutMix: a training batch mixed with itself, images and labels."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms import v2

from fastkd.trainer.data.config import DataConfig


class BatchMix:
    """``mix(images, labels)`` -> images of the same shape, and class probabilities [B, C] instead of labels [B].

    Sample i is mixed with sample i - 1 of the batch. The random numbers come from torch's global generator, whose state
    the trainer saves. A batch that neither method is asked for passes unchanged.
    """

    def __init__(self, config: DataConfig, classes: int) -> None:
        kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        self.transform = v2.RandomChoice(chosen) if chosen else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.transform is None else self.transform(images, labels)
