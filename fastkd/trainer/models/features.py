"""Wraps any model so that it also returns its features and, on request, its last feature map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd.trainer.models.build import Normalization
from fastkd.trainer.models.maps import CONVOLUTIONS, MapSource, find_map, pool_features
from fastkd.trainer.models.taps import Taps, TapShapes, TapSources, find_taps

# What a model returns, and what the hooks caught: inputs of the classifier, last maps, the taps' numbers and values.
Caught = tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...], tuple[tuple[int, Tensor], ...]]

_HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear")
_HOW_TO_NAME = "name it with ModelConfig(classifier='...'), or pass FeatureModel(module, '...') as the module"


@dataclass
class ModelOutput:
    """What a ``FeatureModel`` returns.

    Attributes:
        logits: [B, C].
        features: [B, D], the input of the layer ``classifier``, averaged over its positions.
        classifier: the classifier layer.
        feature_map: the last map [B, C, H, W] before global pooling, or tokens [B, L, C]. Only for terms that need it.
        prefix_tokens: this many of the first tokens stand for no position.
        map_classifier: gives the logits [n, C] of n positions [n, D] of the map. None where the model cannot.
        taps: the intermediate maps. Only for terms that need them.

    Example:
        >>> import torchvision
        >>> output = FeatureModel(torchvision.models.resnet18())(torch.randn(2, 3, 64, 64))
        >>> output.logits.shape, output.features.shape
        (torch.Size([2, 1000]), torch.Size([2, 512]))
    """

    logits: Tensor
    features: Tensor
    classifier: nn.Module | None = None
    feature_map: Tensor | None = None
    prefix_tokens: int = 0
    map_classifier: Callable[[Tensor], Tensor] | None = None
    taps: Taps | None = None


@dataclass(kw_only=True, frozen=True)
class ModelShapes:
    """What a forward pass tells about a model: the features' width, the classes, and its maps if asked for.

    Example:
        >>> shapes = ModelShapes(features=512, classes=100)  # a ResNet-18 for CIFAR-100
    """

    features: int
    classes: int
    feature_map: MapSource | None = None
    taps: TapShapes | None = None


def are_bytes(images: Any) -> bool:
    """Whether what a model takes is of bytes: a tensor of uint8, or an object that has one as ``images``."""
    return getattr(getattr(images, "images", images), "dtype", None) == torch.uint8


def find_classifier(model: nn.Module, name: str | None = None) -> str:
    """The name of the classifier layer of ``model``.

    A given ``name`` is checked. Otherwise timm models are asked (``get_classifier``). For every other model it is the
    last linear or convolution layer of the first child called fc, classifier, head or heads, as in all of torchvision,
    or linear.

    Raises:
        ValueError: there is no such layer, or more than one (distilled timm models have two heads).

    Example:
        >>> import torchvision
        >>> find_classifier(torchvision.models.vgg11())
        'classifier.6'
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules or not name:
            near = [key for key, module in modules.items() if isinstance(module, nn.Linear)][-5:]
            raise ValueError(f"classifier: got {name!r}, expected a layer of {type(model).__name__}, such as {near}")
        return name
    hint = f"{_HOW_TO_NAME} (last layers of {type(model).__name__}: {list(modules)[-4:]})"
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Module) and not isinstance(head, (nn.Identity, nn.ModuleList)):
            for key, module in modules.items():
                if module is head:
                    return key
        raise ValueError(f"classifier: {type(model).__name__} has no single classifier layer; {hint}")
    for prefix in _HEAD_NAMES:
        inside = [
            key
            for key, module in modules.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(module, (nn.Linear, *CONVOLUTIONS))
        ]
        if inside:
            return inside[-1]
    raise ValueError(f"classifier: found no layer called {' / '.join(_HEAD_NAMES)}; {hint}")


