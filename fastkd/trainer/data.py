"""Datasets, the labelled subset, and a loader whose order depends on (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from fastkd.trainer.imports import import_object
from fastkd.trainer.stop import SIGNALS
from fastkd.validate import check_int, check_type


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """Which data, how much of it is labelled, and how it is batched.

    ``name`` is one of ``DATASETS`` (``digits``, ``images``, ``cifar``) or ``package.module:callable``; called with
    ``options`` it returns (training set, evaluation set), map-style datasets of (image, label). ``labelled`` keeps that
    many training samples, balanced over the classes and drawn with ``subset_seed``; None keeps all. ``batch_size`` is
    the global batch. ``shuffle_shards`` reads shards in random order, that many at a time with their samples mixed: for
    disks that are slow at random reads; None mixes all samples.
    """

    name: str = "digits"
    options: dict[str, Any] = field(default_factory=dict)
    labelled: int | None = None
    subset_seed: int = 0
    batch_size: int = 64
    eval_batch_size: int = 512
    drop_last: bool = True
    num_workers: int = 0
    shuffle_shards: int | None = None

    def __post_init__(self) -> None:
        check_type("data.name", self.name, str)
        check_type("data.options", self.options, dict)
        if self.labelled is not None:
            check_int("data.labelled", self.labelled, 1)
        check_seed("data.subset_seed", self.subset_seed)
        check_int("data.batch_size", self.batch_size, 1)
        check_int("data.eval_batch_size", self.eval_batch_size, 1)
        check_type("data.drop_last", self.drop_last, bool)
        check_int("data.num_workers", self.num_workers, 0)
        if self.shuffle_shards is not None:
            check_int("data.shuffle_shards", self.shuffle_shards, 1)


def check_seed(name: str, value: Any) -> None:
    """An int that torch's generators take."""
    check_int(name, value, 0)
    if value >= 2**63:
        raise ValueError(f"{name}: got {value}, expected an int < 2**63")


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, C, H, W] and labels [N] held in memory; a whole batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.shape[0] != labels.shape[0] or labels.ndim != 1:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({images.shape[0]},)")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def load_digits(train_size: int = 1400, seed: int = 0) -> tuple[TensorImages, TensorImages]:
    """scikit-learn's 1,797 handwritten digits, 1x8x8 with pixels in [-1, 1]: (training set, test set).

    The split is stratified by class and depends on ``seed`` alone.
    """
    from sklearn import datasets, model_selection

    check_int("data.options.train_size", train_size, 10)
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    parts = model_selection.train_test_split(
        np.arange(len(labels)), train_size=train_size, random_state=seed, stratify=bunch.target
    )
    train, test = (torch.from_numpy(np.sort(part)) for part in parts)
    return TensorImages(images[train], labels[train]), TensorImages(images[test], labels[test])


def _load_images(**options: Any) -> tuple[Any, Any]:
    from fastkd.trainer.images import load_images

    return load_images(**options)


def _load_cifar(**options: Any) -> tuple[Any, Any]:
    from fastkd.trainer.cifar import load_cifar

    return load_cifar(**options)


DATASETS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "digits": load_digits,
    "images": _load_images,
    "cifar": _load_cifar,
}


def build_datasets(config: DataConfig) -> tuple[Any, Any]:
    """(training set, evaluation set) that ``config.name`` names, before the labelled subset is taken."""
    if config.name in DATASETS:
        return DATASETS[config.name](**config.options)
    if ":" not in config.name:
        raise ValueError(
            f"data.name: got {config.name!r}, expected one of {sorted(DATASETS)} or 'package.module:callable'"
        )
    built = import_object(config.name, "data.name")(**config.options)
    if not isinstance(built, tuple) or len(built) != 2:
        raise TypeError(
            f"data.name: {config.name!r} returned {type(built).__name__}, expected (training set, eval set)"
        )
    return built


def choose_data(config: DataConfig, train_data: Any, eval_data: Any) -> tuple[Any, Any]:
    """The given datasets or the configured ones, cut to the labelled subset."""
    if (train_data is None) != (eval_data is None):
        raise ValueError("train_data, eval_data: got one of them, expected both or none")
    train_set, eval_set = build_datasets(config) if train_data is None else (train_data, eval_data)
    if config.labelled is not None:
        train_set = labelled_subset(train_set, config.labelled, config.subset_seed)
    return train_set, eval_set


def labels_of(dataset: Any) -> Tensor:
    """The labels [N] of a dataset with ``labels`` or ``targets``, of a TensorDataset, or of a Subset of these."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name))
    if hasattr(dataset, "tensors"):
        return torch.as_tensor(dataset.tensors[1])
    raise TypeError(f"data.labelled: {type(dataset).__name__} has neither 'labels' nor 'targets' to choose a subset by")


def normalization_of(dataset: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(means, standard deviations) by which a dataset, or that of a Subset, has normalised the channels, if it says."""
    if isinstance(dataset, Subset):
        return normalization_of(dataset.dataset)
    return getattr(dataset, "normalization", None)


def labels_hash(dataset: Any) -> str | None:
    """sha256 of the labels, which tells most datasets apart cheaply; None for a dataset that does not expose them."""
    try:
        labels = labels_of(dataset).to("cpu", torch.long)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()


def labelled_subset(dataset: Any, count: int, seed: int) -> Any:
    """``count`` samples, as equally many of each class as possible, drawn without replacement with ``seed``."""
    labels = labels_of(dataset)
    if count > len(labels):
        raise ValueError(f"data.labelled: got {count}, expected at most the {len(labels)} training samples")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Rank of each sample within its class: taking the lowest ranks first fills the classes evenly.
    shuffled = labels[order]
    rank = torch.zeros(len(labels), dtype=torch.long)
    for label in shuffled.unique():
        members = shuffled == label
        rank[members] = torch.arange(int(members.sum()))
    chosen = order[torch.argsort(rank, stable=True)[:count]].sort().values
    if isinstance(dataset, TensorImages):
        return TensorImages(dataset.images[chosen], dataset.labels[chosen])
    return Subset(dataset, chosen.tolist())


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


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers, without the collisions of a sum."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


def _leave_signals_to_main(worker: int) -> None:
    """torchrun, timeout and scancel signal the whole process group, and a worker that dies takes the run with it."""
    for number in (*SIGNALS, signal.SIGINT):
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # The main process itself ends its workers by SIGTERM, and would wait for one that ignored that for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main, args=(os.getppid(),), daemon=True).start()


def _end_with_main(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


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
        worker_init_fn=_leave_signals_to_main,
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
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),
    )
