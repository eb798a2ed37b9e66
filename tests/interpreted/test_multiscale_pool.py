"""The multiscale_pool kernels: every flag, maps of one tile and of several."""

import math

import pytest
import torch
from fastkd.kernels import multiscale_pool as kernels

from fastkd import multiscale_pool
from tests.helpers.checks import assert_close
from tests.helpers.pool_cases import FORMATS, check_pool, feature_map, out_and_grad

# One interpreted tile holds 16 positions, 16 windows and 16 channels.
CASES = {
    "one tile": ((2, 20, 3, 3), [3, 2], [1, 1]),
    "usual": ((1, 5, 7, 7), [7, 4, 2], [1, 1, 1]),
    "rectangular": ((1, 17, 4, 6), [(4, 6), (3, 2), 2], [1, (1, 2), 3]),
    "gaps between windows": ((2, 3, 8, 7), [2, 1], [5, 3]),
    "one row": ((1, 4, 1, 40), [(1, 9), (1, 40)], [1, 1]),
    "one column, one channel": ((3, 1, 20, 1), [(3, 1), (20, 1)], [(2, 1), 1]),
    "one position": ((2, 33, 1, 1), [1], [1]),
    "no sample": ((0, 3, 4, 4), [2], [1]),
}


pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), ("rectangular", torch.float16)], ids=str
)
def test_equals_the_definition(
    case: str, normalize: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    shape, windows, strides = CASES[case]
    x = feature_map(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    _, grad = check_pool(x, windows, strides, normalize=normalize)
    assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str
)
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_of_another_dtype(out_dtype: torch.dtype, dtype: torch.dtype, normalize: bool) -> None:
    check_pool(feature_map(1, 18, 4, 4, dtype=dtype), [4, 2], [1, 2], normalize=normalize, dtype=out_dtype)


@pytest.mark.parametrize("normalize", [False, True])
def test_products_of_fp32_itself_as_on_amd(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "precision", lambda hardware: "ieee")
    check_pool(feature_map(1, 18, 4, 4, dtype=torch.float32), [4, 2], [1, 2], normalize=normalize)


def test_channels_over_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 4)
    check_pool(feature_map(1, 70, 4, 4, dtype=torch.float32), [4, 2], [1, 1])
    check_pool(feature_map(1, 70, 4, 4, dtype=torch.float32), [4, 2], [1, 1], normalize=True)


def test_both_formats_and_slices_of_rows_or_channels_are_read_without_a_copy() -> None:
    x = feature_map(3, 8, 4, 5, dtype=torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (x, x[1:3], x[:, 2:7], x[:, :, 1:4], last, last[::2], last[:, 3:5], last[:, :, :3]):
        assert kernels._strides(view)[0] is view
        check_pool(view, [2], [1])
    for view in (x[..., 1:4], x[:, ::2, ::2], last[..., 2:], x.transpose(2, 3), x[:1, :1, :1, :1].expand(2, 3, 4, 4)):
        check_pool(view, [2], [1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(2, 10, 3, 3), (2, 18, 7, 7), (1, 2, 1, 17)], ids=str)
def test_pairs_of_channels_whose_maps_start_at_odd_elements(shape: tuple[int, ...], normalize: bool) -> None:
    arguments = ([(min(shape[2], 3), 3), 1], [2, 3]) if shape[2] > 1 else ([(1, 17), (1, 4)], [1, 3])
    x = feature_map(*shape, dtype=torch.float16)
    check_pool(x, *arguments, normalize=normalize)
    if shape[2] == 3:
        for view in (x[1:], x[:, 2:8], x[:, 1:7], x[:, :, 1:], x[:, 1:4]):
            check_pool(view, [2], [1], normalize=normalize)


def test_a_value_that_is_not_finite_does_not_reach_the_other_channel_of_its_pair() -> None:
    x = feature_map(1, 6, 3, 3, dtype=torch.float16)
    x[0, 1, 0, 0], x[0, 2, 2, 2], x[0, 4, 2, 2] = math.inf, math.nan, -math.inf
    expected = multiscale_pool(x, [3, 2, 1], [1, 1, 1], backend="reference")
    actual = multiscale_pool(x, [3, 2, 1], [1, 1, 1], backend="triton")
    assert actual[..., ::3].isfinite().all()
    assert actual[..., 5].isfinite().all()
    assert_close(actual.nan_to_num(nan=77, posinf=88, neginf=99), expected.nan_to_num(77, 88, 99), torch.float16)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("dtype", "normalize"), [(torch.float32, True), (torch.float16, False)], ids=str)
