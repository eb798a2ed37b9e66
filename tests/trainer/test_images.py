"""Images on disk: folders, shards and CIFAR's files are read right, broken images are replaced and counted."""

import io
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastkd import cli
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.images import load_images
from fastkd.trainer.data.loader import EpochSampler, train_loader
from fastkd.trainer.data.options import IMAGENET_MEAN, IMAGENET_STD
from fastkd.trainer.data.readers.encoded import BrokenImagesError, decode
from fastkd.trainer.data.readers.folder import FolderImages
from fastkd.trainer.data.readers.shards import ShardImages

CLASSES = ("ant", "bee", "cat")
NORMALIZATION = (IMAGENET_MEAN, IMAGENET_STD)


def encoded(seed: int, side: int = 24, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, each: int = 3) -> Path:
    for part in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(each):
                (root / part / name / f"{number}.png").write_bytes(encoded(100 * label + number))
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(root: Path, each: int = 3, json: bool = False) -> Path:
    """The images of ``write_folder``, class by class, two shards a part."""
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        samples = [(label, number) for label in range(len(CLASSES)) for number in range(each)]
        half = len(samples) // 2
        for shard, members in enumerate((samples[:half], samples[half:])):
            with tarfile.open(root / part / f"{shard:06d}.tar", "w") as archive:
                for label, number in members:
                    key = f"dir/{label}_{number}"
                    add(archive, f"{key}.txt", b"ignored")
                    if json:
                        add(archive, f"{key}.json", b'{"label": %d}' % label)
                    else:
                        add(archive, f"{key}.cls", b"%d\n" % label)
                    add(archive, f"{key}.png", encoded(100 * label + number))
    return root


def identity(image: torch.Tensor) -> torch.Tensor:
    return image


def by_pil(encoded: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))).movedim(-1, 0)


def test_a_folder_is_read_class_by_class(tmp_path: Path) -> None:
    dataset = FolderImages(write_folder(tmp_path) / "train", identity, NORMALIZATION)
    assert dataset.classes == list(CLASSES)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = by_pil(encoded(101))
    image, label = dataset[4]
    assert torch.equal(image, expected)
    assert label.item() == 1


@pytest.mark.parametrize("json", [False, True])
def test_shards_hold_what_the_folder_holds(tmp_path: Path, json: bool) -> None:
    folder = FolderImages(write_folder(tmp_path / "folder") / "train", identity, NORMALIZATION)
    root = write_shards(tmp_path / "shards", json=json) / "train"
    for attempt in ("made", "kept"):
        shards = ShardImages(root, identity, NORMALIZATION)
        assert len(list(root.glob(".fastkd-index-*.npz"))) == 1, attempt
        assert torch.equal(shards.labels, folder.labels)
        for index in range(len(folder)):
            assert torch.equal(shards[index][0], folder[index][0])
    assert shards.shard_starts == [0, 4]
    assert not list(root.glob("*.tmp"))


def test_an_index_follows_its_shards(tmp_path: Path) -> None:
    root = write_shards(tmp_path) / "train"
    before = ShardImages(root, identity, NORMALIZATION)
    with tarfile.open(root / "000001.tar", "a") as archive:
        add(archive, "more.cls", b"7")
        add(archive, "more.png", encoded(5))
    after = ShardImages(root, identity, NORMALIZATION)
    assert len(after) == len(before) + 1
    assert after.labels[-1] == 7


