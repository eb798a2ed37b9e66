"""Multi-scale pooling: its ways and layouts; what holds of every operation is in test_contract."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import multiscale_pool
from fastkd.backends.blocked import multiscale_pool as blocked_pool
from tests.helpers.checks import assert_close, poison_empty_tensors, value_and_grads
from tests.helpers.pool_cases import FORMATS, feature_map, out_and_grad, rounding_floor

BACKENDS = ("reference", "blocked")
FORMS = ("product", "axes", "windows")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way of the blocked backend, whatever the size of the map."""
    monkeypatch.setattr(blocked_pool, "form", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_torchs_average_pools_scale_by_scale_row_by_row(backend: str, normalize: bool) -> None:
    x = feature_map(2, 3, 5, 7)
    out = multiscale_pool(x, [(5, 7), 3, (1, 2)], [1, (2, 1), 3], normalize=normalize, backend=backend)
    scales = F.avg_pool2d(x, (5, 7)), F.avg_pool2d(x, 3, (2, 1)), F.avg_pool2d(x, (1, 2), 3)
    expected = torch.cat([scale.flatten(2) for scale in scales], 2).transpose(1, 2)
    assert out.shape == (2, 1 + 2 * 5 + 2 * 2, 3)
    assert out.is_contiguous()
    assert_close(out, F.normalize(expected, dim=2) if normalize else expected, torch.float64)


@st.composite
def maps(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]], list[tuple[int, int]]]:
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    shape = draw(st.integers(0, 4)), draw(st.integers(1, 20)), height, width
    scales = draw(st.integers(1, 4))
    windows = [(draw(st.integers(1, height)), draw(st.integers(1, width))) for _ in range(scales)]
    strides = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(scales)]
    # Windows made of cells, and maps that end within a cell.
    y, x = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    windows, strides = ([(y * h, x * w) for h, w in sides] for sides in (windows, strides))
    shape = *shape[:2], y * height + draw(st.integers(0, y - 1)), x * width + draw(st.integers(0, x - 1))
    return shape, windows, strides


@settings(max_examples=80, deadline=None)
@given(
    case=maps(),
    memory_format=st.sampled_from(FORMATS),
    normalize=st.booleans(),
    way=st.sampled_from((None, *FORMS)),
    block=st.sampled_from([1, 1000, 1 << 20]),
)
def test_blocked_equals_the_definition(
    case: tuple, memory_format: torch.memory_format, normalize: bool, way: str | None, block: int
) -> None:
    shape, windows, strides = case
    x = feature_map(*shape).contiguous(memory_format=memory_format)
    expected = out_and_grad(x, windows, strides, normalize=normalize, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_pool, "BLOCK_ELEMENTS", block)
        patch.setattr(blocked_pool, "SHORT_ROW", 2)
        if way is not None:
            patch.setattr(blocked_pool, "form", lambda *_: way)
        actual = out_and_grad(x, windows, strides, normalize=normalize, backend="blocked")
    floor = 1e-5
    if normalize and shape[1] == 1:
        floor = rounding_floor(multiscale_pool(x, windows, strides, backend="reference"))
    assert_close(actual[0], expected[0], torch.float64)
    assert_close(actual[1], expected[1], torch.float64, floor=floor)
    assert actual[0].is_contiguous()
    assert actual[1].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_no_worse_than_torch(
    dtype: torch.dtype, out_dtype: torch.dtype | None, normalize: bool, memory_format: torch.memory_format, backend: str
) -> None:
    x = (100 * feature_map(3, 65, 7, 7) + 50).to(dtype).contiguous(memory_format=memory_format)
    options = {"normalize": normalize, "dtype": out_dtype}
    exact = out_and_grad(x.double(), [7, 4, 2], [1, 1, 1], normalize=normalize, backend="reference")
    low = out_and_grad(x, [7, 4, 2], [1, 1, 1], backend="reference", **options)
    out, grad = out_and_grad(x, [7, 4, 2], [1, 1, 1], backend=backend, **options)
    assert out.dtype == (out_dtype or dtype)
    assert grad.dtype == dtype
    assert grad.is_contiguous(memory_format=memory_format)
    assert_close(out, exact[0], out.dtype, low[0])
    # What comes back has been rounded to the dtype of the rows, or to that of the features.
    coarser = max(out.dtype, dtype, key=lambda d: torch.finfo(d).eps)
    assert_close(grad, exact[1], coarser, low[1])


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((1, 1, 64, 64), 1000.0, dtype=torch.float16)
    x[..., ::2] = 1001.0
    for backend in BACKENDS:
        assert multiscale_pool(x, [64], [1], backend=backend, dtype=torch.float32).item() == 1000.5


