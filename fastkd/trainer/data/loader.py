"""Datasets, the labelled subset, and a loader whose order depends on (seed, epoch) alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.rng import mix_seed
from fastkd.trainer.signals import leave_signals_to_main


class EpochSampler(Sampler[int]):
    """A permutation of the dataset that depends on (seed, epoch) alone: resuming needs no generator state.

    With ``shards``, ranges of samples that lie together: their order is random, and so is that of the samples within
    every ``at_once`` of them.
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
    """The samples of every shard. ValueError for a dataset that has none."""
    starts = getattr(dataset, "shard_starts", None)
    if starts is None:
        raise ValueError(f"data.shuffle_shards: got {type(dataset).__name__}, expected a whole dataset of shards")
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(dataset)])]


class GlobalBatches(Sampler[list[int]]):
    """The batches of ``sampler``, of which every rank takes its part: together they are what one process would take.

    Parts are consecutive and differ in length by at most one.
    """

    def __init__(self, sampler: Sampler[int], length: int, config: DataConfig, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.length = length
        self.batch_size = config.batch_size
        self.drop_last = config.drop_last
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def rows(self, batch: int) -> int:
        """The length of a global batch, counted from 0 within an epoch."""
        return min(self.batch_size, self.length - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        for batch in range(len(self)):
            rows = self.rows(batch)
            taken = list(itertools.islice(indices, rows))
            yield taken[rows * self.rank // self.world_size : rows * (self.rank + 1) // self.world_size]


class SeededFetch(Dataset[Any]):
    """For worker processes: seeds their generators per batch from (seed, epoch, first index).

    Random augmentations then do not depend on which worker runs them, nor on whether the run was resumed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        mixed = mix_seed(self.seed, int(self.epoch), indices[0])
        random.seed(mixed)
        np.random.seed(mixed % 2**32)  # noqa: NPY002 (augmentations of others use the global generator)
        torch.manual_seed(mixed)
        return fetch(self.dataset, indices)


def fetch(dataset: Any, indices: list[int]) -> Any:
    """A batch in one call where the dataset offers it, else a list of samples."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def first_images(dataset: Any) -> Tensor:
    """The images of a batch of two. TypeError for a dataset of anything but (image, label)."""
    batch = collate(fetch(dataset, [0, 1 % len(dataset)]))
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"train_data: a batch of it is {got}, expected (images, labels)")
    return batch[0]


def collate(batch: Any) -> Any:
    """Leaves a batch that ``__getitems__`` has already stacked; collates a list of samples."""
    return default_collate(batch) if isinstance(batch, list) else batch


def train_loader(
    dataset: Any, config: DataConfig, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[StatefulDataLoader, Callable[[int], None]]:
    """The training loader of one rank, and the function that tells it the epoch before each pass.

    Its ``batch_sampler`` is a ``GlobalBatches``. Raises ValueError when the dataset does not fill a single batch, or a
    global batch has fewer rows than there are ranks.
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
    fetcher = SeededFetch(dataset, seed) if config.num_workers else dataset
    loader = StatefulDataLoader(
        fetcher,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
        # A generator of its own: otherwise every pass draws a number from torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )

    def set_epoch(epoch: int) -> None:
        sampler.epoch = epoch
        if isinstance(fetcher, SeededFetch):
            fetcher.epoch.fill_(epoch)

    return loader, set_epoch


def eval_loader(
    dataset: Any, config: DataConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """The evaluation set in order; with several ranks, every ``world_size``-th sample of it."""
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
