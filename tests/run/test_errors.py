"""A loss that is not finite, wrong settings, settings that do not fit each other."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.trainer import (
    CKDConfig,
    DataConfig,
    DCDConfig,
    KDConfig,
    ModelConfig,
    MSDCRDConfig,
    NonFiniteLossError,
    ObjectiveConfig,
    OptimConfig,
    PCKDConfig,
    TensorImages,
    TrainConfig,
    load_weights,
    train,
)
from fastkd.trainer.config import differences
from fastkd.trainer.run.meter import Meter
from tests.helpers.trainer_runs import DropoutNet, batch, distiller, lines, noisy_data, one_thread, tiny_config  # noqa: F401


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
    with pytest.raises(
        NonFiniteLossError, match=r"the gradient is not finite at step 1: .* grad_norm = nan; .*step-00000000"
    ):
        train(config, terms={"poison": lambda student, teacher, labels: {"poison": Poison.apply(student.logits)}})


def test_the_meter_finds_the_step_without_looking_at_every_step():
    meter = Meter()
    loss = torch.tensor([1.0, 2.0, float("nan"), 3.0])
    meter.names = ["loss", "ce", "grad_norm"]
    # What ``add`` leaves behind on a device that is not the CPU.
    meter._pending = [
        (step, torch.stack([value, torch.tensor(float(step)), torch.tensor(0.5)])) for step, value in enumerate(loss, 1)
    ]
    with pytest.raises(NonFiniteLossError, match=r"at step 3: loss = nan, ce = 3\.0, grad_norm = 0\.5"):
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
        (lambda: TrainConfig(rank_timeout=0), "rank_timeout: got 0, expected a finite number >= 1 and <= 604800"),
        (lambda: TrainConfig(resume=True), "run_dir: got None with resume=True"),
        (lambda: OptimConfig(name="adam"), r"optim\.name: got 'adam', expected one of"),
        (lambda: OptimConfig(lr=0.0), r"optim\.lr: got 0\.0, expected a finite number > 0"),
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
        (lambda: TrainConfig(seed=2**64 + 5), r"seed: got 18446744073709551621, expected an int < 2\*\*63"),
        (lambda: DataConfig(subset_seed=2**63), r"data\.subset_seed: got"),
        (lambda: OptimConfig(momentum=1.0), r"optim\.momentum: got 1\.0, expected a number >= 0 and < 1"),
        (lambda: OptimConfig(betas=(0.9,)), r"optim\.betas: got \(0\.9,\), expected two numbers"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"optim\.betas: got 1\.0, expected a number >= 0 and < 1"),
        (lambda: CKDConfig(temperature=0), r"ckd\.temperature: got 0"),
        (lambda: PCKDConfig(category_weight=-1), r"pckd\.category_weight: got -1"),
        (lambda: PCKDConfig(preview_base=0), r"pckd\.preview_base: got 0"),
        (lambda: PCKDConfig(hidden_dim=0), r"pckd\.hidden_dim: got 0"),
        (lambda: MSDCRDConfig(windows=(0,)), r"msdcrd\.windows: got 0"),
        (lambda: MSDCRDConfig(positives="both"), r"msdcrd\.positives: got 'both'"),
        (lambda: DCDConfig(min_scale=3.0, max_scale=2.0), r"dcd\.min_scale: got 3\.0, expected at most max_scale"),
        (lambda: ObjectiveConfig(terms="1e400*kd"), r"objective\.terms: got the weight '1e400' .*a finite number"),
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
        (lambda: OptimConfig(lr="0.1"), "optim.lr: got '0.1' of type str, expected a finite number"),
        (lambda: ObjectiveConfig(terms=["dcd"]), "objective.terms: got .* of type list, expected str"),
        (lambda: ModelConfig(name=3), "model.name: got 3 of type int"),
        (lambda: TrainConfig(data={"a": 1}), "data: got .* of type dict, expected DataConfig"),
        (lambda: TrainConfig(optim=None), "optim: got None of type NoneType, expected OptimConfig"),
        (lambda: TrainConfig(student="resnet18"), "student: got 'resnet18' of type str, expected ModelConfig or None"),
        (lambda: TrainConfig(tensorboard="no"), "tensorboard: got 'no' of type str, expected bool"),
        (lambda: TrainConfig(resume=0), "resume: got 0 of type int, expected bool"),
        (lambda: DataConfig(drop_last="no"), "data.drop_last: got 'no'"),
        (lambda: OptimConfig(nesterov=1), "optim.nesterov: got 1"),
        (lambda: OptimConfig(betas=0.9), "optim.betas: got 0.9 of type float, expected tuple or list"),
        (lambda: OptimConfig(milestones=3), "optim.milestones: got 3 of type int, expected tuple or list"),
        (lambda: ModelConfig(name="a", pretrained="yes"), "model.pretrained: got 'yes'"),
        (lambda: DCDConfig(learnable="no"), "dcd.learnable: got 'no'"),
        (lambda: MSDCRDConfig(strides=3), "msdcrd.strides: got 3"),
        (lambda: ObjectiveConfig(pckd=CKDConfig()), "objective.pckd: got CKDConfig"),
        (lambda: ObjectiveConfig(kd=4.0), "objective.kd: got 4.0 of type float, expected KDConfig"),
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
    with pytest.raises(ValueError, match=r"data\.name: got 'mnist', expected one of \['cifar', .*, 'stl10'"):
        train(dataclasses.replace(config, data=DataConfig(name="mnist")))
    with pytest.raises(ValueError, match="student: has no trainable parameter"):
        train(
            dataclasses.replace(config, objective=ObjectiveConfig(terms="ce"), teacher=None),
            student=DropoutNet().requires_grad_(False),
        )


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.arange(52) % 6, ValueError, r"student\.num_classes: the student has 4 classes, but \w+ has the label 5"),
        (torch.full((52,), -100), ValueError, r"labels: got -100, expected class indices"),
        (torch.arange(52.0) % 4, TypeError, r"labels: got torch\.float32, expected int64 class indices"),
        (torch.arange(52, dtype=torch.int32) % 4, TypeError, r"labels: got torch\.int32, expected int64"),
    ],
)
def test_labels_that_are_no_classes_are_named(tmp_path, labels, error, message):
    config = tiny_config(tmp_path, run_dir=None)
    good = noisy_data()[0]
    bad = TensorImages(good.images, labels)
    with pytest.raises(error, match=message):
        train(config, train_data=bad, eval_data=good)
    with pytest.raises(error, match=message):
        train(config, train_data=good, eval_data=bad)


@pytest.mark.parametrize(("sample", "got"), [({"x": torch.ones(1)}, "dict"), ((torch.ones(1), 1, 2), "3 parts")])
def test_data_that_is_not_image_and_label_is_an_error(tmp_path, sample, got):
    config = tiny_config(tmp_path)
    with pytest.raises(TypeError, match=rf"train_data: a batch of it is {got}, expected \(images, labels\)"):
        train(config, train_data=[sample] * 20, eval_data=noisy_data()[1])
    assert not Path(config.run_dir).exists()  # a start that fails leaves no folder


def test_a_config_survives_json(tmp_path):
    config = tiny_config(
        tmp_path, optim=OptimConfig(schedule="step", milestones=(1, 2.5), clip_norm=2), data=DataConfig(labelled=20)
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"config\.optim: got unknown fields \['rate'\]"):
        TrainConfig.from_dict({"optim": {"rate": 1}})
    with pytest.raises(TypeError, match="expected numbers, strings, lists and dicts"):
        dataclasses.replace(config, student=ModelConfig(name="a:b", options={"layer": nn.ReLU})).to_dict()


def test_a_resumed_run_may_find_its_data_elsewhere_but_not_other_data():
    def saved(chunks=1, **data):
        options = {"root": data.pop("root", "/a"), "image_size": data.pop("image_size", 224)}
        return TrainConfig(chunks=chunks, data=DataConfig(name="images", options=options, **data)).to_dict()

    assert differences(saved(), saved(chunks=2, root="/b", eval_batch_size=7)) == []
    assert differences(saved(), saved(image_size=32)) == ["data.options.image_size: 224 -> 32"]
