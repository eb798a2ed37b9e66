"""Intermediate maps: which layers give them, and what a forward pass returns."""

import pytest
import torch
from torch import Tensor, nn

from fastkd.trainer import FeatureModel, ModelConfig, build_model
from fastkd.trainer.models.features import ModelOutput, measure_shapes
from fastkd.trainer.models.small import MLP, SmallConvNet
from fastkd.trainer.run.accumulate import in_chunks, recomputed

# name -> the stem, the layers of the maps, those of the preactivations where they are others, the batch norms
FAMILIES: dict[str, tuple[str, list[str], list[str], list[str | None]]] = {
    "timm:resnet18": (
        "act1 64 32",
        ["layer1 64 16", "layer2 128 8", "layer3 256 4", "layer4 512 2"],
        [f"layer{n}.1.act2" for n in (1, 2, 3, 4)],
        [f"layer{n}.1.bn2" for n in (1, 2, 3, 4)],
    ),
    "timm:convnext_atto": (
        "stages.0.downsample 40 16",
        ["stages.0 40 16", "stages.1 80 8", "stages.2 160 4", "stages.3 320 2"],
        [],
        [None] * 4,
    ),
    "timm:mobilenetv3_small_050": (
        "bn1 16 32",
        ["blocks.0 8 16", "blocks.1 16 8", "blocks.3 24 4", "blocks.5 288 2"],
        ["blocks.0", "blocks.1", "blocks.3", "blocks.5.0.bn1.act"],
        ["blocks.0.0.bn2", "blocks.1.1.bn3", "blocks.3.1.bn3", "blocks.5.0.bn1"],
    ),
    "timm:efficientnet_b0": (
        "bn1 32 32",
        ["blocks.1 24 16", "blocks.2 40 8", "blocks.4 112 4", "blocks.6 320 2"],
        [],
        ["blocks.1.1.bn3", "blocks.2.1.bn3", "blocks.4.2.bn3", "blocks.6.0.bn3"],
    ),
    "torchvision:resnet18": (
        "relu 64 32",
        ["layer1 64 16", "layer2 128 8", "layer3 256 4", "layer4 512 2"],
        [f"layer{n}.1.relu" for n in (1, 2, 3, 4)],
        [f"layer{n}.1.bn2" for n in (1, 2, 3, 4)],
    ),
    "torchvision:vgg11_bn": (
        "features.2 64 64",
        ["features.13 256 16", "features.20 512 8", "features.27 512 4", "features 512 2"],
        [],
        ["features.12", "features.19", "features.26", "features.26"],
    ),
    "torchvision:densenet121": (
        "features.relu0 64 32",
        ["features.denseblock1 256 16", "features.denseblock2 512 8", "features.denseblock3 1024 4", "features 1024 2"],
        [],
        [None, None, None, "features.norm5"],
    ),
}


def three_stages(taps: tuple[str, ...] = ()) -> tuple[FeatureModel, Tensor]:
    torch.manual_seed(0)
    return FeatureModel(SmallConvNet(width=4, depth=3), taps=taps), torch.randn(4, 1, 8, 8)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layers_of_the_stages_are_found(name: str) -> None:
    stem, maps, before, norms = FAMILIES[name]
    with torch.device("meta"):
        model = FeatureModel(build_model(ModelConfig(name=name)))
        shapes = measure_shapes(model, torch.randn(2, 3, 64, 64), taps=True).taps
    sources = model.tap_sources
    assert shapes is not None
    assert sources is not None
    assert [f"{tap.layer} {tap.shape[0]} {tap.shape[1]}" for tap in (sources.stem, *sources.maps)] == [stem, *maps]
    names = before or [layer.split()[0] for layer in maps]
    assert [tap.layer for tap in sources.preactivations] == names
    assert sources.norms == tuple(norms)
    assert shapes.maps == shapes.preactivations == tuple(tap.shape for tap in sources.maps)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.modules())


