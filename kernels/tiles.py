"""What the streaming kernels of ``dual_softmax`` and ``contrast`` share: how a row-block walks over its columns.

A program owns BLOCK_M rows and one split of the columns. It visits the columns of its split in tiles of BLOCK_N. Few
tiles need masks: those that may hold positives of the row-block, and a last one that has fewer than BLOCK_N columns.
They are the edge, and have a loop of their own, so that the loop over all other tiles has no mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import LaunchConfig, cached, cdiv, column_splits, hardware_of, launch_config, multiprocessors
from fastkd.kernels.plans import Blocks
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST_G = tl.constexpr(16384.0)  # a quarter of the largest fp16: G of both sides of a pair may be added
# Pointers to scalars, which may lie anywhere in a user's parameters, and to slices that start at any rank's rows.
# A kernel is not compiled a second time for those that do not lie at a multiple of 16 bytes.
ANYWHERE = ["SCALE", "UPSTREAM", "GRAD_CONTRAST", "GRAD_CONSISTENCY", "LARGEST_WEIGHT", "UNSCALE", "WEIGHT", "STATS"]
BLOCK_ROWS = 128  # rows of a program that reads a few numbers per row


@triton.jit
def load_rows(ROWS, row, IN_REGISTERS: tl.constexpr):
    """The rows of a program. Without IN_REGISTERS, a product reads them from shared memory again for every tile.

    The compiler keeps in registers what is computed from a load, and adding zero changes no row.
    """
    rows = ROWS.load([row, 0])
    return rows + 0.0 if IN_REGISTERS else rows


@triton.jit
def store_numbers(NUMBERS, n, in_rows, values):
    """Writes ``values``, a tuple of numbers per row, to NUMBERS [len(values), n]; NUMBERS points to the rows' first."""
    for k in tl.static_range(len(values)):
        tl.store(NUMBERS + k * n.to(tl.int64), values[k], mask=in_rows)


@triton.jit
def split_tiles(split, tiles_per_split, n_cols, first_positive, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A split has tiles ``first ... last - 1``; tiles ``skip ... resume - 1`` hold the positives of the row-block.

    These are EDGE tiles, or all tiles of the split if it has fewer, or none if the positives lie in other splits.
    ``ragged`` is 1 if the split has a tile with fewer than BLOCK_N columns that is not among those; that is tile
    ``whole``. Otherwise ``ragged`` is 0.
    """
    EDGE: tl.constexpr = edge_tiles(BLOCK_M, BLOCK_N)
    first = split * tiles_per_split
    last = max(min(first + tiles_per_split, tl.cdiv(n_cols, BLOCK_N)), first)
    skip = min(max(max(first_positive, 0) // BLOCK_N, first), last)
    end = min(max(tl.cdiv(max(first_positive + BLOCK_M, 0), BLOCK_N), first), last)
    skip = tl.where(skip < end, max(min(skip, last - EDGE), first), last)
    resume = min(skip + EDGE, last)
    whole = min(n_cols // BLOCK_N, last)
    ragged = tl.where((whole < first) | ((skip <= whole) & (whole < resume)), 0, last - whole)
    return first, last, skip, resume, whole, ragged


@triton.constexpr_function
def edge_tiles(BLOCK_M, BLOCK_N):
    """The most tiles that the positives of a row-block, BLOCK_M columns one after the other, can lie in."""
    return -(-BLOCK_M // BLOCK_N) + 1


@triton.jit
def loop_bounds(tiles, BLOCK_N: tl.constexpr, IS_EDGE: tl.constexpr):
    """Bounds of the loop over the edge, or of the loop over all other tiles; both count columns."""
    first, last, skip, resume, _, ragged = tiles
    low, high = (skip, resume + ragged) if IS_EDGE else (first, last - ragged - (resume - skip))
    return low * BLOCK_N, high * BLOCK_N


@triton.jit
def first_column(index, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_EDGE: tl.constexpr):
    """The first column of the tile that one of the two loops visits at ``index``.

    The loop over all other tiles jumps by a constant, because the backward has not one register to spare in it.
    """
    _, _, skip, resume, whole, _ = tiles
    if IS_EDGE:
        start = tl.where(index < resume * BLOCK_N, index, whole * BLOCK_N)
    else:
        start = tl.where(index < skip * BLOCK_N, index, index + edge_tiles(BLOCK_M, BLOCK_N) * BLOCK_N)
    return start


def tiling(
    kernel: str,
    rows: Tensor,
    columns: Tensor,
    *,
    splits: int | None,
    all_columns: int | None,
    bounded: bool | None = None,
) -> tuple[LaunchConfig, tuple[int, int], dict[str, Any]]:
    """The config, the grid (row-blocks, splits), and the arguments that every streaming kernel takes.

    ``splits``: the number that earlier columns were split into, which has to stay the same; None: it is chosen so that
    the device stays busy with ``all_columns`` columns (default: these columns).
    """
    n, width = rows.shape[-2:]
    n_cols = columns.shape[-2]
    assert columns.shape[-1] == width
    assert columns.dtype == rows.dtype
    device = rows.device
    return _tiling(
        kernel, n, n_cols, width, rows.dtype, splits, all_columns, bounded, hardware_of(device), multiprocessors(device)
    )


@cached
def _tiling(
    kernel: str,
    n: int,
    n_cols: int,
    width: int,
    dtype: torch.dtype,
    splits: int | None,
    all_columns: int | None,
    bounded: bool | None,
    hardware: str,
    multiprocessors: int,
) -> tuple[LaunchConfig, tuple[int, int], dict[str, Any]]:
    config = launch_config(kernel, hardware=hardware, dtype=dtype, width=width, bounded=bounded)
    tiles, row_blocks = cdiv(n_cols, config.BLOCK_N), cdiv(n, config.BLOCK_M)
    if splits is None:
        all_tiles = tiles if all_columns is None else cdiv(all_columns, config.BLOCK_N)
        splits = column_splits(row_blocks, all_tiles, config.ctas_per_sm * multiprocessors)
    arguments = {
        "n": n,
        "n_cols": n_cols,
        "tiles_per_split": cdiv(tiles, splits),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "PRECISION": "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    } | ({} if config.maxnreg is None else {"maxnreg": config.maxnreg})
    return config, (row_blocks, splits), arguments


def in_blocks(rows: Tensor, block: int) -> Blocks:
    """Rows [n, width] that a kernel reads in blocks of whole rows."""
    return Blocks(rows, [block, rows.shape[1]])
