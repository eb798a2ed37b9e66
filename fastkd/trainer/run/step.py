"""One optimiser step: forward, backward, clipping, update; a step that is not finite changes nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.features import FeatureModel, ModelOutput
from fastkd.trainer.optim import build_optimizer, set_learning_rate
from fastkd.trainer.precision import DTYPES
from fastkd.trainer.run.accumulate import average_gradients, cached_step
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.ema import MovingAverage
from fastkd.trainer.run.ranks import Ranks, StepFunction


class TrainStep:
    """``step(images, labels, share, lr)`` -> loss, named terms, gradient norm; all on the device, nothing waits for it.

    A loss or a gradient that is not finite leaves weights, optimiser and running statistics as they are. In fp16 that
    is also how the loss scale finds its size. (LARS and LAMB have no fused update: with them each step waits.)

    ``deployed`` is what is evaluated: the exponential moving average of the student's weights and buffers if the config
    asks for one, else the student.
    """

    def __init__(self, distiller: Distiller, config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
        self.distiller, self.device = distiller, device
        self.precision, self.clip_norm = config.precision, config.optim.clip_norm
        self.chunks, self.ranks = config.chunks, ranks
        self.optimizer = build_optimizer(distiller, config.optim, device)
        self.trainable = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Outside fp16 the factor stays 1; all that is left of the scaler is that it skips steps.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if config.precision == "fp16" else 1.0)
        buffers = (*distiller.student.buffers(), *distiller.objective.buffers())
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.ema: MovingAverage | None = None
        self.deployed = distiller.student
        if config.ema is not None:
            self.ema = MovingAverage(distiller.student.model, config.ema)
            self.deployed = FeatureModel(self.ema.module, distiller.student.classifier_name, optional=True)
        self._forward: StepFunction | None = ranks.step(distiller) if self.chunks == 1 else None
        if self.chunks > 1:
            ranks.share_state(distiller)

    def __call__(
        self, images: Tensor, labels: Tensor, share: float, lr: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        set_learning_rate(self.optimizer, lr)
        before = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        if self._forward is not None:
            with self._autocast():
                loss, terms = self._forward(images, labels, share)
            self._backward(loss)
        else:
            loss, terms = self._accumulate(images, labels, share)
        self.scaler.unscale_(self.optimizer)
        grads = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trainable, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == "fp16" else 1.0)
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        if self.ema is not None:
            self.ema.update(self.distiller.student.model, norm.isfinite())
        return loss.detach(), terms, norm

    def _accumulate(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        def student(part: Tensor) -> ModelOutput:
            with self._autocast():
                return self.distiller.student(part)

        def teach(part: Tensor) -> ModelOutput | None:
            with self._autocast():
                return self.distiller.teach(part)

        def objective(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
            with self._autocast():
                return self.distiller.objective(*arguments)

        buffers = list(self.distiller.student.buffers())
        found = cached_step(student, teach, objective, buffers, images, labels, share, self.chunks, self._backward)
        average_gradients(self.distiller, self.ranks.world_size)
        return found

    def _backward(self, loss: Tensor) -> None:
        """A loss that is not finite makes all gradients so, on every rank: gradients decide what is skipped."""
        self.scaler.scale(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def close(self) -> None:
        """Let go of DistributedDataParallel, which holds the process group."""
        self._forward = None

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss scale; the moving average's weights are a file of their own."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; KeyError, TypeError or ValueError for a state of something else."""
        saved = [group["names"] for group in state["optimizer"]["param_groups"]]
        current = [group["names"] for group in self.optimizer.param_groups]
        if saved != current:
            raise ValueError(f"its optimiser holds other parameters: {saved}, expected {current}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
