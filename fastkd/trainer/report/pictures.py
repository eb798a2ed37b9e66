"""Pictures for the page about detectors: evaluation images with the boxes of annotations, students and teachers.

The models are rebuilt from their checkpoints and look at a few images, on the CPU. What cannot be rebuilt or read is
told on the page, and never keeps the rest of it from being written.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastkd.trainer.commands.reopen import reopen, reopen_teacher
from fastkd.trainer.data.datasets import names_of_classes
from fastkd.trainer.data.labels import labels_hash, normalization_of
from fastkd.trainer.data.loader import fetch
from fastkd.trainer.report.curves import look
from fastkd.trainer.report.records import Group, RecordedRun
from fastkd.trainer.report.style import PALETTE
from fastkd.trainer.run.distiller import weights_hash
from fastkd.trainer.tasks.base import Task, find_task
from fastkd.trainer.text import printable

IMAGES = 8
SCORE = 0.5  # the least of a box that is drawn
BOXES = 30  # the most that are drawn of one model in an image
JPEG_BYTES = 22_000  # the most of an image, so that all of them fit in 300 kB with their boxes
_SIZES = ((640, 85), (480, 80), (360, 75), (240, 65), (160, 40))  # longest side and quality, until the image fits
ANNOTATED, TEACHER = PALETTE[5], PALETTE[6]  # which the first runs do not have


@dataclass
class Box:
    """A box to draw: its sides in percent of the image's, and what stands at it."""

    left: float
    top: float
    width: float
    height: float
    text: str
    is_crowd: bool = False


@dataclass
class View:
    """An image with the boxes of the annotations or of one model."""

    title: str
    colour: str
    boxes: list[Box]


@dataclass
class Picture:
    """An image, as base64 of a JPEG, and what is seen in it."""

    name: str
    width: int
    height: int
    jpeg: str
    views: list[View]


@dataclass
class Pictures:
    """What the page shows, and a line for everything that it could not show."""

    items: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def pictures_of(groups: Sequence[Group], trust_code: bool = False) -> Pictures | None:
    """The same evaluation images for the first run of each group. None for runs of other tasks than detection.

    ``trust_code`` allows the configs to import and call any ``package.module:callable``.
    """
    if any(group.runs[0].metric != "map" for group in groups):
        return None
    found = _Looking(trust_code)
    for index, group in enumerate(groups):
        run = group.runs[0]
        student = "student" if len(groups) == 1 else run.name
        try:
            found.add(run, student, look(index)[0])
        except Exception as error:  # what was moved, is damaged or was given as an object raises anything
            found.shown.problems.append(_reason(f"{run.name}: no boxes of it", error))
    for sha256, views in found.teachers.items():
        if sha256 not in found.students:  # the run of the teacher itself may be among them
            for picture, view in zip(found.shown.items, views, strict=True):
                picture.views.append(view)
    return found.shown


class _Looking:
    """Lets one run after the other look at the images of the first one."""

    def __init__(self, trust_code: bool) -> None:
        self.trust_code, self.shown = trust_code, Pictures()
        self.data: str | None = None  # the hash of the annotations, of which all runs must have the same
        self.students: set[str] = set()  # hashes of weights
        self.teachers: dict[str, list[View]] = {}

    def add(self, run: RecordedRun, title: str, colour: str) -> None:
        """The boxes of a run's student, and of its teacher if no other run had the same one."""
        reopened = reopen(run.folder, trust_code=self.trust_code)
        dataset, names = reopened.eval_data, reopened.classes
        count = min(IMAGES, len(dataset))
        samples = fetch(dataset, [place * len(dataset) // count for place in range(count)])
        data = labels_hash(dataset)
        if self.shown.items and data != self.data:
            raise ValueError("its evaluation data are not those of the first run")
        task, normalization = find_task(reopened.config), normalization_of(dataset)
        own = _views(title, colour, task, reopened.model, normalization, samples, names)
        if not self.shown.items:
            self.data = data
            self.shown.items = [_picture(sample, names_of_classes(dataset)) for sample in samples]
        for picture, view in zip(self.shown.items, own, strict=True):
            picture.views.append(view)
        self.students.add(weights_hash(reopened.model))
        sha256 = run.info["teacher_sha256"]
        if sha256 is None or sha256 in self.teachers:
            return
        title = f"teacher of {title}" if self.teachers else "teacher"
        try:
            teacher = reopen_teacher(reopened, self.trust_code)
            assert teacher is not None
            model, normal = teacher
            self.teachers[sha256] = _views(title, TEACHER, task, model, normal or normalization, samples, names)
        except Exception as error:
            self.shown.problems.append(_reason(f"{run.name}: no boxes of its teacher", error))


def _reason(what: str, error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return printable(f"{what} ({text})")


@torch.no_grad()
def _views(
    title: str, colour: str, task: Task, module: nn.Module, normalization: Any, samples: Any, names: list[str] | None
) -> list[View]:
    """What a model finds in each of the images, which it is shown one at a time."""
    model = task.wrap(module, {}, True).eval()
    model.take_images("bytes", normalization)
    views = []
    for sample in samples:
        (found,) = model(task.collate([sample]))  # the highest scores come first
        keep = [place for place, score in enumerate(found["scores"].tolist()) if score >= SCORE][:BOXES]
        texts = [f"{_name(names, int(found['labels'][place]))} {found['scores'][place]:.2f}" for place in keep]
        views.append(View(title, colour, _boxes(found["boxes"][keep], sample[0], texts)))
    return views


def _picture(sample: Any, names: list[str] | None) -> Picture:
    """The image with its annotations."""
    image, target, _ = sample
    crowd = target["iscrowd"].tolist() if "iscrowd" in target else [0] * len(target["labels"])
    texts = [
        _name(names, label) + (", crowd" if many else "")
        for label, many in zip(target["labels"].tolist(), crowd, strict=True)
    ]
    boxes = _boxes(target["boxes"], image, texts)
    for box, many in zip(boxes, crowd, strict=True):
        box.is_crowd = bool(many)
    height, width = image.shape[-2:]
    name = f"Image {int(target['image_id'])}" if "image_id" in target else "Image"
    return Picture(name, width, height, _jpeg(image), [View("annotations", ANNOTATED, boxes)])


def _boxes(boxes: Tensor, image: Tensor, texts: list[str]) -> list[Box]:
    height, width = image.shape[-2:]
    found = []
    for (left, top, right, bottom), text in zip(boxes.float().tolist(), texts, strict=True):
        x, y = round(left / width * 100, 2), round(top / height * 100, 2)
        found.append(Box(x, y, round((right - left) / width * 100, 2), round((bottom - top) / height * 100, 2), text))
    return found


def _name(names: list[str] | None, label: int) -> str:
    """The name of a class, or its number where it has none. The label 0 is the background."""
    return names[label - 1] if names is not None and 0 < label <= len(names) else str(label)


def _jpeg(image: Tensor) -> str:
    """The image [3, H, W], uint8, as base64 of a JPEG of at most ``JPEG_BYTES``."""
    whole = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for side, quality in _SIZES:
        smaller = whole.copy()
        smaller.thumbnail((side, side))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= JPEG_BYTES:
            break
    return base64.b64encode(buffer.getvalue()).decode()
