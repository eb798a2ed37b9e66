"""Small networks for small images, which the digits recipes and the tests train."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Blocks of 3x3 convolution, batch norm and ReLU. From block to block the resolution halves and the width doubles.

    Args:
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of the first block. The features have ``width * 2**(depth - 1)``, as the last block has.
        depth: number of blocks. 8x8 images allow up to 4.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for block in range(depth):
            out = width * 2**block
            stride = 1 if block == 0 else 2
            layers += [
                nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


class MLP(nn.Module):
    """Flatten, then ``hidden`` fully connected ReLU layers of the given widths, then the classifier ``head``."""

    def __init__(self, num_classes: int = 10, in_features: int = 64, hidden: tuple[int, ...] = (32,)) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for below, above in itertools.pairwise(widths):
            layers += [nn.Linear(below, above), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images with ``in_features`` elements each."""
        return self.head(self.body(images))
