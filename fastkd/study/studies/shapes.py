"""The study ``shapes``: a small detector distilled on generated images, in twenty minutes on two cores.

The paper's detection needs COCO and days of GPUs. This study shows in its place, with numbers that anyone can repeat,
what the same terms do to the regions of a detector:

- Data: images of 128 pixels with coloured circles, squares, triangles and crosses on noise, in COCO's format, drawn by
  ``fastkd.trainer.data.coco.shapes``: 2,000 for training, of which a student gets the first 300, and 400 for the mAP.
- Networks and schedule: those of the recipes ``detection-teacher`` and ``detection``, a student with 40 epochs.
- Losses: every term has weight 1, KD the temperature 1 that mdistiller's detectors have. Nothing was tuned.
- mAP is measured after the last epoch, so the evaluation images pick nothing.

The settings were fixed before the first run, and its result changed none of them but the teacher's schedule, which
followed its recipe (from 12 epochs to 6). Students from scratch were also looked at with SGD (learning rates 0.02 and
0.1), which left them at less than half of the mAP. A trial with other networks and images of the same kind had shown a
gain of 24 points by DCD on all regions. Here it is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastkd.study.grid import TEACHER, Cell, Job, Options, Outcome, Study, place
from fastkd.study.jobs import Training
from fastkd.trainer.config import DetectionConfig, TrainConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.fused import KDConfig
from fastkd.trainer.recipes.detection import detection, detection_teacher
from fastkd.validate import check_int

COLUMN = "shapes"
DATA_PLACE, TEACHER_PLACE = place(COLUMN, "data", 0), place(COLUMN, TEACHER, 0)
# The terms beside the detector's own losses, and the regions that they see.
ARMS: dict[str, tuple[str, Literal["all", "foreground"]]] = {
    "scratch": ("", "all"),
    "kd": ("kd", "all"),
    "dcd-foreground": ("dcd", "foreground"),
    "dcd": ("dcd", "all"),
    "dcd+kd": ("dcd + kd", "all"),
}
NAMES = {
    TEACHER: "Teacher",
    "scratch": "From scratch",
    "kd": "KD, T = 1",
    "dcd-foreground": "DCD, foreground regions",
    "dcd": "DCD, all regions",
    "dcd+kd": "DCD + KD, all regions",
}


@dataclass(kw_only=True, frozen=True)
class ShapesOptions(Options):
    """Options of the study on shapes.

    Attributes:
        seeds: runs of every arm, with the seeds 0, 1, ...
        epochs: passes of a student over its images.
        teacher_epochs: epochs of the teacher.
        images: training images of the teacher.
        student_images: training images of a student, the first ones of the teacher's.
        eval_images: images for evaluation.
    """

    seeds: int = 3
    epochs: int = 40
    teacher_epochs: int = 6
    images: int = 2000
    student_images: int = 300
    eval_images: int = 400
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_epochs", "images", "student_images", "eval_images"):
            check_int(name, getattr(self, name), 1)
        if self.student_images > self.images:
            raise ValueError(f"student_images: got {self.student_images}, expected at most images={self.images}")


def shapes(options: ShapesOptions) -> Study:
    """Detection: a small detector distilled on generated shapes in COCO's format, 3 seeds, minutes on two cores.

    The arms are the student from scratch, KD, and DCD on the foreground regions, on all regions, and with KD.
    """
    rows = options.choose(list(ARMS))
    cells = [
        Cell(row="data", column=COLUMN, seed=0, make=partial(_data, options), place=DATA_PLACE, shown=False),
        Cell(
            row=TEACHER,
            column=COLUMN,
            seed=0,
            make=partial(_teacher, options),
            place=TEACHER_PLACE,
            after=(DATA_PLACE,),
        ),
    ]
    cells += [
        Cell(
            row=row,
            column=COLUMN,
            seed=seed,
            make=_student(options, row, seed),
            after=(DATA_PLACE,) if row == "scratch" else (DATA_PLACE, TEACHER_PLACE),
        )
        for seed in range(options.seeds)
        for row in rows
    ]
    return Study(
        name="shapes",
        title="A detector distilled on generated shapes",
        about=f"A small Faster R-CNN with {options.student_images} training images of coloured shapes, and a teacher "
        f"of ten times its size with {options.images:,}. The rows of the losses are the student's regions of interest. "
        f"mAP (IoU 0.5 to 0.95) on {options.eval_images} images after the last epoch. All terms have weight 1, and "
        "nothing was tuned. Such small networks on drawn images do not say how the methods rank on photos.",
        cells=tuple(cells),
        names={row: NAMES[row] for row in (TEACHER, *rows)},
        baseline="scratch" if "scratch" in rows else None,
        measure="map",
        samples=options.student_images,
    )


@dataclass(frozen=True)
class Drawing:
    """The data set of the study, drawn in the folder of its cell. Its value is the number of images."""

    train: int
    val: int

    def run(self, folder: Path) -> Outcome:
        # Drawing needs packages of the trainer that a dry run does not.
        from fastkd.trainer.data.coco.shapes import make_shapes

        make_shapes(folder / "images", self.train, self.val)
        return Outcome({"images": float(self.train + self.val)})

    def settings(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val}

    def needed(self) -> list[Path]:
        return []


def _config(options: ShapesOptions, folder: Path, config: TrainConfig, epochs: int, **data: Any) -> TrainConfig:
    """A recipe on the images of the study in ``folder``."""
    chosen = {**config.data.options, "root": str(folder / DATA_PLACE / "images"), **data}
    return replace(
        config,
        data=replace(config.data, options=chosen),
        optim=replace(config.optim, warmup_epochs=min(config.optim.warmup_epochs, epochs / 2)),
        epochs=epochs,
        eval_every=epochs,
        device=options.device,
        save_every_epochs=4,
    )


def _data(options: ShapesOptions, folder: Path) -> Job:
    return Drawing(options.images, options.eval_images)


def _teacher(options: ShapesOptions, folder: Path) -> Job:
    return Training(_config(options, folder, detection_teacher(), options.teacher_epochs))


def _student(options: ShapesOptions, row: str, seed: int) -> Callable[[Path], Job]:
    terms, regions = ARMS[row]

    def make(folder: Path) -> Job:
        config = _config(options, folder, detection(), options.epochs, limit=options.student_images)
        assert config.teacher is not None
        return Training(
            replace(
                config,
                teacher=replace(config.teacher, weights=str(folder / TEACHER_PLACE)) if terms else None,
                objective=ObjectiveConfig(terms=terms or "detector", kd=KDConfig(temperature=1.0)),
                detection=DetectionConfig(regions=regions),
                seed=seed,
            )
        )

    return make
