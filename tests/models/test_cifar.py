"""The networks of the CIFAR benchmarks have the parameters, the outputs and the taps of the benchmarks' public code.

``tests/golden/cifar_networks.json`` was made by running RepDistiller's code. For each of its networks it has the number
of parameters, and a hash of the names and shapes in the state dict. For a network of each kind it also has fingerprints
of the logits, and of the list of features with and without ``preact``. These are of the weights of ``filled`` and the
image of ``picture``, in float64 and in eval mode.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd.cli import main
from fastkd.trainer import FeatureModel, ModelConfig, build_model, published_teacher
from fastkd.trainer.commands.reopen import is_known_model
from fastkd.trainer.commands.train import parse_flags
from fastkd.trainer.models.cifar import NETWORKS
from fastkd.trainer.models.features import measure_shapes
from fastkd.trainer.run.saved.checkpoint import CheckpointError, find_weights

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden", "cifar_networks.json").read_text())


def layout(state: dict[str, Tensor]) -> str:
    lines = "\n".join(f"{name} {list(value.shape)}" for name, value in state.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for every name of ``state``, of magnitudes that keep a network's activations apart and finite."""
    found = {}
    for number, (name, value) in enumerate(state.items()):
        # Drawing 23 million numbers for ResNet50 would take longer than the test.
        drawn = np.random.default_rng(number).standard_normal(min(value.numel(), 65_537))
        drawn = np.resize(drawn, tuple(value.shape))
        if value.ndim > 1:
            drawn *= (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            drawn = np.exp(0.3 * drawn)
        elif name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        else:
            drawn = 0.3 * drawn
        found[name] = torch.from_numpy(np.asarray(drawn)).to(value.dtype)
    return found


def picture() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 32, 32)))


def fingerprint(value: Tensor) -> float:
    """A number that depends on every entry and on its place."""
    return float(value.flatten() @ torch.cos(torch.arange(value.numel(), dtype=torch.float64)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_state_dict_of_the_benchmarks(name: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=f"cifar:{name}", num_classes=100))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, layout(model.state_dict())) == (GOLDEN[name]["parameters"], GOLDEN[name]["layout"])
    assert is_known_model(f"cifar:{name}")


@pytest.mark.parametrize("name", [name for name in GOLDEN if "logits" in GOLDEN[name]])
def test_a_network_computes_what_the_benchmarks_compute_and_taps_give_their_maps(name: str) -> None:
    expected = GOLDEN[name]
    with torch.device("meta"):
        model = NETWORKS[name]().double().eval()
    model.load_state_dict(filled(model.state_dict()), assign=True)
    wrapped = FeatureModel(model)
    shapes = measure_shapes(wrapped, picture(), taps=True, preactivations=True).taps
    with torch.no_grad():
        output = wrapped(picture())
    assert fingerprint(output.logits) == pytest.approx(expected["logits"], rel=1e-10)
    assert shapes is not None
    assert output.taps is not None
    for kind in ("maps", "preactivations"):
        found = [output.taps.stem, *getattr(output.taps, kind)]
        assert [list(value.shape[1:]) for value in found] == expected["shapes"], kind
        assert [fingerprint(value) for value in found] == pytest.approx(expected[kind], rel=1e-10), kind
    norms = [None if norm is None else model.get_submodule(norm) for norm in expected["norms"]]
    assert list(shapes.norms) == norms
    assert all(norm is None or isinstance(norm, nn.BatchNorm2d) for norm in norms)


def test_a_published_teacher_is_read_from_the_file_of_the_benchmark(tmp_path: Path) -> None:
    teacher = published_teacher("resnet56", str(tmp_path))
    assert teacher.min_accuracy == 0.7224  # 72.34 % less the ten images that rounding may turn
    model = build_model(teacher)
    weights = filled(model.state_dict())
    path = tmp_path / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir()
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}  # PyTorch 0.4
    content = {"epoch": 240, "model": old, "accuracy": torch.tensor(72.34), "optimizer": {"state": {}}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert find_weights(teacher.weights).load_into(model).endswith("ckpt_epoch_240.pth, key model")
    assert torch.equal(model.fc.weight, weights["fc.weight"])
    del old["layer2.0.downsample.0.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"does not fit CifarResNet: 1 missing \(layer2\.0\.downsample\.0\.wei"):
        find_weights(teacher.weights).load_into(model)
    with pytest.raises(ValueError, match=r"name: got 'vgg8', expected one of \['ResNet50', "):
        published_teacher("vgg8")


def test_the_file_of_a_published_teacher_says_which_model_it_is_and_how_accurate(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    weights = "teachers/vgg13_vanilla/ckpt_epoch_240.pth"
    flags = ["--data.options.root", "x", "--teacher.weights", weights]
    for recipe in ("cifar100-dcd-kd", "cifar100-resnet32x4"):  # with another teacher, and with none
        teacher = parse_flags([recipe, *flags]).settings.teacher
        assert teacher == published_teacher("vgg13")
    assert parse_flags([recipe, *flags, "--teacher.min-accuracy", "0.5"]).settings.teacher.min_accuracy == 0.5
    other = parse_flags([recipe, *flags, "--teacher.name", "cifar:vgg8"]).settings.teacher
    assert (other.name, other.min_accuracy) == ("cifar:vgg8", None)
    with pytest.raises(ValueError, match=r"expected a run, or --teacher\.name too"):
        parse_flags([recipe, *flags[:-1], "teachers/vgg8_vanilla/ckpt_epoch_240.pth"])
    assert main(["train", recipe, *flags]) == 1
    assert f"is not there; download http://shape2prog.csail.mit.edu/repo/{weights[9:]}" in capsys.readouterr().err


def test_vgg_pools_larger_images_once_more() -> None:
    with torch.device("meta"):
        model = NETWORKS["vgg8"]()
        found = []
        model.block4.register_forward_hook(lambda _layer, _args, value: found.append(value.shape[2:]))
        for side in (32, 64):
            model(torch.empty(2, 3, side, side))
    assert found == [(4, 4), (4, 4)]


def test_bad_names_and_depths_are_told() -> None:
    with pytest.raises(ValueError, match=r"student\.name: got 'cifar:resnet21', expected one of cifar:resnet8, "):
        build_model(ModelConfig(name="cifar:resnet21"), "student")
    with pytest.raises(ValueError, match=r"depth: got '12', expected one of"):
        build_model(ModelConfig(name="cifar:vgg8", options={"depth": 12}))
    for name, rest in (("resnet8", 2), ("wrn_16_1", 4)):
        with pytest.raises(ValueError, match=rf"depth: got 21, expected 6 n \+ {rest}"):
            NETWORKS[name](depth=21)


def test_classifiers_and_their_initialisation_are_those_of_the_benchmarks() -> None:
    torch.manual_seed(0)
    for name, classifier in (("wrn_16_1", "fc"), ("vgg8", "classifier"), ("MobileNetV2", "classifier.0")):
        layer = NETWORKS[name]().get_submodule(classifier)
        assert not layer.bias.any()
        assert name == "wrn_16_1" or 0.009 < layer.weight.std().item() < 0.011
