"""VGG for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd.trainer.models.cifar.layers import TapLayers, initialize
from fastkd.validate import check_choice

_WIDTHS = (64, 128, 256, 512, 512)
# The number of convolutions in each of the five blocks.
_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class CifarVGG(nn.Module):
    """VGG with batch norm and one linear layer (arXiv 1409.1556): five blocks of 3x3 convolutions, 64 to 512 channels.

    ``depth`` is 8, 11, 13, 16 or 19. The maps of 32x32 images have 32, 16, 8, 4 and 4 positions a side. As in the
    benchmarks, 64x64 images are pooled once more, before the last block.
    """

    def __init__(self, depth: int = 8, num_classes: int = 100) -> None:
        super().__init__()
        check_choice("depth", str(depth), tuple(map(str, _CONVOLUTIONS)))
        counts = _CONVOLUTIONS[depth]
        self.block0 = _block(3, _WIDTHS[0], counts[0])
        self.block1 = _block(_WIDTHS[0], _WIDTHS[1], counts[1])
        self.block2 = _block(_WIDTHS[1], _WIDTHS[2], counts[2])
        self.block3 = _block(_WIDTHS[2], _WIDTHS[3], counts[3])
        self.block4 = _block(_WIDTHS[3], _WIDTHS[4], counts[4])
        self.relus = nn.ModuleList(nn.ReLU() for _ in _WIDTHS)  # not in place: what they get is a tap
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = self.relus[0](self.block0(images))
        x = self.relus[1](self.block1(self.pool(x)))
        x = self.relus[2](self.block2(self.pool(x)))
        x = self.relus[3](self.block3(self.pool(x)))
        if images.shape[2] == 64:
            x = self.pool(x)
        return self.classifier(self.relus[4](self.block4(x)).mean((2, 3)))

    @property
    def tap_layers(self) -> TapLayers:
        """The blocks' outputs behind their last ReLU, and their last batch norms, which are before it."""
        blocks = ["block1", "block2", "block3", "block4"]
        norms = [f"{name}.{len(self.get_submodule(name)) - 1}" for name in blocks]  # type: ignore[arg-type]
        maps = [f"relus.{number}" for number in range(1, 5)]
        return {"stem": "relus.0", "maps": maps, "preactivations": blocks, "norms": [*norms]}


def _block(channels: int, out: int, convolutions: int) -> nn.Sequential:
    """Convolutions, each with batch norm, and with a ReLU between them."""
    layers: list[nn.Module] = []
    for number in range(convolutions):
        layers += [nn.ReLU(inplace=True)] if number else []
        layers += [nn.Conv2d(out if number else channels, out, 3, padding=1), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers)
