"""What a user gets wrong is one line, which names the setting or the flag, what came, and what to do next."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd import cli
from fastkd.trainer import RECIPES, TrainConfig
from fastkd.trainer.commands.train import parse_flags
from fastkd.trainer.signals import StopRequest
from tests.helpers.images import write_classes

FAST = "--epochs 1 --optim.warmup-epochs 0 --device cpu --no-tensorboard"
# A command line, and what its one line must hold, in this order.
ROWS = {
    # Settings that do not go together, or with the data.
    f"train digits-scratch {FAST} --student.options '{{\"widht\": 3}}'": [
        "student.options",
        "'widht'",
        "--student.options",
    ],
    f"train digits-scratch {FAST} --student.name timm:test_resnet": [
        "student:",
        "1 x 8 x 8",
        "--student.options",
        "in_chans",
    ],
    f"train digits-scratch {FAST} --device mps": ["device: got 'mps'", "expected auto, cpu or cuda"],
    "train digits-scratch --epochs 1 --device cpu": ["optim.warmup_epochs: got 1", "--optim.warmup-epochs 0"],
    f"train digits {FAST}": [
        "teacher.weights: runs/digits_teacher",
        "first: fastkd train digits-teacher",
        "--no-teacher",
    ],
    f"train digits-scratch {FAST} --objective.terms kd": ["'kd' needs a teacher", "--teacher.name", "--no-teacher"],
    f"train digits {FAST} --teacher.weights images --objective.terms ce": [
        "no term that uses the teacher",
        "--no-teacher",
    ],
    f"train digits-scratch {FAST} --teacher.options '{{}}'": ["--teacher.options: got '{}'", "--teacher.name too"],
    f"train digits-scratch {FAST} --data.mixup 0.2 --objective.terms pckd": ["data.mixup: got 0.2", "'pckd'"],
    "train images --data.options.root images --student.num-classes 9 --data.options.image-size 32 --data.num-workers 0 "
    "--student.name timm:test_resnet --device cpu": [
        "student.num_classes: the student has 9",
        "--student.num-classes 2",
    ],
    "train images-kd --data.options.root images --teacher.weights file": [
        "--teacher.weights: got 'file'",
        "--teacher.name",
    ],
    # Names.
    f"train digits-scratch {FAST} --student.name nope": ["student.name: got 'nope'", "timm or torchvision"],
    "train digist": ["got the recipe 'digist'", "did you mean digits", "fastkd recipes"],
    "train --epochs 3": ["got '--epochs', expected a recipe first", "--config FILE"],
    "train digits-scratch --data.name nope": ["data.name: got 'nope'", "'cifar', 'coco', 'digits', 'images'"],
    "train digits --data.name torchvision:CIFAR10 --data.options.root x --no-teacher": [
        "torchvision:CIFAR10",
        "--data.name cifar",
    ],
    "train digits --data.name torchvision:MNIST --data.options.root x --no-teacher": [
        "data.options.root",
        "--data.options.download",
    ],
    # Flags.
    "train digits-scratch --epohcs 3": ["--epohcs", "did you mean --epochs?", "see fastkd train digits-scratch --help"],
    "train images --hlp": ["--hlp", "--help?", "see fastkd train images --help"],
    "train images": ["--data.options.root: is missing", "see fastkd train images --help"],
    "train digits-scratch --epochs": ["--epochs: has no value", "--help"],
    "train digits-scratch --epochs x": ["--epochs: got 'x', expected an int", "see fastkd train digits-scratch --help"],
    "train digits-scratch --optim.lr fast": ["--optim.lr: got 'fast', expected a number; see fastkd train"],
    f"train digits-scratch {FAST} --student.name numpy:array": ["student.options: 'numpy:array'"],
    f"train digits-scratch {FAST} --student.name math:pi": [
        "student.name: 'math:pi' is no function, but of type float"
    ],
    "train digits-scratch --epochs 0": ["epochs: got 0, expected an int >= 1"],
    "train digits-scratch --precision fp8": ["--precision: got 'fp8'", "fp32, bf16, fp16"],
    "train digits-scratch --student.num-classes 0": ["student.num_classes: got 0"],
    "train digits-scratch --optim.lr -1": ["optim.lr: got -1.0"],
    "train digits-scratch --ranks 2": ["--ranks: got 2", "--dry-run"],
    # Options of the data.
    "train images --data.options '{\"size\": 32}'": ["data.options: got size", "image_size"],
    "train images --data.options '{'": ["--data.options: got '{', expected a JSON object"],
    "train images --data.options '[1]'": ["--data.options: got '[1]', expected a JSON object"],
    "train images --data.options.root nowhere": ["data.options.root: nowhere is not a folder"],
    "train images --data.options.root images --data.options.auto-augment x": ["data.options.auto_augment: got 'x'"],
    "train images --data.options.root x --data.options.imge-size 3": [
        "--data.options.imge-size",
        "--data.options.image-size",
    ],
    "train cifar100-resnet32x4": ["data.options.root: found no CIFAR-100 in cifar", "--data.options.download"],
    # Files and folders.
    "train digits-scratch --config nowhere.yaml": ["--config: cannot read nowhere.yaml (No such file or directory)"],
    "train digits-scratch --config file": ["--config: file holds NoneType"],
    "train digits-scratch --config bad.yaml": ["--config: bad.yaml is not YAML"],
    "train digits-scratch --config wrong.yaml": ["--config: wrong.yaml: got unknown fields ['epohcs']", "'epochs'"],
    f"train digits-scratch {FAST} --run-dir file": ["run_dir: got 'file', which is a file"],
    f"train digits-scratch {FAST} --run-dir file/run": ["[Errno 20]"],
    f"train digits-scratch {FAST} --run-dir held": ["already holds a run", "--resume", "--run-dir"],
    f"train digits-scratch {FAST} --resume": ["runs/digits_scratch: holds no run to resume"],
    # The other commands.
    "eval": ["checkpoint: is missing", "see fastkd eval --help"],
    "eval x --bset": ["--bset", "did you mean --best?", "see fastkd eval --help"],
    "eval x --data.nmae y": ["--data.nmae", "did you mean --data.name?"],
    "export x": ["out: is missing", "see fastkd export --help"],
    "report --out": ["--out: has no value", "see fastkd report --help"],
    "probe x": ["--data: is missing", "see fastkd probe --help"],
    "recipes x": ["x: is no flag here"],
    "demo --seed 3": ["--seed", "did you mean --seeds?", "see fastkd demo --help"],
    "eval 'a\x1b[2Jb'": ["a\ufffd[2Jb: no such"],
    "eval file --model timm:test_resnet --data.name cifar --root images": ["found no CIFAR-100 in images"],
    "export file x.safetensors": ["file: is a file, expected a checkpoint or run folder"],
    "eval seeds": ["seeds: holds no checkpoint", "several seeds, such as seeds/seed-0"],
    "eval nowhere": ["fastkd eval: nowhere: no such checkpoint or run folder"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the rows name."""
    folder = tmp_path_factory.mktemp("messages")
    write_classes(folder / "images", ("ant", "bee"), 20)
    for name, text in {"file": "", "bad.yaml": "epochs: [", "wrong.yaml": "epohcs: 3"}.items():
        (folder / name).write_text(text)
    (folder / "held").mkdir()
    (folder / "seeds" / "seed-0").mkdir(parents=True)
    (folder / "held" / "run.json").write_text("{}")
    return folder


