"""``fastkd train RECIPE --dry-run``: what a config comes to, without its weights, its data or a step of training.

The models are built and run on tensors without memory, so that even the largest take seconds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd.trainer.commands.memory import memory_of
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import choose_data, without_download
from fastkd.trainer.data.labels import normalization_of
from fastkd.trainer.data.loader import first_images
from fastkd.trainer.data.options import options_class, with_defaults
from fastkd.trainer.models.build import ModelConfig, build_model, count_parameters, torchvision_weights
from fastkd.trainer.objective.config import describe_terms
from fastkd.trainer.objective.objective import needs
from fastkd.trainer.optim import Schedule
from fastkd.trainer.precision import DTYPES
from fastkd.trainer.run.distiller import Distiller, build_distiller
from fastkd.trainer.run.prepare import with_classes, with_samples
from fastkd.trainer.run.saved.checkpoint import CheckpointError, find_checkpoint
from fastkd.trainer.run.teacher_cache import MANIFEST, check_use
from fastkd.trainer.tasks.base import find_task

MIB = 2**20
LEFT_OUT = (
    "  left out: what the terms compute with, gradients on their way back, work space of cuDNN and NCCL, the CUDA",
    "  context, fragments of the allocator; not all of the above is needed at once, and torch.compile saves less",
)


def plan(config: TrainConfig, world_size: int = 1) -> list[str]:
    """The lines that describe a run of ``config`` on ``world_size`` ranks.

    Raises:
        ValueError: training would refuse the config: a model is unknown, terms do not fit it, or a batch is too small.
    """
    if config.student is None:
        raise ValueError("student: got None, expected a model")
    if config.task != "classification":
        return _without_memory(config, world_size)
    if config.teacher is not None and config.teacher.cache is not None:
        check_use(config)
    config, samples, shape, is_bytes, unreadable = _data(config)
    assert config.student is not None
    fewest, rows = config.data.batch_size // world_size, -(-config.data.batch_size // world_size)
    if fewest == 0:
        raise ValueError(f"data.batch_size: got {config.data.batch_size}, expected at least a row for each rank")
    chunks = min(config.chunks, rows)
    with torch.device("meta"):
        images = torch.empty(2, *shape, dtype=torch.uint8 if is_bytes else None)
        distiller = build_bare(config, images)
    # Moved to tensors that claim to be on a CPU, because autocast does not know the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        distiller.to_empty(device="cpu")
        memory = memory_of(distiller, config, shape, rows, chunks, world_size)
    lines = [_model("student", config.student, distiller.student.model)]
    if distiller.teacher is not None and config.teacher is not None:
        lines.append(_model("teacher", config.teacher, distiller.teacher.model.model))
        if config.teacher.cache is not None:
            there = (Path(config.teacher.cache) / MANIFEST).is_file()
            lines[-1] += f", its features from {config.teacher.cache} ({'found' if there else 'not found'})"
    lines.append(f"loss {describe_terms(config.objective.weights)}")
    heads = count_parameters(distiller.objective)
    if heads:
        lines[-1] += f" ({heads:,} parameters of its own)"
    lines.append(
        f"global batch {config.data.batch_size} on {world_size} rank{'s' if world_size > 1 else ''}: "
        f"{rows if fewest == rows else f'{fewest} or {rows}'} each"
        + (f", in {chunks} chunks of at most {-(-rows // chunks)}" if chunks > 1 else "")
    )
    lines.append(_steps(config, samples, unreadable))
    lines.append(_rule(config))
    options = [name for name in ("channels_last", "compile", "sync_batchnorm") if getattr(config, name)]
    options += [] if config.ema is None else [f"moving average {config.ema:g}"]
    lines.append(", ".join([f"precision {config.precision}", *options, f"images {' x '.join(map(str, shape))}"]))
    lines.append("memory of a rank, MiB, estimated:")
    memory["together"] = sum(memory.values())
    width = max(map(len, memory))
    lines += [f"  {name:<{width}} {size / MIB:10,.1f}" for name, size in memory.items()]
    return [*lines, *LEFT_OUT]


def _without_memory(config: TrainConfig, world_size: int) -> list[str]:
    """The lines for a task whose memory is not estimated: what a step holds depends on what is in its images."""
    task, samples, unreadable = find_task(config), None, ""
    try:
        train_set, eval_set = choose_data(without_download(config.data), None, None)
        config, samples = with_classes(config, task, train_set, eval_set, None), len(train_set)
    except (ValueError, OSError) as error:
        unreadable = str(error)
    lines = []
    with torch.device("meta"):
        for role, model in (("student", config.student), ("teacher", config.teacher)):
            if model is not None:
                lines.append(_model(role, model, build_model(model.without_weights(), role)))
    if needs("teacher", config.objective) and config.teacher is None:
        raise ValueError(f"teacher: got None, expected a model: objective.terms={config.objective.terms!r} needs one")
    batch = config.data.batch_size
    options = [] if config.ema is None else [f"moving average {config.ema:g}"]
    return [
        *lines,
        f"task {config.task}, evaluated by {task.title}",
        f"loss {describe_terms(config.objective.weights)}",
        f"global batch {batch} on {world_size} rank{'s' if world_size > 1 else ''}",
        _steps(config, samples, unreadable),
        _rule(config),
        ", ".join([f"precision {config.precision}", *options]),
        "memory of a rank: not estimated for this task",
    ]


def _data(config: TrainConfig) -> tuple[TrainConfig, int | None, tuple[int, ...], bool, str]:
    """The config with the data's classes; the number of training samples; an image's shape, and whether it is of bytes;
    why the data cannot be read. The number is None in that case, and the reason is empty otherwise.
    """
    side = int(with_defaults(config.data.name, config.data.options).get("image_size", 32))
    named = options_class(config.data.name) is not None and config.data.name != "digits"
    shape = (3, side, side) if named else None
    try:
        train_set, eval_set = choose_data(without_download(config.data), None, None)
    except (ValueError, OSError) as error:
        if shape is None:
            raise
        return with_samples(config, 50_000), None, shape, named, str(error)  # as many as CIFAR has
    config = with_classes(config, find_task(config), train_set, eval_set, None)
    if shape is not None:
        return config, len(train_set), shape, named, ""
    images = first_images(train_set)
    is_bytes = images.dtype == torch.uint8 and normalization_of(train_set) is not None
    return config, len(train_set), tuple(images.shape[1:]), is_bytes, ""


def build_bare(config: TrainConfig, images: Tensor) -> Distiller:
    """The distiller of ``config`` without its weights, for ``images`` [B, C, H, W]."""
    assert config.student is not None
    teacher = None
    if config.teacher is not None and needs("teacher", config.objective):
        teacher = build_model(config.teacher.without_weights())
    channels = images.shape[1]
    student = build_model(config.student.without_weights())
    distiller = build_distiller(
        config, images, ((0.0,) * channels, (1.0,) * channels), student=student, teacher=teacher
    )
    if distiller.teacher is not None and config.teacher is not None:
        distiller.teacher.model.model.to(DTYPES[config.teacher.dtype])
    return distiller


def _model(role: str, config: ModelConfig, model: nn.Module) -> str:
    line = f"{role} {config.name} ({count_parameters(model):,} parameters)"
    if config.dtype != "fp32":
        line += f" in {config.dtype}"
    if config.weights is not None or config.pretrained:
        line += f", weights {_weights(config, model)}"
    if config.min_accuracy is not None:
        line += f", accuracy at least {config.min_accuracy:g}"
    return line


def _weights(config: ModelConfig, model: nn.Module) -> str:
    """Where the weights come from, and whether they are there."""
    if config.weights is not None:
        path = Path(config.weights)
        try:
            found = path.is_file() or find_checkpoint(path).exists()
        except CheckpointError:
            found = False
        return f"{path} ({'found' if found else 'not found'})"
    published: Any = getattr(model, "pretrained_cfg", None)
    if published is not None:
        from huggingface_hub import try_to_load_from_cache

        repository = published.get("hf_hub_id") or "?"
        source = f"timm {repository}"
        found = "/" in repository and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
    else:
        weights = torchvision_weights(config.name.rpartition(":")[2])
        source = f"torchvision {weights}"
        found = (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).exists()
    return f"{source} ({'found in the cache' if found else 'to be downloaded'})"


def _steps(config: TrainConfig, samples: int | None, unreadable: str) -> str:
    if samples is None:
        return f"{config.epochs} epochs; steps unknown, the data cannot be read here ({unreadable})"
    batch = config.data.batch_size
    per_epoch = samples // batch if config.data.drop_last else -(-samples // batch)
    if per_epoch == 0:
        raise ValueError(f"data.batch_size: got {batch}, expected at most the {samples} training samples")
    return (
        f"{config.epochs} epochs of {per_epoch} steps ({samples:,} training samples): {config.epochs * per_epoch} steps"
    )


def _rule(config: TrainConfig) -> str:
    """The optimiser and its learning rate over the epochs."""
    optim, whole = config.optim, {"epochs": config.epochs, "global_batch": config.data.batch_size}
    Schedule(optim, steps_per_epoch=1000, **whole)  # refuses a warm-up that is too long
    parts = [optim.name, Schedule(dataclasses.replace(optim, warmup_epochs=0.0), steps_per_epoch=1, **whole).rule]
    if optim.warmup_epochs:
        parts.append(f"warm-up {optim.warmup_epochs:g} epochs")
    if optim.milestones:
        parts.append(f"times {optim.gamma:g} after epochs {' '.join(f'{epoch:g}' for epoch in optim.milestones)}")
    parts.append(f"weight decay {optim.weight_decay:g}{' of everything' if optim.decayed == 'all' else ''}")
    if optim.clip_norm is not None:
        parts.append(f"gradient norm at most {optim.clip_norm:g}")
    return ", ".join(parts)
