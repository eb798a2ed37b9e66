"""Small pictures as files: of classes that a network can tell apart, and with boxes in the format of COCO."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "cat"}, {"id": 1000, "name": "cup"}]


def write_classes(root: Path, classes: Sequence[str], each: int) -> Path:
    """Write ``each`` small JPEGs into ``root/CLASS``: stripes of a width, direction and colour per class."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 90, (40, 48, 3))
            pixels[..., label % 3] += (100 + 60 * np.sin((x if label < 3 else y) / (2 + label))).astype(int)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.jpg")
    return root


def box(number: int, image: int, category: int = 3, bbox: Any = (10, 20, 30, 16), **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def write_part(
    root: Path, part: str, sizes: dict[int, tuple[int, int]], boxes: list[dict[str, Any]], **others: Any
) -> dict[str, Any]:
    """Write images of these sizes, (height, width) by their ids, as PNG, black and white inside of their boxes.

    Returns the content of ``root/PART.json``, of which ``others`` may replace parts.
    """
    (root / part).mkdir(parents=True, exist_ok=True)
    images = []
    for number, (height, width) in sizes.items():
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        for one in boxes:
            if one["image_id"] == number:
                x, y, w, h = (max(0, round(value)) for value in one["bbox"])
                pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(root / part / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    content = {"images": images, "annotations": boxes, "categories": CATEGORIES, **others}
    (root / f"{part}.json").write_text(json.dumps(content))
    return content
