"""Small pictures of classes that a network can tell apart, as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


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
