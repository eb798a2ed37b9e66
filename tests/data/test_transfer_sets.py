"""STL-10 and Tiny-ImageNet are read from files in the layout of the published archives."""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import STL10
from torchvision.transforms import v2

from fastkd.trainer import BrokenImagesError, DataConfig
from fastkd.trainer.data.datasets import build_datasets, is_known_data
from fastkd.trainer.data.readers.cifar import CifarImages

CLASSES = ("n01443537", "n01629819", "n02056570")


def read(name: str, root: Path, **options: object) -> tuple[CifarImages, CifarImages]:
    assert is_known_data(name)
    return build_datasets(DataConfig(name=name, options={"root": str(root), **options}))


def expected(pixels: np.ndarray, side: int) -> torch.Tensor:
    """What torchvision's ``Resize``, which DCD's authors use, makes of [H, W, 3]."""
    return v2.functional.pil_to_tensor(v2.Resize((side, side))(Image.fromarray(pixels)))


def write_stl10(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the test set's images [N, 96, 96, 3] and its labels from 0."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, samples in (("train", 4), ("test", 3)):
        pixels = generator.integers(0, 256, (samples, 96, 96, 3), dtype=np.uint8)
        labels = generator.integers(0, 10, samples)
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # channels, then columns, as published
        (labels + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    return pixels, labels


def write_tiny_imagenet(root: Path) -> list[np.ndarray]:
    """Three classes of two images. Returns the validation images [64, 64, 3] in the order of their numbers."""
    folder = root / "tiny-imagenet-200"
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for number in range(2):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / "images" / f"{name}_{number}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    lines, pictures = [], []
    for number, name in enumerate((CLASSES[1], CLASSES[0], CLASSES[2], CLASSES[1])):
        path = folder / "val" / "images" / f"val_{number}.JPEG"
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        pictures.append(np.array(Image.open(path)))
        lines.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return pictures


def test_stl10_is_scaled_as_torchvision_scales_it_and_augmented_in_training_alone(tmp_path: Path) -> None:
    pixels, labels = write_stl10(tmp_path)
    for root in (tmp_path, tmp_path / "stl10_binary"):
        train, test = read("stl10", root)
        assert (len(train), len(test), train.classes[9], train.images.shape[1:]) == (4, 3, "truck", (3, 32, 32))
        assert test.labels.tolist() == labels.tolist()
        assert torch.equal(test.images, torch.stack([expected(image, 32) for image in pixels]))
        assert (train.augment, test.augment) == (True, False)
    image, _ = test[0]
    assert test.normalization[0] == (0.4467, 0.4398, 0.4066)
    assert torch.equal(image, test.images[0])
    train, test = read("stl10", tmp_path, image_size=96, augment=False)
    assert torch.equal(test.images, torch.from_numpy(pixels).movedim(-1, 1))
    assert torch.equal(train[1][0], train[1][0])


def test_stl10_is_fetched_with_the_right_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, labels = write_stl10(tmp_path)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "stl10_binary", "stl10_binary")
    copy = lambda url, path: shutil.copyfile(tmp_path / "archive.tar.gz", path)  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", copy)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(ValueError, match=r"data\.options\.download: cannot fetch http://.* unpack it in .* yourself"):
        read("stl10", tmp_path / "data", download=True)
    monkeypatch.setattr(STL10, "tgz_md5", hashlib.md5((tmp_path / "archive.tar.gz").read_bytes()).hexdigest())
    assert read("stl10", tmp_path / "data", download=True, image_size=8)[1].labels.tolist() == labels.tolist()


def test_damaged_files_of_stl10_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no STL-10 in .*, expected the folder stl10_binary, or --data\.opt"):
        read("stl10", tmp_path)
    write_stl10(tmp_path)
    path = tmp_path / "stl10_binary" / "test_y.bin"
    path.write_bytes(b"\x01\x02\x0b")
    with pytest.raises(ValueError, match=r"test_y\.bin: has labels outside of \[1, 10\]"):
        read("stl10", tmp_path)
    path.write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match=r"test_X\.bin: has 82944 bytes for 2 labels, expected 27648 each"):
        read("stl10", tmp_path)
    os.truncate(tmp_path / "stl10_binary" / "train_X.bin", 1 << 30)
    with pytest.raises(ValueError, match=r"train_X\.bin: cannot be read \(has 1073741824 bytes, expected at most"):
        read("stl10", tmp_path)


