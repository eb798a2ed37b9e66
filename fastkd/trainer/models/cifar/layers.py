"""What the CIFAR networks have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from torch import nn


class TapLayers(TypedDict):
    """The names of the layers whose outputs methods on intermediate maps read. No later layer changes these in place.

    ``stem`` gives the first map, before the first stage. ``maps`` has one layer per stage, from the first to the last.
    ``preactivations`` has the layer of the same stage whose output has not gone through the stage's last ReLU.
    ``norms`` has the batch norm that each of these comes out of, or None where the benchmarks name none. OFD reads its
    weights.
    """

    stem: str
    maps: list[str]
    preactivations: list[str]
    norms: list[str | None]


def conv1x1(channels: int, out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(channels, out, 1, stride=stride, groups=groups, bias=False)


def conv3x3(channels: int, out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size of its input, apart from the stride."""
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, groups=groups, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], channels: int, out: int, blocks: int, stride: int
) -> nn.Sequential:
    """``blocks`` of ``block(channels, out, stride)``, of which only the first changes the width and the resolution."""
    rest = [block(out, out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(channels, out, stride), *rest)


def initialize(model: nn.Module, linear_std: float | None = None) -> None:
    """Give the convolutions He's initialisation, scaled by their outputs, and biases of zero.

    ``linear_std``: draw the weights of linear layers with this standard deviation, their biases are zero, too.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
