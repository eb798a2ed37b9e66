"""The last linear layer of a model, as the methods that read class centres take it."""

from torch import Tensor, nn

Classifier = nn.Linear | tuple[Tensor, Tensor | None]


def weight_and_bias(
    name: str, classifier: Classifier, width: int, classes: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The weight [classes, width] and the bias [classes] or None.

    Raises:
        TypeError, ValueError: not a linear layer or a pair (weight, bias) of these shapes.
    """
    if isinstance(classifier, nn.Linear):
        weight, bias = classifier.weight, classifier.bias
    elif isinstance(classifier, tuple) and len(classifier) == 2:
        weight, bias = classifier
    else:
        raise TypeError(f"{name}: got {type(classifier).__name__}, expected an nn.Linear or a pair (weight, bias)")
    for part, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and (part == "weight" or value is not None):
            raise TypeError(f"{name}: got a {part} of type {type(value).__name__}, expected a torch.Tensor")
    if weight.ndim != 2 or weight.shape[1] != width or classes not in (None, weight.shape[0]):
        expected = f"[{'classes' if classes is None else classes}, {width}]"
        raise ValueError(f"{name}: got a weight of shape {list(weight.shape)}, expected {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: got a bias of shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    return weight, bias
