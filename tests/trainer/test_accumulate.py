"""Cached accumulation gives the gradients of one graph over all chunks, and leaves everything else as that would."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd.trainer.models.features import FeatureModel, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.run.accumulate import cached_step, join_outputs
from tests.helpers.checks import assert_close


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


def models(dtype: torch.dtype = torch.float64) -> tuple[FeatureModel, FeatureModel, Objective]:
    torch.manual_seed(0)
    student, teacher = FeatureModel(Net(16).to(dtype), "head"), FeatureModel(Net(24).to(dtype).eval(), "head")
    teacher.requires_grad_(False)
    return student, teacher, Objective(ObjectiveConfig(terms="dcd+kd"), shapes(16), shapes(24)).to(dtype)


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), random.random(), np.random.random()]  # noqa: NPY002


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": parameter.grad
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("rows", [16, 19])
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_gradients_are_those_of_one_graph_over_all_chunks(chunks: int, rows: int) -> None:
    student, teacher, objective = models()
    images = torch.randn(rows, 3, 2, 2, dtype=torch.float64)
    labels = torch.randint(5, (rows,))

    def teach(part: Tensor):
        with torch.no_grad():
            return teacher(part)

    cached, cached_objective = copy.deepcopy(student), copy.deepcopy(objective)
    seed()
    loss, terms = cached_step(
        cached, teach, cached_objective, list(cached.buffers()), images, labels, 1.0, chunks, lambda x: x.backward()
    )
    drawn = draw()

    teacher.model.gain.fill_(1)
    seed()
    parts = images.tensor_split(chunks)
    joined = join_outputs([student(part) for part in parts])
    expected, expected_terms = objective(joined, join_outputs([teach(part) for part in parts]), labels)
    expected.backward()

    assert drawn == draw()
    assert_close(loss, expected, torch.float64)
    assert terms.keys() == expected_terms.keys()
    found, wanted = gradients(cached, cached_objective), gradients(student, objective)
    assert found.keys() == wanted.keys()
    assert len(found) == len([*student.parameters(), *objective.parameters()])
    for name, grad in wanted.items():
        assert_close(found[name], grad, torch.float64)
    for buffer, wanted_buffer in zip(cached.buffers(), student.buffers(), strict=True):
        assert torch.equal(buffer, wanted_buffer)


def test_more_chunks_than_images_are_as_many_as_images() -> None:
    student, teacher, objective = models()
    student.eval()
    images, labels = torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    loss, _ = cached_step(student, teacher, objective, [], images, labels, 1.0, 10, lambda x: x.backward())
    assert loss.isfinite()


def test_weights_converted_by_autocast_still_get_their_gradients() -> None:
    student, teacher, objective = models(torch.float32)
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(5, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(student, teacher, objective, [], images, labels, 1.0, 2, lambda x: x.backward())
    assert set(gradients(student)) == {f"0.{name}" for name, _ in student.named_parameters()}
    assert all(grad.any() for grad in gradients(student).values())
