"""``fastkd shards``: writes a folder of images as WebDataset shards, which are read like the folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_image, to_pil_image

from fastkd.trainer.data.images import load_images
from fastkd.trainer.data.readers.encoded import EXTENSIONS, BrokenImagesError, decode
from fastkd.trainer.data.readers.folder import FolderImages
from fastkd.trainer.data.readers.manifest import MANIFEST, read_manifest
from fastkd.trainer.files import FolderLock, replace_text
from fastkd.trainer.signals import leave_signals_to_main
from fastkd.trainer.text import printable
from fastkd.validate import check_int

_TEMPORARY = ".fastkd-shard-"  # begins the name of a shard that is being written


def shards_command(
    root: str,
    out: str,
    short_side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    shard_samples: int = 2000,
    seed: int = 0,
    train: str = "train",
    val: str = "val",
    val_fraction: float = 0.2,
    split_seed: int = 0,
    max_broken: int = 100,
) -> None:
    """Write a folder of images as WebDataset shards. A command that was stopped goes on when it is given again.

    Images that cannot be read are named and left out. The shards do not depend on the number of workers.

    Args:
        root: the folder, as --data.options.root takes it: train and val with a folder for each class in them, or
            directly a folder for each class.
        out: a folder for the shards, outside of root. It gets a folder for each part.
        short_side: scale images whose shorter side is longer down to this, and write them as JPEG. Others stay as they
            are, byte for byte.
        quality: of these JPEGs, from 1 to 100.
        workers: processes that write shards, by default one for each core. 0 writes in this process.
        shard_samples: images in a shard.
        seed: of the order of the images in the shards.
        train: the name of the part for training.
        val: the name of the part for evaluation.
        val_fraction: where root directly holds the classes, this fraction of every class becomes the part val.
        split_seed: the seed that those are drawn with.
        max_broken: this many images of a part may be unreadable. One more ends the command.
    """
    for name, value, least in (("short_side", short_side, 1), ("workers", workers, 0)):
        if value is not None:
            check_int(name, value, least)
    check_int("shard_samples", shard_samples, 1)
    check_int("seed", seed, 0)
    check_int("quality", quality, 1)
    if quality > 100:
        raise ValueError(f"quality: got {quality}, expected at most 100")
    folder = Path(out).resolve()
    if folder.is_relative_to(Path(root).resolve()):
        raise ValueError(f"out: got {out!r}, expected a folder outside of root, {root!r}")
    options: dict[str, Any] = {"train": train, "val": val, "val_fraction": val_fraction, "split_seed": split_seed}
    try:
        train_set, val_set = load_images(root, augment=False, max_broken=max_broken, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("data.options.", "")) from None
    options |= {"short_side": short_side, "quality": quality, "shard_samples": shard_samples, "seed": seed}
    processes = len(os.sched_getaffinity(0)) if workers is None else workers
    with closing(FolderLock(folder, "writing shards into this folder")):
        for part, images in {train: train_set, val: val_set}.items():
            assert isinstance(images, FolderImages)
            print(f"{Path(out) / part}: {_write_part(images, folder / part, options, processes, max_broken)}")
    print(f"read them with --data.name images --data.options.format shards --data.options.root {out}")


def _write_part(images: FolderImages, folder: Path, settings: dict[str, Any], workers: int, max_broken: int) -> str:
    """Write the shards that ``folder`` lacks; a sentence about all of them."""
    manifest = _begin(images, folder, settings)
    shards = manifest["shards"]
    writer = _ShardWriter(images, folder, settings, max_broken)
    todo = [number for number in range(len(writer)) if not _is_written(folder / _name(number), manifest)]
    loader = DataLoader(
        writer,
        batch_size=None,
        sampler=todo,
        num_workers=min(workers, len(todo)),
        prefetch_factor=1 if workers and todo else None,
        in_order=False,
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator(),  # otherwise a pass draws a number from torch's global one
    )
    shown = sys.stdout.isatty()
    done = len(writer) - len(todo)
    try:
        for shard in track(loader, folder.name, len(writer), completed=done, transient=True, disable=not shown):
            if shard.failure:
                raise OSError(shard.failure)
            for image, reason in shard.broken.items():
                print(printable(f"{image}: cannot be read ({reason}), left out"), file=sys.stderr)
            shards[shard.name] = {name: getattr(shard, name) for name in ("images", "bytes", "sha256", "broken")}
            broken = sum(len(known["broken"]) for known in shards.values())
            if broken > max_broken:
                raise BrokenImagesError(
                    f"{images.root}: {broken} images cannot be read, expected at most {max_broken} (--max-broken)"
                )
            os.replace(folder / shard.temporary, folder / shard.name)
            _write_manifest(folder, manifest)
    finally:
        _remove_temporaries(folder)
    _write_manifest(folder, manifest | {"complete": True})
    written, size = (sum(known[count] for known in shards.values()) for count in ("images", "bytes"))
    broken = len(images) - written
    return f"{written:,} images of {len(images.classes):,} classes in {len(shards):,} shards, {size / 1e6:,.1f} MB" + (
        f"; {broken} could not be read, {MANIFEST} names them" if broken else ""
    )


def _begin(images: FolderImages, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest in ``folder``, or a new one. ValueError for one of other settings or images, or shards of others."""
    names = hashlib.sha256(b"\0".join(images.names.tolist())).hexdigest()
    settings = settings | {"root": f"{len(images)} images with names of the sha256 {names}"}
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if any(folder.glob("*.tar")):
            raise ValueError(f"out: {folder} holds tar files that this command did not write; give another folder")
        manifest = {"complete": False, "settings": settings, "classes": images.classes, "shards": {}}
        _write_manifest(folder, manifest)
    for name, value in settings.items():
        if (begun := manifest["settings"].get(name)) != value:
            raise ValueError(
                f"{name}: got {value}, and the shards in {folder} were begun with {begun}; give that, or another --out"
            )
    return manifest | {"complete": False}


