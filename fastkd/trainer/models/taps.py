"""Intermediate maps of a model, one per stage: the model, the user or timm names them, or they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd.trainer.models.maps import CONVOLUTIONS, PASS_ON, Call, prefix_tokens, trace

Shape = tuple[int, int, int]
MOST = 4  # stages whose maps are found, the last ones: as many as the usual networks for large images have
_HOW_TO_NAME = "name layers, from the first stage to the last, with ModelConfig(taps=(...)), as in --student.taps"


class Taps(NamedTuple):
    """The maps [B, C, H, W] of one forward pass.

    Attributes:
        maps: the last map of every stage, as the next stage gets it (most networks: after the activation).
        stem: what the first convolution gives, with its norm and its activation.
        preactivations: as many as ``maps``: what goes into the activation that gives a map, or the map itself where
            none does. Empty unless a term has ``needs_preactivations``.
    """

    maps: tuple[Tensor, ...]
    stem: Tensor
    preactivations: tuple[Tensor, ...] = ()


@dataclass(kw_only=True, frozen=True)
class TapShapes:
    """The shapes (C, H, W) of a model's ``Taps``, for images of one size.

    Attributes:
        maps, stem, preactivations: see ``Taps``. The shapes of the preactivations are always known.
        layers: the names of the layers that give the maps.
        norms: the batch norm that each preactivation comes out of, None where there is none.
        pooled: the features are a further map of 1 x 1 of the same images. Those of a detector are not: they are of
            regions.
    """

    maps: tuple[Shape, ...]
    stem: Shape
    preactivations: tuple[Shape, ...]
    layers: tuple[str, ...]
    norms: tuple[nn.Module | None, ...]
    pooled: bool = True


@dataclass(frozen=True)
class Tap:
    """Where a map is read: at the output of a layer, or at its input.

    Attributes:
        layer: the layer's name.
        shape: (C, H, W) of the map.
        of_input: the map is what the layer is given.
        call: which call of the layer it is. Blocks of ResNets call one ReLU twice.
        overwritten: a later layer works in place on the map, so that it is copied.
        channels_last: the layer has [B, H, W, C].
        prefix_tokens: of tokens [B, L, C] this many of the first stand for no position; the others are a square.
    """

    layer: str
    shape: Shape = (0, 0, 0)
    of_input: bool = False
    call: int = -1
    overwritten: bool = False
    channels_last: bool = False
    prefix_tokens: int = 0

    def read(self, value: Tensor) -> Tensor:
        """The map [B, C, H, W] in what the layer has."""
        if value.ndim == 3:
            tokens = value[:, self.prefix_tokens :]
            side = int(tokens.shape[1] ** 0.5)
            return tokens.mT.unflatten(2, (side, side))
        return value.movedim(-1, 1) if self.channels_last else value


@dataclass(frozen=True)
class TapSources:
    """Where the taps of a model are read, and the names of the batch norms before its activations."""

    maps: tuple[Tap, ...]
    stem: Tap
    preactivations: tuple[Tap, ...]
    norms: tuple[str | None, ...]
    with_preactivations: bool = False

    @property
    def every(self) -> tuple[Tap, ...]:
        """Those that are read."""
        return (self.stem, *self.maps, *(self.preactivations if self.with_preactivations else ()))

    def read(self, noted: Sequence[tuple[int, Tensor]]) -> Taps:
        """The taps in what was noted in one forward pass: the number of the tap in ``every``, and a value."""
        found = [
            tap.read([value for which, value in noted if which == number][tap.call])
            for number, tap in enumerate(self.every)
        ]
        count = len(self.maps)
        return Taps(tuple(found[1 : count + 1]), found[0], tuple(found[count + 1 :]))

    def shapes(self, model: nn.Module) -> TapShapes:
        """The shapes of all taps, and the batch norms."""
        return TapShapes(
            maps=tuple(tap.shape for tap in self.maps),
            stem=self.stem.shape,
            preactivations=tuple(tap.shape for tap in self.preactivations),
            layers=tuple(tap.layer for tap in self.maps),
            norms=tuple(None if name is None else model.get_submodule(name) for name in self.norms),
        )


def find_taps(
    run: Callable[[Tensor], Tensor], model: nn.Module, classifier: str, images: Tensor, given: Sequence[str] = ()
) -> TapSources:
    """The taps of ``model`` for images of this size, from one forward pass.

    The layers of the maps are ``given``, or what the model's attribute ``tap_layers`` says, or what timm's
    ``feature_info`` says. Otherwise they are found: of each resolution the last layer that everything passes through,
    and not only a branch. Of layers that nobody named, only those of the last four resolutions count.

    ``tap_layers`` is a dict: ``stem`` is a name, ``maps`` and ``preactivations`` are lists of names, and ``norms`` is a
    list of the names of the batch norms that the preactivations come out of, or None. A preactivation named by an
    activation is what this activation is given in its last call; by another layer, it is the layer's output.

    Args:
        run: calls the model once, in eval mode, and returns the features [B, D].
        classifier: the name of the classifier layer; only layers before it count.
        given: names of the layers of the maps.

    Raises:
        ValueError: there is no such layer, it gives no map, or no layer gives several positions.
    """
    with torch.enable_grad():
        start = images.detach().requires_grad_(images.is_floating_point()) * 1  # a model may work in place on it
        calls, _, output = trace(lambda: run(start), model, classifier)
    traced = _Traced(model, calls, images, _passed_by_all(start, output))
    declared = getattr(model, "tap_layers", None)
    if given:
        maps = [traced.last(name) for name in given]
    elif declared is not None:
        return _declared(declared, traced)
    else:
        maps = traced.of_timm() or traced.stages()
    if not maps:
        last = [f"{call.name} {tuple(call.value.shape)}" for call in calls][-6:]
        raise ValueError(
            f"taps: found no layer of {type(model).__name__} that gives a map [B, C, H, W] of several positions before "
            f"the classifier; {_HOW_TO_NAME} (its last layers: {last})"
        )
    before = [traced.preactivation(call) for call in maps]
    return TapSources(
        maps=tuple(traced.tap(call) for call in maps),
        stem=traced.tap(traced.stem() or maps[0]),
        preactivations=tuple(traced.tap(call, of_input=_is_activation(call.layer)) for call in before),
        norms=tuple(traced.norm(call) for call in before),
    )


def _declared(layers: Mapping[str, Any], traced: _Traced) -> TapSources:
    """The taps that a model's own ``tap_layers`` name."""
    before = [traced.last(name) for name in layers["preactivations"]]
    return TapSources(
        maps=tuple(traced.tap(traced.last(name)) for name in layers["maps"]),
        stem=traced.tap(traced.last(layers["stem"])),
        preactivations=tuple(traced.tap(call, of_input=_is_activation(call.layer)) for call in before),
        norms=tuple(layers["norms"]),
    )


