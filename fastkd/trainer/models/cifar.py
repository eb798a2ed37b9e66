"""The networks of the CIFAR distillation benchmarks, which neither timm nor torchvision has.

Their parameters have the names of the benchmarks' public code (RepDistiller, mdistiller), so that its teachers load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fastkd.validate import check_int


class CifarResNet(nn.Module):
    """ResNet of ``depth = 6 n + 2`` layers for 32x32 images: three stages of n blocks (arXiv 1512.03385, section 4.2).

    ``widths`` are the channels of the first convolution and of the three stages. resnet20 has (16, 16, 32, 64);
    resnet8x4 and resnet32x4 of the benchmarks have (32, 64, 128, 256).
    """

    def __init__(
        self, depth: int = 20, widths: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100
    ) -> None:
        super().__init__()
        blocks = _blocks(depth, 2)
        stem, *stages = widths
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*_stage(_block, stem, stages[0], blocks, 1))
        self.layer2 = nn.Sequential(*_stage(_block, stages[0], stages[1], blocks, 2))
        self.layer3 = nn.Sequential(*_stage(_block, stages[1], stages[2], blocks, 2))
        self.fc = nn.Linear(stages[2], num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(images)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` for 32x32 images, ``depth = 6 n + 4`` (arXiv 1605.07146)."""

    def __init__(self, depth: int = 16, width: int = 2, num_classes: int = 100) -> None:
        super().__init__()
        blocks = _blocks(depth, 4)
        self.conv1 = _conv3x3(3, 16)
        self.block1 = _Stage(16, 16 * width, blocks, 1)
        self.block2 = _Stage(16 * width, 32 * width, blocks, 2)
        self.block3 = _Stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64 * width, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


class _PreActivated(nn.Module):
    """Two convolutions, each preceded by batch norm and ReLU, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = _conv3x3(out, out)
        self.convShortcut = None if channels == out else nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(self, channels: int, out: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*_stage(_PreActivated, channels, out, blocks, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _block(channels: int, out: int, stride: int) -> nn.Module:
    """Two convolutions, each followed by batch norm, beside a shortcut."""
    if stride == 1 and channels == out:
        return BasicBlock(channels, out)
    shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
    return BasicBlock(channels, out, stride, nn.Sequential(shortcut, nn.BatchNorm2d(out)))


def _stage(
    block: Callable[[int, int, int], nn.Module], channels: int, out: int, blocks: int, stride: int
) -> list[nn.Module]:
    return [block(channels if index == 0 else out, out, stride if index == 0 else 1) for index in range(blocks)]


def _blocks(depth: int, rest: int) -> int:
    """The number of blocks per stage. ValueError for a depth that no network of this kind has."""
    check_int("depth", depth, 6 + rest)
    if (depth - rest) % 6:
        raise ValueError(f"depth: got {depth}, expected 6 n + {rest}")
    return (depth - rest) // 6


def _conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)


def _initialize(model: nn.Module) -> None:
    """Give the convolutions He's initialisation, scaled by their outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
