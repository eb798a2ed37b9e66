"""The exponential moving average of a model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """Keeps ``module``, the average; after every step it is ``decay`` times itself plus ``1 - decay`` times the model.

    Nothing waits for the device. Running statistics are averaged like weights. Integers, and buffers that hold
    infinities (attention masks), are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._averaged = {
            name for name, value in _state(model).items() if value.is_floating_point() and bool(value.isfinite().all())
        }

    @torch.no_grad()
    def update(self, model: nn.Module, is_step: Tensor) -> None:
        """Take in the model after a step; where ``is_step``, 0-dim, is false, nothing changes."""
        own, new = _state(self.module), _state(model)
        mine = [own[name] for name in own if name in self._averaged]
        differences = torch._foreach_sub([new[name] for name in own if name in self._averaged], mine)
        torch._foreach_mul_(differences, torch.where(is_step, 1 - self.decay, 0.0))
        torch._foreach_add_(mine, differences)
        for name in own.keys() - self._averaged:
            own[name].copy_(new[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
