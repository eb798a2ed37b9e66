"""``multiscale_pool`` on a GPU: one tile of windows x channels at a time, as a product with a matrix of zeros and ones.

Bytes per channel, for H W positions, M windows and e bytes per element: the forward reads H W e and writes M e. With
NORMALIZE it visits the channels twice, the first time for the norms. The second visit finds a map of 7 x 7 in the L2
cache, but reads one of 56 x 56 again. The backward reads M e (2 M e with NORMALIZE: the unit rows too) and writes
H W e. None of this has been measured on a GPU yet.

Legend. ``X`` [B, C, H, W]: the map, and ``GRAD_X`` its gradient. ``Y`` [B, M, C]: the averages or unit rows, and ``G``
their gradient. ``P`` [m, p]: whether window m contains position p, made from indices. The sums ``P X`` and ``P^T G``
are fp32. Zeros and ones are exact in every dtype, and so are products with fp16 and bf16. fp32 operands are the sum of
two numbers that tf32 holds (IS_SPLIT): all but the last bit or two survive. Because 0 * inf is NaN, a tile whose sums
are not all finite is summed again, one position or window at a time. SCALES: for every scale its first window, its
windows per row and per column, and height, width, vertical and horizontal stride. ALIGN divides the map's strides, so
that loads are as wide as that allows.
"""

import math

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import hardware_of, launch_config, multiprocessors
from fastkd.kernels.normalize import round_to_tf32
from torch import Tensor

from fastkd.numerics import NORM_EPS, window_counts

EPS = tl.constexpr(NORM_EPS)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1e-30)  # far below a norm that counts as zero
ROWS = 16  # per program that takes dot products
PROGRAMS = 8  # per multiprocessor, at least, where there are enough channels


@triton.jit
def _windows(m, SCALES: tl.constexpr):
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
def _contains(y, x, y0, x0, h, w):
    """Whether positions (y, x) are in the windows; negative distances are huge as unsigned numbers."""
    return ((y - y0).to(tl.uint32) < h.to(tl.uint32)) & ((x - x0).to(tl.uint32) < w.to(tl.uint32))


