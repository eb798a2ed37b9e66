"""The backward kernels of ``multiscale_pool``. Legend: the package's docstring."""

import triton
import triton.language as tl
from fastkd.kernels.multiscale_pool.windows import add_product, contains, is_finite, windows
from fastkd.kernels.normalize import round_to_tf32


@triton.jit
def _dot_products(G, U, rows, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``g . u`` of rows [BLOCK_M] over all channels."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, C, BLOCK_N):
        offs_c = c + tl.arange(0, BLOCK_N)
        inside = in_rows[:, None] & (offs_c < C)[None, :]
        g = tl.load(G + rows[:, None] * C + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(U + rows[:, None] * C + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += g * u
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["n", "C"])
def dots_kernel(G, U, DOTS, n, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dots = _dot_products(G, U, rows, rows < n, C // ALIGN * ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    tl.store(DOTS + rows, dots, mask=rows < n)


@triton.jit
def _load_gradients(
    G, U, INVERSE_NORM, DOTS, dots, rows, per_area, in_rows, offs_c, in_c, C,
    NORMALIZE: tl.constexpr, HAS_DOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums of windows ``rows``, broadcast over ``offs_c``; 0 outside."""
    inside = in_rows & in_c
    g = tl.load(G + rows * C + offs_c, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        u = tl.load(U + rows * C + offs_c, mask=inside, other=0.0).to(tl.float32)
        if HAS_DOTS:
            dots = tl.load(DOTS + rows, mask=in_rows, other=0.0)
        inverse_norm = tl.load(INVERSE_NORM + rows, mask=in_rows, other=0.0)
        # A row's dot product that is not finite must not spread past the last channel.
        g = tl.where(inside, (g - dots * u) * inverse_norm, 0.0)
    return g * per_area


@triton.jit
def _scale_range(k, p_first, p_last, W: tl.constexpr, SCALES: tl.constexpr):
    """First and last (exclusive) window of scale k in the rows of windows that reach positions [p_first, p_last)."""
    first, columns, rows, h, stride = 0, 1, 0, 1, 1
    for i in tl.static_range(len(SCALES)):
        if k == i:
            first, columns, rows, h, stride = SCALES[i][0], SCALES[i][1], SCALES[i][2], SCALES[i][3], SCALES[i][5]
    top = max(p_first // W - h + stride, 0) // stride
    bottom = min((p_last - 1) // W // stride + 1, rows)
    return first + top * columns, first + bottom * columns


@triton.jit
def _spread(
    G, U, INVERSE_NORM, DOTS, GRAD_X, sample, C, dots, first, last, first_c, step,
    H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DOTS: tl.constexpr, IS_SPLIT: tl.constexpr, IS_ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of positions [first, last) for every ``step``-th tile of channels, and returns the poison."""
    p = first + tl.arange(0, BLOCK_P)
    in_p = p < H * W
    y, x = p // W, p % W
    offs_m = tl.arange(0, BLOCK_M)
    poison = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for c in range(first_c, C, step):
        offs_c = c + tl.arange(0, BLOCK_N)
        in_c = offs_c < C
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        if EXACT:
            for m in range(min(C, 0), M):  # from 0, which the compiler does not know: it would unroll the loop
                y0, x0, h, w = windows(m, SCALES)
                dot = 0.0
                if NORMALIZE and not HAS_DOTS:
                    dot = tl.sum(tl.where(offs_m == m, dots, 0.0), 0)
                g = _load_gradients(
                    G, U, INVERSE_NORM, DOTS, dot, sample * M + m, 1.0 / (h * w), True, offs_c, in_c, C,
                    NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS,
                )  # fmt: skip
                acc += tl.where(contains(y, x, y0, x0, h, w)[:, None], g[None, :], 0.0)
        else:
            # One tile of windows may hold several scales; several are taken scale by scale.
            for k in range(1 if M <= BLOCK_M else len(SCALES)):
                m_first, m_last = 0, M
                if M > BLOCK_M:
                    m_first, m_last = _scale_range(k, first, last, W=W, SCALES=SCALES)
                for m in range(m_first, m_last, BLOCK_M):
                    y0, x0, h, w = windows(m + offs_m, SCALES)
                    in_m = m + offs_m < m_last
                    per_area = 1.0 / (h * w).to(tl.float32)
                    g = _load_gradients(
                        G, U, INVERSE_NORM, DOTS, dots[:, None], (sample * M + m + offs_m)[:, None], per_area[:, None],
                        in_m[:, None], offs_c[None, :], in_c[None, :], C, NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS,
                    )  # fmt: skip
                    if IS_ROUNDED:
                        g = round_to_tf32(g)
                    in_windows = contains(y[:, None], x[:, None], y0[None, :], x0[None, :], h[None, :], w[None, :])
                    acc = add_product(acc, in_windows, g, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION)
            poison += acc * 0.0
        grad = acc.to(GRAD_X.dtype.element_ty)
        if CHANNELS_LAST:
            offsets = p.to(tl.int64)[:, None] * C + offs_c[None, :]
            tl.store(GRAD_X + offsets, grad, mask=in_p[:, None] & in_c[None, :])
        else:
            offsets = offs_c.to(tl.int64)[:, None] * (H * W) + p[None, :]
            tl.store(GRAD_X + offsets, tl.trans(grad), mask=in_c[:, None] & in_p[None, :])
    return poison


@triton.jit(do_not_specialize=["C", "splits"])
def backward_kernel(
    G, U, INVERSE_NORM, DOTS, GRAD_X, C, splits,
    H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_DOTS: tl.constexpr, IS_SPLIT: tl.constexpr, IS_ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (H * W + BLOCK_P - 1) // BLOCK_P
    sample = (tl.program_id(0) // tiles // splits).to(tl.int64)
    split = tl.program_id(0) // tiles % splits
    first = tl.program_id(0) % tiles * BLOCK_P
    last = min(first + BLOCK_P, H * W)
    C = C // ALIGN * ALIGN
    offs_m = tl.arange(0, BLOCK_M)
    dots = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZE and not HAS_DOTS:
        dots = _dot_products(G, U, sample * M + offs_m, offs_m < M, C, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    GRAD_X += sample * H * W * C
    poison = _spread(
        G, U, INVERSE_NORM, DOTS, GRAD_X, sample, C, dots, first, last, split * BLOCK_N, splits * BLOCK_N,
        H=H, W=W, M=M, SCALES=SCALES, CHANNELS_LAST=CHANNELS_LAST, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M,
        NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS, IS_SPLIT=IS_SPLIT, IS_ROUNDED=IS_ROUNDED, PRECISION=PRECISION,
        EXACT=False,
    )  # fmt: skip
    if not is_finite(poison):
        tl.debug_barrier()  # two threads may write the same element
        _spread(
            G, U, INVERSE_NORM, DOTS, GRAD_X, sample, C, dots, first, last, split * BLOCK_N, splits * BLOCK_N,
            H=H, W=W, M=M, SCALES=SCALES, CHANNELS_LAST=CHANNELS_LAST, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M, NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS, IS_SPLIT=IS_SPLIT, IS_ROUNDED=IS_ROUNDED,
            PRECISION=PRECISION, EXACT=True,
        )  # fmt: skip
