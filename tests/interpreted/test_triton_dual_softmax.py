"""The dual_softmax kernels: in the interpreter, when they are chosen, and on a GPU."""

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import DCDLoss, backends, dcd_loss
from fastkd.functional.dcd import dcd_terms
from tests.helpers.checks import CONSISTENCIES, assert_close, embeddings, value_and_grads

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


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
    script = f"import sys, fastkd; assert 'triton' not in sys.modules and not {looked}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


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
def test_tf32_is_used_where_any_of_the_settings_allows_it(setting: str, allowed: bool) -> None:
    script = f"import torch; {setting}; from fastkd.backends import triton; assert triton.allows_tf32() is {allowed}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


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


def gpu_inputs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return *(x.cuda() for x in embeddings(n, d, dtype=dtype)), torch.tensor(10.0, device="cuda")


def loss_of(backend: str | None, max_scale: float = 40.0, **options: object) -> Callable[..., Tensor]:
    return lambda s, t, scale: sum(dcd_terms(s, t, scale, max_scale=max_scale, backend=backend, **options))


def eager(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    """What a careful user writes in low precision: unit rows and product in the inputs' dtype, softmax in float32."""
    s, t = (F.normalize(x.float()).to(x.dtype) for x in (student, teacher))
    A = scale * (s @ t.T).float()
    log_p, log_q = A.log_softmax(1), A.T.log_softmax(1)
    return (-log_p.diagonal() + 0.5 * (log_p.exp() * (log_p - log_q)).sum(1)).mean()


@gpu
@pytest.mark.parametrize("max_scale", [40.0, math.inf], ids=["bounded", "online"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "d"), [(3, 5), (63, 16), (129, 128), (1000, 100), (513, 256), (700, 512)])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gpu_equals_the_definition(precision: str, n: int, d: int, dtype: torch.dtype, max_scale: float) -> None:
    if precision == "high" and dtype != torch.float32:
        pytest.skip("the setting concerns float32 alone")
    inputs = gpu_inputs(n, d, dtype)
    exact = value_and_grads(loss_of("reference"), *(x.double() for x in inputs))
    torch.set_float32_matmul_precision(precision)
    try:
        low = value_and_grads(eager, *inputs)
        actual = value_and_grads(loss_of("triton", max_scale), *inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    # tf32 has the mantissa of fp16.
    tolerance = torch.float16 if precision == "high" else dtype
    for a, e, torch_result in zip(actual, exact, low, strict=True):
        assert_close(a, e, tolerance, torch_result, floor=0.1 if a.ndim == 0 else 1e-5)


@gpu
def test_gpu_one_row_has_no_negatives() -> None:
    results = value_and_grads(loss_of("triton"), *gpu_inputs(1, 1, torch.bfloat16))
    assert all(x.abs().max() <= 1e-4 for x in results)


@gpu
@pytest.mark.parametrize("n", [1, 17, 1000])
@pytest.mark.parametrize(
    ("dtype", "scale", "max_scale"),
    [(torch.float16, 10.0, 40.0), (torch.float16, 40.0, 40.0), (torch.float32, 200.0, math.inf)],
)
def test_gpu_collapsed_and_opposite_rows(dtype: torch.dtype, scale: float, max_scale: float, n: int) -> None:
    student, other = torch.eye(20, dtype=dtype, device="cuda")[:2]
    teacher = -0.9 * student + 0.4 * other
    inputs = student.repeat(n, 1), teacher.repeat(n, 1), torch.tensor(scale, device="cuda")
    torch.set_float32_matmul_precision("high")  # fp32, too, through the streaming kernels
    try:
        results = value_and_grads(loss_of("triton", max_scale), *inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(x.isfinite().all() for x in results)


@gpu
@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gpu_frozen_inputs_and_weights(wanted: tuple[int, ...], consistency: str) -> None:
    weight = torch.rand(300, device="cuda")
    loss = loss_of("triton", consistency=consistency, sample_weight=weight)
    inputs = gpu_inputs(300, 128, torch.bfloat16)
    full = value_and_grads(loss, *inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    loss(*leaves).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            assert_close(leaf.grad, full[1 + i], torch.float32 if i == 2 else torch.bfloat16)


@gpu
def test_gpu_large_batch_equals_streaming_torch_and_itself() -> None:
    inputs = gpu_inputs(20_000, 128, torch.bfloat16)
    one = value_and_grads(loss_of("triton"), *inputs)
    again = value_and_grads(loss_of("triton"), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    expected = value_and_grads(loss_of("blocked"), *(x.float() for x in inputs))
    for a, e in zip(one, expected, strict=True):
        assert_close(a, e, torch.bfloat16)


@gpu
@pytest.mark.parametrize("d", [128, 512])
def test_gpu_memory_is_linear_and_no_host_synchronisation(d: int) -> None:
    inputs = gpu_inputs(8192, d, torch.bfloat16)
    value_and_grads(loss_of("triton"), *inputs)
    leaves = [x.requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of("triton")(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < (64 if d == 128 else 256) * 2**20  # N x N alone is 256 MiB


@gpu
def test_gpu_element_offsets_beyond_two_to_the_31() -> None:
    """2^24 + 3 rows of 128: the last rows lie beyond 2^31 elements. Few columns keep the work small."""
    from fastkd.kernels.dual_softmax import streaming as dual_softmax
    from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
    from fastkd.kernels.normalize import unit_rows

    n, columns, tail = 2**24 + 3, 64, 50
    raw = torch.randn(2, n, 128, device="cuda", dtype=torch.bfloat16)
    scale, one = torch.tensor(10.0, device="cuda"), torch.tensor(1.0, device="cuda")

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        units, inverse_norm = unit_rows(rows[0], rows[1], 128)
        own = raw[:, :columns]
        column_units = unit_rows(own[0], own[1], 128)[0]
        far = 2**30  # no row's positive is among the columns
        state = dual_softmax.running_statistics(units, column_units, scale, offset=far, bounded=True)
        stats = statistics(state, scale, None, swapped=False)[1]
        coef, unscale = coefficients(stats, None, one, one, scale, swapped=False, bounded=True)
        partial = dual_softmax.gradient_sums(
            units, column_units, coef, coef[:, :columns].contiguous(), scale, offset=far, bounded=True, need_a=True,
            need_b=False,
        )  # fmt: skip
        return stats, gradients(
            partial, units, inverse_norm, scale, unscale, D=128, dtype=torch.bfloat16, need_a=True, need_b=False
        )[0]

    # The first rows are the columns, so that both runs see the same ones.
    few = torch.cat([raw[:, :columns], raw[:, -tail:]], dim=1)
    stats, grad = run(raw)
    few_stats, few_grad = run(few)
    assert_close(stats[:, -tail:], few_stats[:, -tail:], torch.float32)
    assert_close(grad[-tail:], few_grad[-tail:], torch.bfloat16)


@gpu
def test_gpu_replays_from_a_cuda_graph() -> None:
    inputs = [x.requires_grad_() for x in gpu_inputs(1000, 128, torch.bfloat16)]
    fresh = gpu_inputs(1000, 128, torch.bfloat16)[0].flip(0)

    def step() -> tuple[Tensor, ...]:
        loss = loss_of("triton")(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs[0].copy_(fresh)
    graph.replay()
    for a, e in zip(results, step(), strict=True):
        assert torch.equal(a, e)


@gpu
def test_gpu_compiles_as_one_graph_and_picks_the_kernels() -> None:
    inputs = gpu_inputs(300, 128, torch.bfloat16)
    compiled = torch.compile(loss_of(None), fullgraph=True)
    for a, e in zip(value_and_grads(compiled, *inputs), value_and_grads(loss_of("triton"), *inputs), strict=True):
        assert_close(a, e, a.dtype)
