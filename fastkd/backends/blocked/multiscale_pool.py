"""``multiscale_pool`` of the blocked backend: pooling is one linear map over the positions, so it is a matrix product.

``out[b] = P x[b]`` with x[b] [H W, C] and P [M, H W], and its gradient is ``P^T grad[b]``: one read of the map and one
write of the rows, in either memory format, for all scales at once. Larger maps take the axes one after the other, with
the stacked ``P_h`` and then each scale's ``P_w`` if the channels are last, and the other way round if they are not.
With N rows (columns) of windows in all, that is N H W + M W multiplications per channel instead of M H W.

Where the sides and strides of the windows have a common divisor, all windows are made of the same cells. The map is
then averaged over the cells, which is one read at the speed of memory, and the cells are pooled like a smaller map.

A product spreads 0 * inf = NaN over all rows of its sample and channel: the first row shows whether that has happened,
and such samples go through torch's pooling. So do maps whose matrices would be large, and other devices than the CPU,
where looking would wait for the device.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.numerics import accumulation_dtype, unit_rows, window_counts

BLOCK_ELEMENTS = 1 << 21  # of the map or of the rows, at a time: 8 MiB in float32
MATRIX_ELEMENTS = 1 << 20  # a matrix no longer than this may be built
# How many multiplications in one product take the time of one in two products (one core, 7 x 7 to 56 x 56 maps).
ONE_PRODUCT = 3.4
# A sum of more positions, one after the other, loses digits. Such windows are averaged along one axis, then the other.
LONG_SUM = 256
SHORT_ROW = 16  # positions: torch adds shorter rows slower than a product does
NORM_RANGE = 1e-12, 1e15  # where float32 squares neither vanish nor overflow


def form(height: int, width: int, windows: list[int], strides: list[int]) -> str:
    """The cheapest way to pool on a CPU: "product", "axes" or "windows"."""
    counts = window_counts(height, width, windows, strides)
    M, N = sum(rows * columns for rows, columns in counts), sum(columns for _, columns in counts)
    one = M * height * width
    is_short = all(h * w <= LONG_SUM for h, w in zip(windows[::2], windows[1::2], strict=True))
    if is_short and one <= MATRIX_ELEMENTS and one <= ONE_PRODUCT * (N * height * width + M * height):
        return "product"
    # The sum also bounds the heights' matrices, which are built one per scale.
    largest = max(N * width, sum(rows for rows, _ in counts) * height)
    return "axes" if largest <= MATRIX_ELEMENTS else "windows"


def multiscale_pool_forward(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows [B, M, C] in ``dtype``, and their inverse norms [B, M], or [B, 0] where they are not normalised."""
    B, C, H, W = features.shape
    M = sum(rows * columns for rows, columns in window_counts(H, W, windows, strides))
    accumulation = accumulation_dtype(features.dtype)
    out = features.new_empty((B, M, C), dtype=dtype)
    inverse_norm = features.new_empty((B, M if normalize else 0), dtype=accumulation)
    for samples in _blocks(B, C * max(H * W, M)):
        rows = out[samples]
        if dtype != accumulation:
            rows = torch.empty_like(rows, dtype=accumulation)
        _pool(features[samples].to(accumulation), windows, strides, rows)
        if normalize:
            inverse_norm[samples] = _normalize(rows)
        if dtype != accumulation:
            out[samples] = rows
    return out, inverse_norm


