"""The bodies of detectors: a network's maps of 1/4, 1/8, 1/16 and 1/32 of the image, and the pyramid on top of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from fastkd.trainer.models.published import torchvision_weights

STRIDES = (4, 8, 16, 32)
_SIDE = 128  # of the image that tells a network's strides

Norm = Callable[[int], nn.Module] | None


class Body(NamedTuple):
    """A network that gives maps from fine to coarse, as a list or a dict.

    ``channels`` and ``strides`` are those of its last maps, which are used. ``mean`` and ``std`` normalise
    the images as its published weights want it. They are None without such weights.
    """

    network: nn.Module
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class PyramidBackbone(nn.Module):
    """A body with a feature pyramid network (arXiv 1612.03144) and one more level, which is pooled.

    Gives a dict of maps [B, width, H, W]: ``"0"`` is the finest one, and ``"pool"`` the coarsest. The names of the
    weights are those of torchvision's detectors.
    """

    def __init__(self, body: Body, width: int, norm: Norm = None) -> None:
        super().__init__()
        self.body = body.network
        self.fpn = FeaturePyramidNetwork(list(body.channels), width, LastLevelMaxPool(), norm)
        self.used, self.out_channels = len(body.channels), width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The levels of images [B, 3, H, W]."""
        maps = self.body(images)
        maps = list(maps.values() if isinstance(maps, dict) else maps)[-self.used :]
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(number), x) for number, x in enumerate(maps)))
        return levels


