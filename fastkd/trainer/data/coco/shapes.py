"""Draws a small data set in the format of COCO: coloured circles, squares, triangles and crosses on noise.

A detector learns it in minutes on one core: ``python -m fastkd.trainer.data.coco.shapes FOLDER``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

NAMES = ("circle", "square", "triangle", "cross")
SIDE = 128  # of an image, in pixels
SIZES = (12, 48)  # the smallest and the largest side of a shape
MOST = 6  # shapes in an image


def make_shapes(
    root: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    train: int = 2000,
    val: int = 400,
    seed: int = 0,
) -> None:
    """Write images of shapes into ``root/train`` and ``root/val``, with ``root/train.json`` and ``root/val.json``.

    An image has 128 x 128 pixels and one to six shapes of 12 to 48 pixels, which hide little of each other. The same
    numbers give the same images. Files that are there already are written anew.

    Args:
        root: the folder. It is made if it is not there.
        train: the number of images for training.
        val: the number of images for evaluation.
        seed: the seed that the images are drawn with.

    Example::

        make_shapes("shapes", train=100, val=20)
        train_set, eval_set = load_coco("shapes", short_side=(128,))
    """
    for number, (part, count) in enumerate((("train", train), ("val", val))):
        folder = Path(root) / part
        folder.mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            rng = np.random.default_rng([seed, number, index])
            image, shapes = _draw_image(rng)
            name = f"{index:05d}.jpg"
            image.save(folder / name, quality=95)
            images.append({"id": index + 1, "file_name": name, "width": SIDE, "height": SIDE})
            for kind, x, y, side in shapes:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "category_id": kind + 1,
                                    "bbox": [x, y, side, side], "area": side * side, "iscrowd": 0})  # fmt: skip
        categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (Path(root) / f"{part}.json").write_text(json.dumps(content))


def _draw_image(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """An image, and (kind, left, top, side) of the shapes in it."""
    field = rng.integers(40, 216, 3) + rng.normal(0, 35, (16, 16, 3))
    smooth = Image.fromarray(field.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) + rng.normal(0, 10, (SIDE, SIDE, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    shapes: list[tuple[int, int, int, int]] = []
    for _ in range(rng.integers(1, MOST + 1)):
        side = int(rng.integers(SIZES[0], SIZES[1] + 1))
        x, y = rng.integers(0, SIDE - side, 2).tolist()
        kind, colour = int(rng.integers(len(NAMES))), tuple(rng.integers(0, 256, 3).tolist())
        if not any(_overlap((x, y, side), other[1:]) > 0.3 * min(side, other[3]) ** 2 for other in shapes):
            shapes.append((kind, x, y, side))
            _draw_shape(canvas, kind, x, y, side, colour)
    return image, shapes


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """The pixels that two squares, (left, top, side), have in common."""
    sides = [min(one[i] + one[2], other[i] + other[2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(0, sides[0]) * max(0, sides[1])


def _draw_shape(canvas: ImageDraw.ImageDraw, kind: int, x: int, y: int, side: int, colour: tuple[int, ...]) -> None:
    """Fills the square of ``side`` pixels at (x, y) with a shape. PIL draws the last pixel that it is told, too."""
    right, bottom, third = x + side - 1, y + side - 1, side // 3
    if NAMES[kind] == "circle":
        canvas.ellipse((x, y, right, bottom), fill=colour)
    elif NAMES[kind] == "square":
        canvas.rectangle((x, y, right, bottom), fill=colour)
    elif NAMES[kind] == "triangle":
        canvas.polygon(((x + side / 2, y), (x, bottom), (right, bottom)), fill=colour)
    else:
        canvas.rectangle((x + third, y, right - third, bottom), fill=colour)
        canvas.rectangle((x, y + third, right, bottom - third), fill=colour)


if __name__ == "__main__":
    tyro.cli(make_shapes, prog="python -m fastkd.trainer.data.coco.shapes")
