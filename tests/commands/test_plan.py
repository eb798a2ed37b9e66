"""``--dry-run``: what a run comes to, on a machine that has neither its weights nor its data."""

import dataclasses
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd.cli import main
from fastkd.trainer import RECIPES, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig, build_model
from fastkd.trainer.commands.dry_run import build_bare, plan
from fastkd.trainer.commands.memory import LiveBytes, memory_of
from fastkd.trainer.run.distiller import build_distiller
from tests.helpers.trainer_runs import one_thread, tiny_config  # noqa: F401

pytestmark = pytest.mark.slow

NET = "fastkd.trainer.models.cifar:CifarResNet"
THEIRS = ("images-kd", "embeddings-images")  # whose teacher is the user's


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in THEIRS])
def test_every_recipe_has_a_plan_within_seconds(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = RECIPES[name]()
    begun = time.perf_counter()
    lines = plan(config)
    assert time.perf_counter() - begun < 30  # two or three on a machine of its own
    text = "\n".join(lines)
    memory = "student's activations" if config.task == "classification" else "memory of a rank: not estimated"
    for part in (config.student.name, f"global batch {config.data.batch_size} on 1 rank", memory):
        assert part in text
    assert ("teacher" in lines[1]) == (config.teacher is not None)
    if config.data.name != "digits":
        assert "the data cannot be read here (data.options.root" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_names_batch_steps_schedule_weights_and_options():
    config = dataclasses.replace(RECIPES["imagenet-large-batch"](), chunks=2)
    lines = plan(config, 60)
    assert lines[0] == "student torchvision:resnet18 (11,689,512 parameters)"
    assert lines[1].startswith(
        "teacher torchvision:resnet34.IMAGENET1K_V1 (21,797,672 parameters), weights torchvision"
    )
    assert lines[1].endswith("accuracy at least 0.72")
    assert lines[2] == "loss 1 x ce + 1 x dcd + 1 x kd (131,329 parameters of its own)"
    assert lines[3] == "global batch 16384 on 60 ranks: 273 or 274 each, in 2 chunks of at most 137"
    assert lines[5] == (
        "lamb, lr 0.0226274 = 0.008 x sqrt(16384 / 2048), cosine, warm-up 5 epochs, weight decay 0.02, "
        "gradient norm at most 1"
    )
    assert lines[6] == "precision bf16, channels_last, compile, moving average 0.999, images 3 x 224 x 224"
    config = RECIPES["digits"]()
    assert "40 epochs of 4 steps (200 training samples): 160 steps" in plan(config)
    assert "times 0.1 after epochs 30 60 90" in "\n".join(plan(RECIPES["imagenet-r34-r18-dcd"]()))


def test_a_plan_says_whether_the_weights_are_there(tmp_path):
    config = tiny_config(tmp_path)
    assert plan(config)[1].endswith("teacher.safetensors (found)")
    (tmp_path / "teacher.safetensors").unlink()
    assert plan(config)[1].endswith("teacher.safetensors (not found)")


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"student": None}, 1, r"student: got None"),
        ({"student": ModelConfig(name="no_such_model")}, 1, r"model\.name: got 'no_such_model'"),
        ({"data": DataConfig(name="cifar", options={"root": "x"}, batch_size=4)}, 8, r"data\.batch_size: got 4"),
        ({"optim": OptimConfig(warmup_epochs=99.0)}, 1, r"optim\.warmup_epochs: got 99\.0"),
        ({"teacher": None, "objective": ObjectiveConfig(terms="kd")}, 1, r"needs a teacher but there is none"),
    ],
)
def test_a_plan_refuses_what_training_would_refuse(tmp_path, changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(tiny_config(tmp_path), **changes), ranks)


def config(**changes) -> TrainConfig:
    model = ModelConfig(name=NET, options={"depth": 14, "widths": [8, 8, 16, 32]})
    return TrainConfig(
        student=model,
        teacher=ModelConfig(name=NET, options={"depth": 20}),
        objective=ObjectiveConfig(terms="dcd"),
        **changes,
    )


