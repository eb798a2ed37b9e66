"""Measures how fast images are read and augmented on one core, beside torchvision's and timm's loaders, in one run.

    python -m bench.loader [--images 128] [--rounds 12] [--output FOLDER]

Generated JPEGs of 500 x 400 pixels, as ImageNet's are on average, become batches of 32 images of 224 x 224: a random
crop, resized, and a random mirror. The loaders take turns batch by batch, in one process and one thread. Time is the
processor time of this process in the fastest quarter of the batches, so that a busy machine hardly counts.

The last line is the ratio of fastkd's rates to those of ``ImageFolder`` with torchvision's v2 transforms in float32.
The command exits with 1 where one is below 1.7.
"""

import argparse
import io
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bench.report import hardware, table
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.images import load_images
from fastkd.trainer.data.loader import train_loader
from fastkd.trainer.data.options import IMAGENET_MEAN, IMAGENET_STD
from fastkd.trainer.data.readers.encoded import decode
from fastkd.trainer.rng import kept_generators, sample_seeds, seed_generators

FLOOR = 1.7
WIDTH, HEIGHT, SIDE, BATCH = 500, 400, 224, 32
BASELINE = "torchvision ImageFolder + v2, float32"
OURS = {"folder": "fastkd folder, uint8", "shards": "fastkd shards, uint8"}
GPU_RATES = (7000, 9000)  # images/s of ResNet-34 -> ResNet-18 on one H200, estimated


