"""Recipes for CIFAR-100, unpacked in ``cifar``. RepDistiller's benchmark (arXiv 1910.10699) began these settings.

Where a recipe says that settings are the authors', they are those of their public code. That code decays all that is
trained, batch norms, biases and temperatures too, and keeps the short last batch of an epoch.
"""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.fused import DCDConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.trainer.recipes.methods import objective_of
from fastkd.trainer.recipes.stages import pretrained

NETS = "fastkd.trainer.models.cifar"
RESNET32X4 = ModelConfig(name=f"{NETS}:CifarResNet", options={"depth": 32, "widths": [32, 64, 128, 256]})
RESNET8X4 = ModelConfig(name=f"{NETS}:CifarResNet", options={"depth": 8, "widths": [32, 64, 128, 256]})
WRN_40_2 = ModelConfig(name=f"{NETS}:WideResNet", options={"depth": 40, "width": 2})
WRN_16_2 = ModelConfig(name=f"{NETS}:WideResNet", options={"depth": 16, "width": 2})
TRAINED_RESNET32X4 = replace(RESNET32X4, weights="runs/cifar100-resnet32x4", min_accuracy=0.7)
TRAINED_WRN_40_2 = replace(WRN_40_2, weights="runs/cifar100-wrn-40-2", min_accuracy=0.7)


def _run(
    name: str, student: ModelConfig, objective: ObjectiveConfig, teacher: ModelConfig | None = None
) -> TrainConfig:
    return TrainConfig(
        student=student,
        teacher=teacher,
        data=DataConfig(name="cifar", options={"root": "cifar"}, batch_size=64, drop_last=False),
        objective=objective,
        optim=OptimConfig(lr=0.05, weight_decay=5e-4, decayed="all", schedule="step", milestones=(150, 180, 210)),
        epochs=240,
        run_dir=f"runs/{name}",
    )


def resnet32x4() -> TrainConfig:
    """resnet32x4, the teacher of cifar100-dcd-kd and cifar100-ckd.

    RepDistiller's settings (train_teacher.py): 240 epochs, batch 64, SGD with momentum 0.9 and lr 0.05, divided by 10
    after 150, 180 and 210, weight decay 5e-4 of everything, no warm-up.
    """
    return _run("cifar100-resnet32x4", RESNET32X4, ObjectiveConfig(terms="ce"))


def wrn_40_2() -> TrainConfig:
    """WRN-40-2, the teacher of cifar100-pckd: settings as for cifar100-resnet32x4."""
    return _run("cifar100-wrn-40-2", WRN_40_2, ObjectiveConfig(terms="ce"))


def any_method() -> TrainConfig:
    """resnet32x4 -> resnet8x4 by KD, or by another method: ``--method NAME``.

    The settings are RepDistiller's, as for cifar100-resnet32x4, and the same for every method. Only the loss differs:
    see ``fastkd.trainer.recipes.methods``.
    """
    return _run("cifar100", RESNET8X4, objective_of("kd"), TRAINED_RESNET32X4)


def dcd_kd() -> TrainConfig:
    """resnet32x4 -> resnet8x4 by DCD + KD (arXiv 2407.11802).

    The command and the defaults of the authors' public code (giakoumoglou/distillers, cifar/): all weights are 1, KD is
    at temperature 4, the consistency is KL(q || p), which is not the paper's direction, and the schedule is the one of
    cifar100-resnet32x4.
    """
    objective = ObjectiveConfig(terms="dcd + kd", dcd=DCDConfig(consistency="teacher||student"))
    return _run("cifar100-dcd-kd", RESNET8X4, objective, TRAINED_RESNET32X4)


def ckd() -> TrainConfig:
    """resnet32x4 -> resnet8x4 by CKD (arXiv 2404.14109).

    All settings are from configs/cifar100/ckd/res32x4_res8x4.yaml of the authors' public code (ZhouXinzzzzz/CKD):
    CE + 100 CKD at temperature 1, 480 epochs, batch 64, SGD with lr 0.05 and a cosine to 0 that changes per epoch,
    weight decay 5e-4.
    """
    config = _run("cifar100-ckd", RESNET8X4, ObjectiveConfig(terms="100*ckd"), TRAINED_RESNET32X4)
    return replace(config, optim=OptimConfig(lr=0.05, weight_decay=5e-4, decayed="all", per_epoch=True), epochs=480)


def pckd() -> TrainConfig:
    """WRN-40-2 -> WRN-16-2 by PCKD (arXiv 2410.14143).

    The command in the README of the authors' public code (MuHeDing/PCKD): weights 1 for the centres, 0.05 for the
    categories (here times the 4 / 0.07 that is inside their loss) and 20 for the features. From its defaults: no KD,
    and the schedule of cifar100-resnet32x4. From their loop and loss: epochs count from 1, and 1e-7 is inside the
    logarithm of the categories. (With KD, ``--objective.pckd.kd-weight 1``, their weights pass a gradient:
    ``preview_gradient``.) Three things differ. Their category and feature terms see every image in four rotations, ours
    in one. Their channels are normalised by .4866 .4409 for means of .4867 .4408. Their MLP may have a batch norm.
    """
    return _run("cifar100-pckd", WRN_16_2, objective_of("pckd"), TRAINED_WRN_40_2)


def ab() -> dict[str, TrainConfig]:
    """resnet32x4 -> resnet8x4 by AB (arXiv 1811.03233): the student's layers by AB, then all of it by cross-entropy.

    RepDistiller's settings: 30 epochs at lr 0.05, then those of cifar100-resnet32x4. The authors' second stage is KD at
    temperature 3 alone.
    """
    return pretrained(_run("cifar100-ab", RESNET8X4, objective_of("ab"), TRAINED_RESNET32X4), "ab")


def fsp() -> dict[str, TrainConfig]:
    """resnet32x4 -> resnet8x4 by FSP (CVPR 2017): the student's layers by FSP, then all of it by cross-entropy.

    RepDistiller's settings, as for cifar100-ab.
    """
    return pretrained(_run("cifar100-fsp", RESNET8X4, objective_of("fsp"), TRAINED_RESNET32X4), "fsp")


def ft() -> dict[str, TrainConfig]:
    """resnet32x4 -> resnet8x4 by FT (arXiv 1802.04977): a paraphraser of the teacher's maps, then the student by it.

    RepDistiller's settings: 30 epochs at lr 0.01, then CE + 200 FT and those of cifar100-resnet32x4.
    """
    return pretrained(_run("cifar100-ft", RESNET8X4, objective_of("ft"), TRAINED_RESNET32X4), "ft")
