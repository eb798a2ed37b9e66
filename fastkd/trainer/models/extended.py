"""Students that a method gives layers of its own: these stay in checkpoints, evaluations and exported files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import SimKDLoss
from fastkd.trainer.models.maps import MapSource
from fastkd.trainer.models.weights import CheckpointError
from fastkd.trainer.strict_json import check_fields

NOTE = "extension"  # the entry of a state dict that says how its model was extended
_PARTS = {"simkd": ("layers", "classifier"), "norm": ("layers", "back")}
_FIELDS = {"kind": str, "layer": str, "channels_last": bool, "classifier": str, "side": int}


@dataclass(frozen=True, kw_only=True)
class Extension:
    """How a student was extended.

    Attributes:
        kind: the method.
        layer: the layer whose output is the student's last map.
        channels_last: this output is [B, H, W, C].
        classifier: the student's own classifier layer.
        side: SimKD: a higher map is averaged to this height and width, the teacher's.
    """

    kind: Literal["simkd", "norm"]
    layer: str
    channels_last: bool
    classifier: str
    side: int = 0


class ExtendedModel(nn.Module):
    """A model with further layers behind its last map. It predicts with them, and ``layers`` gives the method's map.

    SimKD: ``layers`` is the projector. Its average goes to the teacher's classifier, which is copied and stays as it
    is. The model's own layers behind its map learn nothing.

    NORM: ``layers`` widens the map, and ``back`` brings it to its own width again. The sum of this and the map goes to
    the model's own layers.

    The state dict has the model's entries with the prefix ``model.``, those of the layers, and ``extension``: what is
    needed to put the layers back (``extended_like``).
    """

    def __init__(self, model: nn.Module, extension: Extension, layers: nn.Module, then: nn.Module) -> None:
        """``then``: SimKD's classifier, or the layer back of NORM."""
        super().__init__()
        self.model, self.how, self.layers = model, extension, layers
        if extension.kind == "simkd":
            self.classifier = then.requires_grad_(False)
        else:
            self.back = then
        note = json.dumps(asdict(extension)).encode()
        self.register_buffer(NOTE, torch.tensor(list(note), dtype=torch.uint8, device="cpu"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        # Hooked per call, so that the given module carries nothing of ours before or after it.
        maps: list[Tensor] = []
        handle = self.model.get_submodule(self.how.layer).register_forward_hook(partial(self._read, maps))
        try:
            logits: Any = self.model(images)
        finally:
            handle.remove()
        if self.how.kind == "simkd":
            x = maps[-1]  # of the last call, where the model uses the layer several times
            if x.shape[2] > self.how.side:
                x = F.adaptive_avg_pool2d(x, self.how.side)
            return self.classifier(self.layers(x).mean((2, 3)))
        return logits if isinstance(logits, Tensor) else logits.logits

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits, under the name that timm's models give this method."""
        return self.classifier if self.how.kind == "simkd" else self.model.get_submodule(self.how.classifier)

    @property
    def tap_layers(self) -> dict[str, Any] | None:
        """Those of the model, if it names any."""
        declared = getattr(self.model, "tap_layers", None)
        if declared is None:
            return None
        lists = {key: [name and f"model.{name}" for name in names] for key, names in declared.items() if key != "stem"}
        return {**lists, "stem": f"model.{declared['stem']}"}

    def _read(self, maps: list[Tensor], _layer: nn.Module, _args: Any, value: Tensor) -> Tensor:
        """The value that the model goes on with. The map that SimKD projects goes into ``maps``."""
        x = value.movedim(-1, 1) if self.how.channels_last else value
        if self.how.kind == "simkd":
            maps.append(x)
            return value
        x = x + self.back(self.layers(x))
        return x.movedim(1, -1) if self.how.channels_last else x


def extend_for_simkd(
    model: nn.Module,
    classifier: str,
    student: MapSource,
    teacher: MapSource,
    weight: Tensor,
    bias: Tensor | None,
    factor: int,
) -> ExtendedModel:
    """``model`` with SimKD's projector, and a copy of the teacher's classifier: its weight and its bias."""
    if factor > teacher.channels:
        raise ValueError(f"simkd.factor: got {factor}, expected at most the teacher's channels, {teacher.channels}")
    loss = SimKDLoss(student.channels, teacher.channels, factor)
    how = Extension(kind="simkd", layer=student.layer, channels_last=student.channels_last, classifier=classifier,
                    side=teacher.shape[1])  # fmt: skip
    taught = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    with torch.no_grad():
        taught.weight.copy_(weight)
        if bias is not None:
            taught.bias.copy_(bias)
    return ExtendedModel(model, how, loss.projector, taught)


def extend_for_norm(
    model: nn.Module, classifier: str, student: MapSource, teacher: MapSource, repeats: int
) -> ExtendedModel:
    """``model`` with NORM's two layers, 1x1 convolutions with batch norm."""
    how = Extension(kind="norm", layer=student.layer, channels_last=student.channels_last, classifier=classifier)
    return ExtendedModel(model, how, *_there_and_back(student.channels, repeats * teacher.channels))


def extended_like(model: nn.Module, state: Mapping[str, Tensor], source: Any) -> nn.Module:
    """``model``, extended as the model was whose state dict is ``state``; as it is if that was not extended.

    Raises CheckpointError, which names the ``source``, if what the state dict says about it is not valid.
    """
    if NOTE not in state or isinstance(model, ExtendedModel):
        return model
    try:
        values = json.loads(bytes(state[NOTE].tolist()))
        check_fields(values, _FIELDS, NOTE)
        how = Extension(**values)
        if how.kind not in ("simkd", "norm") or how.side < (how.kind == "simkd"):
            raise ValueError(f"{how.kind} with side {how.side}")
        for name in (how.layer, how.classifier):
            model.get_submodule(name)
        with torch.device("meta"):  # a file may claim sizes that it does not have
            parts = _layers_of(how, state)
        for prefix, part in zip(_PARTS[how.kind], parts, strict=True):
            for name, value in part.state_dict(prefix=f"{prefix}.").items():
                if state[name].shape != value.shape:
                    raise ValueError(f"{name} has the shape {list(state[name].shape)}")
        return ExtendedModel(model, how, *_layers_of(how, state))
    except Exception as error:  # the entry comes from a file
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{source}: {NOTE} does not say how its model was extended ({reason})") from error


def _layers_of(how: Extension, state: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """What ``ExtendedModel`` takes, in the sizes of a state dict."""
    first = state["layers.0.weight"]
    if how.kind == "norm":
        return _there_and_back(first.shape[1], len(first))
    wide, weight = len(state["layers.6.weight"]), state["classifier.weight"]
    taught = nn.Linear(weight.shape[1], len(weight), bias="classifier.bias" in state)
    return SimKDLoss(first.shape[1], wide, wide // len(first)).projector, taught


def _there_and_back(channels: int, wide: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A 1x1 convolution with batch norm to so many channels, and one back."""
    pairs = (channels, wide), (wide, channels)
    there, back = (nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b)) for a, b in pairs)
    return there, back
