"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastkd.validate import check_choice, check_int, check_number, check_type


@dataclass(kw_only=True, frozen=True)
class OptimConfig:
    """The optimiser, and the learning rate over time::

        OptimConfig(lr=0.1, schedule="step", milestones=(30, 60, 90))
        OptimConfig(name="lamb", lr=8e-3, reference_batch=2048, lr_rule="sqrt", warmup_epochs=5)

    Attributes:
        name: SGD, or LARS for large batches; AdamW, or LAMB for large batches.
        lr: the peak of the learning rate.
        reference_batch: ``lr`` is the peak for a batch of this size, and grows with the global batch. None: for any.
        lr_rule: with ``reference_batch``, times the quotient of the batches (``linear``) or its root (``sqrt``).
        momentum: of SGD and LARS.
        nesterov: Nesterov's momentum, of SGD and LARS.
        betas: decays of the moments of AdamW and LAMB.
        weight_decay: of the parameters that ``decayed`` names. The layer-wise rates of LARS and LAMB reach these, too.
        decayed: ``weights`` are the parameters with two or more dimensions, which leaves out biases, norms and tau.
            ``all`` are all that are trained, heads and connectors included, as in most papers' code.
        trust_coefficient: of LARS.
        schedule: after the warm-up a cosine to ``min_lr``, steps (``gamma`` at each of ``milestones``) or constant.
        per_epoch: after the warm-up, the learning rate of an epoch's first step is that of the whole epoch.
        warmup_epochs: the first epochs, in which the learning rate rises linearly to the peak. Fewer than all epochs.
        min_lr: where the cosine ends.
        milestones: with ``schedule`` step, the epochs at which the learning rate falls.
        gamma: what it is multiplied by there.
        clip_norm: bound of the norm of all gradients together. None: unbounded.
    """

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    lr: float = 0.05
    reference_batch: int | None = None
    lr_rule: Literal["linear", "sqrt"] = "linear"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    decayed: Literal["weights", "all"] = "weights"
    trust_coefficient: float = 0.001
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    per_epoch: bool = False
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, _BUILDERS)
        check_number("optim.lr", self.lr, 0.0, exclusive=True)
        if self.reference_batch is not None:
            check_int("optim.reference_batch", self.reference_batch, 1)
        check_choice("optim.lr_rule", self.lr_rule, ("linear", "sqrt"))
        check_number("optim.trust_coefficient", self.trust_coefficient, 0.0, exclusive=True)
        _check_below_one("optim.momentum", self.momentum)
        check_type("optim.nesterov", self.nesterov, bool)
        check_type("optim.betas", self.betas, (tuple, list))
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas: got {self.betas}, expected two numbers")
        for beta in self.betas:
            _check_below_one("optim.betas", beta)
        check_number("optim.weight_decay", self.weight_decay, 0.0)
        check_choice("optim.decayed", self.decayed, ("weights", "all"))
        check_type("optim.per_epoch", self.per_epoch, bool)
        check_choice("optim.schedule", self.schedule, ("cosine", "step", "constant"))
        check_number("optim.warmup_epochs", self.warmup_epochs, 0.0)
        check_number("optim.min_lr", self.min_lr, 0.0)
        check_type("optim.milestones", self.milestones, (tuple, list))
        for milestone in self.milestones:
            check_number("optim.milestones", milestone, 0.0)
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"optim.milestones: got {self.milestones} with schedule={self.schedule!r}, expected epochs with "
                "schedule='step' and none otherwise"
            )
        check_number("optim.gamma", self.gamma, 0.0, 1.0, exclusive=True)
        if self.clip_norm is not None:
            check_number("optim.clip_norm", self.clip_norm, 0.0, exclusive=True)


def _check_below_one(name: str, value: float) -> None:
    check_number(name, value, 0.0, 1.0)
    if value == 1.0:
        raise ValueError(f"{name}: got {value}, expected a number >= 0 and < 1")


