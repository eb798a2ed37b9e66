"""Rows as they are multiplied (normalised, padded, rounded to tf32), and the gradient of the rows as they were given.

Legend. ``X0``, ``X1``: rows [n, D] of one side or of two, with any strides. ``VECTORS`` [SIDES, n, width]: what is
multiplied, zero beyond D, so that no kernel after this one needs a mask over D. With NORMALIZE these are unit rows
``x_i / |x_i|``; rows with ``|x_i| <= 1e-12`` give zero. ``INVERSE_NORM`` [SIDES, n]: ``1 / |x_i|`` in fp32, and zero
for those rows, so that their gradient is zero too. TO_TF32: elements are rounded to the 10 bits of mantissa that a tf32
product reads. The product itself would drop the other bits, which shrinks every element. Everything downstream, forward
and backward, multiplies these same rounded rows.

PARTIAL [SPLITS, SIDES, n, width]: sums of a gradient over a split of the columns, times a number that UNSCALE undoes;
UPSTREAM, if there is one, multiplies the result.
DOTS [SIDES, n]: their dot products with VECTORS, which add up to the gradient of the scale.

Rows are read in pieces of BLOCK_D elements. The first piece stays in registers, and narrow rows have no other.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import cdiv
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import ANYWHERE
from torch import Tensor

from fastkd.numerics import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
BLOCK_ELEMENTS = 2048


@triton.jit
def round_to_tf32(x):
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits could carry over into a zero


@triton.jit
def _load(ROWS, stride_d, start, in_rows, D, BLOCK_D: tl.constexpr):
    """A piece [BLOCK_M, BLOCK_D] in fp32, from each row's element ``start`` on. ROWS: pointers to the rows."""
    offs_d = start + tl.arange(0, BLOCK_D)
    inside = in_rows[:, None] & (offs_d < D)[None, :]
    return tl.load(ROWS + offs_d[None, :].to(tl.int64) * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ROWS, x, start, in_rows, D, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    inside = in_rows[:, None] & (offs_d < D)[None, :]
    tl.store(ROWS + offs_d[None, :], x.to(ROWS.dtype.element_ty), mask=inside)


@triton.jit
def _vector(x, divisor, norm, is_zero, NORMALIZE: tl.constexpr, TO_TF32: tl.constexpr):
    """A piece of VECTORS, from the piece ``x`` of the rows."""
    if NORMALIZE:
        x = tl.div_rn(tl.div_rn(x, divisor[:, None]), norm[:, None])
        x = tl.where(is_zero[:, None], 0.0, x)
    if TO_TF32:
        x = round_to_tf32(x)
    return x


@triton.jit(do_not_specialize=["stride_0n", "stride_0d", "stride_1n", "stride_1d", "n", "D", "width"])
def vectors_kernel(
    X0, X1, stride_0n, stride_0d, stride_1n, stride_1d, VECTORS, INVERSE_NORM, n, D, width,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, IS_ONE_PIECE: tl.constexpr, NORMALIZE: tl.constexpr,
    TO_TF32: tl.constexpr,
):  # fmt: skip
    side = tl.program_id(1)
    if side == 0:
        X, stride_n, stride_d = X0, stride_0n.to(tl.int64), stride_0d.to(tl.int64)
    else:
        X, stride_n, stride_d = X1, stride_1n.to(tl.int64), stride_1d.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n
    X_rows = X + rows[:, None] * stride_n
    rows += side.to(tl.int64) * n
    x = _load(X_rows, stride_d, 0, in_rows, D, BLOCK_D=BLOCK_D)
    end = BLOCK_D if IS_ONE_PIECE else width  # constant for narrow rows, whose loops then vanish
    divisor, norm, is_zero = None, None, None
    if NORMALIZE:
        # Rows are divided by their largest magnitude before squaring: 1e30 squared overflows, 1e-30 squared vanishes.
        largest = tl.max(tl.abs(x), 1)
        for start in range(BLOCK_D, end, BLOCK_D):
            piece = _load(X_rows, stride_d, start, in_rows, D, BLOCK_D=BLOCK_D)
            largest = tl.maximum(largest, tl.max(tl.abs(piece), 1))
        divisor = tl.where(largest == 0, 1.0, largest)
        scaled = tl.div_rn(x, divisor[:, None])
        squares = tl.sum(scaled * scaled, 1)
        for start in range(BLOCK_D, end, BLOCK_D):
            scaled = tl.div_rn(_load(X_rows, stride_d, start, in_rows, D, BLOCK_D=BLOCK_D), divisor[:, None])
            squares += tl.sum(scaled * scaled, 1)
        norm = tl.sqrt_rn(squares)
        is_zero = divisor * norm <= EPS
        norm = tl.where(is_zero, 1.0, norm)
        tl.store(INVERSE_NORM + rows, tl.where(is_zero, 0.0, tl.div_rn(1.0, divisor * norm)), mask=in_rows)
    OUT = VECTORS + rows[:, None] * width
    x = _vector(x, divisor, norm, is_zero, NORMALIZE=NORMALIZE, TO_TF32=TO_TF32)
    _store(OUT, x, 0, in_rows, width, BLOCK_D=BLOCK_D)
    for start in range(BLOCK_D, end, BLOCK_D):
        piece = _load(X_rows, stride_d, start, in_rows, D, BLOCK_D=BLOCK_D)
        piece = _vector(piece, divisor, norm, is_zero, NORMALIZE=NORMALIZE, TO_TF32=TO_TF32)
        _store(OUT, piece, start, in_rows, width, BLOCK_D=BLOCK_D)


@triton.jit
def _sum(PARTIAL, stride_ps, splits, start, in_rows, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A piece of the rows of PARTIAL, added over the splits."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        total += _load(PARTIAL + split * stride_ps, 1, start, in_rows, D, BLOCK_D=BLOCK_D)
    return total


@triton.jit(do_not_specialize=["stride_ps", "n", "D", "width", "splits"], do_not_specialize_on_alignment=ANYWHERE)
def finish_kernel(
    PARTIAL, stride_ps, VECTORS, INVERSE_NORM, SCALE, UNSCALE, UPSTREAM, GRAD0, GRAD1, DOTS, n, D, width, splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, IS_ONE_PIECE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
):  # fmt: skip
    """Adds the splits, and goes back through the normalisation: ``(g - (g . u) u) / |x|``."""
    side = tl.program_id(1)
    GRAD = GRAD0 if side == 0 else GRAD1
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    rows = side.to(tl.int64) * n + offs_m
    stride_ps = stride_ps.to(tl.int64)
    P, V, OUT = PARTIAL + rows[:, None] * width, VECTORS + rows[:, None] * width, GRAD + offs_m[:, None] * D
    end = BLOCK_D if IS_ONE_PIECE else D
    unscale = tl.load(UNSCALE)
    if HAS_UPSTREAM:
        unscale *= tl.load(UPSTREAM).to(tl.float32)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * tl.load(SCALE).to(tl.float32) * unscale
    if NORMALIZE:
        factor *= tl.load(INVERSE_NORM + rows, mask=in_rows, other=0.0)
    total = _sum(P, stride_ps, splits, 0, in_rows, D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
    vector = _load(V, 1, 0, in_rows, D, BLOCK_D=BLOCK_D)
    dots = tl.sum(total * vector, 1)
    for start in range(BLOCK_D, end, BLOCK_D):
        piece = _sum(P, stride_ps, splits, start, in_rows, D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
        dots += tl.sum(piece * _load(V, 1, start, in_rows, D, BLOCK_D=BLOCK_D), 1)
    tl.store(DOTS + rows, dots * unscale, mask=in_rows)
    if NORMALIZE:
        total -= dots[:, None] * vector
    _store(OUT, total * factor[:, None], 0, in_rows, D, BLOCK_D=BLOCK_D)
    for start in range(BLOCK_D, end, BLOCK_D):
        piece = _sum(P, stride_ps, splits, start, in_rows, D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
        if NORMALIZE:
            piece -= dots[:, None] * _load(V, 1, start, in_rows, D, BLOCK_D=BLOCK_D)
        _store(OUT, piece * factor[:, None], start, in_rows, D, BLOCK_D=BLOCK_D)


@functools.cache
def padded_width(D: int) -> int:
    """The width of a streaming kernel's tile that holds rows of D."""
    return max(16, 1 << (D - 1).bit_length())


@functools.cache
def tile(width: int) -> dict[str, int]:
    """The constants of a kernel that reads rows in pieces."""
    BLOCK_D = min(padded_width(width), BLOCK_ELEMENTS)
    return {"BLOCK_M": BLOCK_ELEMENTS // BLOCK_D, "BLOCK_D": BLOCK_D, "IS_ONE_PIECE": width <= BLOCK_D}


def _vectors(sides: Sequence[Tensor], width: int, *, normalize: bool, to_tf32: bool) -> tuple[Tensor, Tensor | None]:
    """VECTORS [SIDES, n, width] and INVERSE_NORM [SIDES, n] of one or two tensors of one shape and dtype."""
    first, last = sides[0], sides[-1]
    assert first.shape == last.shape
    assert first.dtype == last.dtype
    n, D = first.shape
    assert width >= D
    constants = tile(width)
    vectors = torch.empty(len(sides), n, width, dtype=first.dtype, device=first.device)
    inverse_norm = torch.empty(len(sides), n, dtype=torch.float32, device=first.device) if normalize else None
    launch(
        vectors_kernel,
        (cdiv(n, constants["BLOCK_M"]), len(sides)),
        X0=first,
        X1=last,
        stride_0n=first.stride(0),
        stride_0d=first.stride(1),
        stride_1n=last.stride(0),
        stride_1d=last.stride(1),
        VECTORS=vectors,
        INVERSE_NORM=inverse_norm,
        n=n,
        D=D,
        width=width,
        **constants,
        NORMALIZE=normalize,
        TO_TF32=to_tf32,
        num_warps=4,
    )
    return vectors, inverse_norm


def unit_rows(first: Tensor, second: Tensor, width: int, *, to_tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Unit rows [2, n, width] and inverse norms [2, n] of two tensors of one shape and dtype."""
    units, inverse_norm = _vectors((first, second), width, normalize=True, to_tf32=to_tf32)
    assert inverse_norm is not None
    return units, inverse_norm


def vectors(x: Tensor, width: int, *, normalize: bool, to_tf32: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows [..., n, width] in the dtype they are multiplied in, and their inverse norms [..., n] if ``normalize``.

    ``x``: rows [n, D], or rows of two sides [2, n, D]. It is returned itself, without a copy, if nothing is to be done:
    no normalising, no rounding, and no padding of rows that the streaming kernels can read where they lie.
    """
    is_ready = x.shape[-1] == width and x.is_contiguous() and x.data_ptr() % 16 == 0
    if is_ready and not (normalize or to_tf32):
        return x, None
    rows, inverse_norm = _vectors(x.unbind() if x.ndim == 3 else (x,), width, normalize=normalize, to_tf32=to_tf32)
    if x.ndim == 2:
        rows, inverse_norm = rows[0], None if inverse_norm is None else inverse_norm[0]
    return rows, inverse_norm


def input_gradients(
    partial: Tensor, rows: Tensor, inverse_norm: Tensor | None, scale: Tensor, unscale: Tensor,
    upstream: Tensor | None = None, *, D: int, dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the input's rows [n, D] per side, and DOTS, from the sums of the gradients of VECTORS ``rows``."""
    splits, sides, n, width = partial.shape
    assert partial.stride()[1:] == (n * width, width, 1)
    assert rows.is_contiguous()
    assert inverse_norm is None or inverse_norm.is_contiguous()
    constants = tile(width)
    grads = [torch.empty(n, D, dtype=dtype, device=rows.device) for _ in range(sides)]
    dots = torch.empty(sides, n, dtype=torch.float32, device=rows.device)
    launch(
        finish_kernel,
        (cdiv(n, constants["BLOCK_M"]), sides),
        PARTIAL=partial,
        stride_ps=partial.stride(0),
        VECTORS=rows,
        INVERSE_NORM=inverse_norm,
        SCALE=scale,
        UNSCALE=unscale,
        UPSTREAM=upstream,
        GRAD0=grads[0],
        GRAD1=grads[-1],
        DOTS=dots,
        n=n,
        D=D,
        width=width,
        splits=splits,
        **constants,
        NORMALIZE=inverse_norm is not None,
        HAS_UPSTREAM=upstream is not None,
        num_warps=4,
    )
    return grads, dots