@pytest.mark.parametrize("normalize", [False, True])
def test_slices_and_expanded_maps(normalize: bool) -> None:
    base = feature_map(6, 8, 9, 11)
    for view in (
        lambda x: x[::2, 1:6, 1:8, 2:9],
        lambda x: x[:, ::3, ::2, 1::2],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x[:1, :, :1, :1].expand(4, 8, 7, 7),
        lambda x: x[:, :1].expand(6, 4, 9, 11),
    ):
        results = []
        for backend in BACKENDS:
            leaf = base.clone().requires_grad_()
            out = multiscale_pool(view(leaf), [4, 3], [1, 2], normalize=normalize, backend=backend)
            (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
            results.append((out.detach(), leaf.grad))
        floor = 1e-5
        if normalize and view(base).stride(1) == 0:
            floor = rounding_floor(multiscale_pool(view(base), [4, 3], [1, 2], backend="reference"))
        assert_close(results[1][0], results[0][0], torch.float64)
        assert_close(results[1][1], results[0][1], torch.float64, floor=floor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_value_that_is_not_finite_reaches_its_windows_only(
    form: str, bad: float, memory_format: torch.memory_format, normalize: bool
) -> None:
    x = feature_map(3, 4, 7, 7, dtype=torch.float32).contiguous(memory_format=memory_format)
    x[1, 2, 3, 0] = bad
    arguments = [4, 2, 1], [1, 2, 3]
    expected = multiscale_pool(x, *arguments, normalize=normalize, backend="reference")
    actual = multiscale_pool(x, *arguments, normalize=normalize, backend="blocked")
    finite = expected.isfinite()
    assert 0 < (~finite).sum() < 48
    assert torch.equal(actual.isfinite(), finite)
    if not normalize:
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])
    assert_close(actual[finite], expected[finite], torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_gradient_that_is_not_finite_reaches_its_window_only(
    form: str, bad: float, memory_format: torch.memory_format
) -> None:
    grads = []
    for backend in BACKENDS:
        leaf = feature_map(3, 4, 7, 7).contiguous(memory_format=memory_format).requires_grad_()
        out = multiscale_pool(leaf, [4, 2], [1, 2], backend=backend)
        upstream = torch.ones_like(out)
        upstream[1, 5, 3] = bad
        out.backward(upstream)
        grads.append(leaf.grad)
    assert (~grads[0].isfinite()).sum() == 16
    assert torch.equal(grads[1].isfinite(), grads[0].isfinite())
    assert_close(grads[1][grads[0].isfinite()], grads[0][grads[0].isfinite()], torch.float64)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-10, 1e18, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tiny_and_huge_rows_normalise_as_in_the_definition(scale: float, backend: str) -> None:
    x = scale * feature_map(2, 5, 4, 4, dtype=torch.float32)
    out, grad = out_and_grad(x, [4, 2], [1, 1], normalize=True, backend=backend)
    exact = out_and_grad(x.double(), [4, 2], [1, 1], normalize=True, backend="reference")
    assert_close(out, exact[0], torch.float32)
    assert_close(grad, exact[1], torch.float32, floor=1e-30)
    if scale < 1e-13:
        assert not out.any()
        assert not grad.any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_element_is_written(
    form: str, memory_format: torch.memory_format, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_empty_tensors(monkeypatch)
    x = feature_map(3, 4, 7, 9, dtype=torch.float32).contiguous(memory_format=memory_format)
    assert all(y.isfinite().all() for y in out_and_grad(x, [5, 2], [2, 7], normalize=normalize, backend="blocked"))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_value_that_is_not_finite_stays_in_the_windows_of_its_cell(memory_format: torch.memory_format) -> None:
    x = feature_map(2, 3, 29, 30).contiguous(memory_format=memory_format)
    x[0, 1, 0, 0], x[1, 2, 28, 29] = math.inf, math.nan  # in a window of each scale, and in none
    out, grad = out_and_grad(x, [28, 14, 7], [28, 7, 7], backend="blocked")
    expected = out_and_grad(x, [28, 14, 7], [28, 7, 7], backend="reference")
    assert torch.equal(out.isfinite(), expected[0].isfinite())
    assert (~out.isfinite()).sum() == 3
    assert_close(out[out.isfinite()], expected[0][out.isfinite()], torch.float64)
    assert_close(grad, expected[1], torch.float64)


def test_a_single_window_stays_single_in_cells() -> None:
    x = feature_map(1, 3, 6, 6).contiguous(memory_format=FORMATS[1])
    for a, e in zip(*(out_and_grad(x, [3, 6], [4, 1], backend=backend) for backend in BACKENDS), strict=True):
        assert_close(e, a, torch.float64)


def test_cells_are_as_large_as_windows_and_strides_allow() -> None:
    def cell_of(height: int, width: int, sides: list[int], steps: list[int], channels_last: bool) -> tuple[int, int]:
        both = [[x for side in values for x in (side, side)] for values in (sides, steps)]
        return blocked_pool.cell_of(torch.Size((1, 1, height, width)), *both, channels_last)

    assert cell_of(56, 56, [56, 28, 14], [56, 14, 7], True) == (7, 7)
    assert cell_of(56, 56, [56, 28, 14], [1, 14, 7], True) == (7, 7)  # the one window of 56 has no neighbour
    assert cell_of(57, 58, [56, 28, 14], [56, 14, 7], True) == (7, 7)
    assert cell_of(56, 63, [56, 28], [4, 7], True) == (7, 1)
    assert cell_of(56, 56, [56, 28, 14], [56, 14, 7], False) == (7, 1)
    assert cell_of(14, 14, [14, 7], [14, 7], False) == (1, 1)
    assert cell_of(7, 7, [7, 4, 2], [1, 1, 1], True) == (1, 1)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize("bad", [False, True])
def test_large_windows_are_as_accurate_as_plain_averages(
    bad: bool, channels: int, memory_format: torch.memory_format
) -> None:
    # Running sums would drift, most of all where all values are equal.
    random = feature_map(1, channels, 56, 56, dtype=torch.float32) + 5
    for values in (random, torch.full_like(random, 0.1), torch.full_like(random, 1.7)):
        x = values.contiguous(memory_format=memory_format)
        if bad:  # torch pools such a sample
            x[:, :, 55, 55] = math.inf
        for windows, strides in (
            ([56, 28, 14], [56, 14, 7]),
            ([22], [1]),
            ([22], [11]),
            ([22], [17]),
            ([22, 49], [17, 1]),
        ):
            for a, e in zip(
                out_and_grad(x, windows, strides, backend="blocked"),
                out_and_grad(x.double(), windows, strides, backend="reference"),
                strict=True,
            ):
                error = (a - e)[e.isfinite()].abs().max() / e[e.isfinite()].abs().max()
                assert error <= (6e-7 if values is random and not bad else 2e-6), (windows, strides, error)


def test_the_form_follows_from_the_shape_and_keeps_matrices_small() -> None:
    def form_of(height: int, width: int, sides: list[int], steps: list[int]) -> str:
        both = [[x for side in values for x in (side, side)] for values in (sides, steps)]
        return blocked_pool.form(height, width, *both)

    assert form_of(7, 7, [7, 4, 2], [1, 1, 1]) == "product"
    assert form_of(4, 4, [4, 2, 1], [1, 1, 1]) == "product"
    assert (form_of(56, 56, [16], [17]), form_of(56, 56, [17], [17])) == ("product", "axes")
    assert form_of(14, 14, [14, 7, 4, 2], [1, 1, 1, 1]) == "axes"
    assert form_of(56, 56, [56, 28, 7], [1, 1, 1]) == "axes"
    assert form_of(2000, 2000, [2], [1]) == "windows"
    assert blocked_pool.form(1, 100_000, [1, 3], [1, 1]) == "windows"


def test_a_large_map_needs_memory_in_proportion() -> None:
    x = feature_map(1, 2, 1, 5000)
    for windows in ([(1, 5)], [(1, 5000), (1, 2)]):
        strides = [1] * len(windows)
        for a, e in zip(
            out_and_grad(x, windows, strides, backend="blocked"),
            out_and_grad(x, windows, strides, backend="reference"),
            strict=True,
        ):
            assert_close(a, e, torch.float64)


@pytest.mark.parametrize(
    ("backend", "dynamic", "normalize"),
    [
        pytest.param("reference", True, True, marks=pytest.mark.slow),
        *(("blocked", dynamic, normalize) for dynamic in (True, None) for normalize in (True, False)),
    ],
)
def test_compiles_as_one_graph_for_changing_shapes(backend: str, dynamic: bool | None, normalize: bool) -> None:
    torch.compiler.reset()

    def loss(x: Tensor) -> Tensor:
        out = multiscale_pool(x, (5, (4, 2)), (1, 2), normalize=normalize, dtype=torch.float32, backend=backend)
        return (out * out.cos()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, memory_format in (((2, 3, 7, 7), FORMATS[0]), ((3, 4, 6, 8), FORMATS[0]), ((3, 4, 6, 8), FORMATS[1])):
        x = feature_map(*shape, dtype=torch.float32).contiguous(memory_format=memory_format)
        for a, e in zip(value_and_grads(compiled, x), value_and_grads(loss, x), strict=True):
            assert_close(a, e, torch.float32)