class Schedule:
    """The learning rate as a pure function of the step, so that nothing of it needs saving.

    With peak ``lr``, warm-up of ``w`` steps and ``total`` steps, at step k = 0, 1, ...:
    ``lr (k + 1) / w`` for k < w; then ``min_lr + (lr - min_lr) (1 + cos(pi (k - w) / (total - w))) / 2`` (cosine),
    ``lr gamma^(number of milestones reached)`` (step) or ``lr`` (constant). With ``per_epoch``, the k of the
    schedule is the first step of its epoch.
    """

    def __init__(self, config: OptimConfig, *, steps_per_epoch: int, epochs: int, global_batch: int) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.total = steps_per_epoch * epochs
        self.warmup = round(config.warmup_epochs * steps_per_epoch)
        if self.warmup >= self.total > 0:
            raise ValueError(
                f"optim.warmup_epochs: got {config.warmup_epochs}, expected less than epochs={epochs} "
                "(--optim.warmup-epochs 0 leaves it out)"
            )
        self.milestones = [milestone * steps_per_epoch for milestone in config.milestones]
        self.peak = config.lr
        self.rule = f"lr {config.lr:g}"
        if config.reference_batch is not None:
            factor = global_batch / config.reference_batch
            self.peak = config.lr * (factor if config.lr_rule == "linear" else math.sqrt(factor))
            shown = f"{global_batch} / {config.reference_batch}"
            shown = shown if config.lr_rule == "linear" else f"sqrt({shown})"
            self.rule = f"lr {self.peak:g} = {config.lr:g} x {shown}"
        if config.min_lr > self.peak:
            raise ValueError(f"optim.min_lr: got {config.min_lr}, expected at most the peak learning rate {self.peak}")
        self.rule += f", {config.schedule}{' per epoch' if config.per_epoch else ''}"
        self.rule += f", warm-up {self.warmup} steps" if self.warmup else ""

    def __call__(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.config.per_epoch:
            step = max(step - step % self.steps_per_epoch, self.warmup)
        if self.config.schedule == "cosine":
            done = (step - self.warmup) / (self.total - self.warmup)
            return self.config.min_lr + (self.peak - self.config.min_lr) * (1 + math.cos(math.pi * done)) / 2
        reached = sum(step >= milestone for milestone in self.milestones)
        return self.peak * self.config.gamma**reached


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """All trainable parameters in two groups: those of two or more dimensions, which are decayed, and the others.

    Biases, norm weights, tau, positional scalars and gains have fewer dimensions. They are decayed with
    ``decayed="all"`` alone.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else rest).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": decay,
        }
        for members, decay in ((decayed, config.weight_decay), (rest, config.weight_decay * (config.decayed == "all")))
        if members
    ]


def build_optimizer(module: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser over every trainable parameter of ``module``: student, projection heads and tau."""
    groups = parameter_groups(module, config)
    if not groups:
        raise ValueError("student: has no trainable parameter")
    # One fused kernel instead of a Python loop over parameters; fp32 and fp64 parameters on CPU and CUDA have it.
    return _BUILDERS[config.name](groups, config, device.type in ("cpu", "cuda"))


Groups = list[dict[str, Any]]


def _sgd(groups: Groups, config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.momentum:
        # torch 2.11's fused SGD leaves new momentum uninitialised if the scaler skips the first step, and fails if a
        # parameter gets its first gradient later. Momentum that starts at zero is the same update.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _timm(name: str, groups: Groups, lr: float, **options: Any) -> torch.optim.Optimizer:
    """LARS or LAMB, with layer-wise rates for all weights: by default those without weight decay have none."""
    import timm.optim

    for group in groups:
        group["always_adapt"] = group["params"][0].ndim >= 2
    built: torch.optim.Optimizer = getattr(timm.optim, name)(groups, lr=lr, **options)
    return built


_BUILDERS: dict[str, Callable[[Groups, OptimConfig, bool], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": lambda groups, c, fused: torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, fused=fused),
    "lars": lambda groups, c, _: _timm(
        "Lars", groups, c.lr, momentum=c.momentum, nesterov=c.nesterov, trust_coeff=c.trust_coefficient
    ),
    # Its own clipping is off: clip_norm says what is clipped.
    "lamb": lambda groups, c, _: _timm("Lamb", groups, c.lr, betas=c.betas, max_grad_norm=None),
}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# What each optimiser keeps per parameter, and what may change in its groups from step to step.
_MOMENTS = {
    "SGD": {"momentum_buffer"},
    "Lars": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Lamb": {"exp_avg", "exp_avg_sq"},
}
_CHANGING = ("lr", "step", "max_lr_snapshot")
_HOW_IT_RUNS = ("foreach", "fused", "capturable", "differentiable")


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], steps: int) -> None:
    """Give ``optimizer`` the ``saved`` state of the same optimiser after ``steps`` steps, checked first.

    torch checks neither shapes nor dtypes, and its fused updates write past the end of a moment that is too short. How
    the update runs (fused or not) stays as it is.

    Raises ValueError or TypeError for another optimiser's state, or another model's.
    """
    current = optimizer.state_dict()
    groups, moments = saved["param_groups"], saved["state"]
    check_type("optimizer.param_groups", groups, list)
    check_type("optimizer.state", moments, dict)
    names, expected = ([group["names"] for group in each] for each in (groups, current["param_groups"]))
    if names != expected:
        raise ValueError(f"its optimiser holds other parameters: {names}, expected {expected}")
    merged = [_check_group(group, own, steps) for group, own in zip(groups, current["param_groups"], strict=True)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if missing := sorted(current["state"].keys() - moments.keys()):  # what there is before the first step
        raise ValueError(f"optimizer.state: lacks the parameters {missing[:5]}")
    for index, entries in moments.items():
        check_type("optimizer.state", index, int)
        if not 0 <= index < len(parameters) or set(entries) != _MOMENTS[type(optimizer).__name__]:
            raise ValueError(f"optimizer.state: parameter {index} of {len(parameters)} has {sorted(map(str, entries))}")
        for name, value in entries.items():
            check_type(f"optimizer.{name}", value, torch.Tensor)
            if name == "step":
                _check_counter("optimizer.step", value, steps)
            elif value.shape != parameters[index].shape or value.dtype != parameters[index].dtype:
                raise ValueError(
                    f"optimizer.{name}: got {value.dtype} {list(value.shape)} for parameter {index}, expected "
                    f"{parameters[index].dtype} {list(parameters[index].shape)}"
                )
            elif value.layout != torch.strided or value.is_meta or bool(value.isnan().any()):
                raise ValueError(f"optimizer.{name}: is NaN for parameter {index}")
    optimizer.load_state_dict({"state": moments, "param_groups": merged})


def _check_group(group: dict[str, Any], own: dict[str, Any], steps: int) -> dict[str, Any]:
    """The settings of ``own``, and of the saved ``group`` what changes with the steps. The others must be the same."""
    check_number("optimizer.lr", group["lr"], 0.0)
    for name, value in group.items():
        if name in ("lr", "max_lr_snapshot"):
            check_number(f"optimizer.{name}", value, 0.0)
        elif name == "step":
            _check_counter("optimizer.step", value, steps)
        elif name not in _HOW_IT_RUNS and (isinstance(value, torch.Tensor) or _plain(value) != _plain(own.get(name))):
            raise ValueError(f"optimizer.{name}: got {str(value)[:80]}, expected {own.get(name)}")
    return {**own, **{name: group[name] for name in _CHANGING if name in group}}


def _check_counter(name: str, value: Any, steps: int) -> None:
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point() and not value.is_meta:
        value = value.item()
    check_number(name, value, 0, steps)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
