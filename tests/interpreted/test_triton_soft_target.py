"""The soft_target kernels: in the interpreter, in the width of their loads, and on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd import backends, kd_loss
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import assert_close, terms_and_gradient

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_kernels_in_the_interpreter() -> None:
    """A process of its own: the interpreter is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_soft_target.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rows_of_1000_classes_are_read_and_written_16_bytes_at_a_time(direction: str, tmp_path: Path) -> None:
    """Triton itself knows only of strides divisible by 16; ALIGN has to tell it that 1000 is divisible by 8."""
    from bench.aot import dual_softmax as aot

    names = {job.name: job for job in aot.jobs("sm_90") if job.constants.get("BLOCK_N") == 1024}
    job = names[f"soft_target_{direction} bf16"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(job.compile().asm["cubin"])
    code = subprocess.run(
        [aot.BINARIES / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    per_thread = 1024 // 32 // job.num_warps  # elements, 8 of which make 16 bytes
    assert len(re.findall(r"LDG\.E\.128", code)) == 2 * per_thread // 8
    assert len(re.findall(r"STG\.E\.128", code)) == (per_thread // 8 if direction == "backward" else 0)


def test_more_classes_than_a_normalised_row_may_be_wide_still_have_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, ndim, device, dtype = True, 2, torch.device("cuda", 0), torch.bfloat16
        shape = (8, 128 * 1024)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(backends, "_launch_error", lambda: None)
    assert OnGpu.shape[1] > backends.MAX_WIDTH
    assert backends.resolve(None, "soft_target", OnGpu()) == "triton"


def on_gpu(n: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    student, teacher = (
        torch.randn(n, classes, generator=generator, device="cuda", dtype=torch.float32).mul_(3).to(dtype)
        for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (n,), generator=generator, device="cuda")


def check_on_gpu(student: Tensor, teacher: Tensor, labels: Tensor, **options: object) -> None:
    exact = terms_and_gradient(student.double(), teacher.double(), labels, (0.7, -1.3), backend="reference", **options)
    low = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="reference", **options)
    actual = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="triton", **options)
    again = terms_and_gradient(student, teacher, labels, (0.7, -1.3), backend="triton", **options)
    for a, e, low_value, dtype in zip(actual, exact, low, (torch.float32, torch.float32, student.dtype), strict=True):
        assert_close(a, e, dtype, low_value)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "classes"), [(5, 1), (64, 10), (1000, 100), (256, 1000), (33, 1001), (7, 5000)])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_equals_the_definition_on_a_gpu(n: int, classes: int, dtype: torch.dtype, temperature: float) -> None:
    weight = torch.rand(n, device="cuda")
    check_on_gpu(*on_gpu(n, classes, dtype), temperature=temperature, label_smoothing=0.1, sample_weight=weight)


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [1, 40, 600])
@pytest.mark.parametrize("classes", [128 * 1024, 128 * 1024 - 3])
def test_131072_classes_split_or_not(n: int, classes: int) -> None:
    check_on_gpu(*on_gpu(n, classes, torch.bfloat16), label_smoothing=0.1)


@gpu
@needs_gpu
def test_offsets_beyond_two_to_the_31() -> None:
    classes = 128 * 1024
    n = 2**31 // classes + 2
    student, teacher, labels = on_gpu(n, classes, torch.bfloat16)
    leaf = student.requires_grad_()
    ce, kd = ce_kd_terms(leaf, teacher, labels, backend="triton")
    (ce + kd).backward()
    last = terms_and_gradient(student[-2:].double(), teacher[-2:].double(), labels[-2:], backend="reference")
    low = terms_and_gradient(student[-2:], teacher[-2:], labels[-2:], backend="reference")
    assert_close(leaf.grad[-2:] * (n / 2), last[2], torch.bfloat16, low[2])
    assert_close(torch.stack([ce, kd]), torch.stack(blocked_means(student, teacher, labels)), torch.float32)


def blocked_means(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(ce_kd_terms(student, teacher, labels, backend="blocked"))


@gpu
@needs_gpu
def test_captured_in_a_cuda_graph_without_waiting_for_the_host() -> None:
    student, teacher, labels = on_gpu(128, 1000, torch.bfloat16)
    weight = torch.rand(128, device="cuda")
    leaf = student.clone().requires_grad_()
    leaf.grad = torch.zeros_like(leaf)

    def step() -> Tensor:
        leaf.grad.zero_()
        ce, kd = ce_kd_terms(leaf, teacher, labels, label_smoothing=0.1, sample_weight=weight)
        total = ce + kd
        total.backward()
        return total

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    with torch.no_grad():
        leaf.copy_(student.flip(0))
    graph.replay()
    expected = terms_and_gradient(student.flip(0), teacher, labels, label_smoothing=0.1, sample_weight=weight)
    assert_close(total, expected[0] + expected[1], torch.float32)
    assert torch.equal(leaf.grad, expected[2])


@gpu
@needs_gpu
def test_a_bad_label_on_a_gpu_makes_the_cross_entropy_nan_and_nothing_else() -> None:
    student, teacher, labels = on_gpu(8, 1000, torch.float32)
    labels[3] = 1000
    for backend in ("triton", "blocked", "reference"):
        ce, kd = ce_kd_terms(student, teacher, labels, backend=backend)
        assert ce.isnan()
        assert kd.isfinite()
    assert_close(kd_loss(student, teacher), kd, torch.float32)
