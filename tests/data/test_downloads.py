"""Data sets that are fetched and read: CIFAR's archive by its checksum, and sets of torchvision."""

import gzip
import hashlib
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fastkd.trainer import DataConfig
from fastkd.trainer.data.datasets import build_datasets, is_known_data, without_download
from fastkd.trainer.data.readers.torchvision_sets import PARTS
from tests.trainer.test_cifar import write_cifar


def test_an_archive_is_fetched_once_and_only_with_the_right_checksum(tmp_path: Path, monkeypatch) -> None:
    folder, _, labels = write_cifar(tmp_path, "binary", 10)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    copy = lambda url, path: shutil.copyfile(tmp_path / "archive.tar.gz", path)  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", copy)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    config = DataConfig(name="cifar", options={"root": str(tmp_path / "data"), "classes": 10, "download": True})
    with pytest.raises(ValueError, match=r"data\.options\.download: cannot fetch https://.* unpack it in .* yourself"):
        build_datasets(config)  # its checksum is not the published archive's
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / "archive.tar.gz").read_bytes()).hexdigest())
    train, _ = build_datasets(config)
    assert train.labels.tolist() == labels.tolist()
    (tmp_path / "archive.tar.gz").unlink()
    assert len(build_datasets(config)[0]) == len(labels)


def test_a_config_of_a_checkpoint_fetches_nothing() -> None:
    config = DataConfig(name="cifar", options={"root": "nowhere", "download": True})
    with pytest.raises(ValueError, match="found no CIFAR-100 in nowhere"):
        build_datasets(without_download(config))


def write_fashion(root: Path, samples: int) -> torch.Tensor:
    """The files that torchvision reads FashionMNIST from. Returns the labels of both parts."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = np.arange(samples, dtype=np.uint8) % 10
        for name, head, values in (
            ("images-idx3-ubyte", struct.pack(">4i", 2051, samples, 28, 28), pixels),
            ("labels-idx1-ubyte", struct.pack(">2i", 2049, samples), labels),
        ):
            content = head + values.tobytes()
            (folder / f"{part}-{name}").write_bytes(content)
            (folder / f"{part}-{name}.gz").write_bytes(gzip.compress(content))
    return torch.arange(samples) % 10


def test_a_set_of_torchvision_goes_through_the_same_transforms(tmp_path: Path) -> None:
    labels = write_fashion(tmp_path, 12)
    config = DataConfig(name="torchvision:FashionMNIST", options={"root": str(tmp_path), "image_size": 16})
    train, test = build_datasets(config)
    assert (len(train), len(test), train.classes[0]) == (12, 12, "T-shirt/top")
    assert torch.equal(train.labels, labels)
    image, label = train[3]
    assert (image.shape, label.item()) == ((3, 16, 16), 3)
    assert torch.equal(test[3][0], test[3][0])  # not augmented
    assert is_known_data(config.name)


def test_sets_that_torchvision_unpickles_or_does_not_have_are_refused(tmp_path: Path) -> None:
    assert not {"CIFAR10", "CIFAR100", "LSUN", "ImageNet"} & set(PARTS)
    for name in ("CIFAR10", "Nothing"):
        with pytest.raises(ValueError, match=f"data.name: got 'torchvision:{name}', expected one of MNIST, "):
            build_datasets(DataConfig(name=f"torchvision:{name}", options={"root": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"cannot read torchvision's SVHN from .* expected its files there, or --data"):
        build_datasets(DataConfig(name="torchvision:SVHN", options={"root": str(tmp_path)}))
