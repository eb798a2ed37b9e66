"""A run folder has one owner from the first read to the last write, and nothing is written through a link."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from fastkd.trainer import CheckpointError, train
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.files import FolderLock
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from tests.helpers.trainer_runs import noisy_data, one_thread, tiny_config  # noqa: F401
from tests.robustness.soak import REFUSED, check_same_run, forked

pytestmark = pytest.mark.slow


def few_images():
    return noisy_data(12)


@pytest.fixture
def short(tmp_path):
    """Three steps, each of which is saved."""
    data = DataConfig(name="tests.run.test_owner:few_images", batch_size=4)
    return tiny_config(tmp_path, data=data, epochs=1, save_every_steps=1, run_dir=str(tmp_path / "whole"))


def stop_at_file_operation(number: int, folder: Path) -> None:
    """Stop this process (SIGSTOP) before the ``number``-th operation on a file or folder in ``folder``."""
    count = 0

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if any(isinstance(value, str | Path) and str(value).startswith(str(folder)) for value in arguments):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(look)  # opening, listing, renaming, removing, making: all that Python does to a path


@pytest.mark.parametrize("state", ["new", "begun"])
def test_two_processes_at_every_step_of_each_other_lose_nothing(short, tmp_path, state):
    """The first is stopped before every few of its steps on the folder, while the second runs to its end."""
    train(short)
    begun = dataclasses.replace(short, run_dir=str(tmp_path / "begun"))
    folder = tmp_path / "both"
    again = dataclasses.replace(short, run_dir=str(folder), resume_or_start=True)
    if state == "begun":
        train(begun)
        for path in list_checkpoints(tmp_path / "begun" / "checkpoints")[1:]:
            shutil.rmtree(path)  # the first that was kept is that of step 2
    number, refused, stopped = 1, 0, True
    while stopped:
        shutil.rmtree(folder, ignore_errors=True)
        if state == "begun":
            shutil.copytree(tmp_path / "begun", folder)
        first = forked(again, lambda: stop_at_file_operation(number, folder))  # noqa: B023
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        if stopped:
            second = forked(again)
            second.join(60)
            assert second.exitcode in (0, REFUSED), number
            refused += second.exitcode == REFUSED
            saved = read_checkpoint(find_checkpoint(folder)).manifest["step"] if second.exitcode == 0 else 0
            os.kill(first.pid, signal.SIGCONT)
            first.join(60)
            assert first.exitcode == 0, number  # it was the owner, or it found the finished run
            assert read_checkpoint(find_checkpoint(folder)).manifest["step"] >= saved
        check_same_run(tmp_path / "whole", folder)
        number += 5 if state == "new" else 3
    assert refused > 5
    assert number > 20


def test_a_folder_that_was_removed_or_taken_meanwhile_is_not_written_to(tmp_path):
    lock = FolderLock(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="another process is training in this run folder"):
        FolderLock(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / ".lock").unlink()
    lock.check()  # nobody took it
    (tmp_path / "run" / "checkpoints" / ".lock").unlink()
    other = FolderLock(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="another process"):
        lock.check()
    other.close()
    other = FolderLock(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoints: was removed while a run was training in it"):
        other.check()
    for one in (lock, other):
        one.close()
    assert not (tmp_path / "run").exists()


def test_a_forked_process_that_outlives_the_owner_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path / "run")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"forked")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(reading, 6) == b"forked"
        lock._lock.close()  # what the kernel does when the owner dies
        FolderLock(tmp_path / "run").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl", "tensorboard", "checkpoints", "checkpoints/.lock"])
def test_a_run_writes_through_no_link(short, tmp_path, name, kind):
    train(dataclasses.replace(short, run_dir=str(tmp_path / "run")))
    file, target = tmp_path / "run" / name, tmp_path / "of someone else"
    if kind == "hard" and (not file.is_file() or name == "checkpoints/.lock"):
        pytest.skip("folders have no hard links; the lock is empty")
    shutil.rmtree(find_checkpoint(tmp_path / "run"))  # there are steps to take
    if file.exists():
        shutil.move(file, target)
    else:
        target.mkdir()
    (os.symlink if kind == "symbolic" else os.link)(target, file)
    before = {path: path.read_bytes() for path in (target, *target.rglob("*")) if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"{name}: (is a|cannot be locked)"):
        train(dataclasses.replace(short, run_dir=str(tmp_path / "run"), resume=True))
    assert {path: path.read_bytes() for path in (target, *target.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("name", ["run.json", "classes.json", "config.yaml"])
def test_a_file_that_is_replaced_leaves_the_target_of_a_link_alone(short, tmp_path, name):
    """The link itself, or that of the name under which it is written first, is replaced."""
    target = tmp_path / "of someone else"
    target.write_text("precious")
    (tmp_path / "run").mkdir()
    for link in (name, f"{name}.tmp"):
        if link != "run.json":  # which would be a run
            os.symlink(target, tmp_path / "run" / link)
    train(dataclasses.replace(short, run_dir=str(tmp_path / "run")))
    assert target.read_text() == "precious"
    assert "precious" not in (tmp_path / "run" / name).read_text()


def test_a_link_among_the_checkpoints_is_removed_and_its_target_stays(short, tmp_path):
    train(dataclasses.replace(short, run_dir=str(tmp_path / "run")))
    newest = find_checkpoint(tmp_path / "run")
    other = tmp_path / "other"
    shutil.move(newest.with_name("step-00000002"), other)
    newest.with_name("step-00000002").symlink_to(other)
    train(dataclasses.replace(short, run_dir=str(tmp_path / "run"), resume=True, epochs=2))
    assert not newest.with_name("step-00000002").is_symlink()
    assert read_checkpoint(other).manifest["step"] == 2


def test_records_are_cut_off_only_after_everything_is_checked(short, tmp_path):
    from fastkd.trainer import Callback

    class Failing(Callback):
        def on_start(self, info, folder, step):
            raise LookupError("no tracker")

    config = dataclasses.replace(short, run_dir=str(tmp_path / "run"), resume=True)
    train(dataclasses.replace(config, resume=False))
    shutil.rmtree(find_checkpoint(config.run_dir))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(LookupError, match="no tracker"):
        train(config, callbacks=[Failing()])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert train(config).resumed_from == 2
