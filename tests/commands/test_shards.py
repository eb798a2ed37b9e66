"""``fastkd shards``: the shards give what the folder gives, and a command that was killed goes on."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastkd.trainer.commands.shards import shards_command
from fastkd.trainer.data.images import load_images
from fastkd.trainer.data.readers.encoded import BrokenImagesError, ImageSamples
from fastkd.trainer.data.readers.manifest import MANIFEST
from fastkd.trainer.files import LOCK, FolderLock
from fastkd.trainer.models.weights import CheckpointError

CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, seed: int, side: int = 20, kind: str = "JPEG") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "val"), each: int = 4) -> Path:
    for part in parts:
        for label, name in enumerate(CLASSES):
            (root / part / name / "deeper").mkdir(parents=True)
            for number in range(each):
                write_image(root / part / name / "deeper" / f"{number}.x.JPEG", 10 * label + number, 20 + 4 * number)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "folder")


def write(root: Path, out: Path, **options: Any) -> Path:
    shards_command(str(root), str(out), **{"workers": 0, "shard_samples": 5} | options)
    return out


def samples(dataset: ImageSamples) -> list[tuple[int, bytes]]:
    return sorted((int(label), dataset.encoded(index)) for index, label in enumerate(dataset.labels))


def read(root: Path, form: str = "shards") -> tuple[ImageSamples, ImageSamples]:
    return load_images(str(root), format=form, augment=False)


def contents(out: Path) -> dict[str, bytes]:
    """All files but the lock, which a killed process leaves."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("parts", [("train", "val"), ("",)])
