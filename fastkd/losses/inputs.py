"""Checks of arguments that several modules take: weights of parts, classifiers, inputs of layers."""

import torch
from torch import Tensor, nn

from fastkd.validate import check_float_dtype, check_floating, check_number

Classifier = nn.Linear | tuple[Tensor, Tensor | None]


def check_part_weights(**weights: float) -> None:
    """Checks that the weights of a method's parts, by argument name, are >= 0 and that one of them is above."""
    for name, value in weights.items():
        check_number(name, value, minimum=0)
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: got 0 for all, expected one part at least")


def check_width(name: str, x: Tensor, width: int) -> None:
    """Checks that ``x`` is a matrix of floats with ``width`` columns, before a layer of the module sees it."""
    check_floating(name, x)
    if x.ndim != 2 or x.shape[1] != width:
        pooled = "; average a map over its positions first" if x.ndim > 2 else ""
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected [n, {width}]{pooled}")


def check_layer_input(name: str, x: Tensor, layer: nn.Module) -> None:
    """Checks that ``x`` has the device of the layer's weight, and its dtype unless autocast converts it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if x.dtype != weight.dtype and (not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64):
        raise TypeError(f"{name}: got {x.dtype}, expected the dtype of the module's parameters, {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{name}: got device {x.device}, expected that of the module's parameters, {weight.device}")


def weight_and_bias(
    name: str, classifier: Classifier, features: Tensor, classes: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The classifier's weight [classes, features.shape[1]] and its bias [classes] or None, checked.

    Raises:
        TypeError, ValueError: ``classifier`` is neither a linear layer nor a pair (weight, bias), its shapes do not
            fit, its two parts differ in dtype, or it is not on the device of ``features``.
    """
    weight: Tensor
    bias: Tensor | None
    if isinstance(classifier, nn.Linear):
        weight, bias = classifier.weight, classifier.bias
    elif isinstance(classifier, tuple) and len(classifier) == 2:
        weight, bias = classifier
    else:
        raise TypeError(f"{name}: got {type(classifier).__name__}, expected an nn.Linear or a pair (weight, bias)")
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        kinds = f"({type(weight).__name__}, {type(bias).__name__})"
        raise TypeError(f"{name}: got a pair {kinds}, expected tensors, the bias may be None")
    width = features.shape[1]
    if weight.ndim != 2 or weight.shape[1] != width or classes not in (None, weight.shape[0]):
        expected = f"[{'classes' if classes is None else classes}, {width}]"
        raise ValueError(f"{name}: got a weight of shape {list(weight.shape)}, expected {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: got a bias of shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    check_float_dtype(f"{name}: weight", weight.dtype)
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{name}: got a bias of {bias.dtype}, expected the dtype of the weight, {weight.dtype}")
    for part in (weight, bias):
        if part is not None and part.device != features.device:
            raise ValueError(f"{name}: got device {part.device}, expected that of the features, {features.device}")
    return weight, bias
