"""ResNets for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd.trainer.models.cifar.layers import TapLayers, conv1x1, conv3x3, initialize, stage
from fastkd.validate import check_int


class CifarResNet(nn.Module):
    """ResNet of ``depth = 6 n + 2`` layers: three stages of n blocks (arXiv 1512.03385, section 4.2).

    ``widths`` are the channels of the first convolution and of the three stages. resnet20 has (16, 16, 32, 64);
    resnet8x4 and resnet32x4 of the benchmarks have (32, 64, 128, 256).

    Example:
        >>> CifarResNet(depth=8)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(
        self, depth: int = 20, widths: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, 2)
        stem, *stages = widths
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(_BasicBlock, stem, stages[0], blocks, 1)
        self.layer2 = stage(_BasicBlock, stages[0], stages[1], blocks, 2)
        self.layer3 = stage(_BasicBlock, stages[1], stages[2], blocks, 2)
        self.fc = nn.Linear(stages[2], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(images)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The outputs of stem and stages, and the sums before the stages' last ReLU."""
        return _residual_taps([self.layer1, self.layer2, self.layer3], "bn2")


class CifarResNet50(nn.Module):
    """ResNet-50 with a 3x3 first convolution and without pooling behind it: four stages, 64 to 2048 channels."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(_Bottleneck, 64, 256, 3, 1)
        self.layer2 = stage(_Bottleneck, 256, 512, 4, 2)
        self.layer3 = stage(_Bottleneck, 512, 1024, 6, 2)
        self.layer4 = stage(_Bottleneck, 1024, 2048, 3, 2)
        self.linear = nn.Linear(2048, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images)))))
        return self.linear(self.layer4(self.layer3(x)).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The outputs of stem and stages, and the sums before the stages' last ReLU."""
        return _residual_taps([self.layer1, self.layer2, self.layer3, self.layer4], "bn3")


class _BasicBlock(nn.Module):
    """Two convolutions, each followed by batch norm, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)
        self.sum = nn.Identity()  # has the sum for its output, which the last ReLU must leave as it is
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.last_relu(self.sum(out))


class _Bottleneck(nn.Module):
    """A 3x3 convolution at a quarter of the width between two 1x1 convolutions, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        inside = out // 4
        self.conv1 = conv1x1(channels, inside)
        self.bn1 = nn.BatchNorm2d(inside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(inside, inside, stride)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = conv1x1(inside, out)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = _shortcut(channels, out, stride)
        self.sum = nn.Identity()  # as in _BasicBlock
        self.last_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.last_relu(self.sum(out))


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    """Nothing where the block changes no shape, else a 1x1 convolution and batch norm."""
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))


def _residual_taps(stages: list[nn.Sequential], norm: str) -> TapLayers:
    last = [f"layer{number}.{len(blocks) - 1}" for number, blocks in enumerate(stages, 1)]
    return {
        "stem": "relu",
        "maps": [f"layer{number}" for number in range(1, len(stages) + 1)],
        "preactivations": [f"{block}.sum" for block in last],
        "norms": [f"{block}.{norm}" for block in last],
    }


def blocks_per_stage(depth: int, rest: int) -> int:
    """The number of blocks per stage. ValueError for a depth that no network of this kind has."""
    check_int("depth", depth, 6 + rest)
    if (depth - rest) % 6:
        raise ValueError(f"depth: got {depth}, expected 6 n + {rest}")
    return (depth - rest) // 6
