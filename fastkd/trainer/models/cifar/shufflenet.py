"""ShuffleNets for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.trainer.models.cifar.layers import TapLayers, conv1x1, conv3x3

_GROUPS = 3


class CifarShuffleV1(nn.Module):
    """ShuffleNet with three groups (arXiv 1707.01083): stages of 240, 480 and 960 channels behind a 1x1 convolution."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage_v1(24, 240, 4)
        self.layer2 = _stage_v1(240, 480, 8)
        self.layer3 = _stage_v1(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(images)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The outputs of stem and stages, and the sums before the stages' last ReLU."""
        return _taps([self.layer1, self.layer2, self.layer3])


class CifarShuffleV2(nn.Module):
    """ShuffleNetV2 1.0x (arXiv 1807.11164): stages of 116, 232 and 464 channels behind a 1x1 convolution."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage_v2(24, 116, 3)
        self.layer2 = _stage_v2(116, 232, 7)
        self.layer3 = _stage_v2(232, 464, 3)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.last_relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.last_relu(self.bn2(self.conv2(x))).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The outputs of stem and stages, and what the stages' last ReLU gets, whose channels are not shuffled yet."""
        return _taps([self.layer1, self.layer2, self.layer3])


class _UnitV1(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolution. A stride of 2 puts the pooled input beside them.

    ``out`` counts the channels of the convolutions alone.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        inside, groups = out // 4, 1 if channels == 24 else _GROUPS
        self.conv1 = conv1x1(channels, inside, groups=groups)
        self.bn1 = nn.BatchNorm2d(inside)
        self.shuffle1 = nn.ChannelShuffle(groups)
        self.conv2 = conv3x3(inside, inside, stride, groups=inside)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = conv1x1(inside, out, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(out)
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride=stride, padding=1)
        self.sum = nn.Identity()  # has what the last ReLU gets for its output
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle1(torch.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(out)))))
        return self.last_relu(self.sum(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1)))


class _DownUnitV2(nn.Module):
    """Two branches at half the resolution, side by side."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        inside = out // 2
        self.conv1 = conv3x3(channels, channels, 2, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv1x1(channels, inside)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = conv1x1(channels, inside)
        self.bn3 = nn.BatchNorm2d(inside)
        self.conv4 = conv3x3(inside, inside, 2, groups=inside)
        self.bn4 = nn.BatchNorm2d(inside)
        self.conv5 = conv1x1(inside, inside)
        self.bn5 = nn.BatchNorm2d(inside)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
        return self.shuffle(torch.relu(torch.cat([left, self.bn5(self.conv5(right))], 1)))


class _UnitV2(nn.Module):
    """Three convolutions on one half of the channels, beside the other half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = channels // 2
        self.conv1 = conv1x1(inside, inside)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = conv3x3(inside, inside, groups=inside)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = conv1x1(inside, inside)
        self.bn3 = nn.BatchNorm2d(inside)
        self.sum = nn.Identity()  # has what the last ReLU gets for its output
        self.last_relu = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(out)))))
        # The ReLU changes nothing in the half that is passed on: a ReLU made it.
        return self.shuffle(self.last_relu(self.sum(torch.cat([passed, self.bn3(self.conv3(out))], 1))))


def _stage_v1(channels: int, out: int, units: int) -> nn.Sequential:
    return nn.Sequential(_UnitV1(channels, out - channels, 2), *(_UnitV1(out, out, 1) for _ in range(units - 1)))


def _stage_v2(channels: int, out: int, units: int) -> nn.Sequential:
    return nn.Sequential(_DownUnitV2(channels, out), *(_UnitV2(out) for _ in range(units)))


def _taps(stages: list[nn.Sequential]) -> TapLayers:
    names = [f"layer{number}" for number in range(1, len(stages) + 1)]
    sums = [f"{name}.{len(units) - 1}.sum" for name, units in zip(names, stages, strict=True)]
    return {"stem": "relu", "maps": names, "preactivations": sums, "norms": [None] * len(stages)}
