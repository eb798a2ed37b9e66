"""Reads annotation files in the format of COCO (https://cocodataset.org/#format-data), and checks what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.trainer.strict_json import check_fields, read_json_object

MAX_BYTES = 1 << 32  # of an annotation file; COCO's largest has 450 MB
NOT_USED = ("segmentation", "keypoints", "caption")  # most of the file, which is forgotten while it is read


@dataclass
class Annotations:
    """What is to be seen in N images, which are in the order of their ids: M boxes, those of one image side by side.

    Attributes:
        categories: (id, name) of every class, in the order of their ids. The first one has the label 1.
        image_ids: [N], int64.
        names: [N], the paths of the images in their folder, as bytes.
        sizes: [N, 2], height and width in pixels.
        starts: [N + 1]. The boxes of image i are those from ``starts[i]`` up to ``starts[i + 1]``.
        boxes: [M, 4], float32: left, top, right and bottom in pixels, cut off at the borders of the image.
        labels: [M], int64, from 1 on.
        crowd: [M], whether a box holds a crowd.
        area: [M], float32, in square pixels.
        without_area: how many boxes were left out because they have no width or no height.
    """

    categories: list[tuple[int, str]]
    image_ids: np.ndarray
    names: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    without_area: int

    @property
    def classes(self) -> list[str]:
        """The names of the classes, with the category's id behind a name that several of them have."""
        count = Counter(name for _, name in self.categories)
        return [name if count[name] == 1 else f"{name} ({number})" for number, name in self.categories]

    def with_boxes(self, keep: np.ndarray) -> Annotations:
        """The same images with the boxes of ``keep`` [M], bool, alone."""
        starts = np.concatenate([[0], np.cumsum(keep)])[self.starts]
        parts = {name: getattr(self, name)[keep] for name in ("boxes", "labels", "crowd", "area")}
        return dataclasses.replace(self, starts=starts, **parts)

    def with_images(self, keep: np.ndarray) -> Annotations:
        """The images of ``keep`` [N], bool, alone, with their boxes."""
        counts = np.diff(self.starts)
        fewer = self.with_boxes(np.repeat(keep, counts))
        parts = {name: getattr(self, name)[keep] for name in ("image_ids", "names", "sizes")}
        return dataclasses.replace(fewer, starts=np.concatenate([[0], np.cumsum(counts[keep])]), **parts)

    def sha256(self) -> str:
        """The hash of everything that is trained on: classes, images and boxes."""
        parts = (self.image_ids, self.names, self.sizes, self.starts, self.boxes, self.labels, self.crowd, self.area)
        found = hashlib.sha256(repr(self.categories).encode())
        for part in parts:
            found.update(f"{part.dtype.str}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()


def read_annotations(file: Path, folder: Path) -> Annotations:
    """The annotations in ``file`` of the images in ``folder``. Images that the file does not name are not used.

    Any ids are taken, and in any order. Boxes are cut off at the borders of their image. A box without width or height
    is left out.

    Raises:
        ValueError: one line that names the file, the image or the annotation, and what is wrong with it.
    """
    for path, kind in ((folder, "folder of images"), (file, "annotation file")):
        if not (path.is_dir() if path is folder else path.is_file()):
            raise ValueError(
                f"data.options.root: {path} is not there, expected the {kind} (data.options.train, val, annotations)"
            )
    content = read_json_object(
        file, {"images": list, "annotations": list, "categories": list}, MAX_BYTES, _without_what_is_not_used
    )
    categories = _categories(content["categories"], file)
    images = _images(content["images"], file, folder)
    rows = {image["id"]: row for row, image in enumerate(images)}
    labels = {number: label for label, (number, _) in enumerate(categories, 1)}
    entries = content["annotations"]
    found = np.empty((len(entries), 7))  # left, top, width, height, area, label, crowd
    row_of = np.empty(len(entries), dtype=np.int64)
    for place, entry in enumerate(entries):
        name = _checked(entry, "annotation", place, {"image_id": int, "category_id": int, "bbox": list}, file)
        row, label = rows.get(entry["image_id"]), labels.get(entry["category_id"])
        if row is None:
            raise ValueError(f"{name}: image_id is {entry['image_id']}, expected the id of an image in this file")
        if label is None:
            raise ValueError(f"{name}: category_id is {entry['category_id']}, expected the id of a category")
        box, area, crowd = entry["bbox"], entry.get("area"), entry.get("iscrowd", 0)
        area = 0 if area is None else area  # then it is that of the box
        if len(box) != 4 or not all(map(_is_finite, box)) or box[2] < 0 or box[3] < 0:
            raise ValueError(f"{name}: bbox is {box}, expected four finite numbers: left, top, width >= 0, height >= 0")
        if not _is_finite(area) or area < 0:
            raise ValueError(f"{name}: area is {area!r}, expected a finite number >= 0")
        if crowd not in (0, 1):
            raise ValueError(f"{name}: iscrowd is {crowd!r}, expected 0 or 1")
        row_of[place] = row
        found[place] = *box, area or box[2] * box[3], label, crowd
    sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64)
    borders = sizes[row_of][:, [1, 0, 1, 0]]  # [M, 4]
    corners = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], axis=1)
    outside = ((corners[:, :2] > borders[:, :2]) | (corners[:, 2:] < 0)).any(axis=1)
    if outside.any():
        place = int(outside.argmax())
        raise ValueError(
            f"{_name(entries[place], 'annotation', place, file)}: bbox is {entries[place]['bbox']}, expected a box in "
            f"its image, which has {borders[place, 0]} x {borders[place, 1]} pixels"
        )
    corners = corners.clip(0, borders).astype(np.float32)
    counts = np.bincount(row_of, minlength=len(images))
    order = np.argsort(row_of, kind="stable")
    read = Annotations(
        categories=categories,
        image_ids=np.array([image["id"] for image in images], dtype=np.int64),
        names=np.array([os.fsencode(image["file_name"]) for image in images]),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=corners[order],
        labels=found[order, 5].astype(np.int64),
        crowd=found[order, 6].astype(bool),
        area=found[order, 4].astype(np.float32),
        without_area=0,
    )
    has_area: np.ndarray = np.all(read.boxes[:, 2:] > read.boxes[:, :2], axis=1)
    return dataclasses.replace(read.with_boxes(has_area), without_area=int((~has_area).sum()))


