"""Wide ResNets for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.trainer.models.cifar.layers import TapLayers, conv1x1, conv3x3, initialize, stage
from fastkd.trainer.models.cifar.resnet import blocks_per_stage


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` for 32x32 images, ``depth = 6 n + 4`` (arXiv 1605.07146)."""

    def __init__(self, depth: int = 16, width: int = 2, num_classes: int = 100) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, 4)
        self.conv1 = conv3x3(3, 16)
        self.block1 = _Stage(16, 16 * width, blocks, 1)
        self.block2 = _Stage(16 * width, 32 * width, blocks, 2)
        self.block3 = _Stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()  # not in place: the output of bn1 is a tap
        self.fc = nn.Linear(64 * width, num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The stages' sums, without batch norm or ReLU, and the batch norms that the next stage begins with."""
        norms = ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        maps = ["block1", "block2", "block3"]
        return {"stem": "conv1", "maps": maps, "preactivations": norms, "norms": [*norms]}


class _PreActivated(nn.Module):
    """Two convolutions, each preceded by batch norm and ReLU, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.convShortcut = None if channels == out else conv1x1(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(self, channels: int, out: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = stage(_PreActivated, channels, out, blocks, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
