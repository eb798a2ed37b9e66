"""Batch norms of a frozen teacher are folded into its convolutions where the outputs stay what they are."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.trainer import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig, train
from fastkd.trainer.models.cifar import NETWORKS
from fastkd.trainer.models.features import FeatureModel, measure_shapes
from fastkd.trainer.models.fold import folded
from fastkd.trainer.models.weights import CheckpointError
from fastkd.trainer.run.distiller import FrozenModel, weights_hash

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def used(network: nn.Module) -> nn.Module:
    """Batch norms as after training: no mean is 0 and no factor 1."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.running_var):
                value.data.uniform_(0.5, 1.5, generator=generator)
            for value in (module.bias, module.running_mean):
                value.data.normal_(0, 0.3, generator=generator)
    return network.eval()


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: NETWORKS["resnet8"](num_classes=10), 9),
        (lambda: NETWORKS["wrn_16_1"](num_classes=10), 6),
        (lambda: NETWORKS["ShuffleV2"](num_classes=10), 56),
        (lambda: timm.create_model("test_efficientnet", num_classes=10), 13),
    ],
)
def test_a_folded_copy_gives_the_same_logits_features_maps_and_taps(build: Callable[[], nn.Module], count: int) -> None:
    model = FeatureModel(used(build()))
    measure_shapes(model, IMAGES, feature_map=True, taps=True, preactivations=True)
    before = weights_hash(model)
    frozen = FrozenModel(model)
    expected = frozen(IMAGES)
    assert frozen.fold(IMAGES) == f"teacher: {count} batch norms are folded into convolutions"
    found = frozen(IMAGES)
    assert frozen.computing is not model
    assert weights_hash(model) == before
    assert list(frozen.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    assert expected.taps is not None
    assert found.taps is not None
    pairs = [(found.logits, expected.logits), (found.features, expected.features)]
    pairs += [(found.feature_map, expected.feature_map), (found.taps.stem, expected.taps.stem)]
    pairs += [*zip(found.taps.maps, expected.taps.maps, strict=True)]
    pairs += [*zip(found.taps.preactivations, expected.taps.preactivations, strict=True)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert not torch.equal(found.logits, expected.logits)
    frozen.to(torch.float64)
    assert next(frozen.computing.parameters()).dtype == torch.float64


class Small(nn.Module):
    """A network of one convolution, whose ``kind`` says what keeps it from being folded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "control flow" and x.sum() > 0:
            x = -x
        x = self.conv(x)
        if self.kind == "reads the norm":
            y = F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
        elif self.kind == "weights of the norm":
            y = self.norm(x) * self.norm.weight.mean()
        else:
            y = self.norm(x)
        y = y + x if self.kind == "two readers" else y
        y = self.norm(y) if self.kind == "twice" else y
        return self.fc(y.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("control flow", r"torch\.fx cannot trace it \(TraceError"),
        ("reads the norm", "no convolution has a batch norm behind it"),
        ("two readers", "no convolution has a batch norm behind it"),
        ("twice", "no convolution has a batch norm behind it"),
        ("weights of the norm", r"the folded copy does not run \(AttributeError"),
        ("hook", "its layers have hooks of others"),
        ("tap", "values of tap 0 of the folded copy are off by"),
    ],
)
def test_what_cannot_be_folded_is_computed_as_it_is(kind: str, reason: str) -> None:
    network = used(Small(kind))
    model = FeatureModel(network, taps=["conv"] if kind == "tap" else None)
    if kind == "tap":  # read between the convolution and its batch norm
        measure_shapes(model, IMAGES, taps=True)
    if kind == "hook":
        network.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=reason):
        folded(model, IMAGES)
    frozen = FrozenModel(model)
    assert frozen.fold(IMAGES).startswith("teacher: its batch norms are not folded: ")
    assert frozen.computing is model


def test_a_run_says_that_it_folds_and_is_resumed_with_the_same_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"name": "fastkd.trainer.models.small:SmallConvNet", "options": {"width": 4}}
    data = DataConfig(options={"train_size": 64}, batch_size=32)
    config = TrainConfig(
        student=ModelConfig(**network),
        data=data,
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.05, warmup_epochs=0),
        epochs=1,
        device="cpu",
        run_dir=str(tmp_path / "teacher"),
        tensorboard=False,
        progress=False,
    )
    train(config)
    teacher = ModelConfig(**network, weights=str(tmp_path / "teacher"), fold=True)
    distil = dataclasses.replace(
        config, teacher=teacher, objective=ObjectiveConfig(terms="ce+kd+dcd"), run_dir=str(tmp_path / "student")
    )
    capsys.readouterr()
    result = train(distil)
    assert "batch norms are folded into convolutions" in capsys.readouterr().out
    assert result.distiller.teacher is not None
    assert result.distiller.teacher.computing is not result.distiller.teacher.model
    with pytest.raises(CheckpointError, match=r"teacher\.fold: True -> False"):
        train(dataclasses.replace(distil, teacher=dataclasses.replace(teacher, fold=False), resume=True))


def test_fold_is_refused_for_a_student_and_in_half_precision() -> None:
    with pytest.raises(ValueError, match=r"student\.fold: got True, expected False"):
        TrainConfig(student=ModelConfig(name="resnet18", fold=True))
    with pytest.raises(ValueError, match=r"model\.fold: got True with dtype 'bf16', expected 'fp32'"):
        ModelConfig(name="resnet18", fold=True, dtype="bf16")
