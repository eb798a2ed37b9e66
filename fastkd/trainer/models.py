"""Models: built from a name, their classifier layer found, its input and the last feature map captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd.trainer.imports import import_object
from fastkd.trainer.maps import CONVOLUTIONS, MapSource, find_map, pool_features
from fastkd.validate import check_choice, check_int, check_number, check_type

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

_HEAD_NAMES = ("fc", "classifier", "head", "heads")
_HOW_TO_NAME = "name it with ModelConfig(classifier='...'), or pass FeatureModel(module, '...') as the module"


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    """How to build a model.

    ``name`` is ``timm:NAME``, ``torchvision:NAME``, ``package.module:callable``, or a bare name that is looked up in
    timm first and then in torchvision. Which published weights is part of it: ``timm:resnet50.tv_in1k``,
    ``torchvision:resnet50.IMAGENET1K_V1``; without, the library's default. ``classifier`` names the classifier layer
    (``head.fc``), ``feature_map`` the layer whose output is the last map (``layer4``), for terms that use it; None
    finds them.
    ``weights`` is a ``.safetensors`` file, a ``.pt`` / ``.pth`` state dict, a fastkd checkpoint or a fastkd run
    folder. ``pretrained`` asks timm / torchvision for their published weights (a download). ``options`` are further
    keyword arguments of the builder.

    ``normalization``: (means, standard deviations) of the channels of the images that the weights were trained with;
    None asks timm / torchvision for that of their published weights, others were trained as the data are normalised.
    Of a teacher alone: ``dtype``, in which its weights are kept and it is computed, and ``min_accuracy``, the top-1
    accuracy in [0, 1] that it must reach on the evaluation set before training starts.
    """

    name: str
    num_classes: int | None = None
    classifier: str | None = None
    feature_map: str | None = None
    weights: str | None = None
    pretrained: bool = False
    normalization: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    min_accuracy: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_type("model.name", self.name, str)
        if not self.name:
            raise ValueError("model.name: got '', expected a model's name")
        if self.num_classes is not None:
            check_int("model.num_classes", self.num_classes, 1)
        check_type("model.options", self.options, dict)
        check_type("model.pretrained", self.pretrained, bool)
        if self.pretrained and self.weights is not None:
            raise ValueError(f"model.pretrained: got True together with weights={self.weights!r}, expected one of them")
        if self.normalization is not None:
            check_normalization("model.normalization", self.normalization)
        check_choice("model.dtype", self.dtype, ("fp32", "bf16", "fp16"))
        if self.min_accuracy is not None:
            check_number("model.min_accuracy", self.min_accuracy, 0.0, 1.0)


def check_normalization(name: str, value: Any) -> None:
    """As many means as standard deviations, and those positive."""
    if len(value) != 2 or len(value[0]) != len(value[1]) or not value[0]:
        raise ValueError(f"{name}: got {value}, expected (means, standard deviations), a number for each channel")
    for mean in value[0]:
        check_number(name, mean)
    for std in value[1]:
        check_number(name, std, 0.0, exclusive=True)


@dataclass
class ModelOutput:
    """What a model gives: ``logits`` [B, C] and ``features`` [B, D], the (pooled) input of its layer ``classifier``.

    For terms that need maps also ``feature_map``, the last map [B, C, H, W] before global pooling, or tokens [B, L, C]
    of which the first ``prefix_tokens`` stand for no position; and ``map_classifier``, which gives the logits [n, C] of
    n of its positions, None where the model cannot.
    """

    logits: Tensor
    features: Tensor
    classifier: nn.Module | None = None
    feature_map: Tensor | None = None
    prefix_tokens: int = 0
    map_classifier: Callable[[Tensor], Tensor] | None = None


@dataclass(kw_only=True, frozen=True)
class ModelShapes:
    """What a forward pass tells of a model: the features' width, the classes, the last map if it was asked for."""

    features: int
    classes: int
    feature_map: MapSource | None = None