def write_images(root: Path, count: int) -> None:
    """``root/folder/train`` and ``root/shards/train`` with the same JPEGs of two classes, and ``val`` with a few."""
    generator = np.random.default_rng(0)
    for part, images in (("train", count), ("val", 2)):
        (root / "shards" / part).mkdir(parents=True)
        with tarfile.open(root / "shards" / part / "000000.tar", "w") as archive:
            for number in range(images):
                content, label = _jpeg(generator), number % 2
                folder = root / "folder" / part / f"{label}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:06d}.jpg").write_bytes(content)
                for name, text in ((f"{number:06d}.jpg", content), (f"{number:06d}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(text)
                    archive.addfile(member, io.BytesIO(text))


def _jpeg(generator: np.random.Generator) -> bytes:
    """Soft shapes with fine noise, of a quality at which it is as large as a picture of ImageNet (about 100 kB)."""
    shapes = Image.fromarray(generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) + generator.normal(
        0, 12, (HEIGHT, WIDTH, 3)
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def loaders(root: Path, batch: int) -> dict[str, Iterable[Any]]:
    """Loaders of all training images by name; a pass over each reads and augments them once, in this process."""
    from timm.data import ImageDataset, create_loader

    steps = [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    folder = ImageFolder(root / "folder" / "train", v2.Compose([*steps, *to_float]))
    found: dict[str, Iterable[Any]] = {
        BASELINE: DataLoader(folder, batch, shuffle=True),
        "timm create_loader, float32": create_loader(
            ImageDataset(str(root / "folder" / "train")),
            (3, SIDE, SIDE),
            batch,
            is_training=True,
            color_jitter=0.0,
            interpolation="bilinear",
            num_workers=0,
            use_prefetcher=False,
            persistent_workers=False,
        ),
    }
    for form, name in OURS.items():
        data, _ = load_images(str(root / form), format=form, image_size=SIDE)
        config = DataConfig(batch_size=batch)
        found[name], _ = train_loader(data, config, 0, torch.device("cpu"))
    return found


def images_per_second(found: dict[str, Iterable[Any]], rounds: int) -> dict[str, float]:
    """The rate of each loader in the fastest quarter of its batches; the loaders take turns batch by batch."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        passes = {name: iter(loader) for name, loader in found.items()}
        while passes:
            for name in list(passes):
                begun = time.process_time()
                batch = next(passes[name], None)
                if batch is None:
                    del passes[name]
                else:
                    times[name].append((time.process_time() - begun) / len(batch[1]))
    return {name: 1 / statistics.mean(sorted(spent)[: -(-len(spent) // 4)]) for name, spent in times.items()}


def least(work: dict[str, Any], rounds: int, do: Callable[[Any], Any]) -> dict[str, float]:
    """The least processor time of ``do(part)``, in seconds, over rounds in which all parts take turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, part in work.items():
            begun = time.process_time()
            do(part)
            times[name].append(time.process_time() - begun)
    return {name: min(spent) for name, spent in times.items()}


def parts(root: Path, rounds: int) -> dict[str, float]:
    """Microseconds that fastkd takes for the steps of an image."""
    data, _ = load_images(str(root / "folder"), image_size=SIDE)
    encoded = [data.encoded(index) for index in range(min(len(data), BATCH))]
    decoded = [decode(content) for content in encoded]
    ready = [data.transform(image) for image in decoded]
    seeds = sample_seeds(0, 0, range(len(encoded))).tolist()

    def seed_all() -> None:
        for seed in seeds:
            seed_generators(seed)

    work: dict[str, Callable[[], Any]] = {
        "read the file": lambda: [data.encoded(index) for index in range(len(encoded))],
        "decode": lambda: [decode(content) for content in encoded],
        "crop, resize, mirror": lambda: [data.transform(image) for image in decoded],
        "seed the generators": seed_all,
        "join the batch": lambda: torch.stack(ready),
    }
    with kept_generators():
        return {name: 1e6 * spent / len(encoded) for name, spent in least(work, rounds, lambda part: part()).items()}


class Ready(Dataset[Any]):
    """Batches that cost a worker nothing, to measure what the main process can receive."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.batch = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=dtype)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.batch.clone()


def received(dtype: torch.dtype) -> float:
    """Images/s that the main process can receive from workers and copy once, by its own processor time."""
    place = torch.empty(BATCH, 3, SIDE, SIDE, dtype=dtype)
    batches = iter(DataLoader(Ready(dtype), batch_size=None, num_workers=1))
    next(batches)
    begun, count = time.process_time(), 0
    for batch in batches:
        place.copy_(batch)
        count += BATCH
    return count / (time.process_time() - begun)


def report(rates: dict[str, float], spent: dict[str, float], taken: dict[str, float], command: str, rounds: int) -> str:
    rows = [[name, f"{rate:,.0f}", f"{rate / rates[BASELINE]:.2f}"] for name, rate in rates.items()]
    per_core = min(rates[name] for name in OURS.values())
    few, many = (-(-rate // int(per_core)) for rate in GPU_RATES)
    shown = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in taken.items())
    lines = [
        "# Reading and augmenting images on one core",
        "",
        f"`{command}` on {hardware()}; processor time, the",
        f"fastest quarter of the batches of {rounds} rounds; JPEGs of {WIDTH} x {HEIGHT} pixels to {SIDE} x {SIDE}.",
        "",
        *table(("case", "images/s a core", "ratio"), rows),
        "",
        "Where fastkd's time goes:",
        "",
        *table(("part", "us an image"), [[name, f"{us:,.0f}"] for name, us in spent.items()]),
        "",
        f"The main process can receive from its workers and copy once, in images/s: {shown}.",
        f"A GPU that takes an estimated {GPU_RATES[0]:,} to {GPU_RATES[1]:,} images/s needs {few} to {many} cores.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="how many are written and read")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="a folder that loader.md is written to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), options.images)
        rates = images_per_second(loaders(Path(name), min(BATCH, options.images)), options.rounds)
        spent = parts(Path(name), options.rounds)
    taken = {kind: received(dtype) for kind, dtype in (("uint8", torch.uint8), ("float32", torch.float32))}
    command = shlex.join(["python", "-m", "bench.loader", *(sys.argv[1:] if arguments is None else arguments)])
    ratios = {form: rates[name] / rates[BASELINE] for form, name in OURS.items()}
    last = "ratio to ImageFolder + v2 (float) on one core: " + ", ".join(f"{x} {y:.2f}" for x, y in ratios.items())
    text = report(rates, spent, taken, command, options.rounds) + "\n" + last + "\n"
    print(text, end="")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "loader.md").write_text(text)
    return int(min(ratios.values()) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