class SmallBody(nn.Module):
    """A small network for small images: two 3x3 convolutions per resolution, each with a norm and a ReLU.

    Args:
        width: channels of the map of 1/4 of the image. They double from map to map.
        depth: number of maps.
        norm: gives the norm of so many channels.
    """

    def __init__(self, width: int, depth: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = _block(3, width, 2, norm)
        channels = [width * 2**number for number in range(depth)]
        self.stages = nn.ModuleList(
            nn.Sequential(_block(before, own, 2, norm), _block(own, own, 1, norm))
            for before, own in zip([width, *channels], channels, strict=False)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps, from 1/4 of the image on."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _block(channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False), norm(out), nn.ReLU(inplace=True)
    )


def small_body(width: int = 16, depth: int = 3, norm: str = "batch") -> Body:
    """``SmallBody`` with batch norm, or with ``norm="group"`` with group norm, which is the same for every batch."""
    norms: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(max(1, channels // 8), channels),
    }
    if norm not in norms:
        raise ValueError(f"norm: got {norm!r}, expected 'batch' or 'group'")
    channels = tuple(width * 2**number for number in range(depth))
    return Body(SmallBody(width, depth, norms[norm]), channels, tuple(4 * 2**number for number in range(depth)))


def timm_body(name: str, pretrained: bool = False) -> Body:
    """A model of timm by its ``features_only``. ValueError for models whose maps do not get coarser, such as ViTs."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"got 'timm:{name}', expected a model that timm.list_models() knows")
    try:
        network = timm.create_model(name, pretrained=pretrained, features_only=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"got 'timm:{name}', which gives no maps (features_only: {error})") from error
    info: Any = network.feature_info
    found = [(c, s) for c, s in zip(info.channels(), info.reduction(), strict=True) if s >= STRIDES[0]]
    config: dict[str, Any] = timm.data.resolve_data_config(model=network) if pretrained else {}
    body = _checked(f"timm:{name}", network, found, config.get("mean"), config.get("std"))
    network.eval()
    try:
        with torch.no_grad():
            is_usable = all(map(_is_map, network(torch.zeros(1, 3, _SIDE, _SIDE))[-len(found) :]))
    except (RuntimeError, AssertionError):
        is_usable = False
    if not is_usable:
        raise ValueError(f"got 'timm:{name}', which gives no maps [B, C, H, W] for images of any size")
    network.train()
    return body


def torchvision_body(name: str, pretrained: bool = False) -> Body:
    """A classifier of torchvision, cut off behind its last map.

    ``name`` may say which published weights are meant, as in ``resnet50.IMAGENET1K_V1``. ValueError for models that are
    no chain of layers whose maps get coarser.
    """
    import torchvision

    known, _, _ = name.partition(".")
    if known not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"got 'torchvision:{name}', expected a classifier of torchvision")
    weights = torchvision_weights(name) if pretrained else None
    layers = _chain(torchvision.models.get_model(known, weights=weights, **_plain(known)))
    found: dict[int, tuple[str, int]] = {}
    x = torch.zeros(1, 3, _SIDE, _SIDE)
    layers.eval()
    with torch.no_grad():
        for layer_name, layer in layers.named_children():
            try:
                x = layer(x)
            except (RuntimeError, TypeError, ValueError, AssertionError):
                break  # behind the last map: a classifier, or an encoder of tokens
            if not _is_map(x):
                break
            found[_SIDE // x.shape[2]] = (layer_name, x.shape[1])
    layers.train()
    used = [(stride, *found[stride]) for stride in STRIDES if stride in found]
    body = IntermediateLayerGetter(layers, {name: str(number) for number, (_, name, _) in enumerate(used)})
    transforms = None if weights is None else weights.transforms()
    mean, std = (None, None) if transforms is None else (transforms.mean, transforms.std)
    return _checked(f"torchvision:{name}", body, [(channels, stride) for stride, _, channels in used], mean, std)


def _is_map(x: Any) -> bool:
    """Whether ``x`` is [B, C, H, W] with a whole fraction of the square image along each side."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3] and _SIDE % x.shape[2] == 0


def _plain(name: str) -> dict[str, Any]:
    """Inception and GoogLeNet build further classifiers unless they are told not to."""
    return {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}


def _chain(model: nn.Module) -> nn.Module:
    """The layers of a classifier of torchvision, one behind the other."""
    for name in ("features", "layers"):  # most of them, MNASNet
        if isinstance(getattr(model, name, None), nn.Sequential):
            return model.get_submodule(name)
    if hasattr(model, "trunk_output"):  # RegNet
        stages = model.get_submodule("trunk_output").named_children()
        return nn.Sequential(OrderedDict([("stem", model.get_submodule("stem")), *stages]))
    return model


def _checked(name: str, network: nn.Module, found: Sequence[tuple[int, int]], mean: Any, std: Any) -> Body:
    channels, strides = (tuple(values) for values in zip(*found, strict=True)) if found else ((), ())
    if len(strides) < 2 or list(strides) != sorted(set(strides)):
        raise ValueError(
            f"got {name!r}, whose maps have the strides {list(strides)}, expected a network whose maps get coarser"
        )
    return Body(network, channels, strides, mean, std)


def freeze(backbone: nn.Module, stages: int, norms: bool) -> None:
    """Train neither the first ``stages`` stages with what is before them, nor, with ``norms``, the batch norms.

    A stage ends with a map that the pyramid reads. Frozen batch norms keep their statistics and weights, as in
    torchvision's detectors. ValueError for a body whose stages cannot be told apart.
    """
    body: Any = backbone.get_submodule("body")
    if stages:
        ends = getattr(body, "return_layers", None)
        if isinstance(body, SmallBody):
            parts: list[tuple[nn.Module, bool]] = [(body.stem, False), *((stage, True) for stage in body.stages)]
        elif ends is not None:
            parts = [(layer, name in ends) for name, layer in body.named_children()]
        else:
            raise ValueError(
                f"frozen_stages: got {stages} for {type(body).__name__}, whose stages are not known; expected 0"
            )
        ended = sum(is_end for _, is_end in parts)
        left = stages + ended - getattr(backbone, "used", ended)  # some maps may be finer than the pyramid
        for layer, is_end in parts:
            if left > 0:
                layer.requires_grad_(False)
                left -= is_end
    if norms:
        from timm.layers import freeze_batch_norm_2d

        freeze_batch_norm_2d(body)
