"""MobileNetV2 for 32x32 images."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastkd.trainer.models.cifar.layers import TapLayers, conv1x1, conv3x3, initialize, stage

# Of each stage: its channels at width 1, its blocks and its stride.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381) with ReLU and half the width: seven stages of inverted residuals.

    ``expansion`` is how much wider a block is inside, T in the benchmarks. The first stage does not expand.
    """

    def __init__(self, expansion: int = 6, width: float = 0.5, num_classes: int = 100) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(conv3x3(3, channels, 2), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for number, (out, blocks, stride) in enumerate(_STAGES):
            block = partial(_InvertedResidual, expansion=expansion if number else 1)
            self.blocks.append(stage(block, channels, int(out * width), blocks, stride))
            channels = int(out * width)
        last = max(1280, int(1280 * width))
        self.conv2 = nn.Sequential(conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        initialize(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.conv1(images)
        for blocks in self.blocks:
            x = blocks(x)
        return self.classifier(self.conv2(x).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The stages whose outputs have the last width of a resolution. Stages end without ReLU, in a batch norm."""
        maps = [f"blocks.{number}" for number in (1, 2, 4, 6)]
        norms = [f"{name}.{len(self.get_submodule(name)) - 1}.conv.7" for name in maps]  # type: ignore[arg-type]
        return {"stem": "conv1", "maps": maps, "preactivations": maps, "norms": [*norms]}


class _InvertedResidual(nn.Module):
    """A depthwise convolution between a 1x1 convolution that widens and one that narrows, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.residual = stride == 1 and channels == out
        self.conv = nn.Sequential(
            *(conv1x1(channels, inside), nn.BatchNorm2d(inside), nn.ReLU(inplace=True)),
            *(conv3x3(inside, inside, stride, groups=inside), nn.BatchNorm2d(inside), nn.ReLU(inplace=True)),
            *(conv1x1(inside, out), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)
