"""The trainer: objective, frozen teacher, optimiser, schedule, data, precision, errors, what a run leaves behind."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fastkd
from fastkd.trainer import (
    TERMS,
    DataConfig,
    DCDConfig,
    KDConfig,
    ModelConfig,
    ModelOutput,
    NonFiniteLossError,
    Objective,
    ObjectiveConfig,
    OptimConfig,
    TensorImages,
    TrainConfig,
    labelled_subset,
    load_digits,
    load_weights,
    train,
    weights_hash,
)
from fastkd.trainer.checkpoint import list_checkpoints, read_checkpoint
from fastkd.trainer.data import EpochSampler, train_loader
from fastkd.trainer.distiller import Distiller, build_distiller
from fastkd.trainer.log import Meter
from fastkd.trainer.models import FeatureModel
from fastkd.trainer.objective import parse_terms
from fastkd.trainer.optim import Schedule, build_optimizer
from tests.trainer_runs import DropoutNet, lines, noisy_data, tiny_config


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distiller(terms: str = "dcd+kd") -> Distiller:
    torch.manual_seed(0)
    objective = Objective(ObjectiveConfig(terms=terms), 12, 24)
    return Distiller(FeatureModel(DropoutNet()), FeatureModel(DropoutNet(width=24)), objective)


def batch(samples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 4, 4, generator=generator), torch.arange(samples) % 4


# The objective


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
    objective = Objective(config, 6, 9)
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
    with pytest.raises(ValueError, match=r"objective\.terms: got 'hint'.*expected terms among \['ce', 'dcd', 'kd'\]"):
        Objective(config.objective, 12, 24)
    with pytest.raises(ValueError, match=r"terms: got \['other'\], which objective\.terms='dcd' does not name"):
        Objective(ObjectiveConfig(terms="dcd"), 12, 24, {"other": margin})
    monkeypatch.setitem(TERMS, "hint", lambda config, student_dim, teacher_dim: Hint())
    assert "hint" in Objective(ObjectiveConfig(terms="hint"), 12, 24).terms


# The teacher


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


# The optimiser


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_loss_parameters_are_optimised_and_tau_has_no_weight_decay(name):
    model = distiller()
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1), torch.device("cpu"))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    loss = model.objective.terms["dcd"].loss
    for parameter in (loss.tau, loss.student_head.weight, loss.student_head.bias, loss.teacher_head.weight):
        assert id(parameter) in groups
    assert groups[id(loss.tau)]["weight_decay"] == 0.0
    assert groups[id(loss.student_head.weight)]["weight_decay"] == 0.1
    for key, parameter in model.student.named_parameters():
        assert groups[id(parameter)]["weight_decay"] == (0.0 if "bias" in key or "body.2" in key else 0.1), key
    assert not any(id(parameter) in groups for parameter in model.teacher.parameters())

    before = {key: parameter.clone() for key, parameter in model.objective.named_parameters()}
    assert before["terms.dcd.loss.tau"] == 1.0
    model(*batch())[0].backward()
    optimizer.step()
    for key, parameter in model.objective.named_parameters():
        assert not torch.equal(before[key], parameter), key


def test_sgd_equals_the_plain_one_and_takes_a_late_first_gradient():
    a, b, c, d = (nn.Linear(5, 5) for _ in range(4))
    c.load_state_dict(a.state_dict())
    d.load_state_dict(b.state_dict())
    fused = build_optimizer(nn.ModuleList([a, b]), OptimConfig(lr=0.1, nesterov=True), torch.device("cpu"))
    decay = [{"params": [m.weight for m in (c, d)], "weight_decay": 5e-4}, {"params": [m.bias for m in (c, d)]}]
    plain = torch.optim.SGD(decay, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(4):
        x = torch.randn(3, 5)
        for optimizer, first, second in ((fused, a, b), (plain, c, d)):
            (first(x) if step < 2 else second(first(x))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in ((a, c), (b, d)):
        torch.testing.assert_close(left.weight, right.weight)
        torch.testing.assert_close(left.bias, right.bias)


def test_tau_without_gradient_does_not_decay():
    model = distiller()
    optimizer = build_optimizer(model, OptimConfig(name="adamw", weight_decay=0.5), torch.device("cpu"))
    tau = model.objective.terms["dcd"].loss.tau
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert tau.item() == 1.0
    assert model.objective.terms["dcd"].loss.student_head.weight.grad is not None


def test_tau_and_scale_are_logged_and_move(tmp_path):
    config = tiny_config(tmp_path)
    history = train(config).history
    steps = [line for line in lines(config.run_dir) if line["kind"] == "step"]
    assert steps[0]["dcd/tau"] != 1.0
    assert len({line["dcd/tau"] for line in steps}) > 20
    for line in steps:
        assert line["dcd/scale"] == pytest.approx(math.exp(line["dcd/tau"]))
        named = line["ce"] + line["kd"] + line["dcd/contrast"] + line["dcd/consistency"]
        assert line["loss"] == pytest.approx(named, rel=1e-5)
        assert line["grad_norm"] > 0
    assert history[-1]["dcd/tau"] == steps[-1]["dcd/tau"]
    assert history[0]["ce"] == pytest.approx(sum(line["ce"] for line in steps[:13]) / 13)


def test_fixed_temperature_stays(tmp_path):
    config = tiny_config(
        tmp_path, objective=ObjectiveConfig(terms="dcd", dcd=DCDConfig(learnable=False)), epochs=1, run_dir=None
    )
    assert train(config).history[-1]["dcd/scale"] == pytest.approx(1 / 0.07)


def test_schedules():
    def rates(epochs=10, batch=32, **options):
        config = OptimConfig(lr=1.0, **options)
        schedule = Schedule(config, steps_per_epoch=10, epochs=epochs, global_batch=batch)
        return [schedule(step) for step in range(10 * epochs)], schedule.rule

    cosine, rule = rates(warmup_epochs=1, min_lr=0.1)
    assert cosine[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert cosine[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert 0.1 < cosine[-1] < 0.11
    assert rule == "lr 1, cosine, warm-up 10 steps"
    step, _ = rates(schedule="step", milestones=(3, 6.5), gamma=0.5)
    assert [step[k] for k in (29, 30, 64, 65, 99)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    constant, rule = rates(schedule="constant", reference_batch=64)
    assert set(constant) == {0.5}
    assert rule == "lr 0.5 = 1 x 32 / 64, constant"
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs: got 10, expected less than epochs=10"):
        rates(warmup_epochs=10)
    with pytest.raises(ValueError, match=r"optim\.min_lr: got 0\.9"):
        rates(min_lr=0.9, reference_batch=64)


def test_clipping_bounds_the_gradient(tmp_path):
    config = tiny_config(
        tmp_path,
        optim=OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_norm=1e-3),
        data=DataConfig(name="tests.trainer_runs:noisy_data", batch_size=52),
        epochs=1,
    )
    result = train(config)
    first, last = (load_weights(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints"))
    moved = [(last[name] - first[name]) for name, _ in result.distiller.student.model.named_parameters()]
    assert 0 < torch.cat([m.flatten() for m in moved]).norm() <= 1.001e-3


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_close_to_fp32(tmp_path, precision):
    config = tiny_config(
        tmp_path,
        run_dir=None,
        student=ModelConfig(name="fastkd.trainer.nets:MLP", num_classes=4, options={"in_features": 16, "hidden": [16]}),
        epochs=4,
    )
    seen = []

    def spy(student, teacher, labels):
        seen.append((student.logits.dtype, teacher.features.dtype, labels.dtype))
        return {"spy": student.logits.float().mean() * 0}

    full = train(config)
    low = train(
        dataclasses.replace(config, precision=precision, objective=ObjectiveConfig(terms="dcd+kd+spy")),
        terms={"spy": spy},
    )
    assert set(seen) == {({"bf16": torch.bfloat16, "fp16": torch.float16}[precision],) * 2 + (torch.int64,)}
    assert all(parameter.dtype == torch.float32 for parameter in low.distiller.parameters())
    assert low.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.03)
    assert low.history[-1]["dcd/tau"] == pytest.approx(full.history[-1]["dcd/tau"], abs=0.02)
    assert low.history[-1]["loss"] < low.history[0]["loss"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fp16_skips_the_first_steps_until_the_scaled_gradient_fits(tmp_path, name):
    """The scale begins at 65536: a gradient of 100 overflows fp16; the scale halves until it does not."""
    config = tiny_config(tmp_path, precision="fp16", objective=ObjectiveConfig(terms="big"), epochs=1)
    config = dataclasses.replace(config, optim=OptimConfig(name=name, lr=1e-6), teacher=None)

    def big(student, teacher, labels):
        return {"big": 100 * student.logits.float().sum()}

    big.needs_teacher = False
    result = train(config, terms={"big": big})
    assert read_checkpoint(result.path).state["scaler"]["scale"] in [65536 / 2**k for k in range(5, 12)]
    first, last = (load_weights(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints"))
    assert torch.isfinite(last["fc.weight"]).all()
    assert not torch.equal(first["fc.weight"], last["fc.weight"])


# Data


def test_digits_are_split_once_and_for_all():
    (train_a, test_a), (train_b, _), (train_c, _) = load_digits(), load_digits(), load_digits(seed=1)
    assert (len(train_a), len(test_a)) == (1400, 397)
    assert train_a.images.shape == (1400, 1, 8, 8)
    assert (train_a.images.min(), train_a.images.max()) == (-1, 1)
    assert torch.equal(train_a.images, train_b.images)
    assert not torch.equal(train_a.images, train_c.images)
    assert train_a.labels.bincount().min() >= 130
    both = torch.cat([train_a.images, test_a.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image is in both parts


@pytest.mark.parametrize("count", [10, 57, 100, 1400])
def test_the_labelled_subset_is_balanced_seeded_and_drawn_without_replacement(count):
    data, _ = load_digits()
    subset = labelled_subset(data, count, seed=0)
    assert len(subset) == count
    counts = subset.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= (1 if count < 1400 else 10)
    assert len(subset.images.flatten(1).unique(dim=0)) == count
    assert torch.equal(labelled_subset(data, count, seed=0).images, subset.images)
    if count < 1400:
        assert not torch.equal(labelled_subset(data, count, seed=1).images, subset.images)
    plain = labelled_subset(TensorDataset(data.images, data.labels), count, seed=0)
    assert torch.equal(torch.stack([image for image, _ in plain]), subset.images)


def test_a_subset_of_a_subset_and_its_errors():
    data = TensorDataset(torch.arange(40.0), torch.arange(40) % 4)
    once = labelled_subset(data, 20, seed=0)
    twice = labelled_subset(once, 8, seed=0)
    assert sorted(int(label) for _, label in twice) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match=r"data\.labelled: got 41, expected at most the 40"):
        labelled_subset(data, 41, seed=0)
    with pytest.raises(TypeError, match="list has neither 'labels' nor 'targets'"):
        labelled_subset([(1, 2)], 1, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_alone_and_is_restored_in_the_middle(workers):
    data = TensorImages(torch.arange(40.0).reshape(40, 1, 1, 1), torch.arange(40))
    config = DataConfig(batch_size=8, num_workers=workers)

    def epochs(*numbers, seed=0):
        loader, set_epoch = train_loader(data, config, seed=seed, device=torch.device("cpu"))
        order = []
        for number in numbers:
            set_epoch(number)
            order.append([labels.tolist() for _, labels in loader])
        return order

    both = epochs(0, 1)
    assert sorted(index for labels in both[0] for index in labels) == list(range(40))
    assert both[0] != both[1]
    assert epochs(1) == [both[1]]
    assert epochs(0, seed=1) != [both[0]]
    loader, set_epoch = train_loader(data, config, seed=0, device=torch.device("cpu"))
    set_epoch(1)
    iterator = iter(loader)
    head = [next(iterator)[1].tolist() for _ in range(2)]
    state = loader.state_dict()
    resumed, set_epoch = train_loader(data, config, seed=0, device=torch.device("cpu"))
    set_epoch(1)
    resumed.load_state_dict(state)
    assert head + [labels.tolist() for _, labels in resumed] == both[1]
    set_epoch(2)
    assert [labels.tolist() for _, labels in resumed] == epochs(2)[0]


def test_the_loader_leaves_the_global_generator_alone():
    loader, _ = train_loader(
        TensorImages(torch.zeros(8, 1), torch.zeros(8)), DataConfig(batch_size=4), seed=0, device=torch.device("cpu")
    )
    before = torch.get_rng_state()
    assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_whole_batch_is_one_indexing_operation(monkeypatch):
    calls = []
    fetch = TensorImages.__getitems__
    monkeypatch.setattr(TensorImages, "__getitems__", lambda self, i: calls.append(len(i)) or fetch(self, i))
    monkeypatch.setattr(TensorImages, "__getitem__", None)
    data = TensorImages(torch.randn(20, 1, 2, 2), torch.arange(20))
    loader, _ = train_loader(data, DataConfig(batch_size=8, drop_last=False), seed=0, device=torch.device("cpu"))
    for images, labels in loader:
        assert torch.equal(images, data.images[labels])
    assert calls == [8, 8, 4]


def test_any_map_style_dataset_trains(tmp_path):
    images, labels = noisy_data()[1].images, noisy_data()[1].labels
    pairs = list(zip(images, labels.tolist(), strict=True))
    config = tiny_config(tmp_path, run_dir=None, epochs=1)
    assert train(config, train_data=pairs, eval_data=TensorDataset(images, labels)).history[0]["step"] == 5
    with pytest.raises(ValueError, match="train_data, eval_data: got one of them"):
        train(config, train_data=pairs)
    with pytest.raises(ValueError, match="eval_data: got an empty dataset"):
        train(config, train_data=pairs, eval_data=[])


def test_sampler_covers_everything_once():
    sampler = EpochSampler(101, seed=5)
    assert sorted(sampler) == list(range(101))
    assert list(sampler) == list(sampler)


# What goes wrong


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("step", [1, 9])
def test_a_loss_that_is_not_finite_names_step_and_terms_and_keeps_the_last_good_checkpoint(tmp_path, bad, step):
    count = 0

    def burst(student, teacher, labels):
        nonlocal count
        count += 1
        return {"burst": student.logits.sum() * (float(bad) if count == step else 0.0)}

    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="kd+burst"), save_every_steps=4)
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, terms={"burst": burst})
    good = 0 if step == 1 else 8
    assert re.search(
        rf"at step {step}: loss = .*(nan|inf).*, ce = \d.*, kd = \d.*, burst = .*(nan|inf)", str(caught.value)
    )
    assert str(caught.value).endswith(f"the last good checkpoint is {config.run_dir}/checkpoints/step-{good:08d}")
    weights = load_weights(config.run_dir)
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights.values())
    count = 1000
    assert train(dataclasses.replace(config, resume=True), terms={"burst": burst}).resumed_from == good


def test_a_finite_loss_with_a_gradient_that_is_not_never_reaches_a_checkpoint(tmp_path):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum() * 0

        @staticmethod
        def backward(ctx, grad):
            return torch.full((4, 4), torch.nan)

    config = tiny_config(tmp_path, objective=ObjectiveConfig(terms="poison"), save_every_steps=1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=None))
    with pytest.raises(NonFiniteLossError, match=r"weights are not finite after step 1: .*step-00000000"):
        train(config, terms={"poison": lambda student, teacher, labels: {"poison": Poison.apply(student.logits)}})


def test_the_meter_finds_the_step_without_looking_at_every_step():
    meter = Meter()
    loss = torch.tensor([1.0, 2.0, float("nan"), 3.0])
    meter.names = ["loss", "ce"]
    # What ``add`` leaves behind on a device that is not the CPU.
    meter._pending = [(step, torch.stack([value, torch.tensor(float(step))])) for step, value in enumerate(loss, 1)]
    with pytest.raises(NonFiniteLossError, match=r"at step 3: loss = nan, ce = 3\.0"):
        meter.flush()
    assert meter.sums == {"loss": 3.0, "ce": 3.0}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(epochs=0), "epochs: got 0, expected an int >= 1"),
        (lambda: TrainConfig(seed=-1), "seed: got -1"),
        (lambda: TrainConfig(precision="fp8"), r"precision: got 'fp8', expected one of \['bf16', 'fp16', 'fp32'\]"),
        (lambda: TrainConfig(keep=0), "keep: got 0"),
        (lambda: TrainConfig(log_every=0), "log_every: got 0"),
        (lambda: TrainConfig(resume=True), "run_dir: got None with resume=True"),
        (lambda: OptimConfig(name="adam"), r"optim\.name: got 'adam', expected one of"),
        (lambda: OptimConfig(lr=0.0), r"optim\.lr: got 0\.0, expected a finite number in \(0\.0, inf\)"),
        (lambda: OptimConfig(lr=float("nan")), r"optim\.lr: got nan"),
        (lambda: OptimConfig(momentum=1.5), r"optim\.momentum: got 1\.5"),
        (lambda: OptimConfig(schedule="linear"), r"optim\.schedule: got 'linear'"),
        (lambda: OptimConfig(schedule="step"), r"optim\.milestones: got \(\) with schedule='step'"),
        (lambda: OptimConfig(milestones=(3,)), r"optim\.milestones: got \(3,\) with schedule='cosine'"),
        (lambda: OptimConfig(clip_norm=0), r"optim\.clip_norm: got 0"),
        (lambda: DataConfig(batch_size=0), r"data\.batch_size: got 0"),
        (lambda: DataConfig(labelled=0), r"data\.labelled: got 0"),
        (lambda: DCDConfig(consistency="both"), r"dcd\.consistency: got 'both'"),
        (lambda: DCDConfig(max_scale=-1), r"dcd\.max_scale: got -1"),
        (lambda: KDConfig(temperature=0), r"kd\.temperature: got 0"),
        (lambda: ModelConfig(name=""), r"model\.name: got ''"),
    ],
)
def test_wrong_settings_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(epochs=1.5), "epochs: got 1.5 of type float, expected an int"),
        (lambda: TrainConfig(epochs=True), "epochs: got True of type bool"),
        (lambda: OptimConfig(lr="0.1"), "optim.lr: got '0.1' of type str, expected a number"),
        (lambda: ObjectiveConfig(terms=["dcd"]), "objective.terms: got .* of type list, expected str"),
        (lambda: ModelConfig(name=3), "model.name: got 3 of type int"),
    ],
)
def test_wrong_types_name_the_argument(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_settings_that_do_not_fit_each_other(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    with pytest.raises(ValueError, match=r"data\.batch_size: got 4, expected at most the 3 training samples"):
        train(config, train_data=TensorImages(torch.randn(3, 1, 4, 4), torch.arange(3)), eval_data=noisy_data()[1])
    with pytest.raises(ValueError, match="device: got 'tpu9'"):
        train(dataclasses.replace(config, device="tpu9"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: got 'cuda', but torch sees no CUDA device"):
            train(dataclasses.replace(config, device="cuda"))
    with pytest.raises(ValueError, match=r"data\.name: got 'mnist', expected one of \['digits'\]"):
        train(dataclasses.replace(config, data=DataConfig(name="mnist")))
    with pytest.raises(ValueError, match="student: has no trainable parameter"):
        train(
            dataclasses.replace(config, objective=ObjectiveConfig(terms="ce"), teacher=None),
            student=DropoutNet().requires_grad_(False),
        )


def test_a_config_survives_json(tmp_path):
    config = tiny_config(
        tmp_path, optim=OptimConfig(schedule="step", milestones=(1, 2.5), clip_norm=2), data=DataConfig(labelled=20)
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"config\.optim: got unknown fields \['rate'\]"):
        TrainConfig.from_dict({"optim": {"rate": 1}})
    with pytest.raises(TypeError, match="expected numbers, strings, lists and dicts"):
        dataclasses.replace(config, student=ModelConfig(name="a:b", options={"layer": nn.ReLU})).to_dict()


# What a run leaves behind


def test_a_run_prints_and_writes_what_it_was(tmp_path, capsys):
    config = tiny_config(
        tmp_path,
        quiet=False,
        objective=ObjectiveConfig(terms="0.5*kd+2*dcd"),
        optim=OptimConfig(lr=0.1, reference_batch=8, warmup_epochs=1),
        tensorboard=True,
    )
    result = train(config)
    out = capsys.readouterr().out
    teacher = DropoutNet(width=24)
    teacher.load_state_dict(load_weights(config.teacher.weights))
    sha = weights_hash(teacher)
    for expected in (
        "global batch 4, 52 training samples, 26 steps",
        "lr 0.05 = 0.1 x 4 / 8, cosine, warm-up 13 steps; fp32 on cpu; seed 0",
        "loss 1 x ce + 0.5 x kd + 2 x dcd",
        f"sha256 {sha}",
        f"torch {torch.__version__.split('+')[0]}",
        f"fastkd {fastkd.__version__}",
        "epoch 2/2",
    ):
        assert expected in out, expected
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["global_batch"] == 4
    assert info["learning_rate"] == "lr 0.05 = 0.1 x 4 / 8, cosine, warm-up 13 steps"
    assert info["loss_weights"] == {"ce": 1.0, "kd": 0.5, "dcd": 2.0}
    assert info["teacher_sha256"] == sha
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert info["config"] == config.to_dict()
    assert info["student"]["parameters"] == result.parameters == sum(p.numel() for p in DropoutNet().parameters())
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    epochs = [line for line in lines(config.run_dir) if line["kind"] == "epoch"]
    assert [{k: v for k, v in line.items() if k != "kind"} for line in epochs] == result.history
    assert result.accuracy == epochs[-1]["accuracy"]


def test_the_teacher_hash_tells_any_change_of_a_weight():
    model = DropoutNet()
    first = weights_hash(model)
    assert weights_hash(model) == first
    with torch.no_grad():
        model.fc.bias[0].add_(1e-6)
    assert weights_hash(model) != first
    assert len(weights_hash(model.bfloat16())) == 64


def test_log_every_and_eval_every_thin_the_record(tmp_path):
    config = tiny_config(tmp_path, log_every=5, eval_every=2, epochs=3)
    result = train(config)
    assert [line["step"] for line in lines(config.run_dir) if line["kind"] == "step"] == list(range(5, 40, 5))
    assert ["accuracy" in record for record in result.history] == [False, True, True]


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, run_dir=None, epochs=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    result = train(config)
    assert result.path is None
    assert not list(empty.iterdir())
    assert capsys.readouterr().out == ""
    assert not result.distiller.training


def test_one_seed_gives_one_result_and_the_same_student_under_every_objective(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    first, again, other = train(config), train(config), train(dataclasses.replace(config, seed=1))
    assert first.history == again.history
    assert first.history != other.history
    sample = noisy_data()[1].images[:2]
    for terms in ("kd", "dcd"):
        torch.manual_seed(0)
        built = build_distiller(dataclasses.replace(config, objective=ObjectiveConfig(terms=terms)), sample)
        if terms == "kd":
            reference = weights_hash(built.student.model)
    assert weights_hash(built.student.model) == reference


def test_the_digits_are_learnt():
    config = TrainConfig(
        student=ModelConfig(name="fastkd.trainer.nets:SmallConvNet", options={"width": 8}),
        data=DataConfig(batch_size=100),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.2, warmup_epochs=1),
        epochs=8,
        quiet=True,
    )
    assert train(config).accuracy > 0.9
