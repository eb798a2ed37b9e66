"""``multiscale_pool`` on a GPU: one tile of windows x channels at a time, as a product with a matrix of zeros and ones.

Bytes per channel, for H W positions, M windows and e bytes per element: the forward reads H W e and writes M e. With
NORMALIZE it visits the channels twice, the first time for the norms. The second visit finds a map of 7 x 7 in the L2
cache, but reads one of 56 x 56 again. The backward reads M e (2 M e with NORMALIZE: the unit rows too) and writes
H W e. None of this has been measured on a GPU yet.

Legend. ``X`` [B, C, H, W]: the map, and ``GRAD_X`` its gradient. ``Y`` [B, M, C]: the averages or unit rows, and ``G``
their gradient. ``P`` [m, p]: whether window m contains position p, made from indices. The sums ``P X`` and ``P^T G``
are fp32. Zeros and ones are exact in every dtype, and so are products with fp16 and bf16. fp32 operands are the sum of
two numbers that tf32 holds (IS_SPLIT): all but the last bit or two survive. SCALES: for every scale its first window,
its windows per row and per column, and height, width, vertical and horizontal stride.

Because 0 * inf is NaN, one value that is not finite spoils its whole tile. A program therefore adds up 0 * sum of all
its tiles (``poison``). If the result is not 0, it does all its work again, one position or window at a time (EXACT).

The loops over tiles are pipelined: tiles are copied to shared memory (``LDGSTS``) while earlier ones are multiplied.
Such a copy needs 4 aligned bytes. ALIGN divides the map's strides, and ALIGN_C the number of channels, so that loads
and stores are as wide as they allow. A 16-bit NCHW map of 7 x 7 allows 2 bytes, because every other channel starts at
an odd element. There the even channels and the odd ones are two tiles (PAIRED). The tile of the odd ones starts one
element early, and its ``P`` is shifted by one position (SHIFT). Both may load one element too many (SLACK), which
belongs to the other channel of the pair and to no window.

H, W and the scales are constants of the compiled code, so every new size of map compiles once, for some seconds.
"""

import functools
import math

import torch
from fastkd.kernels.launch import cdiv, hardware_of, launch_config, multiprocessors
from fastkd.kernels.multiscale_pool.backward import backward_kernel, dots_kernel
from fastkd.kernels.multiscale_pool.forward import forward_kernel
from fastkd.kernels.plans import launch
from torch import Tensor

from fastkd.numerics import window_counts

ROWS = 16  # per program that takes dot products
PROGRAMS = 8  # per multiprocessor, at least, where there are enough channels


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
    return _scales_of(height, width, tuple(windows), tuple(strides))


@functools.lru_cache(maxsize=256)
def _scales_of(
    height: int, width: int, windows: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """One and the same object for the same maps, by which a launch is found again."""
    found, first = [], 0
    for k, (rows, columns) in enumerate(window_counts(height, width, list(windows), list(strides))):
        found.append((first, columns, rows, *windows[2 * k : 2 * k + 2], *strides[2 * k : 2 * k + 2]))
        first += rows * columns
    return tuple(found)


def block(count: int, largest: int) -> int:
    return min(largest, max(16, 1 << (count - 1).bit_length()))


def precision(hardware: str) -> str:
    """tf32 where that is the fast one; AMD's matrix units multiply fp32 itself."""
    return "ieee" if hardware == "gfx942" else "tf32"


def _splits(programs: int, channels: int, BLOCK_N: int, device: torch.device) -> int:
    """Over how many programs the channels are spread so that all multiprocessors stay busy."""
    return min(cdiv(channels, BLOCK_N), cdiv(PROGRAMS * multiprocessors(device), max(1, programs)))


def pooled(
    features: Tensor, windows: list[int], strides: list[int], *, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Y [B, M, C] in ``dtype``, and INVERSE_NORM [B, M], or [B, 0] without ``normalize``."""
    B, C, H, W = features.shape
    SCALES = scales_of(H, W, windows, strides)
    M = SCALES[-1][0] + SCALES[-1][1] * SCALES[-1][2]
    X, stride_xc, stride_xp = _strides(features)
    channels_last = stride_xp != 1
    aligned = 16 // X.element_size()
    # Two channels together are aligned where one is not.
    paired = X.element_size() == 2 and not channels_last and stride_xc % 2 == 1 and C % 2 == 0 and X.stride(0) % 2 == 0
    hardware = hardware_of(X.device)
    config = launch_config("multiscale_pool", hardware=hardware, dtype=X.dtype, width=H * W)
    BLOCK_M = block(M, config.BLOCK_M)
    programs = B * cdiv(M, BLOCK_M)
    splits = 1 if normalize else _splits(programs, C, config.BLOCK_N, X.device)
    Y = torch.empty(B, M, C, dtype=dtype, device=X.device)
    inverse_norm = torch.empty(B, M if normalize else 0, dtype=torch.float32, device=X.device)
    launch(
        forward_kernel,
        (programs * splits,),
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
        ALIGN=math.gcd(aligned, X.stride(0), stride_xp if channels_last else stride_xc * (1 + paired)),
        ALIGN_C=math.gcd(aligned, C),
        PAIRED=paired,
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
    config = launch_config("multiscale_pool", hardware=hardware, dtype=grad_features.dtype, width=H * W)
    BLOCK_M, BLOCK_P = block(M, config.BLOCK_M), block(H * W, config.BLOCK_M)
    ALIGN = math.gcd(16 // grad.element_size(), C)
    programs = B * cdiv(H * W, BLOCK_P)
    dots = None
    if unit is not None and (M > BLOCK_M or H * W > BLOCK_P):
        dots = torch.empty(B, M, dtype=torch.float32, device=grad.device)
        launch(
            dots_kernel,
            (cdiv(B * M, ROWS),),
            G=grad,
            U=unit,
            DOTS=dots,
            n=B * M,
            C=C,
            BLOCK_M=ROWS,
            BLOCK_N=128,
            ALIGN=ALIGN,
            num_warps=4,
        )
    # Without dots, each program takes the dot products of all windows, which splits would repeat.
    splits = 1 if unit is not None and dots is None else _splits(programs, C, config.BLOCK_N, grad.device)
    is_tf32 = precision(hardware) == "tf32"
    launch(
        backward_kernel,
        (programs * splits,),
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