@pytest.mark.parametrize("line", ROWS)
def test_a_mistake_is_one_line_that_says_what_to_do(line, place, monkeypatch, refused):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    message = refused(*shlex.split(line))
    assert message.startswith(f"fastkd {line.split()[0]}: ")
    assert "__tyro" not in message
    rest = message
    for part in ROWS[line]:
        assert part in rest, message
        rest = rest.partition(part)[2]


def test_no_teacher_also_leaves_out_the_flags_that_name_one(capsys):
    flags = parse_flags(["digits", "--teacher.weights", "runs/x", "--no-teacher", "--teacher.name=timm:resnet18"])
    assert flags.settings.teacher is None
    assert flags.settings.objective.weights == {"ce": 1.0}
    told = capsys.readouterr().out
    assert "--no-teacher: leaves out --teacher.weights runs/x, --teacher.name timm:resnet18\n" in told


def test_a_module_in_the_place_of_a_config_is_told_without_printing_it():
    with pytest.raises(TypeError) as caught:
        TrainConfig(student=nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)]))  # type: ignore[arg-type]
    assert str(caught.value) == (
        "student: got a module (Sequential), expected a ModelConfig; or train(config, student=module)"
    )


def test_a_failed_download_is_one_line(place, monkeypatch, refused):
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.chdir(place)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", offline)
    monkeypatch.setattr(sys, "path", list(sys.path))
    message = refused("train", "cifar100-resnet32x4", "--data.options.download")
    assert "data.options.download: cannot fetch https://" in message
    assert "(no network); unpack it in cifar yourself" in message


def test_a_reader_that_went_away_and_an_interrupt_are_no_tracebacks(monkeypatch, capfd):
    for error, status in ((BrokenPipeError, 141), (KeyboardInterrupt, 130)):

        def fail(*_: object, error: type[BaseException] = error) -> int:
            raise error

        monkeypatch.setattr(cli, "_run", fail)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        assert cli.main(["recipes"]) == status
    assert capfd.readouterr().err == "fastkd recipes: interrupted\n"


def test_the_first_interrupt_asks_the_run_to_stop_and_the_second_ends_it():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_run_is_saved_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    interrupted = []

    def zero_grad(self, *arguments, **options):
        if not interrupted:
            interrupted.append(os.kill(os.getpid(), signal.SIGINT))
        return given(self, *arguments, **options)

    given = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", zero_grad)
    flags = ["digits-scratch", "--epochs", "2", "--device", "cpu", "--no-tensorboard"]
    assert cli.main(["train", *flags]) == 130
    out = capsys.readouterr().out
    assert "stopped at step 1 of 8" in out
    assert out.endswith(f"go on with: fastkd train {' '.join(flags)} --resume\n")
    assert cli.main(["train", *flags, "--resume"]) == 0
    assert "at step 1 of 8" in capsys.readouterr().out


def test_every_recipe_that_needs_anothers_run_names_it():
    runs = {recipe().run_dir for recipe in RECIPES.values()}
    for recipe in RECIPES.values():
        teacher = recipe().teacher
        assert teacher is None or teacher.weights is None or teacher.weights in runs