def test_shards_give_the_samples_of_the_folder(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """A folder without train and val is split as it is when it is read itself."""
    folder = write_folder(tmp_path / "folder", parts)
    out = write(folder, tmp_path / "out")
    for ours, theirs in zip(read(out), read(folder, "folder"), strict=True):
        assert samples(ours) == samples(theirs)
        assert ours.classes == theirs.classes == list(CLASSES)
        assert ours.labels.tolist() != sorted(ours.labels.tolist())


def test_the_number_of_workers_changes_no_byte_and_the_seed_does(folder: Path, tmp_path: Path) -> None:
    first = contents(write(folder, tmp_path / "0", workers=0))
    names = [*(f"00000{number}.tar" for number in range(3)), MANIFEST]
    assert sorted(first) == [f"{part}/{name}" for part in ("train", "val") for name in names]
    assert contents(write(folder, tmp_path / "2", workers=2)) == first
    assert contents(write(folder, tmp_path / "s", seed=1))["train/000000.tar"] != first["train/000000.tar"]
    manifest = json.loads(first[f"train/{MANIFEST}"])
    for name, shard in manifest["shards"].items():
        content = first[f"train/{name}"]
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_images_are_scaled_down_to_the_short_side_and_smaller_ones_stay(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "train" / "ant" / "large.png", 0, 40, "PNG")
    before = samples(read(folder, "folder")[0])
    out = write(folder, tmp_path / "out", short_side=24)
    after = samples(read(out)[0])
    sizes = sorted(Image.open(io.BytesIO(image)).size for _, image in after)
    assert sizes == sorted([(30, 20)] * 3 + [(34, 24)] * 3 + [(33, 24)] * 3 + [(32, 24)] * 3 + [(30, 24)])
    assert len(set(before) & set(after)) == 6
    assert {Image.open(io.BytesIO(image)).format for _, image in after} == {"JPEG"}
    worse = samples(read(write(folder, tmp_path / "worse", short_side=24, quality=20))[0])
    assert sum(len(image) for _, image in worse) < sum(len(image) for _, image in after)


def killed(at: int, before: bool, command: Callable[[], Any]) -> int:
    """Run ``command`` in a process that is killed before or after it has renamed its file number ``at``."""

    def run() -> None:
        rename, count = os.replace, 0

        def replace(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if not before:
                rename(source, target)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if before:
                rename(source, target)

        os.replace = replace  # type: ignore[assignment]
        command()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode or 0


def test_a_killed_command_keeps_its_finished_shards_and_goes_on(folder: Path, tmp_path: Path) -> None:
    whole, out = contents(write(folder, tmp_path / "whole")), tmp_path / "out"
    kept: dict[str, int] = {}
    for at in range(1, 9):  # a shard and the manifest in turn: every start gets at least as far as the one before
        process_died = killed(at % 4 + 1, at % 2 == 0, lambda: write(folder, out))
        manifest = out / "train" / MANIFEST
        if process_died and manifest.exists() and not json.loads(manifest.read_bytes())["complete"]:
            with pytest.raises(ValueError, match="the shards are not complete; the same fastkd shards command goes on"):
                read(out)
        found = {path: (out / path).stat().st_ino for path in kept}
        assert found == kept
        kept = {
            f"{part}/{name}": (out / part / name).stat().st_ino
            for part in ("train", "val")
            if (out / part / MANIFEST).exists()
            for name in json.loads((out / part / MANIFEST).read_bytes())["shards"]
        }
    assert kept
    write(folder, out)
    assert {path: (out / path).stat().st_ino for path in kept} == kept
    assert contents(out) == whole


def test_a_shard_that_was_lost_or_cut_off_is_written_again(folder: Path, tmp_path: Path) -> None:
    out = write(folder, tmp_path / "out")
    before = contents(out)
    (out / "train" / "000001.tar").unlink()
    os.truncate(out / "train" / "000002.tar", 1000)
    with pytest.raises(ValueError, match=r"2 shards are not what was written, such as '000001\.tar' with no bytes"):
        read(out)
    write(folder, out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"short_side": 24}, "^short_side: got 24, and the shards in .*/train were begun with None"),
        ({"quality": 80}, "^quality: got 80"),
        ({"shard_samples": 6}, "^shard_samples: got 6"),
        ({"seed": 1}, "^seed: got 1"),
        ({"val_fraction": 0.3}, "^val_fraction: got 0.3"),
    ],
)
def test_other_settings_are_refused_by_name(
    folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    out = write(folder, tmp_path / "out")
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        write(folder, out, **changed)
    assert contents(out) == before


def test_another_image_in_the_folder_is_refused_and_another_place_of_it_is_not(folder: Path, tmp_path: Path) -> None:
    out = write(folder, tmp_path / "out")
    before = contents(out)
    moved = folder.rename(tmp_path / "moved")
    write(moved, out, workers=1, max_broken=3)
    assert contents(out) == before
    first = moved / "train" / "ant" / "deeper" / "0.x.JPEG"
    first.rename(first.with_name("renamed.jpg"))
    with pytest.raises(ValueError, match=r"^root: got 12 images with names of the sha256"):
        write(moved, out)


def test_broken_images_are_named_and_left_out_up_to_a_limit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the class cat no image can be read: it stays a class."""
    broken = sorted((folder / "train" / "cat" / "deeper").iterdir())
    for number, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[: 300 * number])
    broken[0].unlink()
    broken[0].symlink_to("/dev/zero")
    out = tmp_path / "out"
    with pytest.raises(BrokenImagesError, match=r"[4] images cannot be read, expected at most 3 \(--max-broken\)"):
        write(folder, out, max_broken=3)
    write(folder, out, max_broken=4)
    printed = capsys.readouterr()
    assert all(f"{path}: cannot be read (" in printed.err for path in broken)
    assert f"{out}/train: 8 images of 3 classes in 3 shards, 0.0 MB; 4 could not be read" in printed.out
    train, val = read(out)
    assert train.classes == val.classes == list(CLASSES)
    assert samples(train) == [sample for sample in samples(val) if sample[0] < 2]
    known = json.loads((out / "train" / MANIFEST).read_bytes())["shards"].values()
    assert sorted(image for shard in known for image in shard["broken"]) == [str(path) for path in broken]


def test_what_cannot_be_written_is_one_line(
    folder: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["shards", "--root", str(folder), "--workers", "1"]
    assert "fastkd shards: --out: is missing" in refused(*flags)
    inside = str(folder / "train" / "out")
    assert f"out: got {inside!r}, expected a folder outside of root" in refused(*flags, "--out", inside)
    assert "quality: got 101, expected at most 100" in refused(*flags, "--out", "x", "--quality", "101")
    assert "short_side: got 0, expected an int >= 1" in refused(*flags, "--out", "x", "--short-side", "0")
    assert f"root: {tmp_path}/none is not a folder" in refused("shards", "--root", f"{tmp_path}/none", "--out", "x")
    others = tmp_path / "others" / "train"
    others.mkdir(parents=True)
    (others / "0.tar").write_bytes(b"x")
    assert f"out: {others} holds tar files" in refused(*flags, "--out", str(others.parent))
    assert contents(others) == {"0.tar": b"x"}
    out = tmp_path / "out"
    lock = FolderLock(out)
    with pytest.raises(CheckpointError, match="another process is writing shards into this folder"):
        write(folder, out)
    lock.close()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr("fastkd.trainer.commands.shards.replace_text", Path.write_text)
    assert f"{out}/train/000000.tar: cannot be written (No space left" in refused(*flags, "--out", str(out))
    assert list(contents(out)) == [f"train/{MANIFEST}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not JSON: truncated or corrupted"),
        (lambda text: "[]", "holds list, expected an object"),
        (lambda text: text.replace('"classes"', '"c"'), "lacks classes"),
        (lambda text: text.replace('"ant"', "7"), "got a class whose name is no string"),
        (lambda text: text.replace('"sha256"', '"sha"'), r"000000\.tar: lacks sha256"),
        (lambda text: text.replace('"ant",', ""), "the largest label is 2, and .* names 2 classes"),
        (
            lambda text: text.replace('"bee"', '"wasp"'),
            r"train has 3 classes, val has 3; in one only: \['bee', 'wasp'\]",
        ),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    out = write(folder, tmp_path / "out")
    path = out / "train" / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read(out)
