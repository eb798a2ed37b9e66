"""A folder of generated JPEGs in ImageNet's layout, the same as WebDataset shards, and recipes on them.

``python -m tests.helpers.imagenet_like FOLDER`` writes both into a folder.
"""

import dataclasses
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.trainer import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

CLASSES, SIDE = 20, 40


def write_images(root: Path, train: int = 6, val: int = 2, classes: int = CLASSES) -> Path:
    """``root/folder`` and ``root/shards``: each class a colour and a direction of stripes, with noise."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        (root / "shards" / part).mkdir(parents=True)
        samples = []
        for label in range(classes):
            folder = root / "folder" / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                encoded = _jpeg(label, generator)
                (folder / f"{number:04d}.JPEG").write_bytes(encoded)
                samples.append((f"{label:04d}_{number:04d}", label, encoded))
        for shard in range(3):
            with tarfile.open(root / "shards" / part / f"{shard:06d}.tar", "w") as archive:
                for key, label, encoded in samples[shard * len(samples) // 3 : (shard + 1) * len(samples) // 3]:
                    for name, content in ((f"{key}.jpg", encoded), (f"{key}.cls", str(label).encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return root


def _jpeg(label: int, generator: np.random.Generator) -> bytes:
    y, x = np.mgrid[0:SIDE, 0:SIDE] + generator.uniform(0, 8)
    angle = np.pi * (label % 5) / 5
    stripes = np.sin(x * np.cos(angle) + y * np.sin(angle))
    colour = np.array([(label // 5) & 1, (label // 5) >> 1 & 1, 0.5])
    pixels = 128 + 90 * stripes[..., None] * (colour - 0.4) + generator.normal(0, 12, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def data(root: str, form: str = "folder", workers: int = 0, batch: int = 40) -> DataConfig:
    return DataConfig(
        name="images",
        options={"root": f"{root}/{form}", "format": form, "image_size": 32, "min_scale": 0.6},
        batch_size=batch,
        eval_batch_size=40,
        num_workers=workers,
    )


def teacher(root: str = ".", form: str = "folder") -> TrainConfig:
    """A small residual network of timm's, from scratch."""
    return TrainConfig(
        student=ModelConfig(name="timm:test_resnet", num_classes=CLASSES),
        data=data(root, form),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1),
        epochs=2,
        device="cpu",
        run_dir=f"{root}/runs/teacher",
        tensorboard=False,
        progress=False,
    )


def student(root: str = ".", form: str = "folder") -> TrainConfig:
    """A network half as wide, distilled in two chunks, with LARS, a moving average and a linear learning-rate rule."""
    return dataclasses.replace(
        teacher(root, form),
        student=ModelConfig(name="timm:test_efficientnet", num_classes=CLASSES),
        teacher=ModelConfig(name="timm:test_resnet", num_classes=CLASSES, weights=f"{root}/runs/teacher"),
        objective=ObjectiveConfig(terms="dcd+kd"),
        optim=OptimConfig(name="lars", lr=0.5, reference_batch=80, warmup_epochs=0.5),
        chunks=2,
        ema=0.9,
        run_dir=f"{root}/runs/student-{form}",
    )


if __name__ == "__main__":
    write_images(Path(sys.argv[1]))
