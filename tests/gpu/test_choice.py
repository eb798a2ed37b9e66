"""Which tensors get the kernels, and what happens where Triton cannot launch them. Runs without a GPU."""

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastkd import DCDLoss, backends, dcd_loss
from tests.helpers.checks import embeddings
from tests.helpers.processes import Forks

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_triton_refuses_what_it_cannot_compute() -> None:
    student, teacher = embeddings(4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        dcd_loss(student, teacher, 3.0, backend="triton")
    with pytest.raises(ValueError, match="no kernel for rotate"):
        backends.resolve("triton", "rotate", student)
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
        ("contrast", OnGpu(), (9, 0), "triton"),
        ("contrast", OnGpu(torch.float64), (9, 0), "blocked"),
        *(("contrast", OnGpu(width=width), (9, 0), "triton") for width in (1, 128, 21841)),
        # More classes than a normalised row may be wide.
        ("soft_target", OnGpu(width=128 * 1024), (9, 0), "triton"),
        ("dual_softmax", OnGpu(), (12, 0), "blocked"),
        ("soft_target", OnGpu(), (12, 0), "triton"),
    ],
)
def test_cuda_tensors_get_the_kernels_that_exist(
    operation: str, like: OnGpu, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(backends, "_launch_error", lambda: None)
    assert backends.resolve(None, operation, like) == expected


def test_a_row_of_classes_may_be_wider_than_a_normalised_row() -> None:
    assert backends.MAX_WIDTH < 128 * 1024


def test_cuda_tensors_stream_through_blocked_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.resolve(None, "dual_softmax", OnGpu()) == "blocked"
    with pytest.raises(ValueError, match="not installed"):
        backends.resolve("triton", "dual_softmax", OnGpu())


def test_kernels_that_spill_run_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (12, 0))
    monkeypatch.setattr(backends, "_launch_error", lambda: None)
    assert backends.resolve("triton", "dual_softmax", OnGpu()) == "triton"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, ["gcc", "no Python.h"]),
        AssertionError("libcuda.so cannot found!"),
    ],
    ids=["compiler", "headers", "driver"],
)
def test_cuda_tensors_stream_through_blocked_where_triton_cannot_launch(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.runtime.driver

    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    config = triton.runtime.driver
    monkeypatch.setattr(config, "_active", None)
    monkeypatch.setattr(config, "_default", None)
    monkeypatch.setattr(sys.modules[type(config).__module__], "_create_driver", fail)
    backends._launch_error.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"cannot launch kernels here.*{re.escape(str(error))}"):
            assert backends.resolve(None, "dual_softmax", OnGpu()) == "blocked"
        with warnings.catch_warnings(action="error"):  # once is enough
            assert backends.resolve(None, "soft_target", OnGpu()) == "blocked"
        with pytest.raises(ValueError, match="cannot launch kernels here"):
            backends.resolve("triton", "dual_softmax", OnGpu())
    finally:
        backends._launch_error.cache_clear()


def test_importing_fastkd_neither_imports_triton_nor_looks_for_a_driver() -> None:
    looked = "fastkd.backends._launch_error.cache_info().misses"
    script = f"import sys, fastkd; fastkd.dcd_loss; assert 'triton' not in sys.modules and not {looked}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.set_float32_matmul_precision('highest')", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
    ],
)
def test_tf32_is_used_where_any_of_the_settings_allows_it(
    setting: str, allowed: bool, forks: Forks, tmp_path: Path
) -> None:
    check = f"from fastkd.kernels.launch import allows_tf32; assert allows_tf32() is {allowed}"
    forks.run(f"import torch; {setting}; {check}", errors=tmp_path / "errors")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10.0),
        ({"max_scale": None}, math.inf),
        ({"learnable": False}, 1 / 0.07),
        ({"learnable": False, "temperature": 0.01}, 100.0),
    ],
)
def test_the_module_tells_the_bound_of_its_scale(
    options: dict[str, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []
    zero = torch.zeros(())
    monkeypatch.setattr(
        "fastkd.losses.dcd.dcd_terms", lambda *args, max_scale, **kwargs: bounds.append(max_scale) or (zero, zero)
    )
    DCDLoss(6, 5, 4, **options)(torch.ones(3, 6), torch.ones(3, 5))
    assert bounds == [pytest.approx(expected)]
