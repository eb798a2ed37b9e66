"""Cached accumulation gives the gradients of one graph over all chunks, and leaves everything else as that would."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd.study.costs import peak_bytes
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.features import FeatureModel, ModelShapes
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.run.accumulate import join_outputs
from fastkd.trainer.run.distiller import Distiller, Trained
from fastkd.trainer.tasks.classification import Classification
from tests.helpers.checks import assert_close

TASK = Classification(TrainConfig())


class Net(nn.Module):
    """Dropout, noise of Python and numpy, batch norm, and (as spectral norm) a buffer that a pass changes and reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.GELU())
        self.register_buffer("gain", torch.ones(()))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images) * self.gain.clone()
        self.gain.mul_(1.01)
        if self.training:
            features = features * (1 + 0.1 * random.random() + 0.1 * np.random.random())  # noqa: NPY002
        return self.head(nn.functional.dropout(features, 0.2, self.training))


def shapes(features: int) -> ModelShapes:
    return ModelShapes(features=features, classes=5)


def build(dtype: torch.dtype = torch.float64) -> Distiller:
    torch.manual_seed(0)
    objective = Objective(ObjectiveConfig(terms="dcd+kd"), shapes(16), shapes(24))
    return Distiller(FeatureModel(Net(16), "head"), FeatureModel(Net(24), "head"), objective).to(dtype)


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), random.random(), np.random.random()]  # noqa: NPY002


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rows", [16, 19])
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_gradients_are_those_of_one_graph_over_all_chunks(chunks: int, rows: int) -> None:
    distiller = build()
    images = torch.randn(rows, 3, 2, 2, dtype=torch.float64)
    labels = torch.randint(5, (rows,))
    chunked = copy.deepcopy(distiller)
    seed()
    loss, terms = Trained(chunked, TASK, chunks)((images, labels))
    loss.backward()
    drawn = draw()

    seed()
    parts = images.tensor_split(chunks)
    teacher = join_outputs([distiller.teach(part) for part in parts])
    joined = join_outputs([distiller.student(part) for part in parts])
    expected, expected_terms = distiller.objective(joined, teacher, labels)
    expected.backward()

    assert drawn == draw()
    assert_close(loss, expected, torch.float64)
    assert terms.keys() == expected_terms.keys()
    found, wanted = gradients(chunked), gradients(distiller)
    assert found.keys() == wanted.keys()
    assert len(found) == len([parameter for parameter in distiller.parameters() if parameter.requires_grad])
    for name, grad in wanted.items():
        assert_close(found[name], grad, torch.float64)
    for buffer, wanted_buffer in zip(chunked.buffers(), distiller.buffers(), strict=True):
        assert torch.equal(buffer, wanted_buffer)


def test_the_activations_of_one_chunk_are_in_memory_at_a_time() -> None:
    student, teacher = (FeatureModel(SmallConvNet(num_classes=5, width=32)) for _ in range(2))
    distiller = Distiller(student, teacher, Objective(ObjectiveConfig(terms="dcd+kd"), shapes(64), shapes(64)))
    images, labels = torch.randn(64, 1, 16, 16), torch.arange(64) % 5

    def peak(chunks: int) -> int:
        def step() -> None:
            Trained(distiller, TASK, chunks)((images, labels))[0].backward()

        step()  # makes the gradients
        return peak_bytes(step)

    assert peak(4) < 0.35 * peak(1)


def test_more_chunks_than_images_are_as_many_as_images() -> None:
    distiller = build()
    distiller.student.eval()
    images, labels = torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    loss, _ = Trained(distiller, TASK, 10)((images, labels))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("chunks", [1, 2])
def test_weights_converted_by_autocast_get_the_gradients_of_the_whole_batch(chunks: int) -> None:
    distiller = build(torch.float32)
    distiller.student.eval()
    whole = copy.deepcopy(distiller)
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(5, (8,))
    for model, count in ((distiller, chunks), (whole, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = Trained(model, TASK, count)((images, labels))
        loss.backward()
    found, wanted = gradients(distiller), gradients(whole)
    assert found.keys() == wanted.keys() >= {f"student.{name}" for name, _ in distiller.student.named_parameters()}
    for name, grad in wanted.items():
        assert_close(found[name], grad, torch.bfloat16)
