"""CKD, PCKD and MSDCRD as terms: their modules with what student and teacher give, in sums, dtypes and resumed runs."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd.cli import main
from fastkd.trainer import (
    CKDConfig,
    Distiller,
    FeatureModel,
    MSDCRDConfig,
    Objective,
    ObjectiveConfig,
    PCKDConfig,
    TrainConfig,
    train,
)
from fastkd.trainer.models.features import measure_shapes
from fastkd.trainer.objective.options.check import loss_options
from tests.helpers.trainer_runs import batch, convolutional, networks, one_thread, tiny_config  # noqa: F401

TERMS = ("ckd", "pckd", "msdcrd")
NAMES = {
    "ckd": {"ckd"},
    "pckd": {"pckd/category", "pckd/feature", "pckd/kd"},
    "msdcrd": {"msdcrd/sample", "msdcrd/feature"},
}


def build(config: ObjectiveConfig, dtype: torch.dtype = torch.float32) -> Distiller:
    models = [FeatureModel(network.to(dtype)) for network in networks()]
    shapes = [measure_shapes(model, batch()[0].to(dtype), feature_map=True) for model in models]
    return Distiller(models[0], models[1], Objective(config, *shapes)).to(dtype)


def test_each_term_is_its_module_on_what_the_models_give() -> None:
    config = ObjectiveConfig(
        terms="0*ce + 10*ckd + 0.5*pckd + 2*msdcrd",
        ckd=CKDConfig(temperature=0.5),
        pckd=PCKDConfig(temperature=2.0, category_weight=3.0),
        msdcrd=MSDCRDConfig(windows=(2, 1), strides=(1, 1), temperature=0.2),
    )
    distiller = build(config, torch.float64)
    distiller.begin_epoch(40)
    images, labels = batch()
    images = images.double()
    total, named = distiller(images, labels)
    student, teacher = distiller.student(images), distiller.teacher(images)
    terms = distiller.objective.terms
    classifiers = distiller.student.model.classifier, distiller.teacher.model.model.classifier
    expected = {
        "ckd": fastkd.ckd_loss(student.logits, teacher.logits, 0.5),
        **{
            f"pckd/{name}": value
            for name, value in terms["pckd"]
            .loss(student.features, teacher.features, student.logits, teacher.logits, labels, *classifiers, 40)
            .items()
        },
        **{
            f"msdcrd/{name}": value
            for name, value in terms["msdcrd"].loss(student.feature_map, teacher.feature_map, classifiers[1]).items()
        },
    }
    assert named.keys() == expected.keys() == set().union(*NAMES.values())
    for name, value in expected.items():
        torch.testing.assert_close(named[name], value.detach())
    weights = {"ckd": 10, "pckd": 0.5, "msdcrd": 2}
    torch.testing.assert_close(total, sum(weights[name.split("/")[0]] * value for name, value in expected.items()))
    assert (terms["pckd"].loss.temperature, terms["pckd"].loss.weights["category"]) == (2.0, 3.0)
    assert terms["msdcrd"].loss.temperature == 0.2


def test_the_options_of_the_terms_are_those_of_their_modules() -> None:
    for config, module, build_module in (
        (CKDConfig(), fastkd.CKDLoss(), fastkd.CKDLoss),
        (PCKDConfig(), fastkd.PCKDLoss(4, 8), lambda **options: fastkd.PCKDLoss(4, 8, **options)),
        (MSDCRDConfig(), fastkd.MSDCRDLoss(4, 8), lambda **options: fastkd.MSDCRDLoss(4, 8, **options)),
    ):
        assert str(build_module(**loss_options(config, type(module)))) == str(module)
        assert set(vars(config)) == set(loss_options(config, type(module)))  # none is left out


def test_local_negatives_make_a_term_a_mean_over_own_rows() -> None:
    names = ("dcd", "ckd", "pckd", "msdcrd")
    whole = ObjectiveConfig(terms=f"0*ce + {' + '.join(names)}")
    local = dataclasses.replace(
        whole, **{name: dataclasses.replace(getattr(whole, name), group="local") for name in names}
    )
    found = {}
    for config in (whole, local):
        distiller = build(config)
        terms = distiller.objective.terms
        assert {term.spans_ranks for term in terms.values()} == {config is whole}
        assert {term.loss.group for term in terms.values()} == {None if config is whole else "local"}
        assert (distiller.objective.columns_sent(4) > 0) == (config is whole)
        torch.manual_seed(0)
        for parameter in distiller.objective.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        # A rank with 3 of 8 rows on two ranks: W n / N.
        found[config.dcd.group] = distiller(*batch(), rank_weight=0.75)[1]
    for name, value in found["global"].items():
        torch.testing.assert_close(found["local"][name], 0.75 * value)
    with pytest.raises(ValueError, match=r"pckd\.group: got 'mine', expected"):
        PCKDConfig(group="mine")


def test_the_labels_of_the_images_select_samples() -> None:
    distiller = build(ObjectiveConfig(terms="0*ce + msdcrd", msdcrd=MSDCRDConfig(selection="image_class")))
    images, labels = batch()
    first, second = (distiller(images, y)[1]["msdcrd/feature"] for y in (labels, labels.roll(1)))
    assert first != second


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.half(), lambda x: x.double()])
def test_all_terms_together_train_in_every_precision(
    tmp_path: Path, precision: str, convert: Callable[[nn.Module], nn.Module]
) -> None:
    config = tiny_config(
        tmp_path,
        run_dir=None,
        epochs=1,
        precision=precision,
        objective=ObjectiveConfig(
            terms="kd + dcd + ckd + 0.1*pckd + msdcrd + mine + fitnet + at + nst + vid + ab + ofd + reviewkd + srrl"
        ),
    )
    student, teacher = networks()
    head = nn.Linear(8, 4)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, student, teacher, labels):
            return {"mine": self.head(student.features.float()).square().mean()}

    before = head.weight.clone()
    result = train(config, **convolutional(student=student, teacher=convert(teacher)), terms={"mine": Mine()})
    record = result.history[0]
    assert record.keys() >= {"ce", "kd", "dcd/contrast", "mine"}.union(*NAMES.values())
    assert all(math.isfinite(value) for value in record.values())
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("terms", TERMS)
def test_every_parameter_of_a_term_is_trained_and_none_of_the_teacher(terms: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run_dir=None, epochs=1, objective=ObjectiveConfig(terms=f"0*ce + {terms}"))
    distiller = build(config.objective)
    loss, _ = distiller(*batch())
    loss.backward()
    for name, parameter in distiller.objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert distiller.student.model.features[0].weight.grad.abs().sum() > 0


def test_terms_are_told_every_epoch_and_the_preview_follows(tmp_path: Path) -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def forward(self, student, teacher, labels):
            return {"told": student.logits.mean()}

    told = Told()
    config = tiny_config(tmp_path, run_dir=None, epochs=3, objective=ObjectiveConfig(terms="told + pckd"))
    result = train(config, terms={"told": told})
    assert told.epochs == [0, 1, 2]
    assert result.distiller.objective.terms["pckd"].epoch == 2
    distiller = build(ObjectiveConfig(terms="0*ce + pckd", pckd=PCKDConfig(preview_base=10.0)))
    losses = []
    for epoch in (0, 3):  # at 10^3 times the mean no sample is too difficult
        distiller.begin_epoch(epoch)
        distiller.eval()
        losses.append(distiller(*batch())[1]["pckd/kd"])
    assert losses[0] < losses[1]


def test_a_teacher_that_classifies_no_single_position_is_an_error(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 3, 3, padding=1)
            self.fc = nn.Linear(48, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.body(images).flatten(1))

    config = tiny_config(tmp_path, run_dir=None, epochs=1, objective=ObjectiveConfig(terms="msdcrd"))
    with pytest.raises(ValueError, match=r"msdcrd: the teacher's layers after 'body' do not classify single positions"):
        train(config, **convolutional(teacher=Flat()))
    assert train(config, **convolutional(student=Flat())).history  # a student need not


def test_a_config_with_windows_survives_json(tmp_path: Path) -> None:
    objective = ObjectiveConfig(terms="msdcrd", msdcrd=MSDCRDConfig(windows=(None, 2, 1), strides=(1, 1, 1)))
    config = tiny_config(tmp_path, objective=objective)
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("terms", ["ckd", "pckd", "msdcrd+kd"])
def test_the_command_line_trains_by_name(terms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = str(tmp_path / "teacher")
    common = ["--epochs", "1", "--optim.warmup-epochs", "0", "--device", "cpu", "--no-tensorboard", "--no-progress"]
    assert main(["train", "digits-teacher", "--run-dir", teacher, *common]) == 0
    run = ["train", "digits", "--teacher.weights", teacher, "--run-dir", str(tmp_path / "run"), *common]
    assert main([*run, "--objective.terms", terms, "--objective.pckd.category-weight", "0.5"]) == 0
    assert f"loss 1 x ce + 1 x {terms.split('+')[0]}" in capsys.readouterr().out
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["student"]["feature_map"] == ("features" if "msdcrd" in terms else None)