class ReLUs(nn.Module):
    """Maps behind an activation that is called twice and works in place, behind a functional one, and behind none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.first, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.bn2 = nn.Conv2d(4, 6, 3, 2, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv(images))
        self.sum = self.bn1(self.first(x)) + x
        self.kept = self.sum.clone()
        x = self.relu(self.sum)
        self.last = self.bn2(self.second(x))
        return self.fc(torch.relu_(self.last.clone()).mean((2, 3)))


def test_maps_are_read_before_and_after_their_activations_and_no_norm_runs_twice() -> None:
    torch.manual_seed(0)
    net = ReLUs()
    model, images = FeatureModel(net), torch.randn(4, 1, 8, 8)
    shapes = measure_shapes(model, images, taps=True, preactivations=True).taps
    assert shapes is not None
    assert (shapes.stem, shapes.maps) == ((4, 8, 8), ((4, 8, 8), (6, 4, 4)))
    assert shapes.norms == (net.bn1, net.bn2)
    taps = model(images).taps
    assert taps is not None
    torch.testing.assert_close(taps.preactivations[0], net.kept)
    assert taps.preactivations[0].min() < 0  # although the activation has worked in place
    torch.testing.assert_close(taps.maps[0], net.kept.relu())
    torch.testing.assert_close(taps.maps[1], net.last)
    torch.testing.assert_close(taps.preactivations[1], net.last)
    torch.testing.assert_close(taps.stem, net.conv(images).relu())
    assert net.bn1.num_batches_tracked == net.bn2.num_batches_tracked == 1
    sum(x.square().mean() for x in (*taps.maps, *taps.preactivations)).backward()
    assert net.conv.weight.grad is not None
    measure_shapes(model, images, taps=True)
    assert model(images).taps.preactivations == ()
    measure_shapes(model, images)
    assert model(images).taps is None


def test_a_block_that_changes_the_size_begins_the_next_stage() -> None:
    """Its first layer is no end of a stage, although everything passes through it."""

    class Block(nn.Module):
        def __init__(self, channels: int, stride: int) -> None:
            super().__init__()
            self.widen, self.narrow = nn.Conv2d(channels, 9, 1), nn.Conv2d(9, channels, 3, stride, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(self.widen(x))

    net = nn.Sequential(nn.Conv2d(1, 4, 1), Block(4, 1), Block(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Linear(4, 4)
    model = FeatureModel(net)
    measure_shapes(model, torch.randn(2, 1, 8, 8), taps=True)
    assert model.tap_sources is not None
    assert [tap.layer for tap in model.tap_sources.maps] == ["1", "2"]


def test_layers_are_named_by_the_user_or_by_the_model() -> None:
    model, images = three_stages(("features.3", "features"))
    shapes = measure_shapes(model, images, taps=True, preactivations=True).taps
    assert shapes is not None
    assert (shapes.layers, shapes.maps) == (("features.3", "features"), ((8, 4, 4), (16, 2, 2)))
    assert model.tap_sources is not None
    assert [tap.layer for tap in model.tap_sources.preactivations] == ["features.3", "features.8"]

    net = SmallConvNet(width=4, depth=3)
    net.tap_layers = {"stem": "features.0", "maps": ["features.2", "features.5"],
                      "preactivations": ["features.2", "features.4"], "norms": ["features.1", None]}  # fmt: skip
    declared = FeatureModel(net)
    measure_shapes(declared, images, taps=True, preactivations=True)
    assert declared.tap_sources is not None
    taps = declared(images).taps
    assert taps is not None
    assert [tap.of_input for tap in declared.tap_sources.preactivations] == [True, False]
    assert taps.preactivations[0].min() < 0 == taps.maps[0].min()
    assert taps.preactivations[1].min() < 0  # what the batch norm gave, before the activation that overwrites it
    assert declared.tap_sources.norms == ("features.1", None)


def test_tokens_are_maps_where_they_are_named() -> None:
    options = {"img_size": 64, "depth": 2}
    config = ModelConfig(name="timm:vit_tiny_patch16_224", taps=("blocks.0", "blocks.1"), options=options)
    with torch.device("meta"):
        images = torch.randn(2, 3, 64, 64)
        module = build_model(config)
        model = FeatureModel(module, taps=config.taps)
        shapes = measure_shapes(model, images, taps=True).taps
        assert shapes is not None
        assert shapes.maps == ((192, 4, 4), (192, 4, 4))
        assert [x.shape for x in model(images).taps.maps] == [(2, 192, 4, 4)] * 2
        with pytest.raises(ValueError, match=r"taps: found no layer of VisionTransformer that gives a map"):
            measure_shapes(FeatureModel(module), images, taps=True)


@pytest.mark.parametrize(
    ("net", "names", "message"),
    [
        (SmallConvNet(), ("features.1", "layer9"), r"taps: got 'layer9', expected a layer of SmallConvNet that gives"),
        (MLP(hidden=(8, 8)), ("body.1",), r"taps: got 'body\.1', which gives \(2, 8\), expected a layer of MLP"),
        (MLP(), (), r"taps: found no layer of MLP .*--student\.taps.*body\.2 \(2, 32\)"),
    ],
)
def test_layers_that_give_no_maps_are_an_error_that_names_them(
    net: nn.Module, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_shapes(FeatureModel(net, taps=names), torch.randn(2, 1, 8, 8), taps=True)
    with pytest.raises(TypeError, match=r"model\.taps: got 1 of type int, expected str"):
        ModelConfig(name="resnet18", taps=(1,))  # type: ignore[arg-type]


def test_maps_may_have_their_channels_last() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 2, 2)
            self.last, self.fc = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.last(self.mix(self.stem(images)).movedim(1, -1)).mean((1, 2)))

    model = FeatureModel(Permuted())
    shapes = measure_shapes(model, torch.randn(2, 1, 8, 12), taps=True).taps
    assert shapes is not None
    assert (shapes.layers, shapes.maps) == (("stem", "last"), ((3, 8, 12), (5, 4, 6)))
    assert model(torch.randn(2, 1, 8, 12)).taps.maps[1].shape == (2, 5, 4, 6)


def flat(output: ModelOutput) -> list[Tensor]:
    assert output.taps is not None
    return [output.taps.stem, *output.taps.maps, *output.taps.preactivations]


def test_taps_are_the_same_compiled_in_chunks_and_cast() -> None:
    model, images = three_stages()
    model.model.eval()
    measure_shapes(model, images, taps=True, preactivations=True)
    expected = flat(model(images))
    assert len(expected) == 7
    for found in (in_chunks(model, images, 3), in_chunks(lambda part: recomputed(model, part), images, 2)):
        for x, y in zip(flat(found), expected, strict=True):
            torch.testing.assert_close(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in flat(model(images))} == {torch.bfloat16}
    model.compile(backend="eager")
    for _ in range(2):
        for x, y in zip(flat(model(images)), expected, strict=True):
            torch.testing.assert_close(x, y)
