"""One optimiser step: forward, backward, clipping, update; a step that is not finite changes nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastkd.trainer.accumulate import average_gradients, cached_step
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.distiller import Distiller
from fastkd.trainer.evaluation import DTYPES
from fastkd.trainer.models import FeatureModel, ModelOutput
from fastkd.trainer.optim import build_optimizer, set_learning_rate
from fastkd.trainer.ranks import Ranks, StepFunction


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
        # Outside fp16 the factor is 1 and never grows; all that is left of the scaler is that it skips steps.
        scale, interval = (2.0**16, 2000) if config.precision == "fp16" else (1.0, 2**31 - 1)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval)
        self.statistics = [buffer for buffer in distiller.student.buffers() if buffer.is_floating_point()]
        self.ema: AveragedModel | None = None
        self.deployed = distiller.student
        if config.ema is not None:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(distiller.student.model, multi_avg_fn=average, use_buffers=True)
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
            self.scaler.scale(loss).backward()
        else:
            loss, terms = self._accumulate(images, labels, share)
        self.scaler.unscale_(self.optimizer)
        grads = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trainable, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        if self.ema is not None:
            self.ema.update_parameters(self.distiller.student.model)
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

        def backward(loss: Tensor) -> None:
            self.scaler.scale(loss).backward()

        buffers = list(self.distiller.student.buffers())
        found = cached_step(student, teach, objective, buffers, images, labels, share, self.chunks, backward)
        average_gradients(self.distiller, self.ranks.world_size)
        return found

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def close(self) -> None:
        """Let go of DistributedDataParallel, which holds the process group."""
        self._forward = None

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss scale; the moving average's weights are a file of their own."""
        averaged = None if self.ema is None else self.ema.n_averaged.cpu()
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "averaged": averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; KeyError, TypeError or ValueError for a state of something else."""
        saved = [group["names"] for group in state["optimizer"]["param_groups"]]
        current = [group["names"] for group in self.optimizer.param_groups]
        if saved != current:
            raise ValueError(f"its optimiser holds other parameters: {saved}, expected {current}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.n_averaged.copy_(state["averaged"])
