"""A folder of generated JPEGs in ImageNet's layout, the same as WebDataset shards, and recipes on them.

``python -m tests.helpers.imagenet_like soak --kills 20`` kills a run at random moments, resumes it, and compares it
with the uninterrupted one, bit for bit.
"""

import argparse
import dataclasses
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.trainer import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig, train
from fastkd.trainer.run.checkpoint import list_checkpoints, read_checkpoint
from tests.helpers.trainer_runs import same

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


def soak(kills: int, seed: int, folder: Path, workers: int = 2) -> dict[str, float]:
    """Kill a run ``kills`` times at random moments. AssertionError if anything that was reported as saved is lost."""
    write_images(folder)
    train(dataclasses.replace(teacher(str(folder)), quiet=True))
    base = dataclasses.replace(
        student(str(folder)), epochs=max(4, 2 * kills), save_every_steps=1, quiet=True, keep=3,
        data=data(str(folder), workers=workers),
    )  # fmt: skip
    whole = dataclasses.replace(base, run_dir=f"{folder}/whole")
    started = time.perf_counter()
    expected = train(whole)
    cut = dataclasses.replace(base, run_dir=f"{folder}/cut", resume_or_start=True)
    file = folder / "cut.json"
    file.write_text(json.dumps(cut.to_dict()))
    code = (
        "import json, sys, torch; from fastkd.trainer import TrainConfig, train; torch.set_num_threads(1)\n"
        "train(TrainConfig.from_dict(json.loads(open(sys.argv[1]).read())))"
    )
    generator = random.Random(seed)
    checkpoints = folder / "cut" / "checkpoints"

    def newest() -> int:
        found = list_checkpoints(checkpoints) if checkpoints.exists() else []
        return int(found[-1].name.split("-")[1]) if found else 0

    saved, done, resumed, steps = 0, 0, 0, read_checkpoint(Path(str(expected.path))).manifest["step"]
    while True:
        process = subprocess.Popen([sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE)
        if done < kills:
            # Within a step or a save some way on; now and then while the process starts.
            goal, begun = saved + generator.randint(0, steps // (kills + 1)), time.perf_counter()
            early = generator.uniform(0, 6) if goal == saved else 600
            while process.poll() is None and time.perf_counter() - begun < early and newest() < max(goal, saved + 1):
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.1))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        found = newest()
        assert found >= saved, f"step {saved} was saved, the newest is {found}"
        resumed += found > saved
        saved = found
        if process.returncode == 0:
            break
    one, other = (read_checkpoint(Path(path)) for path in (expected.path, list_checkpoints(checkpoints)[-1]))
    assert one.weights.keys() == other.weights.keys()
    for name in one.weights:
        assert same(one.weights[name], other.weights[name]), f"{name} differs"
    assert one.state.keys() == other.state.keys()
    for name in one.state.keys() - {"seconds"}:
        assert same(one.state[name], other.state[name]), f"{name} of the state differs"
    assert not list(checkpoints.glob(".tmp-*"))
    metrics = [(folder / run / "metrics.jsonl").read_bytes() for run in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    return {"kills": done, "kills_after_progress": resumed, "steps": saved, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["soak", "write"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="for write: the folder to make")
    options = parser.parse_args()
    if options.command == "write":
        write_images(options.out)
        sys.exit()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(soak(options.kills, options.seed, Path(place)))
