"""The settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastkd.trainer.data.options import check_options
from fastkd.validate import check_int, check_number, check_type


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """Which data a run reads, how many of them are labelled, and how they are batched.

    Attributes:
        name: ``digits``, ``images``, ``cifar``, ``stl10``, ``tiny-imagenet``, ``torchvision:NAME``, or
            ``package.module:callable``. It is called with ``options`` and returns (training set, evaluation set), each
            a map-style dataset of (image, label).
        options: keyword arguments of the data set. Those of fastkd's own are in ``fastkd.trainer.data.options``.
        labelled: keep this many training samples, balanced over the classes. None keeps all.
        unlabelled: images without a label take part: their label is -1. With ``labelled``, these are the training
            images that would otherwise be left out. Cross-entropy is the mean over the labelled rows of the global
            batch. All other terms use every row, and where they need a label the teacher's prediction takes its place.
        subset_seed: the seed that the labelled samples are drawn with.
        batch_size: rows of a training batch, all ranks together.
        eval_batch_size: rows of an evaluation batch, per rank.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        num_workers: loader processes per rank. 0 reads in the training process.
        shuffle_shards: read shards in random order, this many at a time with their samples mixed. This suits disks that
            are slow at random reads. None mixes all samples.
        mixup: alpha of mixup (arXiv 1710.09412): every training batch is mixed with itself, images and labels. 0: not.
        cutmix: alpha of CutMix (arXiv 1905.04899). With both, each batch gets one of the two. Their labels are
            probabilities, so that terms which read the labels of single samples (``pckd``) refuse them.

    Example:
        >>> digits = DataConfig(name="digits", labelled=200, batch_size=50)
        >>> imagenet = DataConfig(name="images", options={"root": "imagenet"}, batch_size=256, num_workers=8)
    """

    name: str = "digits"
    options: dict[str, Any] = field(default_factory=dict)
    labelled: int | None = None
    unlabelled: bool = False
    subset_seed: int = 0
    batch_size: int = 64
    eval_batch_size: int = 512
    drop_last: bool = True
    num_workers: int = 0
    shuffle_shards: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_type("data.name", self.name, str)
        check_type("data.options", self.options, dict)
        check_options(self.name, self.options)
        if self.labelled is not None:
            check_int("data.labelled", self.labelled, 1)
        check_type("data.unlabelled", self.unlabelled, bool)
        check_seed("data.subset_seed", self.subset_seed)
        check_int("data.batch_size", self.batch_size, 1)
        check_int("data.eval_batch_size", self.eval_batch_size, 1)
        check_type("data.drop_last", self.drop_last, bool)
        check_int("data.num_workers", self.num_workers, 0)
        if self.shuffle_shards is not None:
            check_int("data.shuffle_shards", self.shuffle_shards, 1)
        for name in ("mixup", "cutmix"):
            check_number(f"data.{name}", getattr(self, name), 0.0)


def check_seed(name: str, value: Any) -> None:
    """Raise unless ``value`` is an int that torch's generators take."""
    check_int(name, value, 0)
    if value >= 2**63:
        raise ValueError(f"{name}: got {value}, expected an int < 2**63")
