"""Student and teacher in different dtypes, with and without autocast."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastkd.trainer import ModelOutput, Objective, ObjectiveConfig, train
from fastkd.trainer.objective.terms import fused as objective_terms
from tests.helpers.trainer_runs import DropoutNet, one_thread, shapes, tiny_config  # noqa: F401


class FloatNet(DropoutNet):
    """Ends in ``.float()``, as many models do that are meant for autocast."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).float()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (DropoutNet, lambda: FloatNet(width=24)),
        (FloatNet, lambda: DropoutNet(width=24)),
        (DropoutNet, lambda: DropoutNet(width=24).half()),
        (DropoutNet, lambda: DropoutNet(width=24).bfloat16()),
        (DropoutNet, lambda: DropoutNet(width=24).double()),
        (lambda: DropoutNet().double(), lambda: DropoutNet(width=24)),
        (lambda: DropoutNet().double(), lambda: DropoutNet(width=24).double()),
    ],
)
def test_student_and_teacher_of_different_dtypes_train(tmp_path, precision, student, teacher):
    config = tiny_config(tmp_path, run_dir=None, precision=precision, epochs=1)
    given: nn.Module = student()
    dtype = given.fc.weight.dtype
    result = train(config, student=given, teacher=teacher())
    assert math.isfinite(result.history[0]["loss"])
    assert {"ce", "kd", "dcd/contrast"} <= result.history[0].keys()
    assert given.fc.weight.dtype == dtype


def test_logits_of_different_dtypes_are_compared_in_float32(monkeypatch):
    student, teacher = ModelOutput(torch.randn(8, 4), torch.randn(8, 6)), ModelOutput(torch.randn(8, 4), torch.ones(8))
    labels = torch.arange(8) % 4
    model = Objective(ObjectiveConfig(terms="kd"), *shapes(6, 6))
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(objective_terms, "ONE_READ_DEVICES", devices)
        teacher.logits = teacher.logits.bfloat16().float()
        expected, _ = model(student, teacher, labels)
        teacher.logits = teacher.logits.bfloat16()
        assert torch.equal(model(student, teacher, labels)[0], expected)
