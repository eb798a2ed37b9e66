"""What a run prints, writes and returns."""

import dataclasses
import json
import re

import torch

import fastkd
from fastkd.trainer import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    load_weights,
    train,
    weights_hash,
)
from fastkd.trainer.run.distiller import build_distiller
from fastkd.trainer.run.saved.log import RunLog
from fastkd.trainer.text import printable
from tests.helpers.trainer_runs import DropoutNet, batch, distiller, lines, noisy_data, one_thread, tiny_config  # noqa: F401


def test_a_run_prints_and_writes_what_it_was(tmp_path, capsys):
    config = tiny_config(
        tmp_path,
        quiet=False,
        objective=ObjectiveConfig(terms="0.5*kd+2*dcd"),
        optim=OptimConfig(lr=0.1, reference_batch=8, warmup_epochs=1),
        tensorboard=True,
    )
    result = train(config)
    out = capsys.readouterr().out
    teacher = DropoutNet(width=24)
    teacher.load_state_dict(load_weights(config.teacher.weights))
    sha = weights_hash(teacher)
    for expected in (
        "global batch 4, 52 training samples, 26 steps",
        "lr 0.05 = 0.1 x 4 / 8, cosine, warm-up 13 steps; fp32 on cpu; seed 0",
        "loss 1 x ce + 0.5 x kd + 2 x dcd",
        f"sha256 {sha}",
        f"torch {torch.__version__.split('+')[0]}",
        f"fastkd {fastkd.__version__}",
        "epoch 2/2",
    ):
        assert expected in out, expected
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["global_batch"] == 4
    assert info["learning_rate"] == "lr 0.05 = 0.1 x 4 / 8, cosine, warm-up 13 steps"
    assert info["loss_weights"] == {"ce": 1.0, "kd": 0.5, "dcd": 2.0}
    assert info["teacher_sha256"] == sha
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert info["config"] == config.to_dict()
    assert info["student"]["parameters"] == result.parameters == sum(p.numel() for p in DropoutNet().parameters())
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    epochs = [line for line in lines(config.run_dir) if line["kind"] == "epoch"]
    assert [{k: v for k, v in line.items() if k != "kind"} for line in epochs] == result.history
    assert result.accuracy == epochs[-1]["accuracy"]


def test_the_teacher_hash_tells_any_change_of_a_weight():
    model = DropoutNet()
    first = weights_hash(model)
    assert weights_hash(model) == first
    with torch.no_grad():
        model.fc.bias[0].add_(1e-6)
    assert weights_hash(model) != first
    assert len(weights_hash(model.bfloat16())) == 64


def test_log_every_and_eval_every_thin_the_record(tmp_path):
    config = tiny_config(tmp_path, log_every=5, eval_every=2, epochs=3)
    result = train(config)
    assert [line["step"] for line in lines(config.run_dir) if line["kind"] == "step"] == list(range(5, 40, 5))
    assert ["accuracy" in record for record in result.history] == [False, True, True]


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, run_dir=None, epochs=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    result = train(config)
    assert result.path is None
    assert not list(empty.iterdir())
    assert capsys.readouterr().out == ""
    assert not result.distiller.training


def test_one_seed_gives_one_result_and_the_same_student_under_every_objective(tmp_path):
    config = tiny_config(tmp_path, run_dir=None)
    first, again, other = train(config), train(config), train(dataclasses.replace(config, seed=1))
    assert first.history == again.history
    assert first.history != other.history
    sample = noisy_data()[1].images[:2]
    for terms in ("kd", "dcd"):
        torch.manual_seed(0)
        built = build_distiller(dataclasses.replace(config, objective=ObjectiveConfig(terms=terms)), sample)
        if terms == "kd":
            reference = weights_hash(built.student.model)
    assert weights_hash(built.student.model) == reference


def test_the_digits_are_learnt():
    config = TrainConfig(
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 8}),
        data=DataConfig(batch_size=100),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.2, warmup_epochs=1),
        epochs=8,
        quiet=True,
    )
    assert train(config).accuracy > 0.9


def test_a_terminal_shows_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    train(tiny_config(tmp_path, quiet=False, progress=True))
    out = capsys.readouterr().out
    last = [line for line in re.split(r"[\r\n]", out) if "26/26" in line][-1]
    last = re.sub(r"\x1b\[\d*[a-zA-Z]", "", last)  # colours
    assert re.search(r"epoch 2/2 .* 26/26\b.*\d images/s  loss \d\.\d{4}  lr 0\.\d+", last), last


def test_what_is_printed_cannot_steer_a_terminal(tmp_path, capsys):
    """Persian names need the joiner U+200C."""
    odd = "cat\x1b[2J\tdog\u202e\u00a0\ud800 \u06af\u0644\u200c\u0647\u0627"
    shown = "cat\ufffd[2J dog\ufffd \ufffd \u06af\u0644\u200c\u0647\u0627"
    assert printable(odd) == shown
    config = tiny_config(tmp_path)
    RunLog(None, config, size=0, step=0, steps=1, quiet=False).print(f"class {odd}\nnext [bold]line")
    assert capsys.readouterr().out == f"class {shown}\nnext [bold]line\n"


def test_old_gradients_of_a_given_student_do_not_count(tmp_path):
    config = tiny_config(tmp_path, run_dir=None, epochs=1)
    torch.manual_seed(0)
    clean = DropoutNet()
    used = DropoutNet()
    used.load_state_dict(clean.state_dict())
    for parameter in used.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert train(config, student=used).history == train(config, student=clean).history
