"""The networks of the CIFAR distillation benchmarks for 32x32 images, by the names that they have there.

Their parameters have the names and the order of the benchmarks' public code (RepDistiller, mdistiller), so that its
teachers load. Every network has ``tap_layers``, which names the layers that methods on intermediate maps read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastkd.trainer.models.cifar.mobilenet import CifarMobileNetV2
from fastkd.trainer.models.cifar.resnet import CifarResNet, CifarResNet50
from fastkd.trainer.models.cifar.shufflenet import CifarShuffleV1, CifarShuffleV2
from fastkd.trainer.models.cifar.vgg import CifarVGG
from fastkd.trainer.models.cifar.wide_resnet import WideResNet

_X4 = (32, 64, 128, 256)

# ``ModelConfig(name="cifar:NAME")`` builds them. Each takes ``num_classes``, which is 100 if it is not given.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth=depth, widths=_X4) for depth in (8, 32)},
    "ResNet50": CifarResNet50,
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth=depth, width=width) for depth in (16, 40) for width in (1, 2)},
    **{f"vgg{depth}": partial(CifarVGG, depth=depth) for depth in (8, 11, 13, 16, 19)},
    "MobileNetV2": CifarMobileNetV2,
    "ShuffleV1": CifarShuffleV1,
    "ShuffleV2": CifarShuffleV2,
}
