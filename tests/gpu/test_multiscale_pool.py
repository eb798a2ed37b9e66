"""The multiscale_pool kernels on a GPU."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd import multiscale_pool
from tests.helpers.checks import assert_close
from tests.helpers.gpu import assert_replays_from_a_cuda_graph, bandwidth, gpu, large, sanitizer
from tests.helpers.pool_cases import FORMATS, check_pool, out_and_grad

pytest.importorskip("triton")
USUAL = [7, 4, 2], [1, 1, 1]


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    return x.contiguous(memory_format=memory_format)


def check_on_gpu(x: Tensor, windows: list, strides: list, **options: object) -> None:
    actual = check_pool(x, windows, strides, **options)
    again = out_and_grad(x, windows, strides, backend="triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    assert actual[1].stride() == torch.empty_like(x).stride()


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("shape", "windows", "strides"),
    [
        pytest.param((5, 37, 3, 3), [3, 2], [1, 1], id="one-tile", marks=sanitizer),
        pytest.param((33, 512, 7, 7), *USUAL, id="usual"),
        pytest.param((9, 384, 14, 14), [14, 7, 4, 2], [1, 1, 2, 2], id="several-tiles"),
        pytest.param((4, 65, 9, 16), [(9, 16), (3, 5), 2], [1, (2, 1), 3], id="rectangular", marks=sanitizer),
        pytest.param((2, 64, 56, 56), [56, 28, 7], [1, 1, 1], id="large"),
        pytest.param((3, 1, 8, 8), [8, 1], [1, 1], id="one-channel"),
        pytest.param((0, 3, 4, 4), [2], [1], id="no-sample"),
    ],
)
def test_equals_the_definition_on_a_gpu(
    shape: tuple[int, ...],
    windows: list,
    strides: list,
    normalize: bool,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    check_on_gpu(on_gpu(shape, dtype, memory_format), windows, strides, normalize=normalize)


@gpu
def test_fp32_is_not_rounded_to_tf32() -> None:
    """A tf32 sum would be wrong by 1e-4: the operands are the sum of two tf32 numbers."""
    x = on_gpu((4, 64, 7, 7), torch.float32, FORMATS[0])
    exact = out_and_grad(x.double(), *USUAL, backend="reference")
    for actual, expected in zip(out_and_grad(x, *USUAL, backend="triton"), exact, strict=True):
        assert ((actual - expected).abs().max() / expected.abs().max()).item() < 3e-6


@gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_another_dtype_on_a_gpu(out_dtype: torch.dtype) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_on_gpu(on_gpu((8, 100, 7, 7), dtype, FORMATS[1]), *USUAL, normalize=True, dtype=out_dtype)


@gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_values_that_are_not_finite_reach_their_windows_only_on_a_gpu(
    bad: float, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x = on_gpu((3, 70, 7, 7), dtype, memory_format)
    x[1, 66, 3, 0] = bad
    expected = out_and_grad(x, [4, 2, 1], [1, 2, 3], backend="reference")[0]
    actual = out_and_grad(x, [4, 2, 1], [1, 2, 3], backend="triton")[0]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])
    assert_close(actual[expected.isfinite()], expected[expected.isfinite()], dtype)
    grads = []
    for backend in ("reference", "triton"):
        leaf = on_gpu((3, 70, 7, 7), dtype, memory_format).requires_grad_()
        out = multiscale_pool(leaf, [4, 2], [1, 2], backend=backend)
        upstream = torch.ones_like(out)
        upstream[1, 5, 66] = bad
        out.backward(upstream)
        grads.append(leaf.grad)
    finite = grads[0].isfinite()
    assert torch.equal(grads[1].isfinite(), finite)
    assert_close(grads[1][finite], grads[0][finite], dtype)


@gpu
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-13, 1e-10, 1e37])
def test_zero_tiny_and_huge_rows_normalise_as_in_the_definition_on_a_gpu(scale: float) -> None:
    x = scale * on_gpu((3, 200, 3, 3), torch.float32, FORMATS[0])
    x[:, :128] *= 1e-3  # the largest magnitude comes in a later tile of channels
    out, grad = out_and_grad(x, [3, 2], [1, 1], normalize=True, backend="triton")
    exact = out_and_grad(x.double(), [3, 2], [1, 1], normalize=True, backend="reference")
    assert_close(out, exact[0], torch.float32)
    assert_close(grad, exact[1], torch.float32, floor=1e-30)


@gpu
@large
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_offsets_beyond_two_to_the_31(memory_format: torch.memory_format) -> None:
    samples = 2**31 // (512 * 49) + 2
    x = torch.zeros(samples, 512, 7, 7, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory_format)
    x[-2:] = on_gpu((2, 512, 7, 7), torch.bfloat16, memory_format)
    leaf = x.requires_grad_()
    out = multiscale_pool(leaf, *USUAL, backend="triton")
    assert_close(out[-2:], multiscale_pool(x[-2:].double(), *USUAL, backend="reference"), torch.bfloat16)
    out.backward(torch.ones((), dtype=out.dtype, device="cuda").expand(out.shape))
    expected = out_of_ones(x[-2:].detach())
    assert_close(leaf.grad[-2:], expected, torch.bfloat16)


def out_of_ones(x: Tensor) -> Tensor:
    leaf = x.double().requires_grad_()
    multiscale_pool(leaf, *USUAL, backend="reference").sum().backward()
    return leaf.grad


@gpu
def test_captured_in_a_cuda_graph_without_waiting_for_the_host() -> None:
    x = on_gpu((16, 128, 7, 7), torch.bfloat16, FORMATS[0])
    leaf = x.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = multiscale_pool(leaf, *USUAL, normalize=True)
        return out, *torch.autograd.grad(out, [leaf], out.detach().cos())

    assert_replays_from_a_cuda_graph(step, leaf, x.flip(0))


@gpu
@bandwidth
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_reaches_four_fifths_of_the_copy_bandwidth(
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    normalize: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Against the bytes that cannot be avoided; a map far beyond any cache, whose kernels outlast their launching."""
    from bench import measure

    device = torch.device("cuda")
    x = on_gpu((16384, 512, 7, 7), dtype, memory_format).requires_grad_()
    upstream = torch.randn_like(multiscale_pool(x.detach(), *USUAL, normalize=normalize))

    def step() -> None:
        x.grad = None
        multiscale_pool(x, *USUAL, normalize=normalize, backend="triton").backward(upstream)

    moved = 2 * x.numel() + (3 if normalize else 2) * upstream.numel()  # the backward reads unit rows, too
    reached = moved * dtype.itemsize / measure.median_ms(step, device, 0.2) / 1e6
    share = reached / measure.copy_gb_per_s(device, quick=False)
    record_property("share of the copy bandwidth", f"{share:.2f}")
    assert share >= 0.8
