"""Scales an image with its boxes, and mirrors it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional


def scaled_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) with this shorter side, or a smaller one where the longer side would exceed ``max_side``.

    Example:
        >>> scaled_size(480, 640, 800, 1333)
        (800, 1067)
        >>> scaled_size(400, 1000, 800, 1333)
        (533, 1333)
    """
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled_with_boxes(image: Tensor, boxes: np.ndarray, size: tuple[int, int], mirror: bool) -> tuple[Tensor, ...]:
    """(image, boxes, scale) after scaling to ``size``, height and width, and mirroring from left to right.

    ``image`` is uint8 [3, H, W]. It is interpolated on bytes, and averages over left-out pixels. ``boxes`` [n, 4] are
    left, top, right and bottom in its pixels. ``scale`` [2], float32, is the new width and height over the old ones.
    """
    old = image.shape[-2:]
    if tuple(old) != size:
        image = functional.resize(image, list(size), antialias=True)
    scale = torch.tensor([size[1] / old[1], size[0] / old[0]], dtype=torch.float32)
    placed = torch.from_numpy(boxes) * scale.repeat(2)
    if mirror:
        image = image.flip(-1)
        placed = torch.stack([size[1] - placed[:, 2], placed[:, 1], size[1] - placed[:, 0], placed[:, 3]], dim=1)
    return image, placed, scale
