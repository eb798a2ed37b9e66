"""Two ranks with unequal numbers of images and of regions take the step of one process."""

from typing import Any

import pytest
import torch

from fastkd.trainer.batches import DetectionBatch
from fastkd.trainer.config import DetectionConfig, TrainConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.objective import Objective, needs
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.distiller import Distiller, Trained
from fastkd.trainer.tasks.detection.task import Detection
from tests.detection.test_detectors import batch, detector
from tests.helpers.checks import relative_error
from tests.helpers.ranks import run_ranks, succeeded


def step(rank: int, terms: str, regions: Any) -> Any:
    """Rows, loss, named terms and all gradients of a step on three images, of which the first rank has two."""
    config = TrainConfig(
        task="detection", objective=ObjectiveConfig(terms=terms), detection=DetectionConfig(regions=regions)
    )
    student, teacher = detector().double(), detector(1, width=8, head_width=24).double()
    given = batch(((64, 64), (50, 40), (64, 64)))
    given.images = given.images.double() / 255
    taps = needs("taps", config.objective)
    shapes = [model.measure(given, taps=taps) for model in (student, teacher)]
    torch.manual_seed(3)
    objective = Objective(config.objective, *shapes).double()
    ranks = Ranks.present()
    trained = ranks.wrap(Trained(Distiller(student, teacher, objective), Detection(config)))
    part = [0, 1, 2] if ranks.world_size == 1 else [[0, 2], [1]][rank]
    own = DetectionBatch(
        given.images[part], *([each[i] for i in part] for each in (given.sizes, given.targets, given.seeds))
    )
    loss, named = trained(own, ranks.weight(len(own), 3))
    loss.backward()
    gradients = {name: x.grad for name, x in trained.named_parameters() if x.grad is not None}
    _, rows = student(own).chosen(regions)
    return rows, loss.detach(), named, gradients


@pytest.mark.parametrize(("terms", "regions"), [("dcd + kd", "all"), ("dcd + kd + at", "foreground")])
def test_two_ranks_equal_one_process(terms: str, regions: str) -> None:
    rows, loss, named, gradients = step(0, terms, regions)
    results = succeeded(run_ranks(2, step, terms, regions))
    counts = [result[0] for result in results]
    assert sum(counts) == rows
    assert counts[0] != counts[1]
    assert relative_error(sum(result[1] for result in results) / 2, loss) < 1e-10
    for name, value in named.items():
        assert relative_error(sum(result[2][name] for result in results) / 2, value) < 1e-10, name
    assert len(gradients) > 20
    for name, value in gradients.items():
        for result in results:
            assert relative_error(result[3][f"module.{name}"], value) < 1e-10, name
