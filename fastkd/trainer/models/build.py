"""Builds the model that a config names, and tells how the images of its weights were normalised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from fastkd.trainer.imports import import_object
from fastkd.trainer.models.published import torchvision_weights
from fastkd.validate import check_choice, check_int, check_number, check_type

DETECTOR = "faster-rcnn"  # what the names of our detectors begin with
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    """How to build a model, and which weights it starts from.

    Attributes:
        name: ``timm:NAME``, ``torchvision:NAME``, ``cifar:NAME`` (``fastkd.trainer.models.cifar.NETWORKS``),
            ``package.module:callable``, or a bare name, which is looked up in timm first and then in torchvision. NAME
            may say which published weights are meant, as in ``timm:resnet50.tv_in1k`` and
            ``torchvision:resnet50.IMAGENET1K_V1``; else they are the library's default. Detectors are
            ``faster-rcnn:timm:NAME``, ``faster-rcnn:torchvision:NAME``, ``faster-rcnn:small`` and
            ``torchvision:fasterrcnn_...``: see ``fastkd.trainer.models.detection.build``.
        num_classes: the width of the logits. None leaves it to the builder. 0 is for an encoder.
        classifier: the name of the classifier layer, such as ``head.fc``. None finds it.
        feature_map: the name of the layer whose output is the last feature map, such as ``layer4``. None finds it.
        taps: the names of the layers whose outputs are the intermediate maps, from the first stage to the last, such as
            ``layer1 layer2 layer3``. None finds them. Student and teacher need equally many.
        weights: a file of weights (``.safetensors``, or what ``torch.save`` wrote), a fastkd checkpoint or run folder.
        pretrained: take the published weights of timm / torchvision, which are downloaded. ``weights`` switch it off.
            A ``faster-rcnn:...`` takes those of its backbone.
        normalization: (means, standard deviations) of the channels of the images that the weights were trained with.
            None asks timm / torchvision about their published weights; other weights are taken to have been trained
            with the normalisation of the data.
        dtype: what a teacher's weights are kept and computed in. A student is always fp32.
        fold: compute a teacher with its batch norms folded into its convolutions, where that can be done: faster, and
            equal up to rounding. A student never is.
        min_accuracy: the top-1 accuracy in [0, 1] that a teacher must reach before training starts.
        options: further keyword arguments of the builder.

    Example:
        >>> teacher = ModelConfig(name="timm:resnet50.tv_in1k", pretrained=True, min_accuracy=0.75)
        >>> student = ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 8})
    """

    name: str
    num_classes: int | None = None
    classifier: str | None = None
    feature_map: str | None = None
    taps: tuple[str, ...] | None = None
    weights: str | None = None
    pretrained: bool = False
    normalization: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    fold: bool = False
    min_accuracy: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_type("model.name", self.name, str)
        if not self.name:
            raise ValueError("model.name: got '', expected a model's name")
        if self.num_classes is not None:
            check_int("model.num_classes", self.num_classes, 0)
        check_type("model.options", self.options, dict)
        if self.taps is not None:
            check_type("model.taps", self.taps, (tuple, list))
            for name in self.taps:
                check_type("model.taps", name, str)
        check_type("model.pretrained", self.pretrained, bool)
        if self.weights is not None:
            object.__setattr__(self, "pretrained", False)
        if self.normalization is not None:
            check_normalization("model.normalization", self.normalization)
        check_choice("model.dtype", self.dtype, ("fp32", "bf16", "fp16"))
        check_type("model.fold", self.fold, bool)
        if self.fold and self.dtype != "fp32":
            raise ValueError(f"model.fold: got True with dtype {self.dtype!r}, expected 'fp32'")
        if self.min_accuracy is not None:
            check_number("model.min_accuracy", self.min_accuracy, 0.0, 1.0)

    def without_weights(self) -> ModelConfig:
        """The same model as its builder initialises it, for weights that come from elsewhere."""
        return replace(self, pretrained=False, weights=None)


def check_normalization(name: str, value: Any) -> None:
    """Raise unless ``value`` has as many means as standard deviations, and the standard deviations are positive."""
    if len(value) != 2 or len(value[0]) != len(value[1]) or not value[0]:
        raise ValueError(f"{name}: got {value}, expected (means, standard deviations), a number for each channel")
    for mean in value[0]:
        check_number(name, mean)
    for std in value[1]:
        check_number(name, std, 0.0, exclusive=True)


@contextmanager
def _quiet_if_empty(config: ModelConfig) -> Iterator[None]:
    """Leaves out the warnings of torch that a classifier layer without outputs needs no initialisation."""
    with warnings.catch_warnings():
        if config.num_classes == 0:
            warnings.filterwarnings("ignore", "Initializing zero-element")
        yield


def build_model(config: ModelConfig, role: str = "model") -> nn.Module:
    """The module that ``config.name`` names. ``config.weights`` are not loaded (see ``load_weights``).

    ``role`` is what the messages call it: ``student`` and ``teacher`` are the names of the flags.

    Raises:
        ValueError: the name is unknown, ``pretrained`` is set for a ``package.module:callable``, or an option is
            reserved.
        TypeError: the callable did not return an ``nn.Module``.
        OSError: the published weights cannot be downloaded.

    Example:
        >>> model = build_model(ModelConfig(name="torchvision:resnet18", num_classes=10))
    """
    with _quiet_if_empty(config):
        return _build(config, role)


def _build(config: ModelConfig, role: str) -> nn.Module:
    options = dict(config.options)
    if config.num_classes is not None:
        options["num_classes"] = config.num_classes
    source, _, name = config.name.rpartition(":")
    if is_detector(config.name):
        with _told_if_offline(config, role):
            return _detector(config, role, options)
    if source in ("timm", ""):
        import timm

        if timm.is_model(name):
            if "checkpoint_path" in options:
                raise ValueError(f"{role}.options: got 'checkpoint_path', expected the file in {role}.weights")
            with _told_if_offline(config, role):
                return timm.create_model(name, pretrained=config.pretrained, **options)
        if source == "timm":
            raise ValueError(f"{role}.name: got {config.name!r}, expected a model that timm.list_models() knows")
    if source in ("torchvision", ""):
        import torchvision

        known, _, _ = name.partition(".")
        if known in torchvision.models.list_models():
            weights = torchvision_weights(name)
            with _told_if_offline(config, role):
                return torchvision.models.get_model(known, weights=weights if config.pretrained else None, **options)
        raise ValueError(
            f"{role}.name: got {config.name!r}, expected 'package.module:callable' or a model that "
            f"{'torchvision' if source else 'timm or torchvision'} knows"
        )
    if config.pretrained:
        raise ValueError(f"{role}.pretrained: got True with name={config.name!r}, expected a timm or torchvision model")
    build = _cifar_network(name, role) if source == "cifar" else import_object(config.name, f"{role}.name")
    if not callable(build):
        raise TypeError(f"{role}.name: {config.name!r} is no function, but of type {type(build).__name__}")
    model = build(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{role}.name: {config.name!r} returned {type(model).__name__}, expected an nn.Module")
    return model


def is_detector(name: str) -> bool:
    """Whether a model of this name is one of our detectors, or one that torchvision publishes."""
    return name.startswith((f"{DETECTOR}:", "torchvision:fasterrcnn_"))


def _detector(config: ModelConfig, role: str, options: dict[str, Any]) -> nn.Module:
    from fastkd.trainer.models.detection.build import faster_rcnn, published_detector

    source, _, name = config.name.partition(":")
    build = faster_rcnn if source == DETECTOR else published_detector
    try:
        return build(name, pretrained=config.pretrained, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{role}.name {config.name!r} with --{role}.options: {error}") from error


def _cifar_network(name: str, role: str) -> Callable[..., nn.Module]:
    from fastkd.trainer.models.cifar import NETWORKS

    if name not in NETWORKS:
        raise ValueError(f"{role}.name: got 'cifar:{name}', expected one of cifar:{', '.join(NETWORKS)}")
    return NETWORKS[name]


@contextmanager
def _told_if_offline(config: ModelConfig, role: str) -> Iterator[None]:
    """Turns what a failed download raises, of whichever library, into an OSError that says what to do without one."""
    try:
        yield
    except Exception as error:
        network = ("huggingface_hub", "httpx", "requests", "urllib3")
        if not config.pretrained or not (isinstance(error, OSError) or type(error).__module__.startswith(network)):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        flag = "fastkd eval FILE --model NAME" if role == "model" else f"--{role}.weights FILE"
        raise OSError(
            f"{role}.pretrained: the weights of {config.name!r} cannot be downloaded ({reason}); without a network "
            f"give a local file: {flag}"
        ) from error


def trained_normalization(config: ModelConfig, model: nn.Module) -> Normalization | None:
    """The normalisation that the weights of ``model``, built from ``config``, were trained with. None if unknown."""
    if config.normalization is not None:
        mean, std = config.normalization
    elif not config.pretrained:
        return None
    elif is_detector(config.name):
        transform: Any = model.transform
        mean, std = transform.image_mean, transform.image_std
    elif hasattr(model, "pretrained_cfg"):
        import timm

        found = timm.data.resolve_model_data_config(model)
        mean, std = found["mean"], found["std"]
    else:
        transforms = torchvision_weights(config.name.rpartition(":")[2]).transforms()
        mean, std = transforms.mean, transforms.std
    return tuple(map(float, mean)), tuple(map(float, std))


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
