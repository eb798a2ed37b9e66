"""The objective's cross-entropy and KD in one read of the logits, as on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.objective.options.fused import CEConfig, KDConfig
from fastkd.trainer.objective.terms import fused as objective_terms
from tests.helpers.trainer_runs import shapes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits that went through ``ce_kd_terms``, where the CPU is one of the devices that read them once."""
    seen = []
    original = objective_terms.ce_kd_terms

    def record(student_logits: torch.Tensor, *args: object, **options: object) -> object:
        seen.append(student_logits)
        return original(student_logits, *args, **options)

    monkeypatch.setattr(objective_terms, "ce_kd_terms", record)
    monkeypatch.setattr(objective_terms, "ONE_READ_DEVICES", {"cpu"})
    return seen


def outputs() -> tuple[ModelOutput, ModelOutput, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        ModelOutput(torch.randn(8, 5, generator=generator), torch.randn(8, d, generator=generator)) for d in (6, 9)
    )
    student.logits.requires_grad_()
    return student, teacher, torch.arange(8) % 5


CONFIG = ObjectiveConfig(terms="0.5*ce + dcd + 2*kd", ce=CEConfig(label_smoothing=0.1), kd=KDConfig(temperature=2.0))


def test_one_read_changes_no_value_no_name_and_no_order(
    reads: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, labels = outputs()
    model = Objective(CONFIG, *shapes(6, 9))
    with monkeypatch.context() as patch:
        patch.setattr(objective_terms, "ONE_READ_DEVICES", set())
        total, named = model(student, teacher, labels)
    (grad,) = torch.autograd.grad(total, student.logits)
    assert not reads
    fused_total, fused_named = model(student, teacher, labels)
    (fused_grad,) = torch.autograd.grad(fused_total, student.logits)
    assert len(reads) == 1
    assert list(named) == list(fused_named)
    assert not any(value.requires_grad for value in fused_named.values())
    torch.testing.assert_close(fused_total, total)
    torch.testing.assert_close(fused_named, named)
    torch.testing.assert_close(fused_grad, grad)


@pytest.mark.parametrize("terms", ["ce", "0*ce + kd"])
def test_one_term_alone_is_computed_alone(terms: str, reads: list[torch.Tensor]) -> None:
    _, named = Objective(ObjectiveConfig(terms=terms), *shapes(6, 9))(*outputs())
    assert not reads
    assert list(named) == [terms[-2:]]


def test_class_probabilities_go_through_torchs_cross_entropy(reads: list[torch.Tensor]) -> None:
    student, teacher, labels = outputs()
    model = Objective(ObjectiveConfig(terms="ce + kd"), *shapes(6, 9))
    _, named = model(student, teacher, F.one_hot(labels, 5).float())
    assert not reads
    torch.testing.assert_close(named["ce"], F.cross_entropy(student.logits, labels).detach())


def test_a_users_own_cross_entropy_is_not_replaced(reads: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:

    def own(student: ModelOutput, teacher: ModelOutput, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"ce": F.cross_entropy(student.logits, labels, ignore_index=3)}

    student, teacher, labels = outputs()
    _, named = Objective(CONFIG, *shapes(6, 9), {"ce": own})(student, teacher, labels)
    assert not reads
    torch.testing.assert_close(named["ce"], F.cross_entropy(student.logits, labels, ignore_index=3).detach())
