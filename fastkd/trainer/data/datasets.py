"""The data sets that a config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.labels import labelled_subset
from fastkd.trainer.data.memory import load_digits
from fastkd.trainer.imports import import_object


def _load_images(**options: Any) -> tuple[Any, Any]:
    from fastkd.trainer.data.images import load_images

    return load_images(**options)


def _load_cifar(**options: Any) -> tuple[Any, Any]:
    from fastkd.trainer.data.cifar import load_cifar

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
