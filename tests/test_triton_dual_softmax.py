"""The Triton backend: its kernels in the interpreter, its launch table, and when it is chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import backends, dcd_loss, info_nce_loss
from tests.checks import embeddings

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def test_kernels_in_the_interpreter() -> None:
    """A process of its own: the interpreter is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_dual_softmax.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_triton_refuses_what_it_cannot_compute() -> None:
    student, teacher = embeddings(4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        dcd_loss(student, teacher, 3.0, backend="triton")
    with pytest.raises(ValueError, match="no kernel for contrast"):
        info_nce_loss(student, teacher, 3.0, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        dcd_loss(student.double(), teacher.double(), 3.0, backend="triton")


def test_cpu_tensors_stream_through_blocked_by_default() -> None:
    assert backends.resolve(None, "dual_softmax", torch.ones(2, 2)) == "blocked"


class OnGpu:
    """What ``resolve`` reads of a CUDA tensor."""

    is_cuda, ndim, device = True, 2, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 128) -> None:
        self.dtype, self.shape = dtype, (8, width)


@pytest.mark.parametrize(
    ("operation", "like", "capability", "expected"),
    [
        ("dual_softmax", OnGpu(), (9, 0), "triton"),
        ("dual_softmax", OnGpu(), (7, 5), "blocked"),
        ("dual_softmax", OnGpu(torch.float64), (9, 0), "blocked"),
        ("dual_softmax", OnGpu(width=backends.MAX_WIDTH + 1), (9, 0), "blocked"),
        ("contrast", OnGpu(), (9, 0), "blocked"),
    ],
)
def test_cuda_tensors_get_the_kernels_that_exist(
    operation: str, like: OnGpu, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    assert backends.resolve(None, operation, like) == expected


def test_cuda_tensors_stream_through_blocked_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.resolve(None, "dual_softmax", OnGpu()) == "blocked"
    with pytest.raises(ValueError, match="not installed"):
        backends.resolve("triton", "dual_softmax", OnGpu())
