"""Describes a demo in words: its settings, its command, the machine and the versions."""

import os
import platform
import re
import shlex
from dataclasses import fields
from importlib import metadata
from pathlib import Path

from fastkd.demo.config import DemoConfig
from fastkd.demo.results import display_name
from fastkd.study.costs import ROUNDS
from fastkd.study.studies.digits import LABELLED, SCRATCH_PASSES, STEPS, TEST_IMAGES, TRAIN_IMAGES, objective_of
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.run.describe import versions


def describe_settings(config: DemoConfig, first: TrainConfig, teacher: int, student: int) -> dict[str, str]:
    """The settings in words, taken from the configs that were run."""
    optim, objective = first.optim, first.objective
    dcd, pckd, msdcrd = objective.dcd, objective.pckd, objective.msdcrd
    consistency = "KL(student || teacher)" if dcd.consistency == "student||teacher" else "KL(teacher || student)"
    return {
        "data": f"the handwritten digits of scikit-learn, 8x8 pixels: {TRAIN_IMAGES:,} for training, {TEST_IMAGES} for "
        "the test",
        "teacher": f"convolutional network, {teacher:,} parameters, {config.teacher_epochs} epochs on all "
        f"{TRAIN_IMAGES:,} training images with labels; one teacher for all students",
        "student": f"A convolutional network of {student:,} parameters",
        "labels": f"{LABELLED} of the training images have one, balanced over the digits; cross-entropy uses these "
        "images alone",
        "images": f"the distillation terms use all {TRAIN_IMAGES:,} training images, without labels; where PCKD needs "
        "one, an image without a label has the teacher's prediction. The student from scratch sees the "
        f"{LABELLED} labelled images alone, in its batch norm, too. Batch norm accounts for about one point: in a "
        "trial of 4 seeds cross-entropy reached 89.1 % with the other images in its batches, and 88.1 % without",
        "seed": "the initial weights, the order of the data and which images have a label",
        "first seed": "0",
        "schedule": f"{STEPS * config.epochs} steps of {first.data.batch_size} images for every student: "
        f"{config.epochs} passes over all images, or {SCRATCH_PASSES * config.epochs} over the labelled ones; SGD with "
        f"momentum {optim.momentum:g}, "
        f"learning rate {optim.lr:g} falling to zero as a cosine, weight decay {optim.weight_decay:g}",
        "objectives": ", ".join(f"{display_name(method)}: {objective_of(method).terms}" for method in config.methods)
        + "; CE is part of each, every term has weight 1 unless written",
        "DCD, scale e": "an ablation: exp(tau) stays at e, as in the authors' code for ImageNet",
        "KD": f"temperature {objective.kd.temperature:g}",
        "DCD": f"{dcd.embed_dim} dimensions, alpha {dcd.alpha:g}, consistency {consistency}, tau starts at 1"
        + ("" if dcd.max_scale is None else f", exp(tau) at most {dcd.max_scale:g}"),
        "CKD": f"temperature {objective.ckd.temperature:g}",
        "PCKD": f"weights of category contrast, centres, features and KD {pckd.category_weight:g}, "
        f"{pckd.center_weight:g}, {pckd.feature_weight:g} and {pckd.kd_weight:g} (centres only where both networks are "
        f"equally wide), relations times {pckd.relation_scale:g}, KD temperature {pckd.temperature:g}, preview "
        f"{pckd.preview_base:g}^epoch",
        "MSDCRD": ("three scales of the teacher's map" if msdcrd.windows is None else f"windows {msdcrd.windows}")
        + f", temperature {msdcrd.temperature:g}, positives by {msdcrd.positives}, samples and channels of weights "
        f"{msdcrd.sample_term_weight:g} and {msdcrd.feature_weight:g}",
        "accuracy": "on the test images after the last step",
        "cost of a step": "forward, backward and update of one batch, after the runs: one process, one thread, the "
        f"methods in turn, the median of {ROUNDS} steps. Memory: the most that torch's allocator holds at once during "
        "a step, without weights and optimiser state",
    }


def describe_environment(config: DemoConfig, workers: int) -> dict[str, str]:
    """The command, the machine and the versions, in words."""
    found = versions() | {name: metadata.version(name) for name in ("scikit-learn", "matplotlib")}
    return {
        "command": command_line(config),
        "processor": f"{processor_name()}, {usable_cores()} cores",
        "workers": f"{workers} training process{'es' if workers > 1 else ''}, one thread each",
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


def command_line(config: DemoConfig) -> str:
    """The command that runs the demo with this config."""
    words = ["fastkd", "demo"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *(str(item) for item in values)]
    return shlex.join(words)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's model name, as far as the system tells it."""
    try:
        listed = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        listed = None
    return listed.group(1) if listed else platform.processor() or platform.machine()
