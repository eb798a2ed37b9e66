"""Models by name, their classifier found, its input captured."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.trainer import (
    FeatureModel,
    ModelConfig,
    ModelShapes,
    ObjectiveConfig,
    build_model,
    evaluate_checkpoint,
    find_classifier,
    train,
)
from fastkd.trainer.models.features import measure_shapes, pool_features
from tests.helpers.trainer_runs import tiny_config

CLASSIFIERS = {
    "timm:resnet18": "fc",
    "timm:mobilenetv3_small_050": "classifier",
    "timm:vit_tiny_patch16_224": "head",
    "timm:vgg11": "head.fc",
    "timm:densenet121": "classifier",
    "timm:convnext_atto": "head.fc",
    "timm:swin_tiny_patch4_window7_224": "head.fc",
    "timm:efficientnet_b0": "classifier",
    "torchvision:resnet18": "fc",
    "torchvision:mobilenet_v3_small": "classifier.3",
    "torchvision:vit_b_16": "heads.head",
    "torchvision:vgg11": "classifier.6",
    "torchvision:densenet121": "classifier",
    "torchvision:convnext_tiny": "classifier.2",
    "torchvision:swin_t": "head",
    "torchvision:efficientnet_b0": "classifier.1",
    "torchvision:squeezenet1_0": "classifier.1",
    "torchvision:shufflenet_v2_x0_5": "fc",
    "torchvision:maxvit_t": "classifier.5",
    "torchvision:inception_v3": "fc",
}


@pytest.fixture(autouse=True)
def meta_device():
    """Shapes alone: nothing is initialised or computed, so that large families cost little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.device("meta"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_is_found(name):
    model = build_model(ModelConfig(name=name, num_classes=7))
    assert find_classifier(model) == CLASSIFIERS[name]
    layer = model.get_submodule(CLASSIFIERS[name])
    if name.startswith("timm"):
        assert layer is model.get_classifier()
    size = 299 if name == "torchvision:inception_v3" else 224
    width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    assert measure_shapes(FeatureModel(model), torch.randn(2, 3, size, size)) == ModelShapes(features=width, classes=7)


SMALL = [
    ("timm:resnet10t", 32),
    ("timm:mobilenetv3_small_050", 32),
    ("timm:vit_tiny_patch16_224", 224),
    ("timm:convnext_atto", 32),
    ("torchvision:resnet18", 32),
    ("torchvision:mobilenet_v3_small", 32),
    ("torchvision:squeezenet1_1", 64),
]


@pytest.mark.parametrize(("name", "size"), SMALL)
def test_features_are_the_input_of_the_classifier(name, size):
    with torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(ModelConfig(name=name, num_classes=7)).eval()
        images = torch.randn(2, 3, size, size)
        wrapped = FeatureModel(model)
        output = wrapped(images)
        layer = model.get_submodule(wrapped.classifier_name)
        assert torch.equal(output.logits, model(images))
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer(output.features), output.logits)
        else:  # SqueezeNet: features and logits are averages around a 1x1 convolution and a ReLU
            assert output.features.shape == (2, layer.in_channels)
        assert not layer._forward_pre_hooks
        assert measure_shapes(wrapped, images).classes == 7  # the layer found gives the logits


def test_a_bare_name_is_looked_up_in_timm_then_torchvision():
    assert type(build_model(ModelConfig(name="resnet18"))).__module__.startswith("timm")
    assert type(build_model(ModelConfig(name="shufflenet_v2_x0_5"))).__module__.startswith("torchvision")
    model = build_model(
        ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", num_classes=3, options={"width": 4})
    )
    assert find_classifier(model) == "classifier"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="no_such_model"), r"model\.name: got 'no_such_model'.*timm or torchvision"),
        (ModelConfig(name="timm:no_such_model"), r"model\.name: got 'timm:no_such_model'"),
        (ModelConfig(name="timm:hf-hub:some/model"), r"cannot import 'timm:hf-hub:some/model'"),
        (ModelConfig(name="torchvision:no_such_model"), r"model\.name: got 'torchvision:no_such_model'"),
        (ModelConfig(name="no.such.module:build"), r"cannot import 'no\.such\.module:build'"),
        (ModelConfig(name=".a:c"), r"model\.name: got '\.a:c', expected 'package\.module:attribute'"),
        (ModelConfig(name="torch.nn:NoSuchLayer"), r"cannot import 'torch\.nn:NoSuchLayer'"),
        (
            ModelConfig(name="timm:resnet18", options={"checkpoint_path": "x.pt"}),
            r"model\.options: got 'checkpoint_path'",
        ),
        (ModelConfig(name="torch.nn:Identity", pretrained=True), r"model\.pretrained: got True"),
    ],
)
def test_models_that_cannot_be_built(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(config)


def test_a_callable_must_return_a_module():
    with pytest.raises(TypeError, match=r"'builtins:dict' returned dict, expected an nn\.Module"):
        build_model(ModelConfig(name="builtins:dict"))


def test_a_named_classifier_is_checked_and_used():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"found no layer called fc / classifier / head / heads / linear; name it"):
        FeatureModel(model)
    with pytest.raises(ValueError, match=r"classifier: got '9', expected a layer of Sequential, such as \['1', '3'\]"):
        FeatureModel(model, "9")
    assert measure_shapes(FeatureModel(model, "3"), torch.randn(2, 16)) == ModelShapes(features=6, classes=4)
    with pytest.raises(ValueError, match=r"layer '1' of Sequential gives 6 values but the model's logits have 4"):
        measure_shapes(FeatureModel(model, "1"), torch.randn(2, 16))