@pytest.mark.parametrize("damage", ["empty", "flipped", "other header", "shapes", "beyond"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    root = write_shards(tmp_path) / "train"
    before = ShardImages(root, identity, NORMALIZATION)
    (kept,) = root.glob(".fastkd-index-*.npz")
    right = kept.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o644 & ~_umask()
    if damage == "empty":
        kept.write_bytes(b"")
    elif damage in ("flipped", "other header"):
        place = 200 if damage == "flipped" else right.rindex(b"PK\1\2") + 10  # the kind of compression
        kept.write_bytes(right[:place] + bytes([right[place] ^ 0xFF]) + right[place + 1 :])
    else:
        index = dict(np.load(io.BytesIO(right)))
        index["size"] = index["size"][:-1] if damage == "shapes" else index["size"] + 10**6
        np.savez(kept, **index)
    after = ShardImages(root, identity, NORMALIZATION)
    assert torch.equal(after.labels, before.labels)
    assert all(torch.equal(after[index][0], before[index][0]) for index in range(len(before)))
    assert kept.read_bytes() == right


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_index_that_cannot_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    root = write_shards(tmp_path) / "train"
    assert len(ShardImages(root, identity, NORMALIZATION)) == 9
    assert not list(root.glob(".fastkd-index-*"))


def test_cls_is_the_label_whatever_json_says(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in {
            "a.cls": b"1",
            "a.json": b'{"label": 2}',
            "a.png": b"x",
            "b.json": b'{"caption": "no label"}',
            "b.png": b"x",
            "b.cls": b"3",
        }.items():
            add(archive, name, content)
    assert ShardImages(tmp_path, identity, NORMALIZATION).labels.tolist() == [1, 3]


def test_shards_are_read_by_worker_processes(tmp_path: Path) -> None:
    dataset = ShardImages(write_shards(tmp_path) / "train", identity, NORMALIZATION)
    dataset[0]  # opens a file before the workers are forked
    images = torch.cat([batch for batch, _ in DataLoader(dataset, 2, num_workers=2)])
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(len(dataset))]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "1 images have no .cls or .json, such as 'a'"),
        ({"a.png": b"x", "a.cls": b"dog"}, "not a WebDataset shard"),
        ({"a.png": b"x", "a.json": b"{}"}, "not a WebDataset shard"),
        ({"a.png": b"x", "a.cls": b"-1"}, "got the label -1"),
        ({"a.png": b"x", "a.cls": b"9999999"}, r"0\.tar: got the label 9999999 with 1 samples"),
        ({"a.png": b"x", "a.cls": b"1_0"}, r"0\.tar: .*got the label b'1_0', expected a number of digits alone"),
        ({"a.png": b"x", "a.cls": b"0" * 9000}, r"0\.tar: .*a label has more than 8192 bytes"),
        ({"a.png": b"x", "a.json": b"[" * 8000}, r"0\.tar: .*RecursionError"),
        ({"a.png": b"x", "a.cls": b"1e30"}, r"0\.tar: is not a WebDataset shard"),
        ({"a.png": b"x", "a.json": b'{"label": 1e30}'}, r"0\.tar: .*got the label '1e\+30', expected an int"),
        ({"a.png": b"x", "a.json": b'{"label": true}'}, "got the label 'True', expected an int"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, r"0\.tar: 1 samples have a second image .* such as 'a\.jpg'"),
        ({"a.txt": b"x"}, "hold no image with a label"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    with pytest.raises(ValueError, match=message):
        ShardImages(tmp_path, identity, NORMALIZATION)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    root = write_shards(tmp_path) / "train"
    content = (root / "000000.tar").read_bytes()
    (root / "000000.tar").write_bytes(b"\0" * 100 + content[:-100])
    with pytest.raises(ValueError, match=r"000000\.tar: is not a WebDataset shard"):
        ShardImages(root, identity, NORMALIZATION)


def test_a_broken_image_is_replaced_by_the_next_and_counted_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "train"
    (root / "bee" / "1.png").write_bytes(b"not an image")
    (root / "bee" / "2.png").write_bytes(encoded(102)[:-200])
    dataset = FolderImages(root, identity, NORMALIZATION)
    with pytest.warns(RuntimeWarning, match=r"bee/1\.png: cannot be read .*; the next image takes its place"):
        image, label = dataset[4]
    assert torch.equal(image, dataset[6][0])
    assert label.item() == 2
    assert dataset.broken == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dataset[5][0], image)
        assert torch.equal(dataset[4][0], image)
    assert dataset.broken == 2


def test_broken_images_are_counted_over_worker_processes(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "train"
    for name in ("ant/0", "bee/0", "cat/2"):
        (root / f"{name}.png").write_bytes(b"")
    dataset = FolderImages(root, identity, NORMALIZATION)
    labels = torch.cat([batch for _, batch in DataLoader(dataset, 2, num_workers=2)])
    assert dataset.broken == 3
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 0]


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "train"
    for number in range(2):
        (root / "cat" / f"{number}.png").write_bytes(b"")
    dataset = FolderImages(root, identity, NORMALIZATION, max_broken=1)
    expected = pytest.raises(BrokenImagesError, match=r"2 images cannot be read, expected at most 1.*cat/1\.png")
    with expected, pytest.warns(RuntimeWarning):
        dataset[6]


def test_a_folder_without_a_single_good_image_stops(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"")
    dataset = FolderImages(tmp_path, identity, NORMALIZATION)
    with pytest.raises(BrokenImagesError, match="none of the 1 images"), pytest.warns(RuntimeWarning):
        dataset[0]


def test_images_come_out_as_bytes_at_the_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    train, val = load_images(str(tmp_path), image_size=16)
    assert train[0][0].shape == val[0][0].shape == (3, 16, 16)
    assert {image.dtype for image in (train[0][0], val[0][0])} == {torch.uint8}
    assert val.normalization == NORMALIZATION
    shorter = Image.open(io.BytesIO(encoded(0))).resize((21, 18), Image.Resampling.BILINEAR)  # 18 = 16 / 0.875
    middle = torch.from_numpy(np.array(shorter)).movedim(-1, 0)[:, 1:17, 2:18]
    assert (val[0][0].int() - middle.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA"])
def test_every_kind_of_image_becomes_what_pil_makes_of_it_in_rgb(mode: str, kind: str) -> None:
    if (mode in ("P", "RGBA")) == (kind == "JPEG") or (mode, kind) == ("CMYK", "PNG"):
        return
    content = encoded(0, mode=mode, kind=kind)
    image = decode(content)
    assert image.dtype == torch.uint8
    assert torch.equal(image, by_pil(content))


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint16, "PNG"), (">u2", "TIFF"), (np.int32, "TIFF")])
def test_sixteen_bits_become_eight(dtype: str, kind: str) -> None:
    pixels = np.array([[0, 257, 129 * 257 + 100], [256 * 128, 65535, 300]])
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(dtype)).save(buffer, kind)
    image = decode(buffer.getvalue())
    assert image.shape == (3, 2, 3)
    assert image[0].tolist() == [[0, 1, 129], [128, 255, 1]]


