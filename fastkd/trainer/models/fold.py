"""A copy of a frozen model in which convolutions do the work of the batch norms behind them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastkd.trainer.models.features import FeatureModel, ModelOutput, evaluating
from fastkd.trainer.models.maps import CONVOLUTIONS

TOLERANCE = 1e-5  # of an output of the copy, relative to the largest value of the model's


class _Tracer(fx.Tracer):
    """Does not look into batch norms; those of timm have an activation in them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def folded(model: FeatureModel, images: Tensor) -> tuple[FeatureModel, int]:
    """A copy of ``model`` for eval mode, with batch norms folded into convolutions, and the number of these.

    In eval mode a batch norm is ``y = a x + b`` per channel. A convolution before it whose output nothing else reads
    takes over ``a`` and ``b``: ``a (W * x + c) + b = (a W) * x + (a c + b)``. The batch norm then passes its input on;
    layers keep their names, so that maps and taps are read where they were. ``model`` itself is left as it is.

    The copy is compared with ``model`` on ``images``, in float64 on the CPU: logits, features, the map and the taps, as
    far as ``model`` returns them.

    Raises:
        ValueError: torch.fx cannot trace the model, there is nothing to fold, somebody has put hooks on its layers, or
            an output of the copy differs by more than TOLERANCE.

    Example:
        >>> import torchvision
        >>> images = torch.randn(2, 3, 64, 64)
        >>> teacher, count = folded(FeatureModel(torchvision.models.resnet18()), images)
        >>> count
        20
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise ValueError("its layers have hooks of others")
    try:
        pairs = list(_pairs(deepcopy(model.model).eval()))
    except Exception as error:  # whatever the code of the model raises that is given no numbers
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.fx cannot trace it ({type(error).__name__}: {reason})") from None
    if not pairs:
        raise ValueError("no convolution has a batch norm behind it")
    copy = deepcopy(model).eval()
    for convolution, norm in pairs:
        before: Any = copy.model.get_submodule(convolution)
        behind: Any = copy.model.get_submodule(norm)
        dtype = before.weight.dtype
        fused = fuse_conv_bn_eval(before.double(), behind.double()).to(dtype)
        copy.model.set_submodule(convolution, fused)
        # Without the batch norm's own work: nothing, or the activation that timm has put into it, under its name.
        copy.model.set_submodule(norm, nn.Sequential(OrderedDict(behind.to(dtype).named_children())))
    copy.requires_grad_(False)
    _compare(model, copy, images)
    return copy, len(pairs)


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of the convolutions that can be folded, and of the batch norms behind them."""
    graph, modules = _Tracer().trace(network), dict(network.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or len(node.args) != 1:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        # A subclass may do more than a convolution does.
        plain = type(modules[str(before.target)]) in CONVOLUTIONS
        if plain and calls[node.target] == calls[before.target] == 1:
            yield str(before.target), str(node.target)


def _compare(model: FeatureModel, copy: FeatureModel, images: Tensor) -> None:
    """ValueError where the outputs differ. A GPU may multiply with ten bits, and so would not tell."""
    outputs = []
    for one in (model, copy):
        exact = deepcopy(one).to("cpu", torch.float64)
        with evaluating(exact):
            try:
                outputs.append(_values(exact(images.cpu().double())))
            except Exception as error:  # such as code that reads the weights of a batch norm
                raise ValueError(f"the folded copy does not run ({type(error).__name__}: {error})") from None
    for name, expected in outputs[0].items():
        off = float((outputs[1][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not off <= TOLERANCE:
            raise ValueError(f"{name} of the folded copy are off by {off:.1g} of the largest, expected {TOLERANCE:g}")


def _values(output: ModelOutput) -> dict[str, Tensor]:
    found = {"logits": output.logits, "features": output.features}
    if output.feature_map is not None:
        found["values of the map"] = output.feature_map
    if output.taps is not None:
        taps = (output.taps.stem, *output.taps.maps, *output.taps.preactivations)
        found |= {f"values of tap {number}": tap for number, tap in enumerate(taps)}
    return {name: value for name, value in found.items() if value.numel()}
