"""The CIFAR-100 teachers that RepDistiller's authors published, and the accuracies that they must reach here."""

from __future__ import annotations

from pathlib import Path

from fastkd.trainer.models.build import ModelConfig
from fastkd.validate import check_choice

# Percent of the 10,000 test images, as the benchmarks report them.
PUBLISHED_ACCURACY = {
    "wrn_40_2": 75.61,
    "resnet56": 72.34,
    "resnet110": 74.31,
    "resnet32x4": 79.42,
    "vgg13": 74.64,
    "ResNet50": 79.34,
}
# Where a file is in its folder, and where it was published. mdistiller's archive of teachers has the same paths.
TEACHER_FILE = "{name}_vanilla/ckpt_epoch_240.pth"
TEACHER_URL = f"http://shape2prog.csail.mit.edu/repo/{TEACHER_FILE}"
_ALLOWED_LOSS = 0.1  # points: ten images, which the rounding of another machine may turn


def published_teacher(name: str, folder: str = "teachers") -> ModelConfig:
    """The teacher ``name``, whose file is ``folder/NAME_vanilla/ckpt_epoch_240.pth``.

    A run with it begins by evaluating it. An accuracy of more than 0.1 points below the published one is an error,
    because images are then normalised in another way than the teacher's, or the file holds other weights.

    Raises:
        ValueError: no teacher of this name was published.

    Example:
        >>> teacher = published_teacher("wrn_40_2")
        >>> teacher.weights, teacher.min_accuracy
        ('teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth', 0.7551)
    """
    check_choice("name", name, tuple(PUBLISHED_ACCURACY))
    return ModelConfig(
        name=f"cifar:{name}",
        weights=str(Path(folder) / TEACHER_FILE.format(name=name)),
        min_accuracy=round((PUBLISHED_ACCURACY[name] - _ALLOWED_LOSS) / 100, 4),
    )


def published_teacher_in(path: str) -> ModelConfig | None:
    """The published teacher whose file ``path`` is, as its folder and its name tell; None for other files."""
    file = Path(path)
    name = file.parent.name.removesuffix("_vanilla")
    if name not in PUBLISHED_ACCURACY or not file.match(TEACHER_FILE.format(name=name)):
        return None
    return published_teacher(name, str(file.parent.parent))