def test_floating_point_pixels_count_as_broken(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "train"
    Image.fromarray(np.full((24, 28), 0.5, np.float32)).save(root / "ant" / "0.tiff")
    dataset = FolderImages(root, identity, NORMALIZATION)
    with pytest.warns(RuntimeWarning, match=r"ant/0\.tiff: cannot be read \(ValueError: has floating-point pixels"):
        assert torch.equal(dataset[1][0], dataset[2][0])


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, content in ((b"caf\xe9.png", encoded(0)), (b"empty\xe9.png", b"")):
        (tmp_path / "a" / os.fsdecode(name)).write_bytes(content)
    dataset = FolderImages(tmp_path, identity, NORMALIZATION)
    assert torch.equal(dataset[0][0], by_pil(encoded(0)))
    with pytest.warns(RuntimeWarning, match=r"empty\\xe9\.png: cannot be read"):
        dataset[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_are_one_line_of_the_command(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path) / "train"
    (root / "ant" / "1.png").write_bytes(b"")
    dataset = FolderImages(root, identity, NORMALIZATION, max_broken=0)
    monkeypatch.setattr(cli, "_run", lambda *_: len(list(DataLoader(dataset, 9, num_workers=workers))))
    assert cli.main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastkd train: data: 1 images cannot be read, expected at most 0")


@pytest.mark.slow
def test_bad_image_options_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for options, message in (
        ({"format": "tar"}, "data.options.format"),
        ({"image_size": 0}, "data.options.image_size"),
        ({"mean": (0.5,)}, "data.options.mean"),
        ({"std": (0, 1, 1)}, "data.options.std"),
        ({"max_broken": -1}, "data.options.max_broken"),
        ({"val": "nothing"}, r"nothing is not a folder"),
        ({"format": "shards"}, r"found no \*\.tar"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path), **options)
    (tmp_path / "val" / "dog").mkdir()
    (tmp_path / "val" / "dog" / "0.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"train has 3 classes, val has 4; in one only: \['dog'\]"):
        load_images(str(tmp_path))


def test_shards_may_lack_a_class_in_the_validation_set_but_not_add_one(tmp_path: Path) -> None:
    for part, labels in (("train", (0, 1, 3)), ("val", (1,))):
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "0.tar", "w") as archive:
            for label in labels:
                add(archive, f"{label}.cls", b"%d" % label)
                add(archive, f"{label}.png", encoded(label))
    train, _ = load_images(str(tmp_path), format="shards")
    assert train.classes == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"train has 4; in one only: \['2', '3'\]"):
        load_images(str(tmp_path), format="shards", train="val", val="train")


def test_shards_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    shards = [range(10), range(10, 13), range(13, 20), range(20, 30)]
    sampler = EpochSampler(30, 0, shards, 2)
    orders = []
    for epoch in range(8):
        sampler.epoch = epoch
        order = list(sampler)
        assert sorted(order) == list(range(30))
        assert order == list(sampler)
        owners = [next(number for number, shard in enumerate(shards) if index in shard) for index in order]
        halves = [
            set(owners[:length]) for length in range(1, 30) if len(set(owners[:length]) & set(owners[length:])) == 0
        ]
        assert any(len(half) == 2 for half in halves)
        orders.append(tuple(order))
    assert len(set(orders)) == 8


def test_a_run_may_ask_for_shards_only_of_data_that_has_them(tmp_path: Path) -> None:
    config = DataConfig(name="images", batch_size=2, shuffle_shards=1)
    write_shards(tmp_path / "shards")
    train, _ = load_images(str(tmp_path / "shards"), format="shards", image_size=8)
    loader, set_epoch = train_loader(train, config, 0, torch.device("cpu"))
    set_epoch(3)
    assert sum(len(labels) for _, labels in loader) == 8
    write_folder(tmp_path / "folder")
    train, _ = load_images(str(tmp_path / "folder"), image_size=8)
    with pytest.raises(ValueError, match=r"data\.shuffle_shards: got FolderImages"):
        train_loader(train, config, 0, torch.device("cpu"))