def build_model(config: ModelConfig) -> nn.Module:
    """The module that ``config.name`` names, without ``config.weights`` (see ``checkpoint.load_weights``).

    Raises:
        ValueError: unknown name; ``pretrained`` for a ``package.module:callable``; reserved options.
        TypeError: the callable did not return an ``nn.Module``.
    """
    options = dict(config.options)
    if config.num_classes is not None:
        options["num_classes"] = config.num_classes
    source, _, name = config.name.rpartition(":")
    if source in ("timm", ""):
        import timm

        if timm.is_model(name):
            if "checkpoint_path" in options:
                raise ValueError("model.options: got 'checkpoint_path', expected the file in model.weights")
            return timm.create_model(name, pretrained=config.pretrained, **options)
        if source == "timm":
            raise ValueError(f"model.name: got {config.name!r}, expected a model that timm.list_models() knows")
    if source in ("torchvision", ""):
        import torchvision

        known, _, _ = name.partition(".")
        if known in torchvision.models.list_models():
            weights = torchvision_weights(name)
            return torchvision.models.get_model(known, weights=weights if config.pretrained else None, **options)
        raise ValueError(
            f"model.name: got {config.name!r}, expected 'package.module:callable' or a model that "
            f"{'torchvision' if source else 'timm or torchvision'} knows"
        )
    if config.pretrained:
        raise ValueError(f"model.pretrained: got True with name={config.name!r}, expected a timm or torchvision model")
    model = import_object(config.name, "model.name")(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model.name: {config.name!r} returned {type(model).__name__}, expected an nn.Module")
    return model


def torchvision_weights(name: str) -> Any:
    """The published weights, of torchvision's, that ``NAME`` or ``NAME.WEIGHTS`` means. ValueError if unknown."""
    import torchvision

    model, _, tag = name.partition(".")
    published = torchvision.models.get_model_weights(model)
    if tag and tag not in published.__members__:
        raise ValueError(f"model.name: got 'torchvision:{name}', expected weights among {list(published.__members__)}")
    return published[tag] if tag else published.DEFAULT


def trained_normalization(config: ModelConfig, model: nn.Module) -> Normalization | None:
    """What the weights of ``model``, built from ``config``, were trained with; None where nothing tells it."""
    if config.normalization is not None:
        mean, std = config.normalization
    elif not config.pretrained:
        return None
    elif hasattr(model, "pretrained_cfg"):
        import timm

        found = timm.data.resolve_model_data_config(model)
        mean, std = found["mean"], found["std"]
    else:
        transforms = torchvision_weights(config.name.rpartition(":")[2]).transforms()
        mean, std = transforms.mean, transforms.std
    return tuple(map(float, mean)), tuple(map(float, std))


def find_classifier(model: nn.Module, name: str | None = None) -> str:
    """The name of the classifier layer of ``model``.

    A given ``name`` is checked. Otherwise timm models are asked (``get_classifier``); for every other model it is the
    last linear or convolution layer of the first child called fc, classifier, head or heads, as in all of
    torchvision.

    Raises ValueError when there is no such layer, or more than one (distilled timm models have two heads).
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
    """A model that also returns its penultimate features; the wrapped ``model`` itself is left as it is.

    The model's output may be the logits or an object with ``logits`` (Inception in training, Hugging Face models).
    Images are converted to the dtype of the model's first parameter, and a model that is not in float32 runs without
    autocast: a teacher may be in half precision. ``channels_last``, when set, is the layout that they get.

    Args:
        model: any module; ``train`` takes a FeatureModel wherever it takes a module.
        classifier: the name of the classifier layer; None finds it (``find_classifier``).
        feature_map: the name of the layer whose output is the last map; None finds it when a term needs maps.
        optional: features are not needed. Without one classifier layer that is called once they are [B, 0].
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: str | None = None,
        *,
        feature_map: str | None = None,
        optional: bool = False,
    ) -> None:
        super().__init__()
        self.optional = optional
        self.classifier_name: str | None = None
        # A layer that only its name suggests is compared with the logits by ``probe``.
        self.guessed = classifier is None and not callable(getattr(model, "get_classifier", None))
        self.map_name = feature_map
        self.map_source: MapSource | None = None  # set by ``probe`` when maps are needed
        self.channels_last = False
        # Filled by the hooks of one forward pass. The same lists every time, for those that torch.compile has traced.
        self._inputs: list[Tensor] = []
        self._maps: list[Tensor] = []
        self._compiled: Callable[[Tensor], Any] | None = None
        try:
            self.classifier_name = find_classifier(model, classifier)
        except ValueError:
            if classifier is not None or not optional:
                raise
        self.model = model

    def forward(self, images: Tensor) -> ModelOutput:
        """The ``ModelOutput``; RuntimeError unless the classifier layer is called once."""
        handles = []
        layer, source = self.classifier, self.map_source
        # Hooked per call: the user's module carries nothing of ours before or after.
        if layer is not None:
            handles.append(layer.register_forward_pre_hook(self._note_input))
        if source is not None:
            handles.append(self.model.get_submodule(source.layer).register_forward_hook(self._note_map))
        try:
            output, captured, maps = (self._compiled or self._traced)(images)
        finally:
            for handle in handles:
                handle.remove()
            # Empty on entering: a compiled graph is valid for lists of the length that it was traced with.
            self._inputs.clear()
            self._maps.clear()
        if len(captured) != 1 and not self.optional:
            raise RuntimeError(
                f"classifier: layer {self.classifier_name!r} of {type(self.model).__name__} was called {len(captured)} "
                f"times with positional input in one forward pass, expected once; for another layer, {_HOW_TO_NAME}"
            )
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
        return found

    @property
    def classifier(self) -> nn.Module | None:
        """The classifier layer."""
        return None if self.classifier_name is None else self.model.get_submodule(self.classifier_name)

    def compile(self, **options: Any) -> None:
        """Run the model through ``torch.compile``, with its ``options``, from now on; names and weights stay."""
        self._compiled = torch.compile(self._traced, **options)

    def _traced(self, images: Tensor) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The model's output, and what the hooks caught meanwhile."""
        return self._run(images), tuple(self._inputs), tuple(self._maps)

    def _note_input(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs.extend(args[:1])

    def _note_map(self, _layer: nn.Module, _args: Any, value: Tensor) -> None:
        self._maps.append(value)

    def _run(self, images: Tensor) -> Any:
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = next(self.model.parameters(), images).dtype
        if not (images.is_floating_point() and dtype.is_floating_point):
            return self.model(images)
        if dtype == torch.float32:
            return self.model(images.to(dtype))
        # Autocast is made for float32 models; others fail in it (float64 layers, fp16 batch norms).
        with torch.autocast(images.device.type, enabled=False):
            return self.model(images.to(dtype))


@torch.no_grad()
def probe(model: FeatureModel, images: Tensor, *, feature_map: bool = False) -> ModelShapes:
    """The shapes of ``model``, from one forward pass in eval mode; changes no state of the wrapped module.

    ``feature_map`` finds the last map too, in a second pass, and lets ``model`` return it from then on.

    Raises ValueError when the classifier layer is not as wide as the logits, or was found by its name and gives
    something else than the logits; or when there is no map.
    """
    images = images.to(next(model.parameters(), images).device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model.map_source = None  # a model may have been in another run, with other terms
    try:
        shapes = _check_classifier(model, images)
        if not feature_map:
            return shapes
        assert model.classifier_name is not None
        model.map_source = find_map(lambda: model(images).features, model.model, model.classifier_name, model.map_name)
        return replace(shapes, feature_map=model.map_source)
    finally:
        for module, mode in modes:
            module.training = mode


def _check_classifier(model: FeatureModel, images: Tensor) -> ModelShapes:
    """See ``probe``."""
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
    """Whether ``logits`` are the layer's output, up to pooling, a ReLU (SqueezeNet) or a softmax."""
    if not isinstance(value, Tensor) or logits.is_meta:
        return logits.is_meta
    for end in (lambda x: x, torch.relu, lambda x: x.log_softmax(1), lambda x: x.softmax(1)):
        found = pool_features(end(value), layer)
        if found.shape == logits.shape and torch.allclose(
            found.float(), logits.float(), rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            return True
    return False


def count_parameters(model: nn.Module) -> int:
    """Number of parameters (not buffers)."""
    return sum(parameter.numel() for parameter in model.parameters())
