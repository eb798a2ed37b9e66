"""Recipes for ImageNet-1k (ILSVRC-2012), in ``imagenet/train`` and ``imagenet/val``: a folder per class, or shards.

The papers do not say everything. In all recipes these choices are ours: bf16, channels-last, eight loader processes per
rank, no weight decay on biases and norms where the docstring does not say otherwise, and the accuracy that the teachers
must reach (torchvision states 73.3 % for its ResNet-34 and 76.1 % for its ResNet-50). Training images are cropped as
torchvision crops them: 8 to 100 % of the picture, aspect ratios of 3/4 to 4/3. The crop of DALI, which DCD's authors
ran, is 10 to 100 % and 4/5 to 5/4: ``--data.options.min-scale 0.1 --data.options.max-aspect 1.25``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.fused import CEConfig, DCDConfig, PCKDConfig
from fastkd.trainer.optim import OptimConfig

# The papers' teachers have the weights of torchvision's first training recipe.
RESNET34 = ModelConfig(name="torchvision:resnet34.IMAGENET1K_V1", pretrained=True, min_accuracy=0.72)
RESNET50 = ModelConfig(name="torchvision:resnet50.IMAGENET1K_V1", pretrained=True, min_accuracy=0.75)


STEPS = OptimConfig(lr=0.1, weight_decay=1e-4, schedule="step", milestones=(30, 60, 90))


def _run(
    name: str,
    teacher: ModelConfig,
    student: str,
    objective: ObjectiveConfig,
    optim: OptimConfig = STEPS,
    epochs: int = 120,
    batch: int = 256,
) -> TrainConfig:
    """The defaults are the schedule of the ImageNet commands in DCD's public code."""
    return TrainConfig(
        student=ModelConfig(name=f"torchvision:{student}"),
        teacher=teacher,
        data=DataConfig(
            name="images", options={"root": "imagenet"}, batch_size=batch, eval_batch_size=256, num_workers=8
        ),
        objective=objective,
        optim=optim,
        epochs=epochs,
        precision="bf16",
        channels_last=True,
        run_dir=f"runs/{name}",
    )


def resnet34_resnet18_dcd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD (arXiv 2407.11802).

    The networks and the weights are the paper's: CE + DCD with alpha 0.5, tau from 1, embeddings of 128. The schedule
    is from the ImageNet commands in the authors' public code (giakoumoglou/distillers, imagenet/README.md): 120 epochs,
    batch 256, SGD with lr 0.1 divided by 10 after 30, 60 and 90, weight decay 1e-4.
    """
    return _run("imagenet-r34-r18-dcd", RESNET34, "resnet18", ObjectiveConfig(terms="dcd"))


def as_the_authors_ran_it(config: TrainConfig) -> TrainConfig:
    """A config of DCD with what the authors' ImageNet code does, where it differs from the paper.

    The consistency is KL(q || p). tau is in no optimiser, so that the scale stays e. A GPU contrasts its own samples
    alone: they ran four with 64 each. Everything decays. Images are cropped by DALI's settings. One thing is left out:
    their projection heads are not averaged over the GPUs.
    """
    dcd = DCDConfig(consistency="teacher||student", learnable=False, temperature=math.exp(-1), group="local")
    crop = {"min_scale": 0.1, "max_aspect": 1.25}
    return replace(
        config,
        objective=replace(config.objective, dcd=dcd),
        optim=replace(config.optim, decayed="all"),
        data=replace(config.data, options={**config.data.options, **crop}),
    )


def resnet34_resnet18_dcd_as_run() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD (arXiv 2407.11802) as the authors' code ran it, for four GPUs.

    The settings are those of imagenet-r34-r18-dcd, and what ``as_the_authors_ran_it`` changes.
    """
    return replace(as_the_authors_ran_it(resnet34_resnet18_dcd()), run_dir="runs/imagenet-r34-r18-dcd-as-run")