def _is_written(path: Path, manifest: dict[str, Any]) -> bool:
    known = manifest["shards"].get(path.name)
    return known is not None and path.is_file() and path.stat().st_size == known["bytes"]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"{number:06d}.tar"


@dataclass
class _Shard:
    """A shard under its ``temporary`` name. ``failure`` says why it could not be written."""

    name: str
    temporary: str
    images: int = 0
    bytes: int = 0
    sha256: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    failure: str = ""


class _ShardWriter(Dataset[_Shard]):
    """Item k is shard k, which is written when it is asked for."""

    def __init__(self, images: FolderImages, folder: Path, settings: dict[str, Any], max_broken: int) -> None:
        self.images, self.folder, self.max_broken = images, folder, max_broken
        self.short_side, self.quality = settings["short_side"], settings["quality"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings["seed"]))
        self.members = order.split(settings["shard_samples"])

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> _Shard:
        shard = _Shard(_name(number), f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with open(self.folder / shard.temporary, "x+b") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                    self._fill(archive, self.members[number].tolist(), shard)
                file.flush()
                os.fsync(file.fileno())
                shard.bytes = file.tell()
                file.seek(0)
                shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # a full disk
            shard.failure = f"{self.folder / shard.name}: cannot be written ({error.strerror or error})"
        return shard

    def _fill(self, archive: tarfile.TarFile, members: list[int], shard: _Shard) -> None:
        for index in members:
            try:
                extension, image = self._image(index)
            except Exception as error:  # decoders raise almost anything on damaged files
                reason = re.sub(" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")  # differs between processes
                shard.broken[self.images.describe(index)] = reason
                if len(shard.broken) > self.max_broken:
                    return
                continue
            shard.images += 1
            label = str(int(self.images.labels[index])).encode()
            for name, content in ((f"{index:09d}{extension}", image), (f"{index:09d}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    def _image(self, index: int) -> tuple[str, bytes]:
        """(extension, file) of an image that can be decoded."""
        encoded = self.images.encoded(index)
        pixels = to_image(decode(encoded))  # [3, H, W]
        height, width = pixels.shape[1:]
        if self.short_side is None or min(height, width) <= self.short_side:
            name = self.images.names[index].lower()
            return next(kind for kind in EXTENSIONS if name.endswith(kind.encode())), encoded
        size = [round(side * self.short_side / min(height, width)) for side in (width, height)]
        buffer = io.BytesIO()
        smaller = to_pil_image(pixels).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        smaller.save(buffer, "JPEG", quality=self.quality)
        return ".jpg", buffer.getvalue()