class FeatureModel(nn.Module):
    """A model that also returns its penultimate features. The wrapped ``model`` itself is left as it is.

    The model's output may be the logits or an object with ``logits`` (Inception in training, Hugging Face models).
    Images are normalised if ``take_images`` says so. They are converted to the dtype of the model's first parameter,
    and to the memory layout ``channels_last`` if that is set. A model that is not in float32 runs without autocast, so
    that a teacher may be in half precision.

    Args:
        model: any module. ``train`` takes a FeatureModel wherever it takes a module.
        classifier: the name of the classifier layer. None finds it (``find_classifier``).
        feature_map: the name of the layer whose output is the last map. None finds it when a term needs maps.
        taps: the names of the layers whose outputs are the intermediate maps. None finds them: see ``find_taps``.
        optional: features are not needed. They are [B, 0] unless one classifier layer is called once.

    Example:
        >>> from torch import nn
        >>> student = FeatureModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), "3")
        >>> student(torch.randn(8, 1, 8, 8)).features.shape
        torch.Size([8, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: str | None = None,
        *,
        feature_map: str | None = None,
        taps: Sequence[str] | None = None,
        optional: bool = False,
    ) -> None:
        super().__init__()
        self.optional = optional
        self.classifier_name: str | None = None
        # A layer that only its name suggests is compared with the logits by ``measure_shapes``.
        self.guessed = classifier is None and not callable(getattr(model, "get_classifier", None))
        self.map_name = feature_map
        self.map_source: MapSource | None = None  # set by ``measure_shapes`` when maps are needed
        self.tap_names = tuple(taps or ())
        self.tap_sources: TapSources | None = None  # and this when taps are
        self.channels_last = False
        # Filled by the hooks of one forward pass. They stay the same lists, because torch.compile has traced them.
        self._inputs: list[Tensor] = []
        self._maps: list[Tensor] = []
        self._tapped: list[tuple[int, Tensor]] = []
        self._compiled: Callable[[Tensor], Any] | None = None
        try:
            self.classifier_name = find_classifier(model, classifier)
        except ValueError:
            if classifier is not None or not optional:
                raise
        self.conversion: tuple[Normalization | Literal["bytes"], Normalization] | None = None
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.model = model

    def take_images(self, given: Normalization | Literal["bytes"] | None, own: Normalization | None = None) -> None:
        """From now on normalise the images: they are ``given``, and the model was trained on ``own``.

        Both are (means, standard deviations) of the channels. With ``"bytes"``, images of uint8 stand for pixels in
        [0, 255]; floating-point images are then left as they are. With None all images are. An image becomes
        ``x s + b`` in float32, with ``s = given.std / own.std`` and ``b = (given.mean - own.mean) / own.std``, where
        bytes have the mean 0 and the standard deviation 1 / 255.

        Example:
            >>> from torch import nn
            >>> model = FeatureModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "1")
            >>> model.take_images("bytes", ((0.5,) * 3, (0.25,) * 3))
            >>> white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
            >>> round(model(white).features.max().item(), 4)  # (255 / 255 - 0.5) / 0.25
            2.0
        """
        self.conversion = self.scale = self.shift = None
        if given is None or own is None:
            return
        self.conversion = (given, own)
        own_mean, own_std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in own)
        mean, std = (
            (0.0, 1 / 255) if given == "bytes" else (torch.tensor(x, dtype=torch.float64, device="cpu") for x in given)
        )
        device = next(self.model.parameters(), own_mean).device
        self.scale = (std / own_std).float().view(-1, 1, 1).to(device)
        self.shift = ((mean - own_mean) / own_std).float().view(-1, 1, 1).to(device)

    def like(self, model: nn.Module) -> FeatureModel:
        """``model``, a copy of the wrapped one, with the same input; its features are not needed."""
        other = FeatureModel(model, self.classifier_name, optional=True)
        other.take_images(*(self.conversion or (None,)))
        return other

    def measure(self, images: Any, **reads: bool) -> ModelShapes:
        """The shapes of this model: see ``measure_shapes``. RuntimeError for images that it cannot take."""
        return measure_shapes(self, images, **reads)

    @property
    def takes_bytes(self) -> bool:
        """Whether images of uint8 are pixels, which this model normalises."""
        return self.conversion is not None and self.conversion[0] == "bytes"

    def forward(self, images: Tensor) -> ModelOutput:
        """The ``ModelOutput``. RuntimeError unless the classifier layer is called once."""
        layer, source = self.classifier, self.map_source
        output, captured, maps, tapped_values = self._caught(images)
        if len(captured) != 1 and not self.optional:
            raise self._called(len(captured))
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            raise TypeError(f"{type(self.model).__name__} returned {got}, expected logits [B, C]")
        if layer is None or len(captured) != 1:
            return ModelOutput(logits, logits.new_empty((len(logits), 0)))
        found = ModelOutput(logits, pool_features(captured[0], layer), layer)
        if source is not None:
            found.feature_map = source.read(maps[-1])
            found.prefix_tokens = source.prefix_tokens
            found.map_classifier = source.classifier(self.model)
        if self.tap_sources is not None:
            found.taps = self.tap_sources.read(tapped_values)
        return found

    def _called(self, times: int) -> RuntimeError:
        """The error of a classifier layer that was not called once."""
        return RuntimeError(
            f"classifier: layer {self.classifier_name!r} of {type(self.model).__name__} was called {times} times with "
            f"positional input in one forward pass, expected once; for another layer, {_HOW_TO_NAME}"
        )

    def _caught(self, images: Any) -> Caught:
        """The model's output, the inputs of the classifier layer, the last maps and the values of the taps."""
        handles = []
        layer, source = self.classifier, self.map_source
        # Hooked per call, so that the user's module carries nothing of ours before or after it.
        if layer is not None:
            handles.append(layer.register_forward_pre_hook(self._note_input))
        if source is not None:
            handles.append(self.model.get_submodule(source.layer).register_forward_hook(self._note_map))
        for number, tap in enumerate(self.tap_sources.every if self.tap_sources else ()):
            tapped, note = self.model.get_submodule(tap.layer), partial(self._note_tap, number, tap.overwritten)
            hook = tapped.register_forward_pre_hook if tap.of_input else tapped.register_forward_hook
            handles.append(hook(note))
        try:
            return (self._compiled or self._traced)(images)
        finally:
            for handle in handles:
                handle.remove()
            # A compiled graph is valid for lists of the length that it was traced with: empty at the start.
            self._inputs.clear()
            self._maps.clear()
            self._tapped.clear()

    @property
    def classifier(self) -> nn.Module | None:
        """The classifier layer."""
        return None if self.classifier_name is None else self.model.get_submodule(self.classifier_name)

    def compile(self, **options: Any) -> None:
        """Run the model through ``torch.compile`` with these ``options`` from now on. Names and weights stay."""
        self._compiled = torch.compile(self._traced, **options)

    def _traced(self, images: Any) -> Caught:
        """The model's output, and what the hooks caught during the call."""
        return self._run(images), tuple(self._inputs), tuple(self._maps), tuple(self._tapped)

    def _note_input(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs.extend(args[:1])

    def _note_map(self, _layer: nn.Module, _args: Any, value: Tensor) -> None:
        self._maps.append(value)

    def _note_tap(self, number: int, copied: bool, _layer: nn.Module, args: tuple[Any, ...], *output: Tensor) -> None:
        value = output[0] if output else args[0]
        self._tapped.append((number, value.clone() if copied else value))

    def normalized(self, images: Tensor) -> Tensor:
        """The images as the model takes them: see ``take_images``."""
        if self.scale is None or self.shift is None or self.takes_bytes != (images.dtype == torch.uint8):
            return images
        return torch.addcmul(self.shift, images.float(), self.scale)

    def _run(self, images: Tensor) -> Any:
        images = self.normalized(images)
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = next(self.model.parameters(), images).dtype
        if not (images.is_floating_point() and dtype.is_floating_point):
            return self.model(images)
        if dtype == torch.float32:
            return self.model(images.to(dtype))
        # Autocast is made for float32 models. Others fail in it, such as float64 layers and fp16 batch norms.
        with torch.autocast(images.device.type, enabled=False):
            return self.model(images.to(dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs its block with ``model`` in eval mode and without gradients; then every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def measure_shapes(
    model: FeatureModel, images: Tensor, *, feature_map: bool = False, taps: bool = False, preactivations: bool = False
) -> ModelShapes:
    """The shapes of ``model``, from one forward pass in eval mode; changes no state of the wrapped module.

    ``feature_map`` also finds the last map, in a second pass, and lets ``model`` return it from then on; so does
    ``taps`` with the intermediate maps, and ``preactivations`` with what these are before their activations.

    Raises:
        ValueError: the classifier layer is not as wide as the logits; it was found by its name and gives something else
            than the logits; or there is no map.
    """
    images = images.to(next(model.parameters(), images).device)
    model.map_source = model.tap_sources = None  # a model may have been in another run, with other terms
    with evaluating(model):
        shapes = _check_classifier(model, images)
        network, classifier = model.model, model.classifier_name or ""
        if feature_map:
            model.map_source = find_map(lambda: model(images).features, network, classifier, model.map_name)
        if taps:
            found = find_taps(lambda x: model(x).features, network, classifier, images, model.tap_names)
            model.tap_sources = replace(found, with_preactivations=preactivations)
    return replace(
        shapes,
        feature_map=model.map_source,
        taps=None if model.tap_sources is None else model.tap_sources.shapes(network),
    )


def _check_classifier(model: FeatureModel, images: Tensor) -> ModelShapes:
    """See ``measure_shapes``."""
    given: list[Any] = []
    layer = None if model.optional else model.classifier
    handle = None if layer is None else layer.register_forward_hook(lambda _module, _args, value: given.append(value))
    try:
        output = model(images)
    finally:
        if handle is not None:
            handle.remove()
    classes = output.logits.shape[1]
    width = getattr(layer, "out_features", getattr(layer, "out_channels", classes))
    wrong = f"classifier: layer {model.classifier_name!r} of {type(model.model).__name__} gives"
    if width != classes:
        raise ValueError(
            f"{wrong} {width} values but the model's logits have {classes}; find the layer whose output they are and "
            f"{_HOW_TO_NAME}"
        )
    if layer is not None and model.guessed and not _leads_to(given[0], layer, output.logits):
        raise ValueError(
            f"{wrong} something else than the model's logits; find the layer whose output they are, or confirm this "
            f"one: {_HOW_TO_NAME}"
        )
    return ModelShapes(features=output.features.shape[1], classes=classes)


def _leads_to(value: Any, layer: nn.Module, logits: Tensor) -> bool:
    """Whether ``logits`` are the layer's output ``value``, up to pooling, a ReLU (SqueezeNet) or a softmax."""
    if not isinstance(value, Tensor) or logits.is_meta:
        return logits.is_meta
    for end in (lambda x: x, torch.relu, lambda x: x.log_softmax(1), lambda x: x.softmax(1)):
        found = pool_features(end(value), layer)
        if found.shape == logits.shape and torch.allclose(
            found.float(), logits.float(), rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            return True
    return False
