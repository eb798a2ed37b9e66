"""What would end a run in its first or last batch is an error before it starts."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from fastkd.trainer import DataConfig, Distiller, FeatureModel, Objective, ObjectiveConfig, TensorImages, TrainConfig
from fastkd.trainer.data.loader import EpochSampler, GlobalBatches
from fastkd.trainer.models.features import ModelShapes
from fastkd.trainer.tasks.classification import Classification
from tests.helpers.trainer_runs import DropoutNet


class Maps(nn.Module):
    """Its batch norm sees 16 values per channel of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.fc = nn.Linear(1, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(images).mean((2, 3)))


def fit(
    student: nn.Module,
    *,
    samples: int = 28,
    world_size: int = 1,
    labels: int = 4,
    terms: str = "ce",
    chunks: int = 1,
    **data: Any,
) -> None:
    shapes = ModelShapes(features=1, classes=4)
    distiller = Distiller(FeatureModel(student, "fc"), None, Objective(ObjectiveConfig(terms=terms), shapes, shapes))
    config = TrainConfig(data=DataConfig(**data), chunks=chunks)
    batches = GlobalBatches(EpochSampler(samples, 0), samples, config.data, 0, world_size)
    train = TensorImages(torch.randn(samples, 1, 4, 4), torch.arange(samples) % labels)
    sets = (Subset(train, range(samples)), train)
    task = Classification(config)
    task.check_fit(distiller.student, distiller.objective, train.images[:2], batches, *sets, resumed=False)


ONE_ROW = [
    {"batch_size": 7, "chunks": 4},
    {"batch_size": 9, "drop_last": False},
    {"batch_size": 14, "world_size": 8},
    {"batch_size": 14, "world_size": 2, "chunks": 4},
    {"batch_size": 4, "chunks": 100},
]
ENOUGH = [
    {"batch_size": 8, "chunks": 4},
    {"batch_size": 9},
    {"batch_size": 16, "world_size": 8},
    {"batch_size": 7, "chunks": 3},
]


@pytest.mark.parametrize("settings", ONE_ROW)
def test_a_chunk_of_one_row_is_refused_where_batch_norm_gets_one_value(settings: dict[str, Any]) -> None:
    student = DropoutNet()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"data\.batch_size: .* chunks=.* drop_last=.*'body\.2'"):
        fit(student, **settings)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(module.training for module in student.modules())
    fit(Maps(), **settings)


@pytest.mark.parametrize("settings", ENOUGH)
def test_two_rows_are_enough(settings: dict[str, Any]) -> None:
    fit(DropoutNet(), **settings)


def test_a_last_batch_of_one_row_is_refused_for_a_term_that_needs_two() -> None:
    one = {"batch_size": 9, "drop_last": False}
    with pytest.raises(ValueError, match=r"data\.batch_size: got 9 .* one row; the term 'cc' needs at least two"):
        fit(Maps(), terms="cc", **one)
    fit(Maps(), terms="rkd", **one)
    fit(Maps(), terms="cc", batch_size=13, drop_last=False, world_size=2)  # the ranks' rows together


def test_a_label_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student\.num_classes: the student has 4 classes, but train_data has .* 6;"):
        fit(DropoutNet(), labels=7, batch_size=4)
    with pytest.raises(ValueError, match="eval_data has the label 6"):
        fit(DropoutNet(), labels=7, batch_size=4, terms="0*ce + kd")
