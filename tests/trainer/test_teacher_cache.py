"""A teacher that is run once: the cache is written, and a run that reads it is the run with the teacher."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastkd.cli import main
from fastkd.trainer import (
    CheckpointError,
    DataConfig,
    FeatureModel,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TensorImages,
    TrainConfig,
    train,
)
from fastkd.trainer.commands import cache_teacher as writing
from fastkd.trainer.commands.cache_teacher import cache_teacher
from fastkd.trainer.commands.dry_run import plan
from fastkd.trainer.commands.seeds import train_seeds
from fastkd.trainer.data.loader import SeededFetch
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.run.distiller import Trained
from fastkd.trainer.run.saved.config_file import write_config
from fastkd.trainer.run.teacher_cache import TeacherCache, packed
from fastkd.trainer.signals import StopRequest
from tests.helpers.images import write_classes
from tests.helpers.trainer_runs import NoisyImages, one_thread, same  # noqa: F401

NET = "fastkd.trainer.models.small:SmallConvNet"


class Placed(SmallConvNet):
    """Features that depend a little on a row's place in the batch, as those of some kernels do."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.features(images)).flatten(1)
        return self.classifier(features * (1 + 1e-4 * torch.arange(len(images))[:, None]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a teacher, and its float32 cache."""
    folder = tmp_path_factory.mktemp("cache")
    write_classes(folder / "data" / "train", ("a", "b", "c"), 7)
    write_classes(folder / "data" / "val", ("a", "b", "c"), 1)
    torch.manual_seed(5)
    save_file(SmallConvNet(3, 3, width=6).state_dict(), folder / "teacher.safetensors")
    cache_teacher(config_in(folder), folder / "cache", dtype="float32")
    return folder


def config_in(folder: Path, cache: str | Path | None = None, **changes: Any) -> TrainConfig:
    """Two epochs of four batches of 5 of 21 augmented images, whose one that is left over belongs to no batch."""
    options = {"num_classes": 3, "options": {"in_channels": 3, "width": 6}}
    options |= {"weights": str(folder / "teacher.safetensors"), "cache": None if cache is None else str(cache)}
    config = TrainConfig(
        student=ModelConfig(name=NET, num_classes=3, options={"in_channels": 3, "width": 4}),
        teacher=ModelConfig(name=f"{__name__}:Placed", **options),
        data=DataConfig(name="images", options={"root": str(folder / "data"), "image_size": 16}, batch_size=5),
        objective=ObjectiveConfig(terms="kd+dcd"),
        optim=OptimConfig(lr=0.05),
        epochs=2,
        device="cpu",
        tensorboard=False,
        quiet=True,
        max_skipped=0,
    )
    return replace(config, **changes)


def with_cache(config: TrainConfig, cache: Path) -> TrainConfig:
    assert config.teacher is not None
    return replace(config, teacher=replace(config.teacher, cache=str(cache)))


def trained(config: TrainConfig, **given: Any) -> dict[str, Any]:
    """The state of student and objective after the run. With a cache the teacher must not be run in a step."""
    step = Trained.forward

    def without_teacher(self: Trained, *arguments: Any) -> Any:
        self._teachers[0].forward = None  # type: ignore[assignment]
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        if config.teacher is not None and config.teacher.cache is not None:
            patch.setattr(Trained, "forward", without_teacher)
        return train(config, **given).distiller.state_dict()


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, Any]:
    """What a run with its teacher ends with."""
    torch.set_num_threads(1)
    return trained(config_in(place))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_from_a_float32_cache_ends_with_the_bits_of_the_run_with_its_teacher(place, expected, workers):
    config = config_in(place)
    config = replace(config, data=replace(config.data, num_workers=workers))
    assert same(trained(with_cache(config, place / "cache")), expected)


def test_images_that_are_not_augmented_need_one_epoch(tmp_path, place):
    images = torch.randn(21, 3, 16, 16)
    data = {name: TensorImages(images, torch.arange(21) % 3) for name in ("train_data", "eval_data")}
    config = _change(config_in(place), "teacher", name=NET)
    cache_teacher(config, tmp_path / "cache", dtype="float32", **data)
    assert [path.name for path in sorted((tmp_path / "cache").glob("*.npy"))] == ["epoch-0000.npy"]
    cached = with_cache(replace(config, seed=7), tmp_path / "cache")  # of any seed
    assert same(trained(cached, **data), trained(replace(config, seed=7), **data))
    data["train_data"] = NoisyImages(images, torch.arange(21) % 3)
    with pytest.raises(ValueError, match=r"augmentation .version. None, this run has 2"):
        train(cached, **data)


def killed_at(batch: int, function: Callable[[], Any]) -> None:
    """``function()`` in a process that dies when it reads its batch of this number, counted from 1."""
    read, numbers = SeededFetch.__getitems__, itertools.count(1)

    def dying(self: SeededFetch, indices: list[int]) -> Any:
        if next(numbers) == batch:
            os._exit(9)
        return read(self, indices)

    def run() -> None:
        SeededFetch.__getitems__ = dying  # type: ignore[method-assign]
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_a_cache_that_was_killed_goes_on_within_the_epoch(tmp_path, place, monkeypatch):
    monkeypatch.setattr(writing, "SAVE_EVERY", 0.0)
    cache = tmp_path / "cache"
    killed_at(8, lambda: cache_teacher(config_in(place), cache, dtype="float32"))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert list(manifest["epochs"]) == ["0"]
    assert (manifest["begun"]["epoch"], manifest["begun"]["batches"]) == (1, 2)
    with pytest.raises(ValueError, match="has 1 epochs, expected the 2 of the run"):
        train(config_in(place, cache))
    read, seen = SeededFetch.__getitems__, []
    monkeypatch.setattr(SeededFetch, "__getitems__", lambda *given: seen.append(given[1]) or read(*given))
    with pytest.raises(ValueError, match="dtype float32, this call has float16"):
        cache_teacher(config_in(place), cache)
    assert cache_teacher(config_in(place), cache, dtype="float32") == 0
    assert [len(indices) for indices in seen] == [
        5,
        5,
        5,
    ]  # the last, whose other samples are not written again, has one new sample
    for path in (place / "cache").glob("*.npy"):
        assert (cache / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in cache.iterdir()} == {"epoch-0000.npy", "epoch-0001.npy", "manifest.json", ".lock"}


def test_an_epoch_that_was_begun_in_the_order_of_another_seed_is_begun_anew(tmp_path, place, monkeypatch):
    monkeypatch.setattr(writing, "SAVE_EVERY", 0.0)
    config = _option(config_in(place, epochs=1), augment=False)  # every epoch is alike, so that any seed may go on
    killed_at(3, lambda: cache_teacher(config, tmp_path, dtype="float32"))
    killed_at(1, lambda: cache_teacher(replace(config, seed=1), tmp_path, dtype="float32"))
    assert json.loads((tmp_path / "manifest.json").read_text())["begun"] is None
    cache_teacher(config, tmp_path, dtype="float32")
    assert (np.load(tmp_path / "epoch-0000.npy") != 0).any(1).all()


def test_a_run_that_was_killed_while_it_read_goes_on_with_the_cache_or_without(tmp_path, place, expected):
    config = config_in(place, save_every_steps=1, run_dir=str(tmp_path / "run"))
    cached = with_cache(config, place / "cache")
    killed_at(6, lambda: train(cached))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert same(trained(replace(cached, resume=True)), expected)
    assert same(trained(replace(config, resume=True, run_dir=str(tmp_path / "other"))), expected)


def test_a_resumed_run_keeps_a_cache_that_is_not_exact(tmp_path, place):
    cache_teacher(config_in(place), tmp_path / "half")
    config = config_in(place, tmp_path / "half", run_dir=str(tmp_path / "run"))
    train(replace(config, epochs=1))
    with pytest.raises(CheckpointError, match=r"a teacher.cache of float16, this run has float32 or none"):
        train(config_in(place, run_dir=config.run_dir, resume=True))
    assert train(replace(config, resume=True)).resumed_from == 4


def _change(config: TrainConfig, part: str, **changes: Any) -> TrainConfig:
    return replace(config, **{part: replace(getattr(config, part), **changes)})


def _option(config: TrainConfig, **options: Any) -> TrainConfig:
    return _change(config, "data", options={**config.data.options, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "seed": (lambda c: replace(c, seed=1), "was written with seed 0, this run has 1"),
        "epochs": (lambda c: replace(c, epochs=3), "has 2 epochs, expected the 3 of the run"),
        "precision": (lambda c: replace(c, precision="bf16"), "was written with precision 'fp32', this run has 'bf16'"),
        "fold": (lambda c: _change(c, "teacher", fold=True), "was written with teacher.fold False, this run has True"),
        "augmentation": (lambda c: _option(c, min_scale=0.5), "was written with data.options.min_scale 0.08, this run"),
        "subset": (lambda c: _change(c, "data", labelled=20), "written with labels .sha256. .*, this run has"),
        "normalization": (
            lambda c: _change(c, "teacher", normalization=((0.5,) * 3, (0.5,) * 3)),
            "was written with teacher.normalization ",
        ),
        "maps": (
            lambda c: _change(c, "objective", terms="kd+at"),
            "teacher.cache: got .* with the term 'at', which reads the teacher's intermediate maps, expected no cache",
        ),
        "last map": (lambda c: _change(c, "objective", terms="msdcrd"), "'msdcrd', which reads the teacher's maps"),
        "view": (
            lambda c: _change(c, "objective", terms="mlkd"),
            "'mlkd', which reads the teacher's output for",
        ),
        "mixup": (lambda c: _change(c, "data", mixup=0.5), "data.mixup: got 0.5 with teacher.cache, expected 0"),
        "task": (
            lambda c: replace(_change(c, "objective", terms="dcd"), task="embeddings"),
            "task: got 'embeddings' with teacher.cache, expected 'classification'",
        ),
        "folder": (lambda c: with_cache(c, Path("nowhere")), "nowhere has no manifest.json, expected a folder that"),
    }.values(),
)
def test_a_cache_of_other_settings_is_refused_by_name(place, change, message):
    with pytest.raises(ValueError, match=message) as refusal:
        train(change(config_in(place, place / "cache")))
    assert "\n" not in str(refusal.value)


def test_seeds_that_a_cache_does_not_have_are_refused_before_the_first(place):
    with pytest.raises(ValueError, match="cache is of the seed 0, expected no other in --seeds"):
        train_seeds(config_in(place, place / "cache"), [0, 1])


def _weights(folder: Path) -> None:
    save_file(SmallConvNet(3, 3, width=6).state_dict(), folder / "teacher.safetensors")


def _images(folder: Path) -> None:
    for path in (folder / "data" / "train").glob("*/*.jpg"):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).point(lambda value: 255 - value).save(path)


def _truncated(folder: Path) -> None:
    path = folder / "cache" / "epoch-0001.npy"
    os.truncate(path, path.stat().st_size - 4)


def _flipped(folder: Path) -> None:
    with (folder / "cache" / "epoch-0001.npy").open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\x01")


def _manifest(folder: Path) -> None:
    os.truncate(folder / "cache" / "manifest.json", 50)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_weights, "was written with teacher.weights .sha256. '.*', this run has '"),
        (lambda folder: (folder / "data/train/a/0.jpg").rename(folder / "data/train/b/9.jpg"), "labels .sha256."),
        (_images, "has other features than the teacher gives now, which differ by"),
        (_truncated, "epoch-0001.npy has 1132 bytes, expected 1136: it is truncated or damaged"),
        (lambda folder: (folder / "cache" / "epoch-0000.npy").unlink(), "epoch-0000.npy is missing"),
        (_flipped, "epoch-0001.npy is damaged: its bytes are not those that were written"),
        (_manifest, "manifest.json: is not JSON"),
    ],
)
def test_a_changed_teacher_or_file_is_refused(tmp_path, place, damage, message):
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    config = replace(config_in(folder, folder / "cache"), data=config_in(folder).data)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        train(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("dtype", "error", "size"), [("float16", 5e-4, 2), ("int8", 1 / 127, 1)])
def test_smaller_dtypes_are_as_exact_as_they_can_be(tmp_path, place, dtype, error, size):
    cache_teacher(config_in(place, epochs=1), tmp_path, dtype=dtype)
    exact = TeacherCache(place / "cache").rows(0, range(21))
    rows = TeacherCache(tmp_path).rows(0, range(21))
    assert rows.dtype == torch.float32
    assert ((rows - exact).abs().amax(1) <= error * exact.abs().amax(1)).all()
    assert not torch.equal(rows, exact)
    assert np.load(tmp_path / "epoch-0000.npy").nbytes == 21 * (12 * size + 4 * (dtype == "int8"))
    assert np.isfinite(train(config_in(place, tmp_path, epochs=1)).history[0]["loss"])


def test_features_that_the_dtype_cannot_hold_are_refused():
    assert np.array_equal(packed(torch.tensor([[0.0, 0.0]]), "int8")["values"], [[0, 0]])
    with pytest.raises(ValueError, match=r"expected one that holds the teacher's features, up to 1e.05"):
        packed(torch.tensor([[1e5, 0.0]]), "float16")
    with pytest.raises(ValueError, match="dtype: got 'int8', expected one that holds"):
        packed(torch.tensor([[torch.nan, 0.0]]), "int8")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, place, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1500))
    with pytest.raises(ValueError, match=r"needs 2.02e-06 GB for 2 epochs .* left: 5.16e-07 GB are missing"):
        cache_teacher(config_in(place), tmp_path, dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_command_takes_a_run_and_a_signal(tmp_path, place, capsys, monkeypatch):
    config = config_in(place, epochs=1, run_dir=str(tmp_path / "run"), quiet=False)
    write_config(Path(shutil.copytree(place / "data", tmp_path / "run")) / "config.yaml", config.to_dict(), [])
    command = ["cache-teacher", str(tmp_path / "run"), "--output", str(tmp_path / "cache"), "--dtype", "int8"]
    signals = StopRequest.__enter__

    def stopped(self: StopRequest) -> StopRequest:
        self.signal = signal.SIGTERM
        return signals(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__enter__", stopped)
        assert main(command) == 128 + signal.SIGTERM
    begun = json.loads((tmp_path / "cache" / "manifest.json").read_text())["begun"]
    assert (begun["epoch"], begun["batches"]) == (0, 1)
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "1 epoch of 21 samples x 12 features in int8, 3.36e-07 GB; 1 to write" in told
    assert "stopped; the same command goes on" in told
    assert f"use it with --teacher.cache {tmp_path / 'cache'}" in told
    assert main(["cache-teacher", "digits"]) == 1
    assert capsys.readouterr().err == "fastkd cache-teacher: --output: is missing, expected the folder of the cache\n"
    for further, message in (
        {"--dry-run": "--dry-run: is no flag here", "--seeds=0": "--seeds: is no flag here"}
    ).items():
        assert main([*command, further]) == 1
        assert message in capsys.readouterr().err
    assert main(["cache-teacher", "cifar100-ab", "--output", str(tmp_path)]) == 1
    assert "got a recipe of the stages" in capsys.readouterr().err


def test_the_plan_of_a_run_says_whether_its_cache_is_there(place):
    assert any(
        f"its features from {place / 'cache'} (found)" in line for line in plan(config_in(place, place / "cache"))
    )
    assert any("its features from nowhere (not found)" in line for line in plan(config_in(place, "nowhere")))
    with pytest.raises(ValueError, match="with the term 'at', which reads"):
        plan(_change(config_in(place, "nowhere"), "objective", terms="at"))


class _Scaled(SmallConvNet):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


def test_a_teacher_whose_logits_its_classifier_does_not_give_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match="teacher: its logits are not what its classifier makes of"):
        cache_teacher(config_in(place), tmp_path, teacher=FeatureModel(_Scaled(3, 3), "classifier"))
