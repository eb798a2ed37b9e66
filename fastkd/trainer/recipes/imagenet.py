"""Recipes for ImageNet-1k (ILSVRC-2012), in ``imagenet/train`` and ``imagenet/val``: a folder a class, or shards.

Ours in all of them, since no paper says it: bf16, channels-last, eight loader processes a rank, no weight decay on
biases and norms, and the floors that the teachers must reach (torchvision gives 73.3 and 76.1 % for theirs).
"""

from __future__ import annotations

import dataclasses

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import CEConfig, ObjectiveConfig, PCKDConfig
from fastkd.trainer.optim import OptimConfig

# The weights of torchvision's first training recipe, which the papers' teachers have.
RESNET34 = ModelConfig(name="torchvision:resnet34.IMAGENET1K_V1", pretrained=True, min_accuracy=0.72)
RESNET50 = ModelConfig(name="torchvision:resnet50.IMAGENET1K_V1", pretrained=True, min_accuracy=0.75)


def _run(
    name: str,
    teacher: ModelConfig,
    student: str,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    epochs: int,
    batch: int,
) -> TrainConfig:
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


def _dcd(name: str, teacher: ModelConfig, student: str, terms: str) -> TrainConfig:
    """The schedule of the ImageNet commands in DCD's public code, imagenet/README.md of giakoumoglou/distillers."""
    optim = OptimConfig(lr=0.1, weight_decay=1e-4, schedule="step", milestones=(30, 60, 90))
    return _run(name, teacher, student, ObjectiveConfig(terms=terms), optim, epochs=120, batch=256)


def resnet34_resnet18_dcd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD (arXiv 2407.11802).

    The paper's pair; its weights, CE + DCD with alpha 0.5, tau from 1, embeddings of 128. From the ImageNet commands in
    the authors' public code: 120 epochs, batch 256, SGD with lr 0.1 divided by 10 after 30, 60 and 90, weight decay
    1e-4.
    """
    return _dcd("imagenet-r34-r18-dcd", RESNET34, "resnet18", "dcd")


def resnet34_resnet18_dcd_kd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD + KD (arXiv 2407.11802): as imagenet-r34-r18-dcd, and KD at temperature 4."""
    return _dcd("imagenet-r34-r18-dcd-kd", RESNET34, "resnet18", "dcd + kd")


def resnet50_resnet18_dcd() -> TrainConfig:
    """ResNet-50 -> ResNet-18 by DCD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd."""
    return _dcd("imagenet-r50-r18-dcd", RESNET50, "resnet18", "dcd")


def resnet50_resnet18_dcd_kd() -> TrainConfig:
    """ResNet-50 -> ResNet-18 by DCD + KD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd-kd."""
    return _dcd("imagenet-r50-r18-dcd-kd", RESNET50, "resnet18", "dcd + kd")


def resnet50_mobilenetv2_dcd() -> TrainConfig:
    """ResNet-50 -> MobileNetV2 by DCD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd."""
    return _dcd("imagenet-r50-mv2-dcd", RESNET50, "mobilenet_v2", "dcd")


def resnet50_mobilenetv2_dcd_kd() -> TrainConfig:
    """ResNet-50 -> MobileNetV2 by DCD + KD (arXiv 2407.11802): otherwise as imagenet-r34-r18-dcd-kd."""
    return _dcd("imagenet-r50-mv2-dcd-kd", RESNET50, "mobilenet_v2", "dcd + kd")


def resnet34_resnet18_ckd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by CKD (arXiv 2404.14109).

    All from configs/imagenet/r34_r18/ckd.yaml of the authors' public code (ZhouXinzzzzz/CKD): CE + 10 CKD at
    temperature 1, 200 epochs, batch 512, SGD with lr 0.2 and a cosine to 0, weight decay 1e-4.
    """
    return _run(
        "imagenet-r34-r18-ckd",
        RESNET34,
        "resnet18",
        ObjectiveConfig(terms="10*ckd"),
        OptimConfig(lr=0.2, weight_decay=1e-4),
        epochs=200,
        batch=512,
    )


def resnet34_resnet18_pckd() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by PCKD (arXiv 2410.14143), the paper's pair on a schedule of ours.

    The authors' public code (MuHeDing/PCKD) has CIFAR-100 alone. The weights are those of its command there, see
    cifar100-pckd; ours are KD at weight 1, and 100 epochs at batch 256, SGD with lr 0.1 divided by 10 after 30, 60 and
    90, weight decay 1e-4.
    """
    return _run(
        "imagenet-r34-r18-pckd",
        RESNET34,
        "resnet18",
        ObjectiveConfig(terms="pckd", pckd=PCKDConfig(category_weight=0.05 * 4 / 0.07, feature_weight=20.0)),
        OptimConfig(lr=0.1, weight_decay=1e-4, schedule="step", milestones=(30, 60, 90)),
        epochs=100,
        batch=256,
    )


def large_batch() -> TrainConfig:
    """ResNet-34 -> ResNet-18 by DCD + KD at batch 16,384: 8 nodes of 8 GPUs, 256 images each. The choices are ours.

    LAMB with the settings of "ResNet strikes back" (arXiv 2110.00476, procedure A3): lr 8e-3 at batch 2048, weight
    decay 0.02, 5 epochs of warm-up and a cosine, 100 epochs. The lr grows with the root of the batch, as in LAMB's
    paper (arXiv 1904.00962). Ours: cross-entropy with labels smoothed by 0.1 (there a binary one), the plain
    augmentation, gradients clipped at norm 1, a moving average of 0.999 a step. On fewer GPUs, ``--chunks`` keeps the
    batch, and the gradient is the same.
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
    return dataclasses.replace(config, ema=0.999, compile=True)
