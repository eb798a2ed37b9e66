"""Every recipe: what it says of its sources, and what the sources say."""

import dataclasses
import math
import re

import pytest

from fastkd.cli import main
from fastkd.trainer import RECIPES, DCDConfig, TrainConfig
from fastkd.trainer.commands.reopen import is_known_model
from fastkd.trainer.commands.train import parse_flags
from fastkd.trainer.models.published import torchvision_weights
from fastkd.trainer.recipes import STAGED_RECIPES, summary

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
        *(optim.milestones or optim.schedule, optim.momentum, optim.nesterov, optim.warmup_epochs),
        *(optim.decayed, config.data.drop_last, optim.per_epoch),
    )


def test_settings_are_those_of_the_sources():
    steps, imagenet_steps = (150, 180, 210), (30, 60, 90)
    # momentum without Nesterov and warm-up; what decays, whether the last batch is dropped, steps or epochs
    plain = (0.9, False, 0.0)
    ours, cifar = (*plain, "weights", True, False), (*plain, "all", False)
    for pair in ("r34-r18", "r50-r18", "r50-mv2"):
        expected = (120, 256, "sgd", 0.1, 1e-4, imagenet_steps, *ours)
        assert settings(f"imagenet-{pair}-dcd") == ("dcd", *expected)
        assert settings(f"imagenet-{pair}-dcd-kd") == ("dcd + kd", *expected)
    assert settings("imagenet-r34-r18-ckd") == ("10*ckd", 200, 512, "sgd", 0.2, 1e-4, "cosine", *cifar, True)
    assert settings("cifar100-ckd") == ("100*ckd", 480, 64, "sgd", 0.05, 5e-4, "cosine", *cifar, True)
    for name, terms in (("dcd-kd", "dcd + kd"), ("pckd", "pckd"), ("resnet32x4", "ce"), ("wrn-40-2", "ce")):
        assert settings(f"cifar100-{name}") == (terms, 240, 64, "sgd", 0.05, 5e-4, steps, *cifar, False)
    assert RECIPES["cifar100-dcd-kd"]().objective.dcd.consistency == "teacher||student"
    pckd = RECIPES["cifar100-pckd"]().objective.pckd
    assert (pckd.first_epoch, pckd.preview_gradient, pckd.category_eps) == (1, True, 1e-7)
    as_run, paper = (RECIPES[f"imagenet-r34-r18-dcd{variant}"]() for variant in ("-as-run", ""))
    assert as_run.objective.dcd == DCDConfig(
        consistency="teacher||student", learnable=False, temperature=math.exp(-1), group="local"
    )
    assert as_run.optim == dataclasses.replace(paper.optim, decayed="all")
    assert as_run.data.options == {**paper.data.options, "min_scale": 0.1, "max_aspect": 1.25}
    large = RECIPES["imagenet-large-batch"]()
    assert (large.data.batch_size, large.optim.warmup_epochs, large.objective.ce.label_smoothing) == (16384, 5, 0.1)


def test_teachers_are_published_weights_or_another_recipes_run():
    for name, recipe in RECIPES.items():
        teacher = recipe().teacher
        if teacher is None:
            continue
        if teacher.pretrained:
            (stated,) = torchvision_weights(teacher.name.removeprefix("torchvision:")).meta["_metrics"].values()
            assert 0.9 < 100 * teacher.min_accuracy / (stated.get("acc@1") or stated["box_map"]) < 1, name
        else:
            run = next(other() for other in RECIPES.values() if other().run_dir == teacher.weights)
            assert (run.student.name, run.student.options) == (teacher.name, teacher.options), name


def test_fastkd_recipes_lists_them_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*RECIPES, *STAGED_RECIPES]
    assert all(line.endswith(summary(line.split()[0])) for line in lines)


def test_a_method_replaces_the_loss_of_any_recipe_before_the_other_flags() -> None:
    config = parse_flags(["cifar100", "--method", "crd+kd", "--objective.crd.negatives", "4096"]).settings
    assert (config.objective.terms, config.run_dir) == ("ce + kd + 0.8*crd", "runs/cifar100-crd-kd")
    assert config.objective.crd.negatives == 4096
    plain = RECIPES["cifar100"]()
    assert dataclasses.replace(config, objective=plain.objective, run_dir=plain.run_dir) == plain
    given = parse_flags(["digits", "--method", "dist", "--run-dir", "mine", "--objective.terms", "dist"]).settings
    assert (given.objective.terms, given.objective.dist.temperature, given.run_dir) == ("dist", 4.0, "mine")
    with pytest.raises(ValueError, match="method: got 'rdk', did you mean rkd"):
        parse_flags(["digits", "--method", "rdk"])


def test_help_has_the_options_of_the_methods_in_the_loss_alone(capsys) -> None:
    for argument, shown in (("--help", {"ce", "rkd"}), ("--help-verbose", {"ce", "rkd", "dkd", "crd"})):
        with pytest.raises(SystemExit):
            parse_flags(["digits", "--method", "rkd", argument])
        found = set(re.findall(r"--objective\.(\w+)\.", capsys.readouterr().out))
        assert found == shown if argument == "--help" else found >= shown