@dataclass(frozen=True)
class _Traced:
    """The calls of one forward pass, and the nodes of its graph that everything passes; None if all of them count."""

    model: nn.Module
    calls: list[Call]
    images: Tensor
    passed: set[Any] | None

    def last(self, name: str) -> Call:
        """The last call of a layer that somebody named."""
        found = [call for call in self.calls if call.name == name]
        if found and (found[-1].value.ndim == 4 or (found[-1].value.ndim == 3 and self._is_square(found[-1].value))):
            return found[-1]
        got = f", which gives {tuple(found[-1].value.shape)}" if found else ""
        raise ValueError(
            f"taps: got {name!r}{got}, expected a layer of {type(self.model).__name__} that gives maps [B, C, H, W] or "
            f"a square of tokens [B, L, C] before the classifier is called; {_HOW_TO_NAME}"
        )

    def of_timm(self) -> list[Call]:
        """The maps of the last resolutions that timm's ``feature_info`` names; none if it is no description of maps."""
        described = getattr(self.model, "feature_info", None)
        infos = [info for info in described or () if isinstance(info, Mapping) and "module" in info]
        by_size: dict[Any, Call] = {}
        for info in infos:
            for call in self.calls:
                if call.name == info["module"] and self._has_positions(call):
                    by_size[self._size(call.value)] = call
        return list(by_size.values())[-MOST:]

    def stages(self) -> list[Call]:
        """Of each resolution the last call that everything passes through, of the last resolutions."""
        by_size: dict[Any, Call] = {}
        inside: dict[Any, Call] = {}
        for call in self.calls:
            if self._has_positions(call) and self._is_passed(call) and not self._passes_on(call):
                chosen = inside if self._begins_next_stage(call) else by_size
                chosen[self._size(call.value)] = call
        found = sorted({**inside, **by_size}.values(), key=self.calls.index)[-MOST:]
        tokens = [call for call in self.calls if call.value.ndim == 3]
        return [] if tokens and found[-1:] == [self.stem()] else found  # the patches of a transformer are no stage

    def stem(self) -> Call | None:
        """What there is before the second convolution, pooling apart; the only convolution itself."""
        convolutions = [i for i, call in enumerate(self.calls) if isinstance(call.layer, CONVOLUTIONS)]
        end = convolutions[1] if len(convolutions) > 1 else convolutions[0] + 1 if convolutions else 0
        found = [
            call
            for call in self.calls[:end]
            if self._has_positions(call) and self._is_passed(call) and "Pool" not in type(call.layer).__name__
        ]
        return found[-1] if found else None

    def preactivation(self, call: Call) -> Call:
        """The call of the activation that gives this map, or the call itself where none does."""
        for other in reversed(self.calls[: self.calls.index(call) + 1]):
            if other.value is call.value and _is_activation(other.layer) and other.given is not None:
                return other
        return call

    def norm(self, call: Call) -> str | None:
        """The last batch norm as wide as the map, and before the call; in a block it goes before the shortcut's."""
        holder = call.name.rpartition(".")[0]
        if _is_activation(call.layer) and isinstance(self.model.get_submodule(holder), _BatchNorm):
            return holder  # timm's, which has the activation inside
        end = self.calls.index(call)
        width = self.tap(call).shape[0]
        norms = [
            (other.name.count("."), -index, other.name)
            for index, other in enumerate(self.calls[: end + 1])
            if isinstance(other.layer, _BatchNorm) and other.layer.num_features == width
        ]
        near = [entry for entry in norms if -entry[1] >= self._begin_of_block(call)]
        return min(near)[2] if near else None

    def tap(self, call: Call, *, of_input: bool = False) -> Tap:
        """The tap at this call."""
        value = call.given if of_input and call.given is not None else call.value
        same = [other for other in self.calls if other.name == call.name]
        overwritten = value._version != (call.given_version if value is call.given and of_input else call.version)
        tap = Tap(call.name, of_input=of_input, call=same.index(call), overwritten=overwritten)
        if value.ndim == 3:
            tap = replace(tap, prefix_tokens=prefix_tokens(self.model, value.shape[1]))
        tap = replace(tap, channels_last=self._is_channels_last(value))
        C, H, W = tap.read(value).shape[1:]
        return replace(tap, shape=(C, H, W))

    def _begin_of_block(self, call: Call) -> int:
        """The index of the first call in the layer that holds this call, or of the call where nothing does."""
        parent = call.name.rpartition(".")[0]
        holder = f"{parent}." if call.given is not None and _is_activation(call.layer) else f"{call.name}."
        inside = [i for i, other in enumerate(self.calls) if other.name.startswith(holder) or other is call]
        return inside[0] if parent or holder != "." else 0

    def _begins_next_stage(self, call: Call) -> bool:
        """Whether a block that holds the call takes maps of this size and gives maps of another size.

        A sequence of layers is such a block if there is no third size in it.
        """
        size, parts = self._size(call.value), call.name.split(".")
        holders = {".".join(parts[:end]) for end in range(1, len(parts))}
        return any(
            self._size(other.given) == size != self._size(other.value)
            and (type(other.layer) is not nn.Sequential or len(self._sizes_in(other)) == 2)
            for other in self.calls
            if other.name in holders and other.value.ndim == 4 and other.given is not None and other.given.ndim == 4
        )

    def _sizes_in(self, holder: Call) -> set[torch.Size]:
        maps = [call for call in self.calls if call.name.startswith(f"{holder.name}.") and self._has_positions(call)]
        return {self._size(call.value) for call in maps}

    def _passes_on(self, call: Call) -> bool:
        """Whether the layer is none of a stage: dropout, or pooling to as many positions or more."""
        kept = call.given is not None and call.given.ndim == 4 and self._size(call.given) <= self._size(call.value)
        return isinstance(call.layer, PASS_ON) or (kept and "Pool" in type(call.layer).__name__)

    def _is_passed(self, call: Call) -> bool:
        return self.passed is None or call.node in self.passed

    def _has_positions(self, call: Call) -> bool:
        return call.value.ndim == 4 and self._size(call.value).numel() > 1

    def _size(self, value: Tensor) -> torch.Size:
        return value.shape[1:3] if self._is_channels_last(value) else value.shape[2:]

    def _is_channels_last(self, value: Tensor) -> bool:
        """Whether a map is [B, H, W, C]: it then has the images' proportions in these two places, and only there."""
        if value.ndim != 4 or self.images.ndim != 4:
            return False
        height, width = self.images.shape[2:]
        _, first, second, last = value.shape
        return abs(first * width - second * height) < abs(second * width - last * height)

    def _is_square(self, value: Tensor) -> bool:
        positions = value.shape[1] - prefix_tokens(self.model, value.shape[1])
        return positions > 1 and int(positions**0.5) ** 2 == positions