def _without_what_is_not_used(value: dict[str, Any]) -> dict[str, Any]:
    for key in NOT_USED:
        value.pop(key, None)
    return value


def _name(entry: Any, kind: str, place: int, file: Path) -> str:
    """What an entry is called in a message: by its id, or by its place in the file if it has none."""
    known = isinstance(entry, dict) and "id" in entry
    return f"{file}: {kind} {entry['id']!r}" if known else f"{file}: {kind} number {place} in the file"


def _checked(entry: Any, kind: str, place: int, fields: dict[str, type], file: Path) -> str:
    """The name of an entry, which must be an object with these fields."""
    name = _name(entry, kind, place, file)
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: is of type {type(entry).__name__}, expected an object")
    check_fields(entry, fields, name)
    return name


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _sorted_by_id(entries: list[Any], kind: str, fields: dict[str, type], file: Path) -> list[dict[str, Any]]:
    """The entries of a list in the order of their ids, which are all different. They have these ``fields``."""
    for place, entry in enumerate(entries):
        _checked(entry, kind, place, {"id": int, **fields}, file)
    if not entries:
        raise ValueError(f"{file}: has no {kind}, expected at least one")
    ordered = sorted(entries, key=lambda entry: entry["id"])
    for one, other in itertools.pairwise(ordered):
        if one["id"] == other["id"]:
            raise ValueError(f"{file}: {kind} {one['id']}: two have this id, expected another one for each")
    return ordered


def _categories(entries: list[Any], file: Path) -> list[tuple[int, str]]:
    ordered = _sorted_by_id(entries, "category", {"name": str}, file)
    return [(entry["id"], entry["name"]) for entry in ordered]


def _images(entries: list[Any], file: Path, folder: Path) -> list[dict[str, Any]]:
    """The images in the order of their ids, after a look that they are there. Only names below ``folder`` are."""
    ordered = _sorted_by_id(entries, "image", {"file_name": str, "height": int, "width": int}, file)
    there: dict[str, set[str]] = {}
    for image in ordered:
        name = f"{file}: image {image['id']}"
        if image["height"] < 1 or image["width"] < 1:
            raise ValueError(f"{name}: has {image['width']} x {image['height']} pixels, expected at least 1 x 1")
        inner, _, last = image["file_name"].rpartition("/")
        if inner not in there:
            inside = not image["file_name"].startswith("/") and ".." not in inner.split("/")
            there[inner] = set(os.listdir(folder / inner)) if inside and os.path.isdir(folder / inner) else set()
        if last not in there[inner]:
            raise ValueError(f"{name}: the file {image['file_name']!r} is not in {folder}")
    return ordered
