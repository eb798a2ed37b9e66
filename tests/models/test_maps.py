"""The last feature map of a model, found without a name, and what classifies its positions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastkd.trainer import FeatureModel, ModelConfig, ObjectiveConfig, build_model, train
from fastkd.trainer.models.features import measure_shapes
from fastkd.trainer.models.small import MLP, SmallConvNet
from tests.helpers.trainer_runs import DropoutNet, noisy_data, one_thread, tiny_config  # noqa: F401

# name -> (image side, options, map, how it leads to the features): "mean" of its positions, its "first" token, or
# further layers ("layers").
FAMILIES = {
    "timm:resnet18": (64, {}, (512, 2, 2), "mean"),
    "timm:mobilenetv3_small_050": (64, {}, (288, 2, 2), "layers"),
    "timm:efficientnet_b0": (64, {}, (1280, 2, 2), "mean"),
    "timm:convnext_atto": (64, {}, (320, 2, 2), "layers"),
    "timm:regnetx_002": (64, {}, (368, 2, 2), "mean"),
    "timm:densenet121": (64, {}, (1024, 2, 2), "mean"),
    "timm:vit_tiny_patch16_224": (64, {"img_size": 64}, (17, 192), "first"),
    "timm:deit_tiny_patch16_224": (64, {"img_size": 64, "global_pool": "avg"}, (17, 192), "layers"),
    "timm:swin_tiny_patch4_window7_224": (64, {"img_size": 64}, (768, 2, 2), "mean"),
    "timm:mixer_s32_224": (64, {"img_size": 64}, (4, 512), "mean"),
    "torchvision:resnet18": (64, {}, (512, 2, 2), "mean"),
    "torchvision:mobilenet_v2": (64, {}, (1280, 2, 2), "mean"),
    "torchvision:mobilenet_v3_small": (64, {}, (576, 2, 2), "layers"),
    "torchvision:densenet121": (64, {}, (1024, 2, 2), "mean"),
    "torchvision:vgg11": (64, {}, (512, 7, 7), "all positions"),
    "torchvision:vit_b_16": (64, {"image_size": 64}, (17, 768), "first"),
    "torchvision:squeezenet1_1": (64, {}, (512, 3, 3), "mean"),
}


@pytest.mark.parametrize(("name", "layer"), [("timm:resnet18", "layer4"), ("torchvision:resnet18", "layer4")])
def test_images_that_leave_one_position_are_an_error_that_names_the_layer(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = FeatureModel(build_model(ModelConfig(name=name, num_classes=7)).eval())
    with pytest.raises(ValueError, match=rf"feature_map: layer '{layer}' of ResNet is the last, and gives 1 x 1 pos"):
        measure_shapes(model, torch.randn(2, 3, 32, 32), feature_map=True)
    model.map_name = "layer3"
    source = measure_shapes(model, torch.randn(2, 3, 32, 32), feature_map=True).feature_map
    assert source is not None
    assert source.shape == (256, 2, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_leads_to_the_features_and_its_positions_are_classified(name: str) -> None:
    side, options, shape, how = FAMILIES[name]
    torch.manual_seed(0)
    module = build_model(ModelConfig(name=name, num_classes=7, options=options)).eval()
    model = FeatureModel(module)
    source = measure_shapes(model, torch.randn(2, 3, side, side), feature_map=True).feature_map
    assert source is not None
    assert source.shape == shape
    with torch.no_grad():
        images = torch.randn(2, 3, side, side)
        output = model(images)
        found = output.feature_map
        assert found.shape == (2, *shape)
        assert output.prefix_tokens == (1 if shape[0] == 17 else 0)
        assert output.classifier is model.classifier
        pooled = found[:, 0] if how == "first" else found.flatten(2).mean(2) if found.ndim == 4 else found.mean(1)
        if how in ("mean", "first"):
            torch.testing.assert_close(pooled, output.features, rtol=1e-3, atol=1e-4)
        if how == "all positions":
            assert output.map_classifier is None
        elif name != "torchvision:squeezenet1_1":  # whose logits have a ReLU behind the classifier
            if found.ndim == 3 and how == "layers":
                pooled = found[:, 1:].mean(1)
            torch.testing.assert_close(output.map_classifier(pooled), output.logits, rtol=1e-2, atol=1e-3)
        # Nothing passes the map by: with another map the model gives the logits of other images.
        hooked = module.get_submodule(source.layer)
        other = model(torch.randn(2, 3, side, side))
        raw = other.feature_map.movedim(1, -1) if source.channels_last else other.feature_map
        handle = hooked.register_forward_hook(lambda _layer, _args, _value: raw.clone())
        torch.testing.assert_close(model(images).logits, other.logits)
        handle.remove()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_the_map_carries_the_gradient_and_its_classifier_changes_nothing() -> None:
    torch.manual_seed(0)
    model = FeatureModel(SmallConvNet(width=4))
    images = torch.randn(2, 1, 8, 8)
    measure_shapes(model, images, feature_map=True)
    output = model(images)
    before = output.feature_map.detach().clone()
    vectors = output.feature_map.detach().movedim(1, -1).reshape(-1, 8)
    logits = output.map_classifier(vectors)
    torch.testing.assert_close(logits, model.model.classifier(vectors))
    assert torch.equal(output.feature_map, before)
    output.feature_map.square().sum().backward()
    assert model.model.features[0].weight.grad.abs().sum() > 0


def test_a_layer_after_pooling_that_works_in_place_leaves_the_positions_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 8, 3)
            self.act = nn.ReLU(inplace=True)
            self.fc = nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.act(self.body(images).mean((2, 3))))

    torch.manual_seed(0)
    model = FeatureModel(Net())
    measure_shapes(model, torch.randn(2, 1, 8, 8), feature_map=True)
    output = model(torch.randn(2, 1, 8, 8))
    assert model.map_source.tail == ("act", "fc")
    vectors = output.feature_map.detach().movedim(1, -1).reshape(-1, 8)
    before = vectors.clone()
    torch.testing.assert_close(output.map_classifier(vectors), model.model.fc(before.relu()))
    assert torch.equal(vectors, before)


def test_another_map_can_be_named() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 8, 8)
    model = FeatureModel(SmallConvNet(width=4, depth=3), feature_map="features.5")
    source = measure_shapes(model, images, feature_map=True).feature_map
    assert source is not None
    assert (source.shape, source.tail) == ((8, 4, 4), None)  # the classifier takes 16 channels
    assert model(images).feature_map.shape == (2, 8, 4, 4)
    measure_shapes(model, images)  # for a run without such terms
    assert model(images).feature_map is None
    with pytest.raises(ValueError, match=r"feature_map: got 'nothing', expected a layer of SmallConv.*features\.2 \("):
        measure_shapes(FeatureModel(SmallConvNet(), feature_map="nothing"), images, feature_map=True)
    flat = FeatureModel(MLP(), feature_map="body")
    with pytest.raises(ValueError, match="feature_map: got 'body', expected a layer of MLP that gives a map"):
        measure_shapes(flat, images, feature_map=True)


def test_a_model_without_a_map_is_an_error_that_says_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"feature_map: found no layer of MLP .*ModelConfig\(feature_map=.*body\.2"):
        measure_shapes(FeatureModel(MLP()), torch.randn(2, 1, 8, 8), feature_map=True)


@pytest.mark.parametrize("shape", [(6, 4, 4), (4, 4, 6), (4, 6, 4)])
def test_layouts_are_told_apart(shape: tuple[int, ...]) -> None:
    """[B, C, H, W] or [B, H, W, C], with features of another width than the map has channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Unflatten(1, shape)
            self.mix = nn.Linear(96, 5)
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(self.body(x).flatten(1)))

    source = measure_shapes(FeatureModel(Net()), torch.randn(2, 96), feature_map=True).feature_map
    assert source is not None
    assert source.shape == ((6, 4, 4) if shape == (4, 4, 6) else shape)
    assert source.tail is None


@pytest.mark.parametrize(
    ("terms", "captured"), [("dcd+kd", False), ("pckd", False), ("kd+mine", False), ("maps", True), ("msdcrd", True)]
)
def test_maps_are_captured_only_for_terms_that_need_them(terms: str, captured: bool, tmp_path: Path) -> None:
    seen = []

    def mine(student, teacher, labels):
        seen.append(student)
        return {"mine": student.logits.square().mean() if student.feature_map is None else student.feature_map.mean()}

    def maps(student, teacher, labels):
        return mine(student, teacher, labels)

    maps.needs_maps = True  # type: ignore[attr-defined]
    given = {name: term for name, term in {"mine": mine, "maps": maps}.items() if name in terms}
    config = tiny_config(tmp_path, run_dir=None, epochs=1, objective=ObjectiveConfig(terms=terms))
    networks = [SmallConvNet(num_classes=4, width=4, depth=2) for _ in range(2)]
    data = noisy_data()
    result = train(config, student=networks[0], teacher=networks[1], train_data=data[0], eval_data=data[1], terms=given)
    for model in (result.distiller.student, result.distiller.teacher.model):
        assert (model.map_source is not None) == captured
    assert all((output.feature_map is not None) == captured for output in seen)
