"""Wraps an encoder: a model whose output, or whose penultimate features, are the embedding of its input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastkd.trainer.models.features import FeatureModel, ModelOutput, ModelShapes, evaluating, measure_shapes
from fastkd.trainer.models.maps import pool_features

# The networks of these packages are made to classify.
_CLASSIFIERS = ("timm.", "torchvision.", "fastkd.trainer.models.")
# Where an output that is no tensor has its embedding, as in Hugging Face's models.
ATTRIBUTES = ("image_embeds", "text_embeds", "pooler_output")


class EncoderModel(FeatureModel):
    """A model that gives an embedding [B, D] of its input.

    The embedding of a network of timm, torchvision or fastkd is what its classifier layer is given, averaged over its
    positions, or its output where it has no such layer. The embedding of any other module is its output: a tensor
    [B, D], or an object with one in ``image_embeds``, ``text_embeds`` or ``pooler_output``. With ``classifier`` it is
    what the layer of this name is given.

    The input may be a tensor, as for a ``FeatureModel``, a dict, whose values are the model's keyword arguments, or a
    tuple of its arguments.

    Args:
        model: any module.
        classifier: the name of the layer whose input is the embedding.
        taps: the names of the layers whose outputs are the intermediate maps. None finds them when a term needs them.

    Example:
        >>> from torch import nn
        >>> student = EncoderModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 32)))
        >>> output = student(torch.randn(8, 1, 8, 8))
        >>> output.features.shape, output.logits.shape
        (torch.Size([8, 32]), torch.Size([8, 0]))
    """

    def __init__(self, model: nn.Module, classifier: str | None = None, *, taps: Sequence[str] | None = None) -> None:
        super().__init__(model, classifier, taps=taps, optional=True)
        if classifier is None and not type(model).__module__.startswith(_CLASSIFIERS):
            self.classifier_name = None

    def forward(self, given: Any) -> ModelOutput:
        """The embedding as ``features``; ``logits`` are [B, 0].

        TypeError for an output that is no embedding; RuntimeError unless the layer ``classifier`` is called once.
        """
        output, captured, _, tapped = self._caught(given)
        layer = self.classifier
        if layer is not None:
            if len(captured) != 1:
                raise self._called(len(captured))
            output = pool_features(captured[0], layer)
        embedding = _embedding_in(output)
        if embedding is None or embedding.ndim != 2 or not embedding.shape[1] or not embedding.is_floating_point():
            got = type(output).__name__ if embedding is None else f"{embedding.dtype} {list(embedding.shape)}"
            raise TypeError(
                f"{type(self.model).__name__} returned {got}, expected an embedding [B, D] in floating point, or an "
                f"object that has one in {' or '.join(ATTRIBUTES)}"
            )
        taps = None if self.tap_sources is None else self.tap_sources.read(tapped)
        return ModelOutput(embedding.new_empty((len(embedding), 0)), embedding, taps=taps)

    def like(self, model: nn.Module) -> EncoderModel:
        """``model``, a copy of the wrapped one, with the same input and the same embedding."""
        other = EncoderModel(model, self.classifier_name)
        other.take_images(*(self.conversion or (None,)))
        return other

    def plain(self) -> nn.Module:
        """A copy of the model whose output for images is the embedding, in eval mode: what an exporter can follow."""
        copy = deepcopy(self.model).eval()
        if self.classifier_name is not None:
            copy.set_submodule(self.classifier_name, nn.Identity())
        return _Plain(copy, self.classifier)

    def measure(self, images: Any, **reads: bool) -> ModelShapes:
        """The width of the embedding, and the shapes of the taps if they are asked for: see ``measure_shapes``.

        Raises ValueError for a last feature map, and for taps of an input that is no tensor.
        """
        if reads.get("feature_map"):
            raise ValueError("objective.terms: got a term of the last feature map, which an encoder does not give")
        if isinstance(images, Tensor):
            return measure_shapes(self, images, **reads)
        if reads.get("taps"):
            kind = type(images).__name__
            raise ValueError(f"objective.terms: got a term of feature maps with inputs of type {kind}, expected images")
        device = next((parameter.device for parameter in self.parameters()), None)
        with evaluating(self):
            embedding = self(tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, images)).features
        return ModelShapes(features=embedding.shape[1], classes=0)

    def _run(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return super()._run(given)
        dtype = next((parameter.dtype for parameter in self.model.parameters()), torch.float32)
        device = next((x.device.type for x in tree_leaves(given) if isinstance(x, Tensor)), "cpu")
        given = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, given)
        with nullcontext() if dtype == torch.float32 else torch.autocast(device, enabled=False):
            return self.model(**given) if isinstance(given, dict) else self.model(*given)


class _Plain(nn.Module):
    """``model``, in which the layer ``classifier`` passes its input on."""

    def __init__(self, model: nn.Module, classifier: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self._classifiers = (classifier,)  # in a tuple: it is none of this module's layers

    def forward(self, images: Tensor) -> Any:
        output, (classifier,) = self.model(images), self._classifiers
        return _embedding_in(output) if classifier is None else pool_features(output, classifier)


def _embedding_in(output: Any) -> Tensor | None:
    """The output itself if it is a tensor, else the embedding that it has in one of ``ATTRIBUTES``."""
    if isinstance(output, Tensor):
        return output
    found = (getattr(output, name, None) for name in ATTRIBUTES)
    return next((value for value in found if isinstance(value, Tensor)), None)
