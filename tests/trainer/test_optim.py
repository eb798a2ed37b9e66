"""Parameter groups, schedule, clipping, and training in bf16 and fp16."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.trainer import DataConfig, DCDConfig, ModelConfig, ObjectiveConfig, OptimConfig, load_weights, train
from fastkd.trainer.optim import Schedule, build_optimizer
from fastkd.trainer.run.saved.checkpoint import LOSS, STUDENT, list_checkpoints, read_checkpoint
from tests.helpers.trainer_runs import DropoutNet, batch, distiller, lines, noisy_data, one_thread, tiny_config  # noqa: F401


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
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


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_with_decayed_all_everything_that_is_trained_decays(name):
    model = distiller()
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1, decayed="all"), torch.device("cpu"))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    tau = model.objective.terms["dcd"].loss.tau
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert 0 < tau.item() < 1
    with pytest.raises(ValueError, match=r"optim\.decayed: got 'some', expected"):
        OptimConfig(decayed="some")


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


def test_the_square_root_rule() -> None:
    config = OptimConfig(lr=0.1, reference_batch=256, lr_rule="sqrt")
    schedule = Schedule(config, steps_per_epoch=10, epochs=1, global_batch=4096)
    assert schedule.peak == pytest.approx(0.4)
    assert "0.1 x sqrt(4096 / 256)" in schedule.rule
    with pytest.raises(ValueError, match=r"optim\.lr_rule: got 'cubic'"):
        OptimConfig(lr_rule="cubic")


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_layerwise_rates_make_weights_but_not_biases_independent_of_the_gradients_size(name, weight_decay):
    moves = {}
    for size in (1.0, 1000.0):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        optimizer = build_optimizer(
            layer, OptimConfig(name=name, lr=0.1, weight_decay=weight_decay, momentum=0.0), torch.device("cpu")
        )
        before = layer.weight.detach().clone(), layer.bias.detach().clone()
        (size * layer(torch.randn(3, 6)).square().sum()).backward()
        optimizer.step()
        moves[size] = [(now - then).norm().item() for now, then in zip((layer.weight, layer.bias), before, strict=True)]
    assert moves[1000.0][0] == pytest.approx(moves[1.0][0], rel=0.01)
    expected = 1000 if name == "lars" else 1  # LAMB's step is Adam's, whose size never depends on the gradient's
    assert moves[1000.0][1] == pytest.approx(expected * moves[1.0][1], rel=0.01)


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
    stairs, rule = rates(warmup_epochs=1, min_lr=0.1, per_epoch=True)
    assert stairs[:10] == cosine[:10]
    assert stairs[10:] == [cosine[10 * (k // 10)] for k in range(10, 100)]
    assert rule == "lr 1, cosine per epoch, warm-up 10 steps"
    assert rates(warmup_epochs=1.5, per_epoch=True)[0][15:20] == [1.0] * 5  # the rest of the epoch of the warm-up
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
        data=DataConfig(name="tests.helpers.trainer_runs:noisy_data", batch_size=52),
        epochs=1,
    )
    result = train(config)
    first, last = (read_checkpoint(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints"))

    def changes(file: str, module: nn.Module) -> list[torch.Tensor]:
        return [last.weights[file][name] - first.weights[file][name] for name, _ in module.named_parameters()]

    moved = changes(STUDENT, result.distiller.student.model)
    heads = changes(LOSS, result.distiller.objective)
    assert all(change.any() for change in heads[:3])
    # The one global norm is that of the student, the heads and tau together.
    assert 0 < torch.cat([change.flatten() for change in [*moved, *heads]]).norm() <= 1.001e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_close_to_fp32(tmp_path, precision):
    config = tiny_config(
        tmp_path,
        run_dir=None,
        student=ModelConfig(
            name="fastkd.trainer.models.small:MLP", num_classes=4, options={"in_features": 16, "hidden": [16]}
        ),
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
    config = dataclasses.replace(config, optim=OptimConfig(name=name, lr=1e-6, clip_norm=1e9), teacher=None)

    def big(student, teacher, labels):
        return {"big": 100 * student.logits.float().sum()}

    big.needs_teacher = False
    result = train(config, terms={"big": big})
    assert read_checkpoint(result.path).state["scaler"]["scale"] in [65536 / 2**k for k in range(5, 12)]
    first, last = (load_weights(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints"))
    assert torch.isfinite(last["fc.weight"]).all()
    assert not torch.equal(first["fc.weight"], last["fc.weight"])
    steps = [line for line in lines(config.run_dir) if line["kind"] == "step"]
    assert steps[0]["grad_norm"] is None  # infinite, which JSON cannot say
    assert steps[-1]["grad_norm"] > 0
