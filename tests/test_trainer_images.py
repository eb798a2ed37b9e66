"""Images on disk: folders, shards and CIFAR's files are read right, broken images are replaced and counted."""

import io
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastkd.trainer.cifar import PIXELS, load_cifar, shift_and_flip
from fastkd.trainer.data import DataConfig, EpochSampler, train_loader
from fastkd.trainer.images import IMAGENET_MEAN, IMAGENET_STD, BrokenImagesError, FolderImages, load_images
from fastkd.trainer.shards import ShardImages

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


def identity(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


def test_a_folder_is_read_class_by_class(tmp_path: Path) -> None:
    dataset = FolderImages(write_folder(tmp_path) / "train", identity, NORMALIZATION)
    assert dataset.classes == list(CLASSES)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = identity(Image.open(io.BytesIO(encoded(101))))
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
        ({"a.png": b"x"}, "1 images have no .cls or .json, such as a"),
        ({"a.png": b"x", "a.cls": b"dog"}, "not a WebDataset shard"),
        ({"a.png": b"x", "a.json": b"{}"}, "not a WebDataset shard"),
        ({"a.png": b"x", "a.cls": b"-1"}, "got the label -1"),
        ({"a.png": b"x", "a.cls": b"10000000"}, r"0\.tar: .*got the label 10000000"),
        ({"a.png": b"x", "a.cls": b"1e30"}, r"0\.tar: is not a WebDataset shard"),
        ({"a.png": b"x", "a.json": b'{"label": 1e30}'}, r"0\.tar: .*got the label 1e\+30, expected an int"),
        ({"a.png": b"x", "a.json": b'{"label": true}'}, "got the label True, expected an int"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, r"0\.tar: 1 samples have a second image .* such as a\.jpg"),
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


def test_images_come_out_normalised_at_the_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    train, val = load_images(str(tmp_path), image_size=16)
    assert train[0][0].shape == val[0][0].shape == (3, 16, 16)
    plain, _ = load_images(str(tmp_path), image_size=16, mean=(0, 0, 0), std=(1, 1, 1))[1][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATION)
    torch.testing.assert_close(val[0][0], (plain - mean) / std)
    assert 0 <= plain.min() <= plain.max() <= 1


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"0.{kind.lower()}").write_bytes(encoded(0, mode=mode, kind=kind))
    assert FolderImages(tmp_path, identity, NORMALIZATION)[0][0].shape == (3, 24, 28)


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


# CIFAR


def records(classes: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [n, 3072], coarse and fine labels [n]."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n, PIXELS), dtype=np.uint8)
    return pixels, generator.integers(0, 20, n, dtype=np.uint8), generator.integers(0, classes, n, dtype=np.uint8)


def python2_pickle(pixels: np.ndarray, name: bytes, labels: list[int]) -> bytes:
    """As Python 2 wrote the published files: byte strings everywhere, the array by numpy's ``_reconstruct``."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little")

    rows, columns = pixels.shape
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + number(1) + number(rows) + number(columns) + b"\x86" + dtype + b"\x89" + string(pixels.tobytes())
    array += b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(name) + listed + b"u."


def write_cifar(root: Path, kind: str, classes: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """Returns the folder, and pixels and labels of the training set."""
    folder = {
        ("binary", 10): "cifar-10-batches-bin",
        ("binary", 100): "cifar-100-binary",
        ("python", 10): "cifar-10-batches-py",
        ("python", 100): "cifar-100-python",
    }[kind, classes]
    end = ".bin" if kind == "binary" else ""
    train = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    (root / folder).mkdir()
    everything = []
    for seed, name in enumerate([*train, "test" if classes == 100 else "test_batch"]):
        pixels, coarse, fine = records(classes, 7, seed)
        everything.append((pixels, fine))
        if kind == "binary":
            columns = (coarse[:, None], fine[:, None], pixels) if classes == 100 else (fine[:, None], pixels)
            np.concatenate(columns, axis=1).tofile(root / folder / f"{name}{end}")
        else:
            key = b"fine_labels" if classes == 100 else b"labels"
            (root / folder / name).write_bytes(python2_pickle(pixels, key, fine.tolist()))
    pixels, labels = (np.concatenate(parts) for parts in zip(*everything[:-1], strict=True))
    return root / folder, pixels, labels


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_is_read_in_both_layouts(tmp_path: Path, kind: str, classes: int) -> None:
    folder, pixels, labels = write_cifar(tmp_path, kind, classes)
    for root in (tmp_path, folder):
        train, test = load_cifar(str(root), classes=classes)
        assert torch.equal(train.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
        assert train.labels.tolist() == labels.tolist()
        assert len(test) == 7
        images, chosen = test.__getitems__([3, 1])
        assert torch.equal(chosen, test.labels[[3, 1]])
        mean, std = (torch.tensor(values)[:, None, None] for values in test.normalization)
        torch.testing.assert_close(images[0], (test.images[3] / 255 - mean) / std)


def test_a_pickle_that_names_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    folder, _, _ = write_cifar(tmp_path, "python", 100)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.mkdir, (tmp_path / "ran",)

    (folder / "train").write_bytes(pickle.dumps({b"data": Bomb(), b"fine_labels": []}))
    with pytest.raises(ValueError, match=r"train: is not a file of CIFAR-100 \(UnpicklingError: names "):
        load_cifar(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no CIFAR-100 in .*cifar-100-binary or cifar-100-python"):
        load_cifar(str(tmp_path))
    folder, _, _ = write_cifar(tmp_path, "binary", 100)
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected a multiple of 3074"):
        load_cifar(str(tmp_path))
    (folder / "train.bin").write_bytes(content[:1] + b"\xc8" + content[2:])
    with pytest.raises(ValueError, match=r"expected one each in \[0, 100\)"):
        load_cifar(str(tmp_path))


def test_augmented_images_are_shifted_windows_and_their_mirrors() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    result = shift_and_flip(images, 2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for before, after in zip(padded, result, strict=True):
        matches = {
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(after.flip(2) if flip else after, before[:, top : top + 6, left : left + 5])
        }
        assert len(matches) == 1
        found |= matches
    assert {flip for *_, flip in found} == {False, True}
    assert {top for top, *_ in found} == {left for _, left, _ in found} == set(range(5))
