"""The forward kernel of ``multiscale_pool``. Legend: the package's docstring."""

import triton
import triton.language as tl
from fastkd.kernels.multiscale_pool.windows import add_product, contains, is_finite, windows

from fastkd.numerics import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
TINY = tl.constexpr(1e-30)  # far below a norm that counts as zero


@triton.jit
def _products(
    X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, offs_c, in_c,
    H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, SHIFT: tl.constexpr, SLACK: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the windows over positions [p_first, p_last), [BLOCK_M, BLOCK_N]. X points SHIFT before position 0."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(p_first, p_last + SHIFT, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        in_p = offs_p < H * W + SLACK
        if CHANNELS_LAST:
            inside = in_p[:, None] & in_c[None, :]
            x = tl.load(X + offs_p.to(tl.int64)[:, None] * stride_xp + offs_c[None, :], mask=inside, other=0.0)
        else:
            inside = in_c[:, None] & in_p[None, :]
            x = tl.load(X + offs_c.to(tl.int64)[:, None] * stride_xc + offs_p[None, :], mask=inside, other=0.0)
            x = tl.trans(x)
        p = offs_p - SHIFT
        # Rounded down, position -1 would be in row 0, so that it is moved to where there is no window.
        p = tl.where(p < 0, H * W, p)
        in_windows = contains((p // W)[None, :], (p % W)[None, :], y0[:, None], x0[:, None], h[:, None], w[:, None])
        acc = add_product(acc, in_windows, x, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION)
    return acc


@triton.jit
def _sums(
    X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, c, C,
    H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PAIRED: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums of the windows for channels [c, c + BLOCK_N), [BLOCK_M, BLOCK_N]."""
    if EXACT:
        offs_c = c + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # min(C, 0) is 0, which the compiler does not know: it would unroll the loop.
        for p in range(p_first + min(C, 0), p_last):
            x = tl.load(X + p * stride_xp + offs_c.to(tl.int64) * stride_xc, mask=offs_c < C, other=0.0).to(tl.float32)
            acc += tl.where(contains(p // W, p % W, y0, x0, h, w)[:, None], x[None, :], 0.0)
    elif PAIRED:
        offs_c = c // 2 + tl.arange(0, BLOCK_N // 2)
        in_c = offs_c < C // 2
        even = _products(
            X, 2 * stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, offs_c, in_c, H=H, W=W, CHANNELS_LAST=False,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N // 2, BLOCK_P=BLOCK_P, SHIFT=0, SLACK=1, IS_SPLIT=IS_SPLIT,
            PRECISION=PRECISION,
        )  # fmt: skip
        odd = _products(
            X + stride_xc // 2 * 2, 2 * stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, offs_c, in_c, H=H, W=W,
            CHANNELS_LAST=False, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N // 2, BLOCK_P=BLOCK_P, SHIFT=1, SLACK=1,
            IS_SPLIT=IS_SPLIT, PRECISION=PRECISION,
        )  # fmt: skip
        acc = tl.join(even, odd).reshape(BLOCK_M, BLOCK_N)
    else:
        offs_c = c + tl.arange(0, BLOCK_N)
        acc = _products(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, offs_c, offs_c < C, H=H, W=W,
            CHANNELS_LAST=CHANNELS_LAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, SHIFT=0, SLACK=0,
            IS_SPLIT=IS_SPLIT, PRECISION=PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _norms(
    X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C,
    H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PAIRED: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A divisor and the sum of squares of the averages divided by it, per window, and the poison."""
    per_area = 1.0 / (h * w).to(tl.float32)
    divisor = tl.full([BLOCK_M], 0.0, tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    poison = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, C, BLOCK_N):
        y = _sums(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, c, C, H=H, W=W, CHANNELS_LAST=CHANNELS_LAST,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION,
            EXACT=EXACT,
        )  # fmt: skip
        poison += y * 0.0
        y = y * per_area[:, None]
        # Rows are divided by a number before squaring: the square of 1e30 overflows, the square of 1e-30 vanishes.
        # It is a sixteenth of the largest magnitude, because the reciprocal is then always a normal number.
        new = tl.maximum(tl.max(tl.abs(y), 1) * 0.0625, divisor)
        new = tl.where(new < TINY, 0.0, new)
        per_new = tl.where(new == 0.0, 0.0, 1.0 / new)
        decay = divisor * per_new
        y = y * per_new[:, None]
        squares = squares * decay * decay + tl.sum(y * y, 1)
        divisor = new
    return divisor, squares, poison


@triton.jit
def _write_rows(
    X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C, Y, in_m, per_divisor, per_norm, first, step,
    H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PAIRED: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the averages times ``per_divisor`` times ``per_norm``, for every ``step``-th channel tile; the poison."""
    per_area = 1.0 / (h * w).to(tl.float32)
    poison = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(first, C, step):
        y = _sums(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, c, C, H=H, W=W, CHANNELS_LAST=CHANNELS_LAST,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION,
            EXACT=EXACT,
        )  # fmt: skip
        poison += y * 0.0
        # One after the other: the reciprocal of a large norm may vanish.
        y = y * per_area[:, None] * per_divisor[:, None] * per_norm[:, None]
        offs_c = c + tl.arange(0, BLOCK_N)
        tl.store(Y + offs_c[None, :], y.to(Y.dtype.element_ty), mask=in_m[:, None] & (offs_c < C)[None, :])
    return poison


@triton.jit(do_not_specialize=["stride_xb", "stride_xc", "stride_xp", "C", "splits"])
def forward_kernel(
    X, stride_xb, stride_xc, stride_xp, Y, INVERSE_NORM, C, splits,
    H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr, ALIGN_C: tl.constexpr,
    PAIRED: tl.constexpr, NORMALIZE: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    sample = (tl.program_id(0) // tiles // splits).to(tl.int64)
    split = tl.program_id(0) // tiles % splits
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    C = C // ALIGN_C * ALIGN_C
    # One of the two is 1, which nothing else divides.
    if CHANNELS_LAST:
        stride_xp = stride_xp.to(tl.int64) // ALIGN * ALIGN
    elif PAIRED:
        stride_xc = stride_xc.to(tl.int64)
    else:
        stride_xc = stride_xc.to(tl.int64) // ALIGN * ALIGN
    X += sample * (stride_xb.to(tl.int64) // ALIGN * ALIGN)
    y0, x0, h, w = windows(m, SCALES)
    p_first, p_last = 0, H * W
    if H * W > BLOCK_P:
        p_first = tl.min(tl.where(in_m, y0, H), 0) * W // BLOCK_P * BLOCK_P
        p_last = tl.max(tl.where(in_m, y0 + h, 0), 0) * W
    per_divisor, per_norm = tl.full([BLOCK_M], 1.0, tl.float32), tl.full([BLOCK_M], 1.0, tl.float32)
    if NORMALIZE:
        divisor, squares, poison = _norms(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C, H=H, W=W, CHANNELS_LAST=CHANNELS_LAST,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION,
            EXACT=False,
        )  # fmt: skip
        if not is_finite(poison):
            divisor, squares, poison = _norms(
                X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C, H=H, W=W, CHANNELS_LAST=CHANNELS_LAST,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED, IS_SPLIT=IS_SPLIT,
                PRECISION=PRECISION, EXACT=True,
            )  # fmt: skip
        norm = tl.sqrt_rn(squares)
        is_zero = divisor * norm <= EPS
        inverse_norm = tl.where(is_zero, 0.0, 1.0 / (divisor * norm))
        if split == 0:
            tl.store(INVERSE_NORM + sample * M + m, inverse_norm, mask=in_m)
        per_divisor, per_norm = tl.where(is_zero, 0.0, 1.0 / divisor), tl.where(is_zero, 0.0, 1.0 / norm)
    rows = Y + (sample * M + m)[:, None] * C
    first, step = split * BLOCK_N, splits * BLOCK_N
    poison = _write_rows(
        X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C, rows, in_m, per_divisor, per_norm, first, step,
        H=H, W=W, CHANNELS_LAST=CHANNELS_LAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED,
        IS_SPLIT=IS_SPLIT, PRECISION=PRECISION, EXACT=False,
    )  # fmt: skip
    if not is_finite(poison):
        tl.debug_barrier()  # two threads may write the same element
        _write_rows(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, C, rows, in_m, per_divisor, per_norm, first, step,
            H=H, W=W, CHANNELS_LAST=CHANNELS_LAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, PAIRED=PAIRED,
            IS_SPLIT=IS_SPLIT, PRECISION=PRECISION, EXACT=True,
        )  # fmt: skip