def multiscale_pool_backward(
    grad: Tensor, unit: Tensor | None, inverse_norm: Tensor, windows: list[int], strides: list[int],
    grad_features: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of the features, [B, C, H, W]; ``unit``: the forward's rows if it normalised them."""
    B, C, H, W = grad_features.shape
    for samples in _blocks(B, C * max(H * W, grad.shape[1])):
        rows = grad[samples].to(inverse_norm.dtype)
        if unit is not None:
            u = unit[samples].to(inverse_norm.dtype)
            inverse = inverse_norm[samples, :, None]
            dots = (rows * u).sum(dim=2, keepdim=True)
            rows = (rows * inverse).addcmul_(dots * inverse, u, value=-1)
        part = grad_features[samples]
        if part.dtype == rows.dtype:
            _spread(rows.contiguous(), windows, strides, part)
        else:
            part.copy_(_spread(rows.contiguous(), windows, strides, torch.empty_like(part, dtype=rows.dtype)))


def _blocks(samples: int, elements: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // elements)
    return [slice(start, start + size) for start in range(0, samples, size)]


def _normalize(rows: Tensor) -> Tensor:
    """Divides rows [b, M, C] by their norms, in place; returns the inverse norms [b, M]."""
    norm = torch.linalg.vector_norm(rows, dim=2)
    low, high = NORM_RANGE
    # Reading the norms waits for a GPU, which takes the careful way at once.
    if rows.device.type == "cpu" and bool(((norm > low) & (norm < high)).all()):
        inverse_norm = norm.reciprocal_()
        rows *= inverse_norm[:, :, None]
        return inverse_norm
    unit, inverse = unit_rows(rows.flatten(0, 1))
    rows.copy_(unit.view_as(rows))
    return inverse.view(rows.shape[:2])


def cell_of(size: torch.Size, windows: list[int], strides: list[int], channels_last: bool) -> tuple[int, int]:
    """Height and width of the largest cells such that every window is made of whole cells; 1 and 1 for no cells."""
    height, width = size[-2:]
    counts = [count for both in window_counts(height, width, windows, strides) for count in both]
    # Where there is one window, it has no neighbour at a stride.
    sides = [math.gcd(w, s) if n > 1 else w for w, s, n in zip(windows, strides, counts, strict=True)]
    # Torch adds runs of memory fast: all channels of a position, or a row of positions that is not too short.
    if channels_last:
        return math.gcd(*sides[::2]), math.gcd(*sides[1::2])
    return (math.gcd(*sides[::2]), 1) if width >= SHORT_ROW else (1, 1)


def _on_cells(sides: list[int], cell: tuple[int, int]) -> list[int]:
    """Windows or strides in cells. The stride of a single window may be no multiple; rounded up, it stays single."""
    return [-(-side // cell[k % 2]) for k, side in enumerate(sides)]


def _cell_means(x: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """The averages of the cells of x [b, C, H, W], in its memory format."""
    _, _, H, W = x.shape
    x = x[:, :, : H // height * height, : W // width * width]
    if not channels_last:
        return x.unflatten(2, (-1, height)).mean(3)
    # Permuted, because torch averages a view whose last dimension is not dense ten times slower.
    x = x.permute(0, 2, 3, 1).unflatten(1, (-1, height)).mean(2).unflatten(2, (-1, width)).mean(3)
    return x.permute(0, 3, 1, 2)


def _pool(x: Tensor, windows: list[int], strides: list[int], rows: Tensor) -> None:
    """``rows`` [b, M, C] = the averages of x [b, C, H, W]."""
    b, _, H, W = x.shape
    channels_last = x.stride(1) < x.stride(3)
    if x.device.type == "cpu" and (cell := cell_of(x.shape, windows, strides, channels_last)) != (1, 1):
        x = _cell_means(x, *cell, channels_last)
        windows, strides = _on_cells(windows, cell), _on_cells(strides, cell)
        H, W = x.shape[2:]
    way = form(H, W, windows, strides) if x.device.type == "cpu" else "windows"
    if way == "windows":
        _pool_windows(x, windows, strides, rows)
        return
    if way == "product":
        P = _matrix(H, W, tuple(windows), tuple(strides), x.dtype)
        torch.bmm(P.expand(b, -1, -1), x.flatten(2).transpose(1, 2), out=rows)
    else:
        _pool_axes(x, windows, strides, rows)
    bad = ~rows[:, 0].isfinite().all(dim=1)
    if bool(bad.any()):
        right = torch.empty_like(rows[bad])
        _pool_windows(x[bad], windows, strides, right)
        rows[bad] = right


def _spread(rows: Tensor, windows: list[int], strides: list[int], grad: Tensor) -> Tensor:
    """``grad`` [b, C, H, W] = for every position the sum of its windows' ``rows`` [b, M, C], divided by their areas."""
    b, C, H, W = grad.shape
    channels_last = not grad.is_contiguous()
    if rows.device.type == "cpu" and (cell := cell_of(grad.shape, windows, strides, channels_last)) != (1, 1):
        h, w = H // cell[0], W // cell[1]
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        part = torch.empty((b, C, h, w), dtype=rows.dtype, memory_format=memory_format)
        _spread(rows, _on_cells(windows, cell), _on_cells(strides, cell), part).div_(cell[0] * cell[1])
        if (h * cell[0], w * cell[1]) != (H, W):
            grad.zero_()
        inside = grad[:, :, : h * cell[0], : w * cell[1]].unflatten(2, (h, cell[0])).unflatten(4, (w, cell[1]))
        inside.copy_(part[:, :, :, None, :, None])
        return grad
    way = form(H, W, windows, strides) if rows.device.type == "cpu" else "windows"
    if way == "windows":
        return _spread_windows(rows, windows, strides, grad)
    if way == "product":
        P = _matrix(H, W, tuple(windows), tuple(strides), rows.dtype)
        if channels_last:
            torch.bmm(P.T.expand(b, -1, -1), rows, out=grad.permute(0, 2, 3, 1).view(b, H * W, C))
        else:
            torch.bmm(rows.transpose(1, 2), P.expand(b, -1, -1), out=grad.view(b, C, H * W))
    else:
        _spread_axes(rows, windows, strides, grad)
    bad = ~grad[:, :, 0, 0].isfinite().all(dim=1)
    if bool(bad.any()):
        grad[bad] = _spread_windows(rows[bad], windows, strides, torch.empty_like(grad[bad]))
    return grad


def _pool_axes(x: Tensor, windows: list[int], strides: list[int], rows: Tensor) -> None:
    b, C, H, W = x.shape
    P_h, P_w = _axes(H, W, tuple(windows), tuple(strides), x.dtype)
    channels_last = x.stride(1) < x.stride(3)
    outer, inner = (P_h, P_w) if channels_last else (P_w, P_h)
    lines = _lines(x, channels_last)  # [b, outer positions, inner positions * C]
    strips = torch.bmm(torch.cat(outer).expand(b, -1, -1), lines).view(b, -1, *((W, C) if channels_last else (C, H)))
    parts = strips.split([len(scale) for scale in outer], dim=1)
    for part, scale, i in zip(parts, inner, _slices(H, W, windows, strides), strict=True):
        part = part.flatten(0, 1) if channels_last else part.flatten(0, 1).transpose(1, 2)  # [b * outer, inner, C]
        out = torch.bmm(scale.expand(len(part), -1, -1), part).view(b, -1, len(scale), C)
        rows[:, i] = (out if channels_last else out.transpose(1, 2)).flatten(1, 2)


def _spread_axes(rows: Tensor, windows: list[int], strides: list[int], grad: Tensor) -> None:
    b, C, H, W = grad.shape
    P_h, P_w = _axes(H, W, tuple(windows), tuple(strides), rows.dtype)
    channels_last = not grad.is_contiguous()
    outer = P_h if channels_last else P_w
    strips = rows.new_empty(b, sum(map(len, outer)), *((W, C) if channels_last else (C, H)))
    parts = strips.split([len(scale) for scale in outer], dim=1)
    for part, height, width, i in zip(parts, P_h, P_w, _slices(H, W, windows, strides), strict=True):
        above = rows[:, i].view(b, len(height), len(width), C)
        if channels_last:
            out = torch.bmm(width.T.expand(b * len(height), -1, -1), above.flatten(0, 1))
        else:
            out = torch.bmm(above.permute(0, 2, 3, 1).flatten(0, 1), height.expand(b * len(width), -1, -1))
        part.copy_(out.view(part.shape))
    torch.bmm(torch.cat(outer).T.expand(b, -1, -1), strips.flatten(2), out=_lines(grad, channels_last))


def _lines(x: Tensor, channels_last: bool) -> Tensor:
    """x [b, C, H, W] as [b, H, W * C], or as [b, W, C * H] if the channels are not last."""
    return x.permute(0, 2, 3, 1).flatten(2) if channels_last else x.flatten(1, 2).transpose(1, 2)


def _pool_windows(x: Tensor, windows: list[int], strides: list[int], rows: Tensor) -> None:
    for k, i in enumerate(_slices(x.shape[2], x.shape[3], windows, strides)):
        out = x
        for window, stride in _steps(windows[2 * k : 2 * k + 2], strides[2 * k : 2 * k + 2]):
            out = F.avg_pool2d(out, window, stride)
        rows[:, i] = out.flatten(2).transpose(1, 2)


def _spread_windows(rows: Tensor, windows: list[int], strides: list[int], grad: Tensor) -> Tensor:
    b, C, H, W = grad.shape
    grad.zero_()
    for k, i in enumerate(_slices(H, W, windows, strides)):
        steps = _steps(windows[2 * k : 2 * k + 2], strides[2 * k : 2 * k + 2])
        maps = [grad]  # what a step pools; it is read for its shape alone
        for (h, w), (down, right) in steps:
            height, width = maps[-1].shape[2:]
            maps.append(grad.new_empty(b, C, (height - h) // down + 1, (width - w) // right + 1))
        above = rows[:, i].transpose(1, 2).reshape(maps.pop().shape)
        for (window, stride), below in zip(reversed(steps), reversed(maps), strict=True):
            above = torch.ops.aten.avg_pool2d_backward(above, below, window, stride, [0, 0], False, True, None)
        grad += above
    return grad


def _steps(window: list[int], stride: list[int]) -> list[tuple[list[int], list[int]]]:
    """The windows and strides by which torch pools one scale: large windows in two steps, which are shorter sums."""
    if math.prod(window) <= LONG_SUM:
        return [(window, stride)]
    return [([window[0], 1], [stride[0], 1]), ([1, window[1]], [1, stride[1]])]


def _slices(height: int, width: int, windows: list[int], strides: list[int]) -> list[slice]:
    """Where each scale's windows are among all M."""
    ends = itertools.accumulate(rows * columns for rows, columns in window_counts(height, width, windows, strides))
    return [slice(start, end) for start, end in itertools.pairwise((0, *ends))]


@functools.lru_cache(maxsize=32)
def _matrix(height: int, width: int, windows: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """P [M, H W] on the CPU."""
    return torch.cat([torch.kron(*both) for both in zip(*_axes(height, width, windows, strides, dtype), strict=True)])


@functools.lru_cache(maxsize=32)
def _axes(
    height: int, width: int, windows: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """``P_h`` [rows of windows, H] and ``P_w`` [columns of windows, W] of each scale, on the CPU."""
    P_h = [_axis(height, h, s, dtype) for h, s in zip(windows[::2], strides[::2], strict=True)]
    P_w = [_axis(width, w, s, dtype) for w, s in zip(windows[1::2], strides[1::2], strict=True)]
    return P_h, P_w


def _axis(length: int, window: int, stride: int, dtype: torch.dtype) -> Tensor:
    """[windows, length]: the weights of the positions in each window."""
    first = torch.arange(0, length - window + 1, stride)[:, None]
    offset = torch.arange(length) - first
    return ((offset >= 0) & (offset < window)).to(dtype) / window