def test_a_timm_model_without_or_with_two_classifiers_must_be_told():
    for name, options in (("resnet18", {"num_classes": 0}), ("deit_tiny_distilled_patch16_224", {})):
        model = build_model(ModelConfig(name=f"timm:{name}", options=options))
        with pytest.raises(ValueError, match="no single classifier layer; name it"):
            FeatureModel(model)
    model = build_model(ModelConfig(name="timm:crossvit_tiny_240", num_classes=7))  # a list of heads
    with pytest.raises(ValueError, match=r"CrossVit has no single classifier layer; name it with ModelConfig.*head\.1"):
        FeatureModel(model)


class Tail(nn.Module):
    """A layer called ``fc``, then ``end`` on its output."""

    def __init__(self, end):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
        self.fc = nn.Linear(6, 4)
        self.end = end

    def forward(self, images):
        return self.end(self.fc(self.body(images)))


def test_a_layer_called_fc_that_does_not_give_the_logits_is_not_taken_for_the_classifier():
    with torch.device("cpu"):
        images = torch.randn(2, 1, 4, 4)
        hidden = Tail(nn.Linear(4, 4))
        with pytest.raises(
            ValueError, match=r"'fc' of Tail gives something else than the model's logits.*FeatureModel"
        ):
            measure_shapes(FeatureModel(hidden), images)
        assert measure_shapes(FeatureModel(hidden, "end"), images) == ModelShapes(features=4, classes=4)
        # Confirmed by its name.
        assert measure_shapes(FeatureModel(hidden, "fc"), images) == ModelShapes(features=6, classes=4)
        assert not hidden.fc._forward_hooks
        for end in (nn.Identity(), nn.LogSoftmax(1), nn.Softmax(1), nn.Dropout(0.5)):
            assert measure_shapes(FeatureModel(Tail(end)), images) == ModelShapes(features=6, classes=4)


def test_cross_entropy_and_kd_need_no_classifier_layer(tmp_path):
    with torch.device("cpu"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
        config = tiny_config(tmp_path, epochs=1, teacher=None, objective=ObjectiveConfig(terms="ce"))
        result = train(config, student=model)
        assert result.distiller.student(torch.randn(2, 16)).features.shape == (2, 0)
        assert evaluate_checkpoint(result.path, model=model, trust_code=True).accuracy == result.accuracy
        config = tiny_config(tmp_path, epochs=1, run_dir=None, objective=ObjectiveConfig(terms="kd"))
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        assert train(config, student=model, teacher=teacher).history


def test_a_given_module_names_its_classifier_by_a_feature_model(tmp_path):
    with torch.device("cpu"):
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4))
        config = tiny_config(tmp_path, epochs=1, student=None, teacher=None)
        with pytest.raises(ValueError, match=r"found no layer called .*pass FeatureModel\(module, '\.\.\.'\)"):
            train(dataclasses.replace(config, run_dir=None), student=student, teacher=teacher)
        result = train(config, student=FeatureModel(student, "3"), teacher=FeatureModel(teacher, "3"))
        heads = result.distiller.objective.terms["dcd"].loss
        assert (heads.student_head.in_features, heads.teacher_head.in_features) == (6, 9)
        described = json.loads(Path(config.run_dir, "run.json").read_text())
        assert described["student"]["name"] == "Sequential"
        assert described["student"]["classifier"] == "3"
        model = FeatureModel(student, "3")
        assert evaluate_checkpoint(result.path, model=model, trust_code=True).accuracy == result.accuracy


def test_a_classifier_that_is_not_called_once_is_an_error():
    class Twice(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.times = times

        def forward(self, x):
            for _ in range(self.times):
                x = self.fc(x)
            return x

    for times in (0, 2):
        with pytest.raises(RuntimeError, match=f"'fc' of Twice was called {times} times"):
            FeatureModel(Twice(times))(torch.randn(2, 4))


def test_output_must_be_logits():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.head(x)

    with pytest.raises(TypeError, match=r"Maps returned shape \(2, 5, 8, 8\), expected logits \[B, C\]"):
        FeatureModel(Maps())(torch.randn(2, 3, 8, 8))


def test_maps_and_tokens_are_pooled_over_everything_but_channels():
    with torch.device("cpu"):
        maps = torch.randn(2, 3, 4, 5)
        torch.testing.assert_close(pool_features(maps, nn.Conv2d(3, 1, 1)), maps.mean((2, 3)))
        torch.testing.assert_close(pool_features(maps, nn.Linear(5, 1)), maps.mean((1, 2)))
        torch.testing.assert_close(pool_features(maps[0], nn.Linear(5, 1)), maps[0].mean(1))
        assert pool_features(maps[0, 0], nn.Linear(5, 1)).shape == (4, 5)


def test_probe_changes_no_state():
    with torch.device("cpu"):
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5))
        model.fc = nn.Linear(4, 2)
        model[1].eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        generator = torch.get_rng_state()
        images = torch.randn(2, 4, generator=torch.Generator())
        assert measure_shapes(FeatureModel(model), images) == ModelShapes(features=4, classes=2)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)