def test_a_value_that_is_not_finite_reaches_its_windows_only(
    bad: float, memory_format: torch.memory_format, dtype: torch.dtype, normalize: bool
) -> None:
    x = feature_map(1, 4, 6, 6, dtype=dtype).contiguous(memory_format=memory_format)
    x[0, 2, 3, 0] = bad
    expected = multiscale_pool(x, [4, 2, 1], [1, 2, 3], normalize=normalize, backend="reference")
    actual = multiscale_pool(x, [4, 2, 1], [1, 2, 3], normalize=normalize, backend="triton")
    finite = expected.isfinite()
    assert 0 < (~finite).sum() < 24
    assert torch.equal(actual.isfinite(), finite)
    if not normalize:
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])
    assert_close(actual[finite], expected[finite], dtype)


@pytest.mark.parametrize(
    ("bad", "dtype"), [(0x7FFFFFFF, torch.float16), (0x7F800000, torch.float32)], ids=["nan to fp16", "inf to fp32"]
)
@pytest.mark.parametrize(("windows", "side"), [([4, 2], 6), ([3, 2], 4)], ids=["tiles", "one tile"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_gradient_that_is_not_finite_reaches_its_windows_only(
    bad: int, dtype: torch.dtype, windows: list[int], side: int, normalize: bool
) -> None:
    """Given as bits: rounding must not carry those of a GPU's NaN over into a zero."""
    grads = []
    for backend in ("reference", "triton"):
        x = feature_map(1, 4, side, side, dtype=dtype).requires_grad_()
        out = multiscale_pool(x, windows, [1, 2], normalize=normalize, dtype=torch.float32, backend=backend)
        upstream = torch.ones_like(out)
        upstream[0, 1, 3] = torch.tensor(bad, dtype=torch.int32).view(torch.float32)
        out.backward(upstream)
        grads.append(x.grad)
    finite = grads[0].isfinite()
    assert (~finite).sum() == windows[0] ** 2 * (4 if normalize else 1)
    assert torch.equal(grads[1].isfinite(), finite)
    assert_close(grads[1][finite], grads[0][finite], dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-13, 1e-10, 1e37])
def test_zero_tiny_and_huge_rows_normalise_as_in_the_definition(scale: float) -> None:
    x = scale * feature_map(1, 20, 3, 3, dtype=torch.float32)
    x[0, :16] *= 1e-3  # the largest magnitude comes in a later tile of channels
    out, grad = out_and_grad(x, [3, 2], [1, 1], normalize=True, backend="triton")
    exact = out_and_grad(x.double(), [3, 2], [1, 1], normalize=True, backend="reference")
    assert_close(out, exact[0], torch.float32)
    assert_close(grad, exact[1], torch.float32, floor=1e-30)


def test_alignment_of_the_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda **options: seen.append((options["ALIGN"], options["ALIGN_C"], options["PAIRED"]))

    monkeypatch.setattr(kernels, "forward_kernel", Kernel())
    for shape, memory_format in (((2, 64, 7, 7), 0), ((2, 63, 7, 7), 0), ((2, 64, 14, 14), 0), ((2, 64, 7, 7), 1)):
        x = torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=FORMATS[memory_format])
        kernels.pooled(x, [2, 2], [1, 1], normalize=False, dtype=x.dtype)
    assert seen == [(2, 8, True), (1, 1, False), (4, 8, False), (8, 8, False)]
