"""The command line, called as the console script calls it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd.cli import main
from fastkd.trainer import RECIPES
from fastkd.trainer.commands.train import parse_flags
from fastkd.trainer.extras import EXTRAS

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
        ("empty", "recipe: 'own_recipes:empty' returned dict, expected a TrainConfig, or a dict of stages"),
        ("number", "recipe: 'own_recipes:number' is of type int, expected a function"),
        ("typed", "epochs: got '3' of type str, expected an int >= 1"),
    ):
        assert refused("train", f"own_recipes:{name}") == f"fastkd train: {message}"
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["train", "own_recipes:broken"])


def test_help(capsys):
    assert main([]) == main(["--help"]) == main(["train"]) == main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "train RECIPE" in out
    assert all(name in out for name in RECIPES)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastkd {fastkd.__version__}\n"
    assert main(["nonsense"]) == main(["recipe"]) == 2
    nonsense, near = capsys.readouterr().err.splitlines()
    assert nonsense.startswith("fastkd: unknown command 'nonsense', expected one of demo, recipes, train, ")
    assert near == "fastkd: unknown command 'recipe', did you mean recipes? fastkd --help describes them"
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
    assert run_python("-m", "fastkd", "--version").stdout.startswith("fastkd ")


@pytest.mark.slow
def test_the_list_of_commands_imports_nothing_heavy():
    heavy = ("torch", "numpy", "fastkd.trainer", "timm", "tyro")
    code = f"import sys, fastkd.cli; fastkd.cli.main([]); print([m for m in {heavy} if m in sys.modules])"
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


def imported_by(rooms: tuple[str, ...]) -> set[str]:
    """The packages that fastkd's rooms import, in functions too, beside Python's own, torch and fastkd."""
    folder = Path(__file__).parents[2] / "fastkd"
    nodes = [
        node
        for room in rooms
        for file in (folder / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    found = {"tensorboard" if name == "torch.utils.tensorboard" else name.split(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"fastkd", "torch"}


def test_the_extras_hold_what_is_imported_and_no_more():
    # torch's exporter imports onnxscript, and torchmetrics imports faster_coco_eval.
    indirect = {"onnxscript", "faster_coco_eval"}
    known = {package for packages in EXTRAS.values() for package in packages} - indirect
    assert imported_by(("trainer", "study", "demo")) == known


@pytest.mark.slow
def test_training_needs_the_extra_train_alone_and_commands_say_what_they_lack(tmp_path):
    code = """if True:
        import sys, torch
        from importlib import util
        from torch import nn
        from fastkd.cli import main
        from fastkd.trainer import FeatureModel, OptimConfig, TensorImages, TrainConfig, extras, train

        others = sum((packages for name, packages in extras.EXTRAS.items() if name != "train"), ())
        find, absent = util.find_spec, [*others]
        util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
        data = TensorImages(torch.randn(64, 1, 4, 4), torch.arange(64) % 4)
        net = lambda: FeatureModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), "3")
        config = TrainConfig(run_dir="run", optim=OptimConfig(warmup_epochs=0), epochs=1, device="cpu")
        train(config, student=net(), teacher=net(), train_data=data, eval_data=data)
        assert not {*others} & {*sys.modules}, {*others} & {*sys.modules}
        print(main(["report", "run"]), main(["demo"]), main(["train", "digits-teacher", "--device", "cpu"]))
        absent[:] = "timm", "tyro"
        print(main(["train", "digits"]))
        from fastkd.trainer import evaluate
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("1 1 1\n1\n"), done.stderr
    lines = done.stderr.splitlines()
    packages = "matplotlib, jinja2, sklearn, scipy, threadpoolctl, tensorboard"
    install = "in a checkout of fastkd, run: pip install"
    assert f"fastkd report: this command needs {packages}; {install} '.[report]'" in lines
    assert f"fastkd demo: this command needs {packages}; {install} '.[report]'" in lines
    assert f"fastkd train: the data set digits needs {packages}; {install} '.[report]'" in lines
    assert f"fastkd train: this command needs timm, tyro; {install} '.[train]'" in lines
    assert lines[-1].endswith(f"fastkd.trainer needs timm, tyro; {install} '.[train]'")
