"""The command line, called as the console script calls it."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd.cli import main
from fastkd.trainer import RECIPES, require_extras
from fastkd.trainer.commands.train import parse_flags

FAST = ["--epochs", "1", "--optim.warmup-epochs", "0", "--device", "cpu", "--no-tensorboard"]


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """``fastkd train`` puts the current folder on the import path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_train_distil_and_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits-teacher", *FAST]) == 0
    out = capsys.readouterr().out
    assert "global batch 128" in out
    assert "checkpoint runs/digits_teacher/checkpoints/step-00000010" in out
    flags = ["--objective.terms", "0.5*kd + dcd", "--student.options.width", "6", "--optim.lr", "0.05", "--seed", "3"]
    assert main(["train", "digits", *FAST, *flags]) == 0
    out = capsys.readouterr().out
    assert "loss 1 x ce + 0.5 x kd + 1 x dcd" in out
    assert "lr 0.05, cosine" in out
    assert "seed 3" in out
    assert main(["eval", "runs/digits"]) == 0
    assert "step 4, accuracy 0." in capsys.readouterr().out
    assert main(["train", "digits", *FAST, *flags, "--resume"]) == 0
    assert "already finished" in capsys.readouterr().out


def test_an_own_recipe_in_the_current_folder(tmp_path, monkeypatch, capsys, refused):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom fastkd.trainer.recipes.digits import digits_scratch\n"
        "def small():\n    return dataclasses.replace(digits_scratch(), epochs=2, run_dir='runs/small')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mine:small", "--no-tensorboard", "--device", "cpu", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "seed 4" in out
    assert "recipe: cannot import 'mine:large'" in refused("train", "mine:large")


def test_another_model_drops_the_recipes_options_and_json_gives_new_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mlp = ["--student.name", "fastkd.trainer.models.small:MLP"]
    options = ["--student.options", '{"hidden": [8]}', '--data.options={"train_size": 1000}']
    assert main(["train", "digits-scratch", *FAST, *mlp, *options]) == 0
    assert "student fastkd.trainer.models.small:MLP (610 parameters)" in capsys.readouterr().out
    teacher = ["--teacher.weights", "runs/digits_scratch"]  # which says which model it is of
    flags = ["--objective.terms", "kd", "--run-dir", "runs/distilled", "--student.options.width", "3"]
    assert main(["train", "digits-scratch", *FAST, *teacher, *flags]) == 0
    out = capsys.readouterr().out
    assert "teacher fastkd.trainer.models.small:MLP (610 parameters)" in out
    chosen = parse_flags(["digits-scratch", *mlp, "--data.options.train-size", "1000"]).settings
    assert (chosen.student.options, chosen.data.options) == ({}, {"train_size": 1000})
    assert parse_flags(
        ["digits-scratch", "--data.name", "cifar", "--data.options.root", "x"]
    ).settings.data.options == {"root": "x"}


def test_no_teacher_leaves_out_the_terms_that_need_one(capsys):
    for recipe, terms in (("digits", "1.0*ce"), ("cifar100-ckd", "1.0*ce")):
        config = parse_flags([recipe, "--no-teacher"]).settings
        assert (config.teacher, config.objective.terms) == (None, terms)
    assert "--no-teacher: leaves out dcd, kd; the loss is 1 x ce" in capsys.readouterr().out


def test_a_recipe_that_gives_no_config_is_one_line(tmp_path, monkeypatch, refused):
    (tmp_path / "own_recipes.py").write_text(
        "from fastkd.trainer import TrainConfig\nempty = dict\nnumber = 3\n"
        "def typed(): return TrainConfig(epochs='3')\ndef broken(): return 1 + 'a'\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("empty", "recipe: 'own_recipes:empty' returned dict, expected a TrainConfig"),
        ("number", "recipe: 'own_recipes:number' is of type int, expected a function"),
        ("typed", "epochs: got '3' of type str, expected an int >= 1"),
    ):
        assert refused("train", f"own_recipes:{name}") == f"fastkd train: {message}"
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["train", "own_recipes:broken"])


def test_wrong_flags_of_other_commands_exit_with_status_2():
    with pytest.raises(SystemExit) as caught:
        main(["eval"])
    assert caught.value.code == 2


def test_help(capsys):
    assert main([]) == main(["--help"]) == main(["train"]) == main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "train RECIPE" in out
    assert all(name in out for name in RECIPES)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastkd {fastkd.__version__}\n"
    assert main(["nonsense"]) == 2
    assert "unknown command 'nonsense'" in capsys.readouterr().err
    for argv in (["train", "digits", "--help"], ["eval", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
    assert capsys.readouterr().out.count("\n") < 260  # a line for a flag


@pytest.mark.parametrize("recipe", ["digits", "imagenet-r34-r18-dcd-kd"])
def test_every_flag_has_a_help(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", recipe, "--help-verbose"])
    text = re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out)
    flags = re.split(r"\n\s+(?=--[a-z])", text)[1:]
    described = [flag for flag in flags if not re.search(r"(student|teacher)\.options\.", flag)]
    assert len(described) > 70
    assert [
        flag for flag in described if re.fullmatch(r"--\S+(, --\S+)? *[^\n]*\n?\s*\(default:[^)]*\)\s*", flag)
    ] == []


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
def test_the_package_runs_as_a_module():
    assert "\ndigits " in run_python("-m", "fastkd", "recipes").stdout


@pytest.mark.slow
def test_the_list_of_commands_imports_nothing_heavy():
    heavy = ("torch", "numpy", "fastkd.trainer", "timm", "torchdata", "tyro")
    code = f"import sys, fastkd.cli; fastkd.cli.main([]); print([m for m in {heavy} if m in sys.modules])"
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


def test_every_package_that_the_trainer_imports_is_checked_for():
    folder = Path(__file__).parents[2] / "fastkd"
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
        for room in ("trainer", "demo")
        for file in (folder / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    known = set(inspect.getsource(require_extras).replace('"', " ").split())
    imported -= {"onnxruntime", "onnxscript"}  # an extra of their own, asked for where it is needed
    assert {"timm", "jinja2", "rich"} <= imported
    assert imported - set(sys.stdlib_module_names) - {"fastkd", "torch"} <= known


@pytest.mark.slow
def test_missing_extras_say_what_to_install():
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('timm', 'tyro') else find(n, *a)\n"
        "from fastkd.cli import main; print(main(['train', 'digits']))\n"
        "from fastkd.trainer import train"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "1"
    message = "fastkd.trainer: missing timm, tyro; run: pip install 'fastkd[train]'"
    assert done.stderr.startswith(f"fastkd: {message}")
    assert done.stderr.strip().endswith(f"ImportError: {message}")
