"""Loaders: the order of the training data depends on the seed and the epoch alone, whatever the number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from fastkd.trainer.data.additions import Additions
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.labels import PartlyLabelled
from fastkd.trainer.data.readers.memory import TensorImages
from fastkd.trainer.rng import kept_generators, mix_seed, sample_seeds, seed_generators
from fastkd.trainer.signals import leave_signals_to_main

# The version of how images are read and augmented. A run goes on with the version that it began with.
AUGMENTATION = 2


class EpochSampler(Sampler[int]):
    """A permutation of the dataset that depends on ``seed`` and ``epoch`` alone, so that resuming needs no other state.

    ``shards`` are ranges of samples that lie together on disk. Their order is then random, and ``at_once`` of them at a
    time have their samples mixed.
    """

    def __init__(self, length: int, seed: int, shards: Sequence[range] | None = None, at_once: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.shards = [range(length)] if shards is None else shards
        self.at_once = at_once

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = [0] if len(self.shards) == 1 else torch.randperm(len(self.shards), generator=generator).tolist()
        for start in range(0, len(order), self.at_once):
            chosen = [self.shards[shard] for shard in order[start : start + self.at_once]]
            samples = chosen[0] if len(chosen) == 1 else list(itertools.chain.from_iterable(chosen))
            for place in torch.randperm(len(samples), generator=generator).tolist():
                yield samples[place]


def shards_of(dataset: Any) -> list[range]:
    """The range of samples of every shard. ValueError for a dataset that has no shards."""
    starts = getattr(dataset, "shard_starts", None)
    if starts is None:
        raise ValueError(f"data.shuffle_shards: got {type(dataset).__name__}, expected a whole dataset of shards")
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(dataset)])]


class GlobalBatches(Sampler[list[int]]):
    """This rank's part of every global batch of ``sampler``; all ranks together take what one process would take.

    The parts of a batch are consecutive and differ in length by at most one. A pass begins with batch ``start``: so a
    resumed run goes on within an epoch.
    """

    def __init__(self, sampler: Sampler[int], length: int, config: DataConfig, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.length = length
        self.batch_size = config.batch_size
        self.drop_last = config.drop_last
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    def __len__(self) -> int:
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def rows(self, batch: int) -> int:
        """The length of the global batch number ``batch`` of an epoch, counted from 0."""
        return min(self.batch_size, self.length - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        indices = itertools.islice(self.sampler, self.start * self.batch_size, None)
        for batch in range(self.start, len(self)):
            rows = self.rows(batch)
            taken = list(itertools.islice(indices, rows))
            yield taken[rows * self.rank // self.world_size : rows * (self.rank + 1) // self.world_size]


class SeededFetch(Dataset[Any]):
    """Wraps a dataset: what happens to a sample depends on (seed, epoch, index) alone.

    Random augmentations are then the same for every batch size, every number of workers and of ranks, and in a resumed
    run. The generators of the process are put back. CUDA's generators are left alone. With ``additions`` a batch is
    (images, labels, a dict of the additions).
    """

    def __init__(self, dataset: Any, seed: int, additions: Additions | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.additions = additions
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        epoch = int(self.epoch)

        def read(draw: int) -> Any:
            return fetch_seeded(self.dataset, indices, sample_seeds(self.seed, epoch, indices, draw))

        with kept_generators():
            batch = read(0)
            if self.additions is None:
                return batch
            return *collate(batch), self.additions(indices, self.seed, epoch, lambda: collate(read(1))[0])


def fetch_seeded(dataset: Any, indices: Sequence[int], seeds: np.ndarray) -> Any:
    """The samples ``indices``, each read with its own seed [B]; a batch, or a list of samples.

    A dataset with the method ``seeded_items(indices, seeds)`` draws its random numbers itself, for a whole batch at
    once. Any other is asked for one sample after the other, and finds torch's, Python's and numpy's global generators
    seeded before each.
    """
    if draws_nothing(dataset):
        return fetch(dataset, list(indices))
    if type(dataset) is Subset:
        return fetch_seeded(dataset.dataset, [dataset.indices[index] for index in indices], seeds)
    if type(dataset) is PartlyLabelled:
        return dataset.without_labels(fetch_seeded(dataset.dataset, indices, seeds), indices)
    if hasattr(dataset, "seeded_items"):
        return dataset.seeded_items(indices, seeds)
    parts = []
    for index, seed in zip(indices, seeds.tolist(), strict=True):
        seed_generators(seed)
        parts.append(fetch(dataset, [index]))
    if isinstance(parts[0], list):
        return list(itertools.chain.from_iterable(parts))
    return tree_map(lambda *rows: torch.cat(rows), *parts)


def fetch(dataset: Any, indices: list[int]) -> Any:
    """The samples ``indices``: one batch if the dataset has ``__getitems__``, else a list of samples."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def draws_nothing(dataset: Any) -> bool:
    """Whether the dataset is known to use no generator. Seeding would take longer than indexing a tensor."""
    while isinstance(dataset, Subset | PartlyLabelled):
        dataset = dataset.dataset
    return type(dataset) is TensorImages  # a class that inherits from it may augment