def resnet34_resnet18_dcd_kd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD + KD (arXiv 2407.11802): as imagenet-r34-r18-dcd, and KD at temperature 4."""
    return _run("imagenet-r34-r18-dcd-kd", RESNET34, "resnet18", ObjectiveConfig(terms="dcd + kd"))


def resnet50_resnet18_dcd() -> TrainConfig:
    """ResNet-50 -> ResNet-18 by DCD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd."""
    return _run("imagenet-r50-r18-dcd", RESNET50, "resnet18", ObjectiveConfig(terms="dcd"))


def resnet50_resnet18_dcd_kd() -> TrainConfig:
    """ResNet-50 -> ResNet-18 by DCD + KD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd-kd."""
    return _run("imagenet-r50-r18-dcd-kd", RESNET50, "resnet18", ObjectiveConfig(terms="dcd + kd"))


def resnet50_mobilenetv2_dcd() -> TrainConfig:
    """ResNet-50 -> MobileNetV2 by DCD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd."""
    return _run("imagenet-r50-mv2-dcd", RESNET50, "mobilenet_v2", ObjectiveConfig(terms="dcd"))


def resnet50_mobilenetv2_dcd_kd() -> TrainConfig:
    """ResNet-50 -> MobileNetV2 by DCD + KD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd-kd."""
    return _run("imagenet-r50-mv2-dcd-kd", RESNET50, "mobilenet_v2", ObjectiveConfig(terms="dcd + kd"))


def resnet34_resnet18_ckd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by CKD (arXiv 2404.14109).

    All settings are from configs/imagenet/r34_r18/ckd.yaml of the authors' public code (ZhouXinzzzzz/CKD): CE + 10 CKD
    at temperature 1, 200 epochs, batch 512, SGD with lr 0.2 and a cosine to 0 that changes per epoch, weight decay 1e-4
    of everything, the last batch kept.
    """
    config = _run(
        "imagenet-r34-r18-ckd",
        RESNET34,
        "resnet18",
        ObjectiveConfig(terms="10*ckd"),
        OptimConfig(lr=0.2, weight_decay=1e-4, decayed="all", per_epoch=True),
        epochs=200,
        batch=512,
    )
    return replace(config, data=replace(config.data, drop_last=False))


def resnet34_resnet18_pckd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by PCKD (arXiv 2410.14143), the paper's pair on a schedule of ours.

    The authors' public code (MuHeDing/PCKD) covers CIFAR-100 alone. The weights are the same as in cifar100-pckd. These
    choices are ours: KD at weight 1, 100 epochs, batch 256, SGD with lr 0.1 divided by 10 after 30, 60 and 90, weight
    decay 1e-4.
    """
    return _run(
        "imagenet-r34-r18-pckd",
        RESNET34,
        "resnet18",
        ObjectiveConfig(terms="pckd", pckd=PCKDConfig(category_weight=0.05 * 4 / 0.07, feature_weight=20.0)),
        epochs=100,
    )


def large_batch() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD + KD at batch 16,384: 8 nodes of 8 GPUs, 256 images each. The choices are ours.

    LAMB has the settings of "ResNet strikes back" (arXiv 2110.00476, procedure A3): lr 8e-3 at batch 2048, weight decay
    0.02, 5 epochs of warm-up and a cosine, 100 epochs. The lr grows with the root of the batch, as in LAMB's paper
    (arXiv 1904.00962). These choices are ours: cross-entropy with labels smoothed by 0.1 (theirs is binary), the plain
    augmentation, gradients clipped at norm 1, a moving average with 0.999 per step. On fewer GPUs, ``--chunks`` keeps
    the batch, and the gradient is the same.
    """
    config = _run(
        "imagenet-large-batch",
        RESNET34,
        "resnet18",
        ObjectiveConfig(terms="dcd + kd", ce=CEConfig(label_smoothing=0.1)),
        OptimConfig(
            name="lamb",
            lr=8e-3,
            reference_batch=2048,
            lr_rule="sqrt",
            weight_decay=0.02,
            warmup_epochs=5,
            clip_norm=1.0,
        ),
        epochs=100,
        batch=16_384,
    )
    return replace(config, ema=0.999, compile=True)
