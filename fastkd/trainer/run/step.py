"""One optimiser step: forward, backward, clipping, update; a step that is not finite changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.optim import build_optimizer, restore_optimizer, set_learning_rate
from fastkd.trainer.precision import autocast
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.distiller import Distiller, Trained
from fastkd.trainer.tasks.base import Task
from fastkd.validate import check_int, check_number


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


class TrainStep:
    """``step(batch, rank_weight, lr)`` -> loss, named terms, gradient norm.

    All three stay on the device, and nothing waits for it. (LARS and LAMB have no fused update: with them each step
    waits.) A loss or a gradient that is not finite leaves weights, optimiser and running statistics as they are. In
    fp16 this is also how the loss scale finds its size.

    ``deployed`` is the model that is evaluated: the exponential moving average of the student's weights and buffers if
    the config asks for one, else the student.
    """

    def __init__(
        self, distiller: Distiller, config: TrainConfig, device: torch.device, ranks: Ranks, task: Task
    ) -> None:
        self.distiller, self.config, self.device = distiller, config, device
        self.optimizer = build_optimizer(distiller, config.optim, device)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Outside fp16 the factor stays 1; all that is left of the scaler is that it skips steps.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if config.precision == "fp16" else 1.0)
        buffers = (*distiller.student.model.buffers(), *distiller.objective.buffers())
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.ema: MovingAverage | None = None
        self.deployed = distiller.student
        if config.ema is not None:
            self.ema = MovingAverage(distiller.student.model, config.ema)
            self.deployed = distiller.student.like(self.ema.module)
        self.trained: nn.Module | None = ranks.wrap(Trained(distiller, task, config.chunks))

    def __call__(self, batch: Any, rank_weight: float, lr: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        assert self.trained is not None
        set_learning_rate(self.optimizer, lr)
        before = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.precision):
            loss, terms = self.trained(batch, rank_weight)
        # A loss that is not finite turns every gradient into NaN on all ranks, so the scaler skips the step everywhere.
        self.scaler.scale(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.config.precision == "fp16" else 1.0)
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        if self.ema is not None:
            self.ema.update(self.distiller.student.model, norm.isfinite())
        return loss.detach(), terms, norm

    def close(self) -> None:
        """Let go of DistributedDataParallel, which holds the process group."""
        self.trained = None

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimiser and of the loss scale."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Take what ``state_dict`` returned after ``steps`` steps. KeyError, TypeError or ValueError otherwise."""
        restore_optimizer(self.optimizer, state["optimizer"], steps)
        saved, own = state["scaler"], self.scaler.state_dict()
        fixed = own.keys() - {"scale", "_growth_tracker"}
        if saved.keys() != own.keys() or any(saved[name] != own[name] for name in fixed):
            raise ValueError(f"scaler: got {str(saved)[:80]}, expected {own} with another scale")
        if own:
            check_number("scaler.scale", saved["scale"], 0.0, exclusive=True)
            check_int("scaler.growth_tracker", saved["_growth_tracker"], 0)
            check_number("scaler.growth_tracker", saved["_growth_tracker"], 0, 2**31)
        self.scaler.load_state_dict(saved)
