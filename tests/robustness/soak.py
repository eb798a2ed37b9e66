"""Faults in a run at random moments, after which it must end as the uninterrupted one, bit for bit.

``python -m tests.robustness.soak --faults 50`` makes 50 of them and prints a line per kind.
"""

import argparse
import dataclasses
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastkd.trainer import CheckpointError, TrainConfig, train
from fastkd.trainer.run import loop
from fastkd.trainer.run.saved.checkpoint import CheckpointFolder, list_checkpoints, read_checkpoint
from fastkd.trainer.run.state import RunState
from fastkd.trainer.run.step import TrainStep
from tests.helpers.imagenet_like import CLASSES, data, student, teacher, write_images
from tests.helpers.trainer_runs import same

REFUSED, FULL = 3, 4  # how a process ends that was told "another process", or that a file cannot be written
_fork = multiprocessing.get_context("fork")  # the children have imported everything
# Where a run is when it is killed: the function in which the clock of the bomb begins to run, and the longest time.
MOMENTS: dict[str, tuple[Any, str, float]] = {
    "killed while it starts": (loop, "open_run", 0.3),
    "killed while it resumes": (RunState, "restore", 0.1),
    "killed while it saves": (CheckpointFolder, "save", 0.05),
    "killed while it evaluates": (loop, "evaluate", 0.1),
}
OVERLAP, DISK = "two processes at once", "full disk"
KINDS = (*MOMENTS, OVERLAP, DISK)


def forked(config: TrainConfig, prepare: Callable[[], Any] = lambda: None) -> Any:
    """A process that calls ``prepare`` and trains. Its exit code: 0, ``REFUSED``, ``FULL``, 1, or minus a signal."""
    process = _fork.Process(target=_train, args=(config, prepare))
    process.start()
    return process


def _train(config: TrainConfig, prepare: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    prepare()
    try:
        train(config)
    except CheckpointError as error:
        if "another process" in str(error):
            os._exit(REFUSED)
        if "cannot be written" in str(error):
            os._exit(FULL)
        raise


def at_call(owner: Any, name: str, number: int, action: Callable[[], Any]) -> None:
    """In this process, make the ``number``-th call of ``owner.name`` do ``action`` first."""
    original, calls = getattr(owner, name), 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*arguments, **options)

    setattr(owner, name, called)


def _bomb(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _fill_disk(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fault(kind: str, config: TrainConfig, generator: random.Random) -> list[int]:
    """Train with one fault of this kind; the exit codes of the processes."""
    if kind == OVERLAP:
        processes = []
        for _ in range(2):  # the second is refused, or goes on when the first is dead
            explode = partial(_bomb, generator.uniform(0, 0.05))
            processes.append(forked(config, partial(at_call, TrainStep, "__call__", generator.randint(1, 6), explode)))
            time.sleep(generator.uniform(0, 1.0))
    elif kind == DISK:
        call, size = generator.randint(1, 4), int(2 ** generator.uniform(0, 15))
        processes = [forked(config, lambda: at_call(CheckpointFolder, "save", call, lambda: _fill_disk(size)))]
    else:
        owner, name, longest = MOMENTS[kind]
        call = generator.randint(1, 4) if owner is CheckpointFolder else generator.randint(1, 2)
        call = 1 if name in ("open_run", "restore") else call
        seconds = generator.uniform(0, longest)
        processes = [forked(config, lambda: at_call(owner, name, call, lambda: _bomb(seconds)))]
    codes = []
    for process in processes:
        process.join(300)
        codes.append(process.exitcode)
    allowed = {OVERLAP: {REFUSED, -signal.SIGKILL}, DISK: {FULL}}.get(kind, {-signal.SIGKILL})
    assert {*codes} <= allowed, f"{kind}: ended with {codes}, expected {allowed}"
    return codes


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which is whole; -1 if there is none."""
    found = list_checkpoints(run / "checkpoints")
    return int(read_checkpoint(found[-1]).manifest["step"]) if found else -1


def soak(
    faults: int, seed: int, folder: Path, workers: int = 2, images: int = 6, of: tuple[str, ...] = KINDS
) -> dict[str, int]:
    """How many faults of each kind a run survived. AssertionError if anything that was reported as saved is lost.

    The run has more steps than it takes between all faults. ``images``: of every class.
    """
    generator = random.Random(seed)
    write_images(folder, train=images, val=1)
    _complete(dataclasses.replace(teacher(str(folder)), quiet=True))
    base = dataclasses.replace(
        student(str(folder)), epochs=max(4, 2 * faults), save_every_steps=1, quiet=True, keep=3,
        data=data(str(folder), workers=workers, batch=CLASSES * images // 3),
    )  # fmt: skip
    whole, cut = (dataclasses.replace(base, run_dir=str(folder / name)) for name in ("whole", "cut"))
    _complete(whole)
    again = dataclasses.replace(cut, resume_or_start=True)
    kinds = [of[number % len(of)] for number in range(faults)]
    generator.shuffle(kinds)
    saved, done = -1, Counter[str]()
    for kind in kinds:
        if kind == "killed while it resumes" and saved < 0:  # there is nothing to resume yet
            kind = "killed while it saves"
        fault(kind, again, generator)
        found = newest(folder / "cut")
        assert found >= saved, f"{kind}: step {saved} was saved, the newest is {found}"
        saved = found
        done[kind] += 1
    _complete(again)
    check_same_run(folder / "whole", folder / "cut")
    return {kind: done[kind] for kind in of}


def _complete(config: TrainConfig) -> None:
    process = forked(config)
    process.join(3600)
    assert process.exitcode == 0, f"{config.run_dir}: ended with {process.exitcode}"


def check_same_run(whole: Path, cut: Path) -> None:
    one, other = (read_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, cut))
    assert one.weights.keys() == other.weights.keys()
    for name in one.weights:
        assert same(one.weights[name], other.weights[name]), f"{name} differs"
    assert one.state.keys() == other.state.keys()
    for name in one.state.keys() - {"seconds"}:
        assert same(one.state[name], other.state[name]), f"{name} of the state differs"
    assert not list((cut / "checkpoints").glob(".tmp-*"))
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        survived = soak(options.faults, options.seed, Path(place))
    for kind, count in survived.items():
        print(f"{count:4d}  {kind}")
    print(f"{sum(survived.values()):4d}  faults in {time.perf_counter() - started:.0f} s: nothing lost, the same bits")
