"""Mixup and CutMix: a training batch mixed with itself, images and labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastkd.trainer.data.config import DataConfig


class BatchMix:
    """``mix(images, labels)`` -> images of the same shape and dtype, and class probabilities [B, C] for labels [B].

    Sample i is mixed with sample i - 1 of the batch, on the device of the images. Bytes are mixed in float32 and
    rounded to whole levels, so that each model still normalises its own input.

    What is mixed cannot depend on a sample alone, as everything before it does: it depends on the batch. The random
    numbers come from torch's global generator, whose state the trainer saves, and which differs between ranks. So a
    resumed run mixes the same, and a run with another batch size or number of ranks does not. A batch that neither
    method is asked for passes unchanged.
    """

    def __init__(self, config: DataConfig, classes: int) -> None:
        kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        self.transform = v2.RandomChoice(chosen) if chosen else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.transform is None:
            return images, labels
        if images.dtype != torch.uint8:
            return self.transform(images, labels)
        mixed, shares = self.transform(images.float(), labels)
        return mixed.round().to(torch.uint8), shares
