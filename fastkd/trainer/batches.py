"""Batches that are more than one tensor of images: what a data set collates and what a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# An image, uint8 [3, H, W]; what is to be found in it, as DetectionBatch.targets has it; a random number.
DetectionSample = tuple[Tensor, dict[str, Tensor], int]


@dataclass
class DetectionBatch:
    """Images with their boxes, for object detectors.

    Images are padded with zeros on the right and below to the size of the largest one. Height and width of the padded
    images are multiples of 32, as the strides of the usual backbones want it. Boxes are (left, top, right, bottom).

    Attributes:
        images: [B, 3, H, W], uint8.
        sizes: (height, width) of each image without its padding.
        targets: what is to be found in each of the B images, see the table below.
        seeds: one random number per image, which the data set draws when it reads the sample. What a model draws with
            it depends on the sample and the epoch alone, and neither on the batch nor on the rank.

    ========= ================= ====================================================================================
    boxes     [n, 4], float32   in pixels of the image in this batch
    labels    [n], int64        the classes, from 1 on (0 is the background)
    iscrowd   [n], int64        1 where a box holds a crowd, which is neither right nor wrong to be found
    area      [n], float32      as the annotation says it, in pixels of the image on disk
    scale     [2], float32      the size of this image divided by its size on disk, for x and for y
    image_id  [], int64         the number of the image in the annotation file
    ========= ================= ====================================================================================

    Example:
        >>> target = {"boxes": torch.tensor([[4.0, 2.0, 20.0, 30.0]]), "labels": torch.tensor([1])}
        >>> batch = DetectionBatch(torch.zeros(1, 3, 32, 64, dtype=torch.uint8), [(32, 50)], [target], [17])
        >>> len(batch)
        1
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DetectionBatch:
        """The same batch with its tensors on another device."""
        moved = [{name: value.to(device, non_blocking=non_blocking) for name, value in t.items()} for t in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=moved)

    def pin_memory(self) -> DetectionBatch:
        """The same batch in page-locked memory, which a GPU copies from while it computes."""
        pinned = [{name: value.pin_memory() for name, value in target.items()} for target in self.targets]
        return replace(self, images=self.images.pin_memory(), targets=pinned)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes send small arrays as they are. For every tensor they would open a file.
        targets = [{name: value.numpy() for name, value in target.items()} for target in self.targets]
        return vars(self) | {"targets": targets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        targets = [{name: torch.as_tensor(value) for name, value in target.items()} for target in state["targets"]]
        vars(self).update(state, targets=targets)


def collate_detection(samples: Sequence[DetectionSample]) -> DetectionBatch:
    """The batch of these samples, padded to multiples of 32.

    Example:
        >>> image = torch.zeros(3, 30, 50, dtype=torch.uint8)
        >>> collate_detection([(image, {"boxes": torch.zeros(0, 4)}, 5)]).images.shape
        torch.Size([1, 3, 32, 64])
    """
    images, targets, seeds = (list(part) for part in zip(*samples, strict=True))
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-max(sides) // 32 * -32 for sides in zip(*sizes, strict=True))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return DetectionBatch(padded, sizes, targets, seeds)
