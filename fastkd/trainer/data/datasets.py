"""Builds the data sets that a config names."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch.utils.data import Subset

from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.labels import labelled_subset, without_other_labels
from fastkd.trainer.data.options import options_class
from fastkd.trainer.imports import import_object

# Named and not imported, so that a run on digits does not load torchvision.
TORCHVISION = "fastkd.trainer.data.readers.torchvision_sets:load_torchvision"
DATASETS = {
    "digits": "fastkd.trainer.data.readers.memory:load_digits",
    "images": "fastkd.trainer.data.images:load_images",
    "cifar": "fastkd.trainer.data.readers.cifar:load_cifar",
    "stl10": "fastkd.trainer.data.readers.stl10:load_stl10",
    "coco": "fastkd.trainer.data.coco.reader:load_coco",
    "tiny-imagenet": "fastkd.trainer.data.readers.tiny_imagenet:load_tiny_imagenet",
}


def build_datasets(config: DataConfig) -> tuple[Any, Any]:
    """(training set, evaluation set) that ``config.name`` names, before the labelled subset is taken."""
    name, options = DATASETS.get(config.name, config.name), dict(config.options)
    if name.startswith("torchvision:"):
        name, options["name"] = TORCHVISION, name.removeprefix("torchvision:")
    if ":" not in name:
        raise ValueError(
            f"data.name: got {name!r}, expected one of {sorted(DATASETS)}, 'torchvision:NAME' or "
            "'package.module:callable'"
        )
    load = import_object(name, "data.name")
    if options_class(config.name) is not None and "root" not in options and config.name != "digits":
        raise ValueError(f"data.options.root: is missing for {config.name!r}; give --data.options.root DIR")
    try:
        inspect.signature(load).bind(**options)
    except TypeError as error:  # what a user's own data set takes
        raise ValueError(f"data.options: {config.name!r}: {error}") from None
    built = load(**options)
    if not isinstance(built, tuple) or len(built) != 2:
        raise TypeError(f"data.name: {name!r} returned {type(built).__name__}, expected (training set, eval set)")
    return built


def is_known_data(name: str) -> bool:
    """Whether ``name`` can build nothing but a data set of fastkd or torchvision."""
    return name in DATASETS or name.startswith("torchvision:")


def choose_data(config: DataConfig, train_data: Any, eval_data: Any) -> tuple[Any, Any]:
    """The given datasets or else the configured ones, the training set cut to its labelled subset.

    With ``config.unlabelled`` it is whole, and the labels outside of that subset are -1.
    """
    if (train_data is None) != (eval_data is None):
        raise ValueError("train_data, eval_data: got one of them, expected both or none")
    train_set, eval_set = build_datasets(config) if train_data is None else (train_data, eval_data)
    if config.labelled is not None:
        choose = without_other_labels if config.unlabelled else labelled_subset
        train_set = choose(train_set, config.labelled, config.subset_seed)
    return train_set, eval_set


def without_download(config: DataConfig) -> DataConfig:
    """The same data, which are not fetched if they are not there: for a config that came with a checkpoint."""
    return replace(config, options={name: value for name, value in config.options.items() if name != "download"})


def names_of_classes(dataset: Any) -> list[str] | None:
    """The names of the classes of a dataset, or of the dataset of a Subset. None if it does not say."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) and names else None