def test_tiny_imagenet_is_read_in_both_layouts_of_its_validation_set(tmp_path: Path) -> None:
    pictures = write_tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    for root in (tmp_path, folder):
        train, val = read("tiny-imagenet", root)
        assert (train.classes, train.labels.tolist()) == (list(CLASSES), [0, 0, 1, 1, 2, 2])
        assert (val.classes, val.labels.tolist()) == (list(CLASSES), [1, 0, 2, 1])
        assert torch.equal(val.images, torch.stack([expected(image, 32) for image in pictures]))
        assert (train.augment, val.augment, val.normalization[1]) == (True, False, (0.2770, 0.2691, 0.2821))
    for number, name in enumerate((CLASSES[1], CLASSES[0], CLASSES[2], CLASSES[1])):  # as scripts arrange it
        (folder / "val" / name).mkdir(exist_ok=True)
        (folder / "val" / "images" / f"val_{number}.JPEG").rename(folder / "val" / name / f"val_{number}.JPEG")
    (folder / "val" / "images").rmdir()
    _, arranged = read("tiny-imagenet", tmp_path, image_size=64)
    assert arranged.labels.tolist() == [0, 1, 1, 2]
    assert torch.equal(arranged.images[0], torch.from_numpy(pictures[1]).movedim(-1, 0))


@pytest.mark.parametrize(
    "line",
    [
        *("../train/n01443537/images/n01443537_0.JPEG\tn01443537", "val_0.JPEG", "val_0.JPEG\tn00000000"),
        *("val_0.txt\tn01443537", "\tn01443537", "x" * 9999),
    ],
)
def test_annotations_that_name_other_files_or_classes_are_told(tmp_path: Path, line: str) -> None:
    write_tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(f"val_1.JPEG\tn01443537\t0\n{line}\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: line 2 is .*, expected the name of an image") as error:
        read("tiny-imagenet", tmp_path)
    assert len(str(error.value)) < 400


def test_damaged_files_of_tiny_imagenet_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no Tiny-ImageNet in .* unpack http://.*tiny-imagenet-200\.zip there"):
        read("tiny-imagenet", tmp_path)
    write_tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    image = folder / "val" / "images" / "val_2.JPEG"
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")  # PIL would start Ghostscript for it
    image.write_bytes(buffer.getvalue())
    with pytest.raises(BrokenImagesError, match=r"val_2\.JPEG: cannot be read"):
        read("tiny-imagenet", tmp_path, max_broken=0)
    with pytest.warns(RuntimeWarning, match=r"val_2\.JPEG: cannot be read .*; the next image takes its place"):
        assert read("tiny-imagenet", tmp_path)[1].labels.tolist() == [1, 0, 1, 1]
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(BrokenImagesError, match=r"val_2\.JPEG: cannot be read \(OSError: is not a regular file\)"):
        read("tiny-imagenet", tmp_path, max_broken=0)
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text("")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: is empty, expected a line for each image"):
        read("tiny-imagenet", tmp_path)
    annotations.unlink()
    with pytest.raises(ValueError, match=r"val_annotations\.txt: cannot be read \(No such file or directory\)"):
        read("tiny-imagenet", tmp_path)
    shutil.rmtree(folder / "val" / "images")
    (folder / "val" / CLASSES[0]).mkdir()
    shutil.copy(folder / "train" / CLASSES[0] / "images" / f"{CLASSES[0]}_0.JPEG", folder / "val" / CLASSES[0])
    with pytest.raises(ValueError, match=r"train and val of .* differ in their classes, as in \['n01629819', "):
        read("tiny-imagenet", tmp_path)