def estimate(settings: TrainConfig, rows: int, chunks: int = 1, world_size: int = 1) -> dict[str, int]:
    with torch.device("meta"):
        distiller = build_bare(settings, torch.empty(2, 3, 32, 32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        distiller.to_empty(device="cpu")
        return memory_of(distiller, settings, (3, 32, 32), rows, chunks, world_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_a_real_step_keeps(precision):
    settings = config(precision=precision)
    found = estimate(settings, 6)["student's activations"]
    real = build_distiller(
        settings,
        torch.randn(2, 3, 32, 32),
        student=build_model(settings.student),
        teacher=build_model(settings.teacher),
    )
    images = torch.randn(6, 3, 32, 32)
    own = {tensor.data_ptr() for tensor in (*real.student.parameters(), *real.student.buffers(), images)}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        real.student(images)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # In bf16 the statistics that batch norm keeps, two numbers a channel, are float32 and not taken for that.
    assert found == expected if precision == "fp32" else found == pytest.approx(expected, rel=1e-3)
    assert expected > 6 * 8 * 32 * 32 * 2 * 4  # more than a few maps


def test_memory_grows_with_rows_and_shrinks_with_chunks():
    whole, twice, halves = (estimate(config(), *arguments) for arguments in ((8, 1), (16, 1), (16, 2)))
    activations = "student's activations"
    assert twice[activations] == pytest.approx(2 * whole[activations], rel=1e-2)
    assert halves[activations] == whole[activations]
    assert halves["teacher's forward pass"] == whole["teacher's forward pass"]
    assert "outputs of all chunks" in halves
    assert "outputs of all chunks" not in whole


def test_optimiser_ranks_average_and_half_a_teacher_are_counted():
    plain = estimate(config(), 4)
    weights = plain["gradients"]
    assert plain["optimiser (sgd)"] == weights
    assert estimate(config(optim=OptimConfig(name="lamb")), 4)["optimiser (lamb)"] == 2 * weights
    assert estimate(config(optim=OptimConfig(momentum=0.0)), 4)["optimiser (sgd)"] == 0
    assert "moving average" in estimate(config(ema=0.9), 4)
    ranks = estimate(config(data=DataConfig(batch_size=64)), 4, world_size=16)
    assert ranks["buckets of the all-reduce"] == weights
    assert ranks["embeddings of all ranks"] == 64 * 2 * 128 * 4
    settings = config()
    half = dataclasses.replace(settings, teacher=dataclasses.replace(settings.teacher, dtype="bf16"))
    assert estimate(half, 4)["teacher"] == pytest.approx(plain["teacher"] / 2, rel=1e-2)


def test_the_forward_pass_holds_what_is_alive_at_once():
    net = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(100, 30, bias=False), nn.Linear(30, 10, bias=False))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net.to_empty(device="cpu")
        x = torch.empty(8, 10)
        with LiveBytes() as live:
            net(x)
    assert live.peak == 8 * (100 + 30) * 4


def test_dry_run_on_the_command_line_trains_nothing(capsys, monkeypatch, tmp_path, refused):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "cifar100-dcd-kd", "--dry-run", "--ranks", "4", "--data.batch-size", "256"]) == 0
    out = capsys.readouterr().out
    assert "global batch 256 on 4 ranks: 64 each" in out
    assert "weights runs/cifar100-resnet32x4 (not found)" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "cifar100", "--dry-run", "--method", "ofd"]) == 0  # margins of batch norms without memory
    assert "--method: got none, expected one argument" in refused("train", "digits", "--method")
    error = refused("train", "digits", "--dry-run", "--ranks", "none")
    assert "--ranks: got 'none', expected None or INT" in error


def test_the_settings_of_a_model_are_flags(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = "--teacher.dtype bf16 --teacher.normalization 0.5 0.5 0.5 0.5 0.5 0.5 --teacher.min-accuracy 0.7"
    weights = "--teacher.weights teacher.pt --teacher.no-pretrained --no-channels-last --compile --sync-batchnorm"
    assert main(["train", "imagenet-r50-mv2-dcd", "--dry-run", *flags.split(), *weights.split()]) == 0
    out = capsys.readouterr().out
    assert "in bf16, weights teacher.pt (not found), accuracy at least 0.7" in out
    assert "precision bf16, compile, sync_batchnorm, images" in out


def test_a_plan_names_the_published_weights_that_it_would_take(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    teacher = ModelConfig(name="timm:resnet10t.c3_in1k", pretrained=True)
    settings = dataclasses.replace(RECIPES["imagenet-r34-r18-dcd"](), teacher=teacher)
    assert "weights timm timm/resnet10t.c3_in1k (to be downloaded)" in plan(settings)[1]
    settings = RECIPES["imagenet-r34-r18-dcd"]()
    assert "ResNet34_Weights.IMAGENET1K_V1 (to be downloaded)" in plan(settings)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet34-b627a593.pth").touch()
    assert "ResNet34_Weights.IMAGENET1K_V1 (found in the cache)" in plan(settings)[1]
