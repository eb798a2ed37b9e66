"""Cached accumulation: one optimiser step over k chunks whose negatives span the whole batch, exactly.

Summing the losses of chunks would contrast a sample only with those of its own chunk. Here every chunk is first run
without a graph, and only the student's outputs are kept; the objective sees them all at once and gives their gradient;
then every chunk is run again, with the random numbers and the buffers it had, and that gradient is taken back through
it. Memory is that of one chunk's activations and the whole batch's outputs; time that of one more forward pass.
(Gradient caching: arXiv 2101.06983.) Batch norm normalises with a chunk's own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.rng import _generators, _set_generators


def cached_step(
    student: Callable[[Tensor], ModelOutput],
    teach: Callable[[Tensor], ModelOutput | None],
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    buffers: list[Tensor],
    images: Tensor,
    labels: Tensor,
    share: float,
    chunks: int,
    backward: Callable[[Tensor], None],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms over all images; the gradients are added to the parameters' as ``backward(loss)`` would.

    ``student``, ``teach`` and ``objective`` each enter autocast by themselves: it would keep the weights converted in
    the first pass, which lead to no gradient. ``buffers``: the student's, which a forward pass may change. There are at
    most as many chunks as images.
    """
    parts = images.tensor_split(min(chunks, len(images)))
    before = [buffer.clone() for buffer in buffers]
    generators = []
    with torch.no_grad():
        outputs = []
        for part in parts:
            generators.append(_generators(images.device))
            outputs.append(student(part))
        taught = [teach(part) for part in parts]
    afterwards = _generators(images.device)

    joined = join_outputs(outputs)
    leaves = {name: value.requires_grad_() for name, value in _tensors(joined).items() if value.is_floating_point()}
    teacher = None if taught[0] is None else join_outputs([output for output in taught if output is not None])
    loss, terms = objective(joined, teacher, labels, share)
    backward(loss)

    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    start = 0
    for part, state in zip(parts, generators, strict=True):
        _set_generators(state, images.device)
        found = _tensors(student(part))
        rows = slice(start, start + len(part))
        used = [name for name, leaf in leaves.items() if leaf.grad is not None and found[name].requires_grad]
        torch.autograd.backward([found[name] for name in used], [leaves[name].grad[rows] for name in used])  # type: ignore[index]
        start += len(part)
    _set_generators(afterwards, images.device)
    return loss.detach(), terms


def join_outputs(outputs: list[ModelOutput]) -> ModelOutput:
    """The outputs of consecutive chunks as those of one batch; what is no tensor is taken from the first."""
    first = outputs[0]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(output, name) for output in outputs]) for name in _tensors(first)
    }
    return dataclasses.replace(first, **joined)


def _tensors(output: ModelOutput) -> dict[str, Tensor]:
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def average_gradients(module: nn.Module, world_size: int) -> None:
    """The mean over the ranks of all gradients of ``module``, in one all-reduce for each dtype."""
    if world_size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= world_size
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