@triton.jit
def _add_product(acc, contains, values, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + contains @ values``."""
    ones = contains.to(values.dtype)
    if IS_SPLIT:
        high = (values.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        acc = tl.dot(ones, values - high, acc, input_precision=PRECISION)
        values = high
    return tl.dot(ones, values, acc, input_precision=PRECISION)


@triton.jit
def _is_finite(acc):
    return tl.min(tl.min((tl.abs(acc) < INF).to(tl.int32), 1), 0) > 0


@triton.jit
def _sums(
    X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, offs_c, C,
    H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the windows over positions [p_first, p_last), [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    in_c = offs_c < C
    for start in range(p_first, p_last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        if CHANNELS_LAST:
            inside = (p < H * W)[:, None] & in_c[None, :]
            x = tl.load(X + p.to(tl.int64)[:, None] * stride_xp + offs_c[None, :], mask=inside, other=0.0)
        else:
            inside = in_c[:, None] & (p < H * W)[None, :]
            x = tl.load(X + offs_c.to(tl.int64)[:, None] * stride_xc + p[None, :], mask=inside, other=0.0)
            x = tl.trans(x)
        contains = _contains((p // W)[None, :], (p % W)[None, :], y0[:, None], x0[:, None], h[:, None], w[:, None])
        acc = _add_product(acc, contains, x, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION)
    if not _is_finite(acc):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for p in range(p_first, p_last):
            x = tl.load(X + p * stride_xp + offs_c * stride_xc, mask=in_c, other=0.0).to(tl.float32)
            acc += tl.where(_contains(p // W, p % W, y0, x0, h, w)[:, None], x[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=["stride_xb", "stride_xc", "stride_xp", "C", "splits"])
def forward_kernel(
    X, stride_xb, stride_xc, stride_xp, Y, INVERSE_NORM, C, splits,
    H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
    NORMALIZE: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    sample = (tl.program_id(0) // tiles // splits).to(tl.int64)
    split = tl.program_id(0) // tiles % splits
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    C = C // ALIGN * ALIGN
    # One of the two is 1, which nothing else divides.
    if CHANNELS_LAST:
        stride_xp = stride_xp.to(tl.int64) // ALIGN * ALIGN
    else:
        stride_xc = stride_xc.to(tl.int64) // ALIGN * ALIGN
    X += sample * (stride_xb.to(tl.int64) // ALIGN * ALIGN)
    y0, x0, h, w = _windows(m, SCALES)
    per_area = 1.0 / (h * w).to(tl.float32)
    p_first, p_last = 0, H * W
    if H * W > BLOCK_P:
        p_first = tl.min(tl.where(in_m, y0, H), 0) * W // BLOCK_P * BLOCK_P
        p_last = tl.max(tl.where(in_m, y0 + h, 0), 0) * W
    offs_n = tl.arange(0, BLOCK_N)
    if NORMALIZE:
        divisor = tl.full([BLOCK_M], 0.0, tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for c in range(0, C, BLOCK_N):
            y = _sums(
                X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, c + offs_n, C, H=H, W=W,
                CHANNELS_LAST=CHANNELS_LAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, IS_SPLIT=IS_SPLIT,
                PRECISION=PRECISION,
            ) * per_area[:, None]  # fmt: skip
            # Rows are divided by a number before squaring: the square of 1e30 overflows, the square of 1e-30 vanishes.
            # It is a sixteenth of the largest magnitude, because the reciprocal is then always a normal number.
            new = tl.maximum(tl.max(tl.abs(y), 1) * 0.0625, divisor)
            new = tl.where(new < TINY, 0.0, new)
            per_new = tl.where(new == 0.0, 0.0, 1.0 / new)
            decay = divisor * per_new
            y = y * per_new[:, None]
            squares = squares * decay * decay + tl.sum(y * y, 1)
            divisor = new
        norm = tl.sqrt_rn(squares)
        is_zero = divisor * norm <= EPS
        inverse_norm = tl.where(is_zero, 0.0, 1.0 / (divisor * norm))
        if split == 0:
            tl.store(INVERSE_NORM + sample * M + m, inverse_norm, mask=in_m)
        # Applied one after the other: the reciprocal of a large norm may vanish.
        per_divisor, per_norm = tl.where(is_zero, 0.0, 1.0 / divisor), tl.where(is_zero, 0.0, 1.0 / norm)
    for c in range(split * BLOCK_N, C, splits * BLOCK_N):
        y = _sums(
            X, stride_xc, stride_xp, y0, x0, h, w, p_first, p_last, c + offs_n, C, H=H, W=W,
            CHANNELS_LAST=CHANNELS_LAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_P=BLOCK_P, IS_SPLIT=IS_SPLIT,
            PRECISION=PRECISION,
        ) * per_area[:, None]  # fmt: skip
        if NORMALIZE:
            y = y * per_divisor[:, None] * per_norm[:, None]
        rows = Y + (sample * M + m)[:, None] * C
        tl.store(rows + (c + offs_n)[None, :], y.to(Y.dtype.element_ty), mask=in_m[:, None] & (c + offs_n < C)[None, :])


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
    p = first + tl.arange(0, BLOCK_P)
    in_p = p < H * W
    last = min(first + BLOCK_P, H * W)
    y, x = p // W, p % W
    C = C // ALIGN * ALIGN
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    dots = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZE and not HAS_DOTS:
        dots = _dot_products(G, U, sample * M + offs_m, offs_m < M, C, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    GRAD_X += sample * H * W * C
    for c in range(split * BLOCK_N, C, splits * BLOCK_N):
        offs_c = c + offs_n
        in_c = offs_c < C
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        # One tile of windows may hold several scales; several are taken scale by scale.
        for k in range(1 if M <= BLOCK_M else len(SCALES)):
            m_first, m_last = 0, M
            if M > BLOCK_M:
                m_first, m_last = _scale_range(k, first, last, W=W, SCALES=SCALES)
            for m in range(m_first, m_last, BLOCK_M):
                y0, x0, h, w = _windows(m + offs_m, SCALES)
                in_m = m + offs_m < m_last
                per_area = 1.0 / (h * w).to(tl.float32)
                g = _load_gradients(
                    G, U, INVERSE_NORM, DOTS, dots[:, None], (sample * M + m + offs_m)[:, None], per_area[:, None],
                    in_m[:, None], offs_c[None, :], in_c[None, :], C, NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS,
                )  # fmt: skip
                if IS_ROUNDED:
                    g = round_to_tf32(g)
                h = tl.where(in_m, h, 0)
                contains = _contains(y[:, None], x[:, None], y0[None, :], x0[None, :], h[None, :], w[None, :])
                acc = _add_product(acc, contains, g, IS_SPLIT=IS_SPLIT, PRECISION=PRECISION)
        if not _is_finite(acc):
            acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
            for m in range(M):
                y0, x0, h, w = _windows(m, SCALES)
                dot = 0.0
                if NORMALIZE and not HAS_DOTS:
                    dot = tl.sum(tl.where(offs_m == m, dots, 0.0), 0)
                g = _load_gradients(
                    G, U, INVERSE_NORM, DOTS, dot, sample * M + m, 1.0 / (h * w), True, offs_c, in_c, C,
                    NORMALIZE=NORMALIZE, HAS_DOTS=HAS_DOTS,
                )  # fmt: skip
                acc += tl.where(_contains(y, x, y0, x0, h, w)[:, None], g[None, :], 0.0)
        grad = acc.to(GRAD_X.dtype.element_ty)
        if CHANNELS_LAST:
            offsets = p.to(tl.int64)[:, None] * C + offs_c[None, :]
            tl.store(GRAD_X + offsets, grad, mask=in_p[:, None] & in_c[None, :])
        else:
            offsets = offs_c.to(tl.int64)[:, None] * (H * W) + p[None, :]
            tl.store(GRAD_X + offsets, tl.trans(grad), mask=in_c[:, None] & in_p[None, :])


def _strides(features: Tensor) -> tuple[Tensor, int, int]:
    """The map, and its strides over channels and positions, one of which is 1. Only slices of columns are copied."""
    _, C, H, W = features.shape
    over_c, over_y, over_x = features.stride()[1:]
    over_p = over_x if W > 1 else over_y if H > 1 else 1
    is_flat = H == 1 or W == 1 or over_y == W * over_x
    if is_flat and (over_p == 1 or over_c == 1 or C == 1):
        return features, 1 if C == 1 and over_p != 1 else over_c, over_p
    return features.contiguous(), H * W, 1


def scales_of(height: int, width: int, windows: list[int], strides: list[int]) -> tuple[tuple[int, ...], ...]:
    found, first = [], 0
    for k, (rows, columns) in enumerate(window_counts(height, width, windows, strides)):
        found.append((first, columns, rows, *windows[2 * k : 2 * k + 2], *strides[2 * k : 2 * k + 2]))
        first += rows * columns
    return tuple(found)


def block(count: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(count)))


def precision(hardware: str) -> str:
    """tf32 where that is the fast one; AMD's matrix units multiply fp32 itself."""
    return "ieee" if hardware == "gfx942" else "tf32"


def _splits(programs: int, channels: int, BLOCK_N: int, device: torch.device) -> int:
    """Over how many programs the channels are spread so that all multiprocessors stay busy."""
    return min(triton.cdiv(channels, BLOCK_N), triton.cdiv(PROGRAMS * multiprocessors(device), max(1, programs)))


def pooled(
    features: Tensor, windows: list[int], strides: list[int], *, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Y [B, M, C] in ``dtype``, and INVERSE_NORM [B, M], or [B, 0] without ``normalize``."""
    B, C, H, W = features.shape
    SCALES = scales_of(H, W, windows, strides)
    M = SCALES[-1][0] + SCALES[-1][1] * SCALES[-1][2]
    X, stride_xc, stride_xp = _strides(features)
    channels_last = stride_xp != 1
    hardware = hardware_of(X.device)
    config = launch_config("multiscale_pool", hardware=hardware)
    BLOCK_M = block(M, config.BLOCK_M)
    programs = B * triton.cdiv(M, BLOCK_M)
    splits = 1 if normalize else _splits(programs, C, config.BLOCK_N, X.device)
    Y = torch.empty(B, M, C, dtype=dtype, device=X.device)
    inverse_norm = torch.empty(B, M if normalize else 0, dtype=torch.float32, device=X.device)
    forward_kernel[(programs * splits,)](
        X=X,
        stride_xb=X.stride(0),
        stride_xc=stride_xc,
        stride_xp=stride_xp,
        Y=Y,
        INVERSE_NORM=inverse_norm,
        C=C,
        splits=splits,
        H=H,
        W=W,
        M=M,
        SCALES=SCALES,
        CHANNELS_LAST=channels_last,
        BLOCK_M=BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_P=block(H * W, config.BLOCK_M),
        ALIGN=math.gcd(16 // X.element_size(), C, X.stride(0), stride_xp if channels_last else stride_xc),
        NORMALIZE=normalize,
        IS_SPLIT=X.dtype == torch.float32 and precision(hardware) == "tf32",
        PRECISION=precision(hardware),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Y, inverse_norm


def spread_gradients(
    grad: Tensor, unit: Tensor | None, inverse_norm: Tensor, windows: list[int], strides: list[int],
    grad_features: Tensor,
) -> None:  # fmt: skip
    """Writes GRAD_X, dense in either memory format. ``grad``, ``unit``: contiguous [B, M, C]."""
    assert grad.is_contiguous()
    B, C, H, W = grad_features.shape
    M = grad.shape[1]
    hardware = hardware_of(grad.device)
    config = launch_config("multiscale_pool", hardware=hardware)
    BLOCK_M, BLOCK_P = block(M, config.BLOCK_M), block(H * W, config.BLOCK_M)
    ALIGN = math.gcd(16 // grad.element_size(), C)
    programs = B * triton.cdiv(H * W, BLOCK_P)
    dots = None
    if unit is not None and (M > BLOCK_M or H * W > BLOCK_P):
        dots = torch.empty(B, M, dtype=torch.float32, device=grad.device)
        dots_kernel[(triton.cdiv(B * M, ROWS),)](
            G=grad, U=unit, DOTS=dots, n=B * M, C=C, BLOCK_M=ROWS, BLOCK_N=128, ALIGN=ALIGN, num_warps=4
        )
    # Without dots, each program takes the dot products of all windows, which splits would repeat.
    splits = 1 if unit is not None and dots is None else _splits(programs, C, config.BLOCK_N, grad.device)
    is_tf32 = precision(hardware) == "tf32"
    backward_kernel[(programs * splits,)](
        G=grad,
        U=unit,
        INVERSE_NORM=inverse_norm,
        DOTS=dots,
        GRAD_X=grad_features,
        C=C,
        splits=splits,
        H=H,
        W=W,
        M=M,
        SCALES=scales_of(H, W, windows, strides),
        CHANNELS_LAST=not grad_features.is_contiguous(),
        BLOCK_P=BLOCK_P,
        BLOCK_N=config.BLOCK_N,
        BLOCK_M=BLOCK_M,
        ALIGN=ALIGN,
        NORMALIZE=unit is not None,
        HAS_DOTS=dots is not None,
        IS_SPLIT=is_tf32 and grad_features.dtype == torch.float32,
        IS_ROUNDED=is_tf32 and grad_features.dtype != torch.float32,
        PRECISION=precision(hardware),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
