"""A rank that is killed, stopped or raises, or whose disk is full, ends the others within the time-out, by its name."""

import dataclasses
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tests.helpers.ranks import _context, under_torchrun
from tests.helpers.trainer_runs import tiny_config

pytestmark = pytest.mark.slow
TIMEOUT, PATIENCE = 2.0, 2.0
SILENT = "RankLostError: rank 1 of 2 gave no sign of life for 2 s: killed, stopped, or out of reach"


def program(fault: str, folder: str) -> None:
    """A rank of a run in which something happens to one rank at step 6. The last line it writes says how it ended."""
    import fastkd.trainer.run.step as module
    from fastkd.trainer import pulse, train

    torch.set_num_threads(1)
    pulse.BEAT, pulse.PATIENCE = 0.4, PATIENCE
    rank = int(os.environ["RANK"])
    call, steps = module.TrainStep.__call__, itertools.count(1)

    def step(self, *arguments):
        if next(steps) == 6:
            if fault == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "killed 0" and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stopped" and rank == 1:
                # torchrun would wait for it for 30 seconds.
                subprocess.Popen(["sh", "-c", f"sleep {TIMEOUT + PATIENCE + 1}; kill -KILL {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "busy" and rank == 1:
                time.sleep(TIMEOUT + PATIENCE + 1)
            if fault == "raising" and rank == 1:
                raise LookupError("no such image")
            if fault == "full disk" and rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return call(self, *arguments)

    module.TrainStep.__call__ = step
    config = tiny_config(Path(folder), rank_timeout=TIMEOUT, save_every_steps=3)
    if fault == "differing" and rank == 1:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.25), seed=3)
    try:
        train(config)
        how = "finished"
    except Exception as error:
        how = f"{type(error).__name__}: {error}"
    Path(folder, f"ended-{rank}").write_text(how)


def _rank(fault: str, folder: str, rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    program(fault, folder)


def ended(folder: Path) -> list[str]:
    return [(folder / f"ended-{rank}").read_text() if (folder / f"ended-{rank}").exists() else "" for rank in range(2)]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            "raising",
            [r"RankLostError: rank 1 of 2 ended with LookupError: no such image", "LookupError: no such image"],
        ),
        ("killed", [SILENT, ""]),
        ("killed 0", ["", r"RankLostError: the process in which torchrun or rank 0 of 2 ran has ended"]),
        (
            "busy",
            [r"RankLostError: rank 1 of 2 did not answer within 2 s \(rank_timeout\), but its process lives", ".*"],
        ),
        ("full disk", [r"CheckpointError: .*/metrics\.jsonl: cannot be written \(File too large\)"] * 2),
        (
            "differing",
            [
                r"ValueError: optim\.lr: got 0\.05 on rank 0, 0\.25 on rank 1; seed: got 0 on rank 0, 3 on rank 1; "
                "expected the same on every rank"
            ]
            * 2,
        ),
    ],
)
def test_what_ends_one_rank_ends_the_other_which_names_it(tmp_path, fault, expected):
    tiny_config(tmp_path)  # writes the teacher
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_context.Process(target=_rank, args=(fault, str(tmp_path), rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    for found, pattern in zip(ended(tmp_path), expected, strict=True):
        assert re.fullmatch(pattern, found), found


def test_a_stopped_rank_is_named_under_torchrun(tmp_path):
    """The run can be resumed; torchrun kills the process that was stopped."""
    from fastkd.trainer import train

    config = tiny_config(tmp_path, save_every_steps=3)
    with pytest.raises(ChildFailedError):
        under_torchrun(program, "stopped", str(tmp_path))
    assert ended(tmp_path) == [SILENT, ""]
    assert train(dataclasses.replace(config, resume=True)).resumed_from == 3
