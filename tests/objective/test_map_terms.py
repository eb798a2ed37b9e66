"""The map methods as terms: the maps that each gets, and what the trainer does with them."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd.trainer import (
    CheckpointError,
    DataConfig,
    Distiller,
    FeatureModel,
    FitNetConfig,
    FTConfig,
    ModelConfig,
    NSTConfig,
    ObjectiveConfig,
    ReviewKDConfig,
    SRRLConfig,
    TrainConfig,
    evaluate_checkpoint,
    load_digits,
    train,
)
from fastkd.trainer.commands.export import export
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.models.extended import ExtendedModel
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.objective.terms.maps import TERMS
from fastkd.trainer.run.distiller import build_distiller, load_paraphraser
from fastkd.trainer.run.saved.checkpoint import LOSS, find_checkpoint, read_checkpoint
from tests.helpers.trainer_runs import noisy_data, one_thread, same, tiny_config  # noqa: F401
from tests.run.test_resume import interrupted

EVERY = ("fitnet", "at", "nst", "fsp", "vid", "ab", "ofd", "reviewkd", "paraphraser", "ft", "srrl", "simkd", "norm")


def objective(terms: str, **options: Any) -> ObjectiveConfig:
    return ObjectiveConfig(terms=terms, **{"reviewkd": ReviewKDConfig(warmup_epochs=0), **options})


def build(
    config: ObjectiveConfig, images: Tensor, *, student: nn.Module | None = None, teacher: nn.Module | None = None
) -> Distiller:
    """A student of 3 and 6 channels, and a teacher of 5 and 10; for FSP, of the student's."""
    torch.manual_seed(1)
    teacher = teacher or SmallConvNet(width=3 if "fsp" in config.terms else 5)
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    return build_distiller(
        TrainConfig(objective=config), images, student=student or SmallConvNet(width=3), teacher=teacher
    )


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train_set, _ = load_digits()
    return train_set.images[:64], train_set.labels[:64]


def test_every_method_has_a_test() -> None:
    assert set(EVERY) == TERMS.keys()


# name -> what the loss is called with, of student s and teacher t
INPUTS: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "fitnet": lambda s, t: (s.taps.maps[1], t.taps.maps[1]),
    "at": lambda s, t: (list(s.taps.maps), list(t.taps.maps)),
    "nst": lambda s, t: ([s.taps.maps[-1]], [t.taps.maps[-1]]),
    "fsp": lambda s, t: ([s.taps.stem, *s.taps.maps], [t.taps.stem, *t.taps.maps]),
    "vid": lambda s, t: (list(s.taps.maps), list(t.taps.maps)),
    "ab": lambda s, t: (list(s.taps.preactivations), list(t.taps.preactivations)),
    "ofd": lambda s, t: (list(s.taps.preactivations), list(t.taps.preactivations)),
    "reviewkd": lambda s, t: (
        [*s.taps.maps, s.features[:, :, None, None]],
        [*t.taps.preactivations, t.features[:, :, None, None]],
    ),
    "paraphraser": lambda s, t: (t.taps.maps[-1],),
    "ft": lambda s, t: (s.taps.maps[-1], t.taps.maps[-1]),
    "srrl": lambda s, t: (s.features, t.features, t.logits, t.classifier),
}


