"""Which windows contain a position, and products with that matrix. Legend: the package's docstring."""

import triton
import triton.language as tl


@triton.jit
def windows(m, SCALES: tl.constexpr):
    """Top, left, height and width of windows m."""
    y, x = m * 0, m * 0
    h, w = y, y
    for k in tl.static_range(len(SCALES)):
        i = m - SCALES[k][0]
        y = tl.where(i >= 0, i // SCALES[k][1] * SCALES[k][5], y)
        x = tl.where(i >= 0, i % SCALES[k][1] * SCALES[k][6], x)
        h = tl.where(i >= 0, SCALES[k][3], h)
        w = tl.where(i >= 0, SCALES[k][4], w)
    return y, x, h, w


@triton.jit
def contains(y, x, y0, x0, h, w):
    """Whether positions (y, x) are in the windows; negative distances are huge as unsigned numbers."""
    return ((y - y0).to(tl.uint32) < h.to(tl.uint32)) & ((x - x0).to(tl.uint32) < w.to(tl.uint32))


@triton.jit
def add_product(acc, in_windows, values, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + in_windows @ values``."""
    ones = in_windows.to(values.dtype)
    if IS_SPLIT:
        high = (values.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        acc = tl.dot(ones, values - high, acc, input_precision=PRECISION)
        values = high
    return tl.dot(ones, values, acc, input_precision=PRECISION)


@triton.jit
def is_finite(poison):
    """Whether no tile had a sum that is not finite: ``poison`` has 0 * sum of all of them added up."""
    return tl.min(tl.min((poison == 0.0).to(tl.int32), 1), 0) > 0
