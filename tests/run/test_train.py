"""The objective as a weighted sum of named terms; the teacher, frozen whatever is called."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd
from fastkd.trainer import TERMS, DCDConfig, KDConfig, ModelOutput, Objective, ObjectiveConfig, load_weights, train
from fastkd.trainer.objective.config import parse_terms
from tests.helpers.trainer_runs import DropoutNet, batch, distiller, lines, noisy_data, one_thread, shapes, tiny_config  # noqa: F401


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("ce", {"ce": 1.0}),
        ("dcd+kd", {"ce": 1.0, "dcd": 1.0, "kd": 1.0}),
        (" 0.5 * kd + 2*dcd ", {"ce": 1.0, "kd": 0.5, "dcd": 2.0}),
        ("0*ce + 1e-2*kd", {"kd": 0.01}),
        ("1e+2*kd+0.1*ce", {"kd": 100.0, "ce": 0.1}),
        ("ce+0*kd", {"ce": 1.0}),
    ],
)
def test_terms_are_a_weighted_sum_with_cross_entropy(text, weights):
    assert parse_terms(text) == weights


@pytest.mark.parametrize("text", ["", "dcd+", "dcd++kd", "-1*kd", "kd*2", "1.2.3*kd", "kd+kd", "0*ce", "dcd kd"])
def test_terms_that_are_no_sum_are_errors(text):
    with pytest.raises(ValueError, match=r"objective\.terms: "):
        ObjectiveConfig(terms=text)


def test_the_objective_is_the_weighted_sum_of_the_losses():
    torch.manual_seed(0)
    student, teacher = (ModelOutput(torch.randn(8, 4), torch.randn(8, d)) for d in (6, 9))
    labels = torch.arange(8) % 4
    config = ObjectiveConfig(terms="0.5*ce + 2*kd + 3*dcd", kd=KDConfig(temperature=2.0), dcd=DCDConfig(alpha=0.25))
    objective = Objective(config, *shapes(6, 9))
    total, named = objective(student, teacher, labels)
    dcd = objective.terms["dcd"].loss
    expected = (
        0.5 * F.cross_entropy(student.logits, labels)
        + 2 * fastkd.kd_loss(student.logits, teacher.logits, 2.0)
        + 3
        * fastkd.dcd_loss(
            dcd.student_head(student.features), dcd.teacher_head(teacher.features), dcd.tau.exp(), alpha=0.25
        )
    )
    torch.testing.assert_close(total, expected)
    assert named.keys() == {"ce", "kd", "dcd/contrast", "dcd/consistency"}
    assert not any(value.requires_grad for value in named.values())
    torch.testing.assert_close(
        0.5 * named["ce"] + 2 * named["kd"] + 3 * (named["dcd/contrast"] + named["dcd/consistency"]), total.detach()
    )


def test_own_terms_are_modules_or_functions_with_a_name_and_a_weight(tmp_path, monkeypatch):
    class Hint(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(12, 24)

        def forward(self, student, teacher, labels):
            return {"mse": F.mse_loss(self.map(student.features), teacher.features)}

    def margin(student, teacher, labels):
        return {"margin": student.logits.square().mean()}

    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="0.1*hint + 0.01*margin"), epochs=1)
    hint = Hint()
    before = hint.map.weight.clone()
    result = train(config, terms={"hint": hint, "margin": margin})
    assert {"ce", "hint/mse", "margin"} <= result.history[0].keys()
    assert not torch.equal(hint.map.weight, before)
    with pytest.raises(ValueError, match=r"objective\.terms: got 'hint'.*expected terms among \['ab', .*'wsld'\]"):
        Objective(config.objective, *shapes(12, 24))
    with pytest.raises(ValueError, match=r"terms: got \['other'\], which objective\.terms='dcd' does not name"):
        Objective(ObjectiveConfig(terms="dcd"), *shapes(12, 24), {"other": margin})
    for bad, got in (([0.0], "list"), (torch.ones(4), r"shape \(4,\)")):
        with pytest.raises(TypeError, match=rf"terms: 'margin' returned {got} for 'm', expected a 0-dim tensor"):
            train(
                dataclasses.replace(config, run_dir=None),
                terms={"hint": hint, "margin": lambda s, t, y, bad=bad: {"m": bad}},
            )
    monkeypatch.setitem(TERMS, "hint", lambda config, student, teacher: Hint())
    assert "hint" in Objective(ObjectiveConfig(terms="hint"), *shapes(12, 24)).terms


RECORDED = ["loss", "lr", "epoch", "step", "kind", "accuracy", "eval_loss", "grad_norm"]
ATTRIBUTES = ["train", "type", "keys", "forward", "float", "__class__", "training"]


@pytest.mark.parametrize("name", RECORDED + ATTRIBUTES)
def test_a_term_named_like_a_recorded_value_or_an_attribute_of_modules_is_an_error(name):
    with pytest.raises(ValueError, match=rf"objective\.terms: got the name '{name}', which is reserved"):
        Objective(ObjectiveConfig(terms=name), *shapes(12, 24), {name: lambda s, t, y: {name: s.logits.sum()}})


def test_a_term_that_returns_nothing_or_no_dict_is_an_error():
    output = ModelOutput(torch.randn(8, 4), torch.randn(8, 6))
    for bad, got in (({}, "an empty dict"), (torch.ones(()), "Tensor"), (None, "NoneType")):
        objective = Objective(ObjectiveConfig(terms="own"), *shapes(6, 6), {"own": lambda s, t, y, bad=bad: bad})
        with pytest.raises(TypeError, match=f"terms: 'own' returned {got}, expected a dict of named 0-dim tensors"):
            objective(output, None, torch.arange(8) % 4)


def test_the_teacher_stays_in_eval_and_without_gradient_whatever_is_called():
    model = distiller()
    teacher = model.teacher
    images, labels = batch()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        expected = teacher(images).logits
    for call in (
        lambda: model.train(),
        lambda: model.train(True).requires_grad_(True),
        lambda: teacher.train().requires_grad_(),
        lambda: teacher.model.train(),
        lambda: teacher.model.model.train(),
        lambda: teacher.model.model.body[2].train(),
        lambda: teacher.model.model.dropout.train(),
        lambda: nn.ModuleList([model]).train(),
    ):
        call()
        assert torch.equal(teacher(images).logits, expected)
        assert not teacher(images).features.requires_grad
        assert not any(module.training for module in teacher.modules())
        loss, _ = model(images, labels)
        loss.backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    model.requires_grad_(False).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert model.student.training
    assert all(parameter.grad is not None for parameter in model.student.parameters())


def test_a_teacher_that_shares_parameters_with_the_student_is_an_error(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    student, teacher = DropoutNet(), DropoutNet()
    with pytest.raises(ValueError, match=r"teacher: shares parameters with the student.*body\.1\.weight.* and 1 more"):
        train(config, student=student, teacher=student)
    teacher.body = student.body
    with pytest.raises(ValueError, match=r"shares parameters .*: \['body\.1\.weight', .*'body\.2\.bias'\]$"):
        train(config, student=student, teacher=teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_training_leaves_the_teacher_as_it_was(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    result = train(config)
    expected = load_weights(config.teacher.weights)
    assert all(torch.equal(expected[k], v) for k, v in result.distiller.teacher.model.model.state_dict().items())


def test_a_teacher_that_is_missing_useless_or_unlike_the_student_is_an_error(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    untrained = dataclasses.replace(config.teacher, weights=None)
    with pytest.raises(ValueError, match="needs a teacher but there is none"):
        train(dataclasses.replace(config, teacher=None))
    with pytest.raises(ValueError, match="has no term that uses the teacher"):
        train(dataclasses.replace(config, objective=ObjectiveConfig(terms="ce")))
    with pytest.raises(ValueError, match=r"teacher\.weights: got None, expected trained weights"):
        train(dataclasses.replace(config, teacher=untrained))
    other = DropoutNet(width=24)
    other.fc = nn.Linear(24, 5)
    with pytest.raises(ValueError, match="teacher: has 5 classes, expected the student's 4"):
        train(config, teacher=other)
    with pytest.raises(ValueError, match="student: got None"):
        train(dataclasses.replace(config, student=None))
    with pytest.raises(TypeError, match=r"student: got function, expected an nn\.Module"):
        train(config, student=lambda x: x)
