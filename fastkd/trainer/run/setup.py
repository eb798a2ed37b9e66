"""The steps before training: the data, and the models made ready for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import choose_data
from fastkd.trainer.data.labels import labels_hash, normalization_of
from fastkd.trainer.data.loader import GlobalBatches, eval_loader, first_images, train_loader
from fastkd.trainer.objective.terms import TermFunction
from fastkd.trainer.run.check import check_fit
from fastkd.trainer.run.distiller import Distiller, build_distiller, weights_hash
from fastkd.trainer.run.prepare import prepare
from fastkd.trainer.run.ranks import Ranks
from fastkd.trainer.run.state import Identity


@dataclass(frozen=True)
class RunData:
    """The data of a run: both datasets, this rank's loaders, and the images of a batch of two.

    ``set_epoch`` tells ``loader`` the epoch before each pass.
    """

    train_set: Any
    eval_set: Any
    loader: StatefulDataLoader
    set_epoch: Callable[[int], None]
    eval_loader: DataLoader[Any]
    sample: Tensor

    @property
    def batches(self) -> GlobalBatches:
        """The global batches of an epoch, of which ``loader`` reads this rank's parts."""
        batches: GlobalBatches = self.loader.batch_sampler
        return batches


def open_data(config: TrainConfig, train_data: Any, eval_data: Any, device: torch.device, ranks: Ranks) -> RunData:
    """The given datasets, or the configured ones, with their loaders."""
    train_set, eval_set = choose_data(config.data, train_data, eval_data)
    place = (ranks.rank, ranks.world_size)
    loader, set_epoch = train_loader(train_set, config.data, config.seed, device, *place)
    evaluation = eval_loader(eval_set, config.data, device, *place)
    return RunData(train_set, eval_set, loader, set_epoch, evaluation, first_images(train_set))


def build_models(
    config: TrainConfig,
    data: RunData,
    device: torch.device,
    ranks: Ranks,
    *,
    student: nn.Module | None,
    teacher: nn.Module | None,
    terms: Mapping[str, nn.Module | TermFunction] | None,
) -> tuple[Distiller, list[str]]:
    """The distiller on ``device``, checked against the data and ready for the first step; and lines for the user."""
    distiller = build_distiller(config, data.sample, student=student, teacher=teacher, terms=terms).to(device)
    check_fit(config, distiller, data.sample, data.batches, data.train_set, data.eval_set)
    return distiller, prepare(distiller, config, device, ranks, normalization_of(data.train_set))


def identify(config: TrainConfig, data: RunData, distiller: Distiller, objects: dict[str, Any]) -> Identity:
    """The run's identity; ``objects`` are the arguments of ``train`` that may replace what the config would build."""
    return Identity(
        config=config.to_dict(),
        given_as_objects=[name for name, value in objects.items() if value is not None],
        train_samples=len(data.train_set),
        labels_sha256=labels_hash(data.train_set),
        teacher_sha256=None if distiller.teacher is None else weights_hash(distiller.teacher.model.model),
    )
