"""Finds the last feature map of a model in one traced forward pass, and what classifies single positions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOW_TO_NAME = "name it with ModelConfig(feature_map='...') or FeatureModel(module, feature_map='...')"
PASS_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


@dataclass(frozen=True)
class MapSource:
    """The layer whose output is the map, the map's layout, and what follows it.

    Attributes:
        layer: the layer's name.
        shape: (C, H, W), or (L, C) for tokens.
        channels_last: the layer's output is [B, H, W, C].
        prefix_tokens: this many of the first tokens stand for no position.
        tail: the layers from the map to the logits, which then also classify a single position. None where the model
            does more than average in between: VGG's linear layers see all positions.
        tail_takes_maps: the tail takes a position as a 1x1 map.
    """

    layer: str
    shape: tuple[int, ...]
    channels_last: bool = False
    prefix_tokens: int = 0
    tail: tuple[str, ...] | None = None
    tail_takes_maps: bool = False

    @property
    def channels(self) -> int:
        """The channels of the map, or the width of the tokens."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[1]

    def read(self, value: Tensor) -> Tensor:
        """The map [B, C, H, W] or the tokens [B, L, C] in the layer's output."""
        return value.movedim(-1, 1) if self.channels_last else value

    def classifier(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """The function from n positions of the map [n, C] to their logits [n, classes]. None without a tail."""
        if self.tail is None:
            return None
        layers = [model.get_submodule(name) for name in self.tail]
        first = next((parameter for layer in layers for parameter in layer.parameters()), None)

        def classify(vectors: Tensor) -> Tensor:
            # Copied, because a layer may work in place.
            x = vectors.to(vectors.dtype if first is None else first.dtype, copy=True)
            if self.tail_takes_maps:
                x = x[:, None, None, :] if self.channels_last else x[:, :, None, None]
            for layer in layers:
                x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
            return x.flatten(1)

        return classify


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: what it returned and what it was given first, with the state of both at that moment.

    ``node`` is the value's node in the autograd graph. A version that has changed since means that a later layer has
    worked in place.
    """

    name: str
    layer: nn.Module
    value: Tensor
    given: Tensor | None = None
    node: Any = None
    version: int = 0
    given_version: int = 0


def find_map(run: Callable[[], Tensor], model: nn.Module, classifier: str, given: str | None = None) -> MapSource:
    """The last map of ``model`` before its layer ``classifier``.

    The map is the last output with several positions ([B, C, H, W], [B, H, W, C] or tokens [B, L, C]) of a layer that
    is called before the classifier. An output whose average or first token is the features goes before the others.

    Args:
        run: calls the model once, in eval mode, and returns the features [B, D].
        given: the layer's name, if it is known.

    Raises:
        ValueError: there is no such layer, or ``given`` is not one. The message names the last layers.
    """
    calls, features, output = trace(run, model, classifier)
    width = features.shape[1]
    maps = [call for call in calls if call.name == given]
    if given is None:
        maps = [call for call in calls if not isinstance(call.layer, PASS_ON) and _positions(call.value, width) > 1]
    maps = [call for call in maps if call.value.ndim in (3, 4)]
    if not maps:
        asked = "found no layer" if given is None else f"got {given!r}, expected a layer"
        last = [f"{call.name} {tuple(call.value.shape)}" for call in calls][-6:]
        raise ValueError(
            f"feature_map: {asked} of {type(model).__name__} that gives a map [B, C, H, W] or tokens [B, L, C] with "
            f"more than one position before the classifier; {_HOW_TO_NAME} (its last layers: {last})"
        )
    # Only near the end: far inside the model, an average may equal the features by accident.
    averaged = [call for call in maps[-4:] if any(_close(pooled, features) for pooled in _pooled(call.value, width))]
    after = calls[calls.index(maps[-1]) + 1 :]
    if given is None and not averaged and (single := _single_position(after, features)) is not None:
        raise ValueError(
            f"feature_map: layer {single!r} of {type(model).__name__} is the last, and gives 1 x 1 positions for "
            f"images of this size, expected several; take larger images, or an earlier layer: {_HOW_TO_NAME}"
        )
    call = (averaged or maps)[-1]
    source = MapSource(call.name, (), channels_last=_is_channels_last(call.value, width))
    source = replace(source, shape=tuple(source.read(call.value).shape[1:]))
    if call.value.ndim == 3:
        source = replace(source, prefix_tokens=prefix_tokens(model, call.value.shape[1]))
    follow = [later.name for later in calls[calls.index(call) + 1 :] if not list(later.layer.children())]
    for tail in ((*follow, classifier), (classifier,)):
        for takes_maps in (call.value.ndim == 4, False):
            candidate = replace(source, tail=tail, tail_takes_maps=takes_maps)
            if _classifies(candidate, model, _pooled(call.value, width), output):
                return candidate
    return source


def pool_features(features: Tensor, layer: nn.Module) -> Tensor:
    """The input of ``layer``, averaged over everything but batch and channels: [B, D].

    The channels are dimension 1 before a convolution, and before an unknown layer that is given a map. Otherwise they
    are the last dimension.
    """
    if features.ndim == 2:
        return features
    channels_first = isinstance(layer, CONVOLUTIONS) or (not isinstance(layer, nn.Linear) and features.ndim == 4)
    return features.flatten(2).mean(2) if channels_first else features.flatten(1, -2).mean(1)


def trace(run: Callable[[], Tensor], model: nn.Module, classifier: str) -> tuple[list[Call], Tensor, Tensor]:
    """Every call that ends before the classifier is called, the features, and the classifier's output [B, C].

    Without a classifier, named ``""``, every call counts, and the features take the place of its output.
    """
    calls: list[Call] = []
    outputs: list[Tensor] = []
    versions: dict[int, int] = {}  # of the first argument, by the layer that is being called
    head = model.get_submodule(classifier) if classifier else nn.Identity()

    def enter(layer: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            versions[id(layer)] = args[0]._version

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, value: Any) -> None:
            if layer is head:
                outputs.append(pool_features(value, head))  # at once: the next layer may work in place
            elif isinstance(value, Tensor) and not entered:
                given = args[0] if args and isinstance(args[0], Tensor) else None
                calls.append(Call(name, layer, value, given, value.grad_fn, value._version, versions.get(id(layer), 0)))

        return hook

    entered: list[bool] = []
    handles = [layer.register_forward_hook(record(name)) for name, layer in model.named_modules() if name]
    handles += [layer.register_forward_pre_hook(enter) for name, layer in model.named_modules() if name]
    handles.append(head.register_forward_pre_hook(lambda _layer, _args: entered.append(True)))
    try:
        features = run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, features, outputs[-1] if classifier else features


def _is_channels_last(value: Tensor, width: int) -> bool:
    """Whether a map is [B, H, W, C] rather than [B, C, H, W].

    The features' width tells it; if it does not, the two sides that are equal do.
    """
    if value.ndim != 4:
        return False
    _, first, second, last = value.shape
    if width in (first, last) and not first != second == last:
        return first != width
    return first == second != last


def _positions(value: Tensor, width: int) -> int:
    if value.ndim == 3:
        return value.shape[1]
    if value.ndim != 4:
        return 0
    return value[0, ..., 0].numel() if _is_channels_last(value, width) else value[0, 0].numel()


def _pooled(value: Tensor, width: int) -> Sequence[Tensor]:
    """What models make of a map: its average. Of tokens: the first one, or the average with or without the first."""
    if value.ndim == 3:
        return value[:, 0], value.mean(1), value[:, 1:].mean(1)
    return (value.mean((1, 2)) if _is_channels_last(value, width) else value.mean((2, 3)),)


def _single_position(calls: Sequence[Call], features: Tensor) -> str | None:
    """The layer that gives the features as a map of one position, before anything is pooled. None if there is none.

    ``calls`` are those after the last map of several positions.
    """
    found = None
    for call in calls:
        if any("Pool" in type(layer).__name__ for layer in call.layer.modules()):
            break
        if call.value.ndim == 4 and not isinstance(call.layer, PASS_ON) and _close(call.value.flatten(1), features):
            found = call.name
    return found


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.is_meta:
        return False
    left, right = left.float(), right.float()
    return bool((left - right).norm() <= 1e-2 * right.norm())  # half-precision models average in half precision


def _classifies(source: MapSource, model: nn.Module, pooled: Sequence[Tensor], output: Tensor) -> bool:
    """Whether the tail turns one of the pooled maps into the classifier's output."""
    classify = source.classifier(model)
    assert classify is not None
    for vectors in pooled:
        try:
            found = classify(vectors)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            return False  # layers that do not follow one another
        if _close(found, output) or (found.is_meta and found.shape == output.shape):
            return True
    return False


def prefix_tokens(model: nn.Module, length: int) -> int:
    """The number of tokens that stand for no position: timm's models say it, else a square grid leaves them over."""
    said = getattr(model, "numprefix_tokens", None)
    if isinstance(said, int):
        return said
    side = int(length**0.5)
    return length - side**2 if length - side**2 <= 2 else 0
