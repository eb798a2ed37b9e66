"""How many outputs the models have, where neither the user nor a recipe says it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastkd.trainer import ModelConfig, TensorImages, TrainConfig
from fastkd.trainer.run.prepare import with_classes
from fastkd.trainer.tasks.classification import Classification, check_outputs

TASK = Classification(TrainConfig())


def fixed() -> nn.Module:
    """A builder that takes no number of classes."""
    return nn.Linear(1, 7)


DATA = TensorImages(torch.zeros(6, 1, 2, 2), torch.tensor([0, 1, 2, 2, 1, 0]))
NET = "fastkd.trainer.models.small:SmallConvNet"


def decided(student: ModelConfig, teacher: ModelConfig | None = None, saved: dict | None = None) -> list[int | None]:
    config = with_classes(TrainConfig(student=student, teacher=teacher), TASK, DATA, DATA, saved)
    return [model.num_classes for model in (config.student, config.teacher) if model is not None]


def test_the_labels_decide_unless_something_else_is_said():
    for name in ("timm:resnet18", "torchvision:resnet18", "resnet18", NET):
        assert decided(ModelConfig(name=name), ModelConfig(name=name, weights="runs/teacher")) == [3, 3]
    assert decided(ModelConfig(name="timm:resnet18", num_classes=9)) == [9]
    assert decided(ModelConfig(name=NET, options={"num_classes": 9})) == [None]
    assert decided(ModelConfig(name=f"{__name__}:fixed")) == [None]
    published = ModelConfig(name="timm:resnet18", pretrained=True)
    assert decided(published, published) == [3, None]  # the student is tuned; the teacher keeps its trained outputs


def test_a_class_that_only_the_evaluation_set_has_counts():
    more = TensorImages(DATA.images, DATA.labels + 2)
    config = with_classes(TrainConfig(student=ModelConfig(name="timm:resnet18")), TASK, DATA, more, None)
    assert config.student.num_classes == 5


def test_names_of_classes_count_for_more_than_labels():
    data = TensorImages(DATA.images, DATA.labels)
    data.classes = ["a", "b", "c", "none of them"]
    config = with_classes(TrainConfig(student=ModelConfig(name="timm:resnet18")), TASK, data, data, None)
    assert config.student.num_classes == 4
    check_outputs(4, data.classes)
    check_outputs(1000, None)
    with pytest.raises(
        ValueError, match=r"the student has 5 outputs and the data have 4 classes.*--student.num-classes 4"
    ):
        check_outputs(5, data.classes)


@pytest.mark.parametrize("before", [None, 3, 1000])
def test_a_resumed_run_has_the_models_that_it_began_with(before):
    student = ModelConfig(name="timm:resnet18")
    saved = TrainConfig(student=replace(student, num_classes=before)).to_dict()
    assert decided(student, saved=saved) == [before]
