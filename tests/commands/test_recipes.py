"""Every recipe: what it says of its sources, and what the sources say."""

import pytest

from fastkd.cli import main
from fastkd.trainer import RECIPES, TrainConfig
from fastkd.trainer.commands.reopen import is_known_model
from fastkd.trainer.models.build import torchvision_weights
from fastkd.trainer.recipes import summary

SOURCES = {"dcd": "2407.11802", "pckd": "2410.14143", "ckd": "2404.14109"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_that_survives_json_and_has_its_own_run_folder(name):
    config = RECIPES[name]()
    assert TrainConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.student is not None
    assert config.run_dir == f"runs/{name}".replace("digits-", "digits_")
    assert len(summary(name)) <= 110
    for model in filter(None, (config.student, config.teacher)):
        assert is_known_model(model.name)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("digits")])
def test_a_recipe_names_its_source(name):
    text = RECIPES[name].__doc__
    method = next((method for method in SOURCES if method in name.split("-")), None)
    if method is not None:
        assert SOURCES[method] in text
    assert (
        "ours" in text.lower()
        or "as imagenet" in text
        or "authors'" in text
        or "RepDistiller" in text
        or "as for" in text
    )


def settings(name: str) -> tuple:
    config = RECIPES[name]()
    optim = config.optim
    return (
        *(config.objective.terms, config.epochs, config.data.batch_size, optim.name, optim.lr, optim.weight_decay),
        optim.milestones or optim.schedule,
    )


def test_settings_are_those_of_the_sources():
    steps, imagenet_steps = (150, 180, 210), (30, 60, 90)
    for pair in ("r34-r18", "r50-r18", "r50-mv2"):
        expected = (120, 256, "sgd", 0.1, 1e-4, imagenet_steps)
        assert settings(f"imagenet-{pair}-dcd") == ("dcd", *expected)
        assert settings(f"imagenet-{pair}-dcd-kd") == ("dcd + kd", *expected)
    assert settings("imagenet-r34-r18-ckd") == ("10*ckd", 200, 512, "sgd", 0.2, 1e-4, "cosine")
    assert settings("cifar100-ckd") == ("100*ckd", 480, 64, "sgd", 0.05, 5e-4, "cosine")
    for name, terms in (("dcd-kd", "dcd + kd"), ("pckd", "pckd"), ("resnet32x4", "ce"), ("wrn-40-2", "ce")):
        assert settings(f"cifar100-{name}") == (terms, 240, 64, "sgd", 0.05, 5e-4, steps)
    large = RECIPES["imagenet-large-batch"]()
    assert (large.data.batch_size, large.optim.warmup_epochs, large.objective.ce.label_smoothing) == (16384, 5, 0.1)


def test_teachers_are_published_weights_or_another_recipes_run():
    for name, recipe in RECIPES.items():
        teacher = recipe().teacher
        if teacher is None:
            continue
        if teacher.pretrained:
            accuracy = torchvision_weights(teacher.name.removeprefix("torchvision:")).meta["_metrics"]["ImageNet-1K"]
            assert 0.9 < 100 * teacher.min_accuracy / accuracy["acc@1"] < 1, name
        else:
            run = next(other() for other in RECIPES.values() if other().run_dir == teacher.weights)
            assert (run.student.name, run.student.options) == (teacher.name, teacher.options), name


def test_fastkd_recipes_lists_them_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(line.endswith(summary(name)) for line, name in zip(lines, RECIPES, strict=True))
