"""What happens to a sample depends on (seed, epoch, index) alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastkd.trainer.data.additions import Additions
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.images import load_images
from fastkd.trainer.data.labels import without_other_labels
from fastkd.trainer.data.loader import SeededFetch, train_loader
from fastkd.trainer.data.readers.cifar import CifarImages
from fastkd.trainer.rng import sample_seeds
from tests.helpers.images import write_classes

CPU = torch.device("cpu")
SAMPLES = 66
NORMALIZATION = ((0.5,) * 3, (0.5,) * 3)


class Noise(Dataset[tuple[Tensor, int]]):
    """An own dataset whose samples are drawn from all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.cat([torch.rand(2), torch.tensor([random.random(), np.random.rand()])]), index  # noqa: NPY002


class NoiseInBatches(Noise):
    """The same, of which a whole batch can be had."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.rand(len(indices), 3, 8, 8), torch.tensor(indices)


def cifar() -> CifarImages:
    pixels = torch.randint(256, (SAMPLES, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return CifarImages(pixels, torch.arange(SAMPLES), NORMALIZATION, augment=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    write_classes(root / "train", ("a", "b"), SAMPLES // 2)
    write_classes(root / "val", ("a", "b"), 1)
    return root


def pictures(folder: Path, **options: Any) -> Any:
    data, _ = load_images(str(folder), image_size=16, **options)
    data.labels = torch.arange(SAMPLES)
    return data


def images_of(
    data: Any, batch: int = 16, workers: int = 0, ranks: int = 1, seed: int = 0, epoch: int = 1, **options: Any
) -> dict[int, Tensor]:
    """The image of every sample by its label, as the loaders of all ranks give it in an epoch."""
    found: dict[int, Tensor] = {}
    for rank in range(ranks):
        config = DataConfig(batch_size=batch, num_workers=workers, drop_last=False)
        loader, set_epoch = train_loader(data, config, seed, CPU, rank, ranks, **options)
        set_epoch(epoch, 0)
        for images, labels, *_ in loader:
            found |= dict(zip(labels.tolist(), images, strict=True))
    return found


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[index], other[index]) for index in one)


@pytest.mark.parametrize("kind", ["crops", "timm", "cifar", "subset", "own", "own batches"])
def test_images_are_the_same_for_every_batch_size_number_of_workers_and_of_ranks(folder: Path, kind: str) -> None:
    make = {
        "crops": lambda: pictures(folder),
        "timm": lambda: pictures(folder, randaugment=2, color_jitter=0.4, erasing=0.5),
        "cifar": cifar,
        "subset": lambda: Subset(Subset(cifar(), list(range(SAMPLES))[::-1]), list(range(0, SAMPLES, 2))),
        "own": Noise,
        "own batches": NoiseInBatches,
    }
    data = make[kind]()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    expected = images_of(data)
    assert len(expected) == len(data)
    others: list[dict[str, int]] = [{"batch": 64}, {"batch": 64, "ranks": 2}]
    if kind in ("timm", "crops"):
        others += [{"workers": 1}, {"workers": 4, "ranks": 2}]
    for changes in others:
        assert same(images_of(data, **changes), expected), changes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
    for changes in ({"epoch": 2}, {"seed": 1}):
        other = images_of(data, **changes)
        assert sum(torch.equal(other[index], expected[index]) for index in expected) < len(expected) / 4, changes


def test_a_label_that_is_left_out_changes_no_image_and_a_second_reading_has_its_own_numbers() -> None:
    data, expected = cifar(), images_of(cifar())
    partly = without_other_labels(data, 10, 0)
    loader, set_epoch = train_loader(partly, DataConfig(batch_size=64), 0, CPU)
    set_epoch(1, 0)
    images, labels = next(iter(loader))
    assert 0 < (labels >= 0).sum() <= 10
    kept = {int(label): image for image, label in zip(images, labels, strict=True) if label >= 0}
    assert all(torch.equal(expected[label], image) for label, image in kept.items())
    with_view = Additions(("strong",), data)
    views = []
    for batch in (16, 64):
        loader, set_epoch = train_loader(data, DataConfig(batch_size=batch), 0, CPU, additions=with_view)
        set_epoch(1, 0)
        images, labels, added = next(iter(loader))
        assert all(torch.equal(expected[int(label)], image) for image, label in zip(images, labels, strict=True))
        views.append(added["strong"][:16])
        assert sum(torch.equal(*pair) for pair in zip(images, added["strong"], strict=True)) < 4
    assert torch.equal(*views)


def test_the_seeds_of_samples_are_all_different_and_depend_on_each_number() -> None:
    seeds = sample_seeds(0, 0, range(100_000))
    assert len(set(seeds.tolist())) == 100_000
    assert seeds.min() >= 0
    assert sample_seeds(0, 0, [7]).tolist() == [int(seeds[7])]
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not np.isin(sample_seeds(other[0], other[1], range(1000), other[2]), seeds).any()
    assert abs((seeds % 9).mean() - 4) < 0.03
    assert abs(np.corrcoef(seeds[1:] % 2, seeds[:-1] % 2)[0, 1]) < 0.02


def test_a_dataset_that_draws_nothing_is_still_read_a_batch_at_a_time() -> None:
    calls = []

    class Counted(CifarImages):
        def seeded_items(self, indices: Any, seeds: Any) -> Any:
            calls.append(len(indices))
            return super().seeded_items(indices, seeds)

    data = Counted(cifar().images, torch.arange(SAMPLES), NORMALIZATION, augment=True)
    SeededFetch(data, 0).__getitems__([3, 1, 2])
    assert calls == [3]