def first_images(dataset: Any) -> Tensor:
    """The first two images of a dataset as a batch. TypeError if its samples are not (image, label)."""
    found = fetch(dataset, [0, 1 % len(dataset)])
    if isinstance(found, list) and isinstance(found[0], tuple) and any(isinstance(part, dict) for part in found[0]):
        raise TypeError("train_data: gives images with boxes, expected (images, labels), or --task detection")
    batch = collate(found)
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"train_data: a batch of it is {got}, expected (images, labels)")
    return batch[0]


def collate(batch: Any) -> Any:
    """The batch that ``fetch`` gives: a list of samples is stacked, a batch from ``__getitems__`` stays as it is."""
    return default_collate(batch) if isinstance(batch, list) else batch


def train_loader(
    dataset: Any,
    config: DataConfig,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    additions: Additions | None = None,
    collate: Callable[[Any], Any] = collate,
) -> tuple[DataLoader[Any], Callable[[int, int], None]]:
    """The training loader of one rank, and the function that must tell it the epoch, and its first batch before a pass.

    Its ``batch_sampler`` is a ``GlobalBatches``. The batches are the same for every number of workers. With
    ``additions`` they have a third part, see ``SeededFetch``.

    Raises:
        ValueError: the dataset does not fill a single batch, or a global batch has fewer rows than there are ranks.
    """
    if len(dataset) < (config.batch_size if config.drop_last else 1):
        raise ValueError(
            f"data.batch_size: got {config.batch_size}, expected at most the {len(dataset)} training samples "
            "(or drop_last=False)"
        )
    shards = None if config.shuffle_shards is None else shards_of(dataset)
    sampler = EpochSampler(len(dataset), seed, shards, config.shuffle_shards or 1)
    batches = GlobalBatches(sampler, len(dataset), config, rank, world_size)
    smallest = batches.rows(len(batches) - 1)
    if smallest < world_size:
        raise ValueError(
            f"data.batch_size: got {config.batch_size}, whose smallest batch has {smallest} rows, expected at least "
            f"one row for each of the {world_size} ranks"
        )
    plain = additions is None and draws_nothing(dataset)
    fetcher = dataset if plain else SeededFetch(dataset, seed, additions)
    loader: DataLoader[Any] = DataLoader(
        fetcher,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
        # A generator of its own: otherwise every pass draws a number from torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )

    def set_epoch(epoch: int, start: int = 0) -> None:
        sampler.epoch, batches.start = epoch, start
        if isinstance(fetcher, SeededFetch):
            fetcher.epoch.fill_(epoch)

    return loader, set_epoch


def eval_loader(
    dataset: Any,
    config: DataConfig,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    collate: Callable[[Any], Any] = collate,
) -> DataLoader[Any]:
    """A loader of the evaluation set in its order; each of several ranks gets every ``world_size``-th sample."""
    if world_size > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world_size))
    return DataLoader(
        dataset,
        batch_size=config.eval_batch_size,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator(),
    )
