"""The settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
