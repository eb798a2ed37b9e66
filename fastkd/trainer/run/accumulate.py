"""Exact accumulation: the model's output for a whole batch, with the activations of one chunk in memory at a time.

Summing the losses of chunks would contrast a sample with the samples of its own chunk only. Here the objective sees the
outputs for the whole batch, and its gradient is exact. The forward pass keeps the outputs and drops the activations; in
the backward pass each chunk is run again, with the random numbers and the buffers that it had. The price is one more
forward pass. (Gradient caching: arXiv 2101.06983.) Batch norm normalises with a chunk's own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.models.taps import Taps
from fastkd.trainer.rng import restore_rng, rng_state


def in_chunks(model: Callable[[Tensor], ModelOutput], images: Tensor, chunks: int) -> ModelOutput:
    """``model(images)``, computed on at most ``chunks`` parts of the images, one after the other."""
    if chunks == 1:
        return model(images)
    return join_outputs([model(part) for part in images.tensor_split(min(chunks, len(images)))])


def recomputed(model: nn.Module, images: Tensor) -> ModelOutput:
    """``model(images)``, whose activations are computed a second time in the backward pass instead of being kept."""
    before = _Snapshot(model, images.device)

    @contextmanager
    def as_before() -> Iterator[None]:
        """For the second pass: the generators and buffers of the first one."""
        now = _Snapshot(model, images.device)
        before.restore()
        try:
            yield
        finally:
            now.restore()

    # Not stopped early: the second pass must end where the first one did for a model that notes what it computes.
    output: ModelOutput = checkpoint(
        model,
        images,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), as_before()),
        early_stop=False,
    )
    return output


class _Snapshot:
    """What a forward pass reads and changes beside the weights: the random number generators and the buffers."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self.rng = device, rng_state(device)
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        restore_rng(self.rng, self.device)
        for buffer, value in self.buffers:
            buffer.copy_(value)


def join_outputs(outputs: list[ModelOutput]) -> ModelOutput:
    """One output for the whole batch: the chunks' tensors joined in order; all other fields are the first chunk's."""
    first = outputs[0]
    joined: dict[str, Any] = {
        field.name: tree_map(lambda *parts: torch.cat(parts), *(getattr(output, field.name) for output in outputs))
        for field in dataclasses.fields(first)
        if isinstance(getattr(first, field.name), Tensor | Taps)
    }
    return dataclasses.replace(first, **joined)