@pytest.mark.parametrize("name", EVERY)
def test_each_trains_on_the_digits_and_gets_the_maps_of_its_method(name: str, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    distiller = build(objective(f"0*ce + {name}", nst=NSTConfig(maps="last")), images)
    head = next(layer for layer in distiller.student.modules() if isinstance(layer, nn.Linear) and layer.out_features)
    before = head.weight.clone()
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    distiller.begin_epoch(0)
    values = []
    for _ in range(6):
        loss, named = distiller(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0], values
    if name != "norm":  # whose layer back goes to the student's own classifier
        assert torch.equal(head.weight, before)
        assert head.weight.grad is None
    reached = [p.grad is not None and bool(p.grad.any()) for p in distiller.student.parameters()]
    assert any(reached) == (name != "paraphraser")
    distiller.eval()
    if name in INPUTS:
        student, teacher = distiller.student(images), distiller.teacher(images)
        expected = distiller.objective.terms[name].loss(*INPUTS[name](student, teacher))
        _, named = distiller(images, labels)
        torch.testing.assert_close(torch.stack(list(named.values())), torch.stack(list(expected.values())))


@pytest.mark.parametrize("terms", ["fitnet+at+nst+vid+ab+ofd+reviewkd+paraphraser+ft+srrl", "fsp+simkd", "norm"])
def test_ranks_average_to_one_process(terms: str) -> None:
    """Each takes the mean over its own rows. With batch norms in training mode they would see other statistics."""
    torch.manual_seed(0)
    images, labels = torch.randn(7, 1, 8, 8).double(), torch.arange(7) % 10
    distiller = build(objective(f"0*ce + {terms}"), images.float()).double().eval()
    distiller.objective.eval()
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]

    def gradients(rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=torch.float64)
        for part in rows:
            total = total + distiller(images[part], labels[part], len(rows) * len(part) / 7)[0] / len(rows)
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return total, [x for x in found if x is not None]

    whole, parts = gradients([torch.arange(7)]), gradients(list(torch.arange(7).split([3, 1, 3])))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=0)
    assert len(whole[1]) > 5
    for x, y in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def config_of(folder: Path, terms: str, **changes: Any) -> tuple[TrainConfig, Callable[[], dict[str, Any]]]:
    """A run of two small networks on noisy data, and what ``train`` is given for it."""
    options = changes.pop("options", {})

    def given() -> dict[str, Any]:
        torch.manual_seed(0)
        networks = SmallConvNet(num_classes=4, width=3), SmallConvNet(num_classes=4, width=3 if "fsp" in terms else 5)
        train_data, eval_data = noisy_data()
        return {"student": networks[0], "teacher": networks[1], "train_data": train_data, "eval_data": eval_data}

    data = DataConfig(name="tests.helpers.trainer_runs:noisy_data", batch_size=8)
    return tiny_config(folder, epochs=1, data=data, objective=objective(terms, **options), **changes), given


def paraphraser(folder: Path) -> str:
    """A run of the first stage of FT."""
    config, given = config_of(folder, "0*ce + paraphraser", run_dir=str(folder / "paraphraser"))
    train(config, **given())
    return str(folder / "paraphraser")


@pytest.mark.parametrize("terms", ["fitnet+at+nst+vid+ab+ofd+reviewkd+srrl+paraphraser+ft", "0*ce + simkd", "kd+norm"])
def test_a_resumed_run_is_the_uninterrupted_one(terms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"ft": FTConfig(paraphraser=paraphraser(tmp_path))} if "ft" in terms.split("+") else {}
    config, given = config_of(tmp_path, terms, save_every_steps=2, ema=0.5, options=options)
    train(config, **given())
    cut = interrupted(monkeypatch, dataclasses.replace(config, run_dir=str(tmp_path / "cut")), 6, **given())
    if options:  # the paraphraser is in the checkpoint
        gone = dataclasses.replace(cut.objective, ft=FTConfig(paraphraser=None))
        cut = dataclasses.replace(cut, objective=gone)
    assert train(cut, **given()).resumed_from == 4
    whole, resumed = (read_checkpoint(find_checkpoint(run.run_dir)) for run in (config, cut))
    assert same(whole.weights, resumed.weights)
    assert same(whole.state["optimizer"], resumed.state["optimizer"])