def _is_activation(layer: nn.Module) -> bool:
    return ".activation" in type(layer).__module__  # torch.nn.modules.activation, timm.layers.activations


def _passed_by_all(start: Tensor, end: Tensor) -> set[Any] | None:
    """The nodes of the autograd graph that every path from ``start`` to ``end`` passes. None without a graph.

    A node is one of them if the paths to it, times the paths from it, are as many as there are in all.
    """
    if start.grad_fn is None or end.grad_fn is None:
        return None
    order = list(_children_first(end.grad_fn))
    below: dict[Any, int] = dict.fromkeys(order, 0)
    above = dict(below)
    above[end.grad_fn] = 1
    for node in order:
        below[node] = 1 if node is start.grad_fn else sum(below[child] for child, _ in node.next_functions if child)
    for node in reversed(order):
        for child, _ in node.next_functions:
            if child:
                above[child] += above[node]
    return {node for node in order if below[node] * above[node] == below[end.grad_fn]}


def _children_first(root: Any) -> Iterator[Any]:
    """The nodes of the graph below ``root``, each once and after those that it leads to."""
    seen, stack = {root}, [(root, iter(root.next_functions))]
    while stack:
        node, children = stack[-1]
        child = next((child for child, _ in children if child and child not in seen), None)
        if child is None:
            yield node
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(child.next_functions)))