def test_the_second_stage_of_ft_takes_the_paraphraser_of_the_first(tmp_path: Path) -> None:
    run = paraphraser(tmp_path)
    config, given = config_of(tmp_path, "200*ft", options={"ft": FTConfig(paraphraser=run)})
    term = train(config, **given()).distiller.objective.terms["ft"]
    state = term.loss.paraphraser.state_dict()
    saved = read_checkpoint(find_checkpoint(run)).weights[LOSS]
    assert all(torch.equal(saved[f"terms.paraphraser.loss.{name}"], value) for name, value in state.items())
    # A file of the module's own, and what is wrong.
    torch.save(state, tmp_path / "own.pt")
    networks = {name: given()[name] for name in ("student", "teacher")}
    distiller = build_distiller(config, noisy_data()[0].images[:2], **networks)
    assert load_paraphraser(distiller, str(tmp_path / "own.pt")) == [f"paraphraser: {tmp_path / 'own.pt'}"]
    assert same(dict(distiller.objective.terms["ft"].loss.paraphraser.state_dict()), dict(state))
    with pytest.raises(ValueError, match=r"ft\.paraphraser: got None, expected the run that trained it"):
        load_paraphraser(distiller, None)
    torch.save(losses.Paraphraser(4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: does not fit Paraphraser: .*encoder"):
        load_paraphraser(distiller, str(tmp_path / "other.pt"))


@pytest.mark.parametrize("terms", ["0*ce + simkd", "kd + norm"])
def test_the_layers_of_the_method_stay_with_the_student(terms: str, tmp_path: Path) -> None:
    config, given = config_of(tmp_path, terms, ema=0.5)
    arguments = given()
    config = dataclasses.replace(
        config,
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", num_classes=4, options={"width": 3}),
    )
    result = train(config, **{**arguments, "student": None})
    student, teacher = result.distiller.student.model, arguments["teacher"]
    assert isinstance(student, ExtendedModel)
    images = arguments["eval_data"].images
    output = result.deployed.eval()(images)
    if "simkd" in terms:
        loss = losses.SimKDLoss(6, 10)
        loss.projector.load_state_dict(result.deployed.model.layers.state_dict())
        inner = result.deployed.model.model
        expected = loss.eval().logits(inner.features(images), teacher.classifier)
        torch.testing.assert_close(output.logits, expected)
        assert torch.equal(student.classifier.weight, teacher.classifier.weight)
        assert not student.classifier.weight.requires_grad
    else:
        inner = result.deployed.model
        x = inner.model.features(images)
        x = x + inner.back(inner.layers(x))
        torch.testing.assert_close(output.logits, inner.model.classifier(x.mean((2, 3))))
    # Evaluation, export and a later run have them, too.
    data = {"eval_data": arguments["eval_data"]}
    assert evaluate_checkpoint(config.run_dir, **data).accuracy == result.accuracy
    assert (
        evaluate_checkpoint(config.run_dir, model=SmallConvNet(num_classes=4, width=3), **data).accuracy
        == result.accuracy
    )
    reopened = reopen(config.run_dir, **data)
    file = tmp_path / "student.safetensors"
    export(reopened, file)
    as_teacher = dataclasses.replace(config.student, weights=str(file))
    later = dataclasses.replace(config, teacher=as_teacher, objective=objective("kd"), run_dir=None)
    found = train(later, **{**arguments, "student": SmallConvNet(num_classes=4), "teacher": None}).distiller.teacher
    torch.testing.assert_close(found(images).logits, output.logits)
    # It is compiled like any model, and is the user's own module without hooks.
    result.deployed.compile(backend="eager")
    torch.testing.assert_close(result.deployed(images).logits, output.logits)
    assert not any(layer._forward_hooks for layer in student.modules())


def test_a_larger_map_of_the_student_is_averaged_and_its_taps_stay_where_they_were() -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    student, taught = SmallConvNet(width=3), SmallConvNet(width=5, depth=3)
    student.tap_layers = {"stem": "features.0", "maps": ["features.2"], "preactivations": ["features.2"],
                          "norms": [None]}  # fmt: skip
    teacher = FeatureModel(taught, taps=("features.2",))
    distiller = build_distiller(
        TrainConfig(objective=objective("0*ce + simkd + at")), images, student=student, teacher=teacher
    ).eval()
    output = distiller.student(images)
    loss = losses.SimKDLoss(6, 20).eval()
    loss.projector.load_state_dict(distiller.student.model.layers.state_dict())
    features = student.features(images)
    assert (features.shape[2], taught.features(images).shape[2]) == (4, 2)
    torch.testing.assert_close(output.logits, loss.logits(features, taught.classifier, teacher_height=2))
    named = distiller(images, labels)[1]
    torch.testing.assert_close(named["simkd"], loss(features, taught.features(images))["simkd"].detach())
    assert [tap.layer for tap in distiller.student.tap_sources.maps] == ["model.features.2"]
    reused = SmallConvNet(width=3)
    reused.features[5] = reused.features[2]  # the map is that of its last call
    reusing = FeatureModel(reused, feature_map="features.2")
    assert build(objective("0*ce + simkd"), images, student=reusing)(images, labels)
    named_by_user = FeatureModel(SmallConvNet(width=3), taps=("features.1",))
    distiller = build(objective("0*ce + simkd + at"), images, student=named_by_user, teacher=teacher)
    assert [tap.layer for tap in distiller.student.tap_sources.maps] == ["model.features.1"]


def test_a_note_about_the_layers_that_is_damaged_names_the_file(tmp_path: Path) -> None:
    config, given = config_of(tmp_path, "0*ce + simkd", run_dir=None)
    state = train(config, **given()).distiller.student.model.state_dict()
    valid = json.loads(bytes(state["extension"].tolist()))
    notes = ({"kind": "simkd"}, {**valid, "kind": "other"}, {**valid, "layer": "nothing"}, {**valid, "side": 0})
    forged = [{"extension": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)} for note in notes]
    forged += [{"extension": torch.full((100_000,), ord("["), dtype=torch.uint8)}]
    # Sizes that other layers do not have.
    forged += [{"layers.0.weight": torch.zeros(50, 6, 1, 1), "layers.6.weight": torch.zeros(100, 50, 1, 1)}]
    for changes in forged:
        torch.save({**state, **changes}, tmp_path / "student.pt")
        changed = dataclasses.replace(
            config,
            student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", weights=str(tmp_path / "student.pt")),
        )
        with pytest.raises(CheckpointError, match=r"student\.pt: extension does not say how its model was extended \("):
            train(changed, **{**given(), "student": None})


class WithLayer(SmallConvNet):
    """A trained layer between the average and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(64, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.between(self.pool(self.features(images)).flatten(1)))


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        (objective("at"), SmallConvNet(depth=3), r"at: the student has 2 maps \(features\.2 3 x 8 x 8, features 6 x 4 "
         r"x 4\), the teacher 3 \(.*\), expected as many; name .* --student\.taps and --teacher\.taps"),
        (objective("0*ce + fsp"), SmallConvNet(width=5), r"fsp: channels: got \[3, 3, 6\] .*\[5, 5, 10\]; the stud"),
        (objective("fitnet", fitnet=FitNetConfig(hint=3)), None, r"fitnet: hint: got 3, expected at most 2"),
        (objective("0*ce + simkd"), WithLayer(), r"simkd: the teacher does more between its map 'features'"),
        (objective("simkd + norm"), None, r"objective\.terms: got 'simkd \+ norm', expected a student that is ext"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_an_error_that_says_why(
    config: ObjectiveConfig, teacher: nn.Module | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(config, torch.randn(2, 1, 8, 8), teacher=copy.deepcopy(teacher))


def test_margins_are_those_of_the_teachers_batch_norms() -> None:
    images = torch.randn(2, 1, 8, 8)
    distiller = build(objective("ofd"), images)
    norms = [layer for layer in distiller.teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    for level, norm in enumerate(norms):
        margin = distiller.objective.terms["ofd"].loss.get_buffer(f"margin_{level}")
        assert margin.std() > 0
        torch.testing.assert_close(margin, losses.activation_margin(norm.weight, norm.bias).float())
    bare = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bare.fc = nn.Linear(4, 10)
    with pytest.raises(ValueError, match="ofd: margins: found no batch norm with weights before the teacher's map of"):
        build(objective("ofd"), images, teacher=bare)


def test_reviewkd_warms_up() -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for first, expected in ((0, [0.0, 0.5, 1.0, 1.0]), (1, [0.5, 1.0, 1.0, 1.0])):
        config = objective("0*ce + 5*reviewkd", reviewkd=ReviewKDConfig(warmup_epochs=2, first_epoch=first))
        distiller = build(config, images).eval()
        values = []
        for epoch in range(4):
            distiller.objective.set_epoch(epoch)
            values.append(distiller(images, labels)[0].item())
        assert values == pytest.approx([factor * values[-1] for factor in expected])


def test_the_last_maps_are_another_reading_of_srrl() -> None:
    images = torch.randn(4, 1, 8, 8)
    distiller = build(objective("srrl", srrl=SRRLConfig(reading="maps")), images).eval()
    student, teacher = distiller.student(images), distiller.teacher(images)
    expected = distiller.objective.terms["srrl"].loss(
        student.feature_map, teacher.feature_map, teacher.logits, teacher.classifier
    )
    named = distiller(images, torch.arange(4))[1]
    torch.testing.assert_close(named["srrl/feature"], expected["feature"].detach())
