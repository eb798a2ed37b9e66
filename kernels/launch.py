"""The launch table: which tile sizes, warps and stages a kernel gets, by hardware. No search happens at run time.

Every entry was chosen from ahead-of-time compilation (``python -m bench.aot``): no spills, shared memory within the
limit, warpgroup matrix instructions on sm_90. None has been measured yet; ``python -m bench.tune`` measures on a GPU.

``sm_80`` entries stay below 99 KiB of shared memory, so that consumer cards of compute capability 8.6 and 8.9 use them
too. Cards of compute capability 12.x also use them; there ``dual_softmax`` spills, and runs only if it is asked for.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
HARDWARE = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
STREAMING = ("dual_softmax_forward", "dual_softmax_backward", "contrast_forward", "contrast_backward", "contrast_self")


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    ``ctas_per_sm``: how many programs a multiprocessor shall hold. ``apart``: the gradients of the two sides get a
    launch each, because one launch for both would spill. ``rows_in_registers``: a forward keeps its rows in registers.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1
    apart: bool = False
    rows_in_registers: bool = False

    @property
    def maxnreg(self) -> int | None:
        """The registers a thread may have so that ``ctas_per_sm`` programs fit; None: as many as the compiler likes."""
        most = 65536 // (32 * self.num_warps * self.ctas_per_sm) // 8 * 8
        return None if self.ctas_per_sm == 1 else min(255, most)


class Entry(NamedTuple):
    """What a line of the table is for: a kernel, its dtype's size, the widest row it holds, and BOUNDED.

    ``itemsize`` 0: every dtype. ``width``: padded D, or the number of classes or of a map's positions; 0: any.
    ``bounded``: None for kernels that have no BOUNDED.
    """

    kernel: str
    itemsize: int = 0
    width: int = 0
    bounded: bool | None = None


# {kernel: {(bytes per element, width): config}}. A key of dual_softmax may have BOUNDED as its third part; without it,
# the entry is for both. contrast_self is the backward of queries that are contrasted with themselves.
_Lines = dict[str, dict[Any, LaunchConfig]]


def _by_size(two: LaunchConfig, four: LaunchConfig) -> dict[Any, LaunchConfig]:
    """One config for 16-bit rows of 64 and 128 elements, and one for 32-bit rows."""
    return {(2, 64): two, (2, 128): two, (4, 64): four, (4, 128): four}


_SM80: _Lines = {
    "dual_softmax_forward": _by_size(LaunchConfig(64, 32, 8, 2), LaunchConfig(32, 16, 8, 1)),
    "dual_softmax_backward": {
        **_by_size(LaunchConfig(32, 32, 8, 2), LaunchConfig(32, 32, 8, 2)),
        (4, 128): LaunchConfig(32, 16, 8, 1),
    },
    "contrast_forward": _by_size(LaunchConfig(64, 32, 8, 2), LaunchConfig(32, 32, 8, 2)),
    "contrast_backward": _by_size(LaunchConfig(64, 32, 8, 2), LaunchConfig(32, 32, 8, 2)),
    "contrast_self": {
        **_by_size(LaunchConfig(64, 32, 8, 2), LaunchConfig(32, 32, 8, 2)),
        (2, 128): LaunchConfig(32, 32, 8, 2),
    },
    "multiscale_pool": {(0, 64): LaunchConfig(32, 32, 4, 3), (0, 0): LaunchConfig(32, 64, 8, 3)},
}
_SM90: _Lines = {
    "dual_softmax_forward": {
        (2, 64): LaunchConfig(128, 64, 8, 4, ctas_per_sm=2),
        (2, 128): LaunchConfig(128, 64, 8, 4, rows_in_registers=True),
        (2, 256): LaunchConfig(128, 32, 8, 4, rows_in_registers=True),
        (4, 64): LaunchConfig(128, 64, 8, 4, rows_in_registers=True),
        (4, 128): LaunchConfig(128, 32, 8, 4, rows_in_registers=True),
    },
    "dual_softmax_backward": {
        (2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 128, True): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 128, False): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2, apart=True),
        (2, 256): LaunchConfig(64, 16, 4, 2, ctas_per_sm=2, apart=True),
        (4, 64): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
        (4, 128): LaunchConfig(128, 32, 8, 2, apart=True),
    },
    "contrast_forward": {
        (2, 64): LaunchConfig(128, 64, 8, 4, ctas_per_sm=2, rows_in_registers=True),
        (2, 128): LaunchConfig(128, 64, 8, 4, ctas_per_sm=2),
        (2, 256): LaunchConfig(128, 64, 8, 4, rows_in_registers=True),
        (4, 64): LaunchConfig(128, 64, 8, 4, ctas_per_sm=2),
        (4, 128): LaunchConfig(128, 64, 8, 4, rows_in_registers=True),
    },
    "contrast_backward": {
        (2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=3),
        (2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 256): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
        (4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (4, 128): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
    },
    "contrast_self": {
        (2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 256): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
        (4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (4, 128): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
    },
    "multiscale_pool": {
        (0, 64): LaunchConfig(64, 32, 4, 3),
        (2, 0): LaunchConfig(64, 64, 8, 3),
        (4, 0): LaunchConfig(32, 64, 8, 3),
    },
}
# What differs from sm_90. In multiscale_pool 64 rows would go through tensor memory, where Triton 3.6 fails to compile,
# and 32 x 64 with 8 warps and 32 x 32 with 2 or 3 stages spill.
_SM100: _Lines = {
    "dual_softmax_forward": {
        (2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=3),
        (2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 256): LaunchConfig(64, 64, 4, 2),
        (4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (4, 128): LaunchConfig(64, 64, 4, 2),
    },
    "dual_softmax_backward": {
        (2, 128, True): LaunchConfig(64, 64, 4, 2),
        (2, 64, False): LaunchConfig(64, 64, 8, 2),
        (2, 128, False): LaunchConfig(64, 64, 8, 2, apart=True),
        (2, 256, True): LaunchConfig(64, 64, 8, 2, apart=True),
        (2, 256, False): LaunchConfig(64, 32, 8, 2, apart=True),
        (4, 64): LaunchConfig(64, 32, 8, 2),
        (4, 128): LaunchConfig(64, 32, 8, 2, apart=True),
    },
    "contrast_forward": dict.fromkeys(_SM90["contrast_forward"], LaunchConfig(64, 64, 4, 2, ctas_per_sm=2)),
    "contrast_backward": {
        (2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        (2, 256): LaunchConfig(64, 64, 8, 2),
        (4, 128): LaunchConfig(64, 32, 4, 2),
    },
    "contrast_self": {(2, 256): LaunchConfig(64, 32, 8, 2), (4, 128): LaunchConfig(64, 32, 4, 2)},
    "multiscale_pool": dict.fromkeys(_SM90["multiscale_pool"], LaunchConfig(32, 32, 4, 1)),
}
_GFX942: _Lines = {
    **{kernel: _by_size(LaunchConfig(64, 16, 4, 1), LaunchConfig(64, 16, 4, 1)) for kernel in STREAMING},
    "multiscale_pool": {(0, 0): LaunchConfig(32, 32, 4, 1)},
}
# A row that fits one tile needs no running maximum, and a tile of one warp needs no barrier.
_NARROW = {
    (0, 16): LaunchConfig(32, 16, 1, 1),
    (0, 64): LaunchConfig(8, 64, 1, 1),
    (0, 128): LaunchConfig(4, 128, 1, 1),
    (0, 256): LaunchConfig(2, 256, 1, 1),
    (0, 512): LaunchConfig(1, 512, 1, 1),
}
_SOFT_TARGET: _Lines = {
    "soft_target_forward": {
        **_NARROW,
        (0, 1024): LaunchConfig(1, 1024, 1, 1),
        (0, 2048): LaunchConfig(1, 2048, 2, 1),
        (0, 4096): LaunchConfig(1, 4096, 4, 1),
        (0, 8192): LaunchConfig(1, 8192, 8, 1),
        (0, 0): LaunchConfig(1, 2048, 8, 1, ctas_per_sm=2),
    },
    "soft_target_backward": {**_NARROW, (0, 0): LaunchConfig(1, 1024, 2, 1)},
}
_INTERPRETER: _Lines = {
    **{
        kernel: dict.fromkeys(lines, LaunchConfig(16, 16, 4, 1, rows_in_registers=True))
        for kernel, lines in _SM90.items()
    },
    **{kernel: {(0, 32): LaunchConfig(4, 32, 4, 1), (0, 0): LaunchConfig(2, 64, 4, 1)} for kernel in _SOFT_TARGET},
}


_caches: list[Any] = []


def cached(function: Function) -> Function:
    """A cache of what follows from the table; :func:`clear_caches` empties all of them when the table has changed."""
    cache = functools.lru_cache(maxsize=4096)(function)
    _caches.append(cache)
    return cast(Function, cache)


def clear_caches() -> None:
    for cache in _caches:
        cache.cache_clear()


def table_of(*parts: _Lines) -> dict[Entry, LaunchConfig]:
    """The entries of all parts; a later part replaces what an earlier one says."""
    table = {}
    for part in parts:
        for kernel, lines in part.items():
            for (itemsize, width, *bounded), config in lines.items():
                for mode in bounded or ((True, False) if kernel.startswith("dual_softmax") else (None,)):
                    table[Entry(kernel, itemsize, width, mode)] = config
    return table


TABLE = {
    "sm_80": table_of(_SM80, _SOFT_TARGET),
    "sm_90": table_of(_SM90, _SOFT_TARGET),
    "sm_100": table_of(_SM90, _SM100, _SOFT_TARGET),
    "gfx942": table_of(_GFX942, _SOFT_TARGET),
    "interpreter": table_of(_INTERPRETER),
}


@cached
def launch_config(
    kernel: str, *, hardware: str, dtype: torch.dtype = torch.float32, width: int = 0, bounded: bool | None = None
) -> LaunchConfig:
    """The config of the narrowest entry that holds rows of ``width`` elements; KeyError where there is none."""
    holds = {
        entry.width or math.inf: config
        for entry, config in TABLE[hardware].items()
        if entry.kernel == kernel
        and entry.itemsize in (0, dtype.itemsize)
        and entry.bounded == bounded
        and width <= (entry.width or math.inf)
    }
    if not holds:
        raise KeyError(f"{kernel}: no entry for {dtype} rows of {width} on {hardware}")
    return holds[min(holds)]


@cached
def fits(dtype: torch.dtype, width: int, hardware: str) -> bool:
    """Whether rows of this padded width fit the streaming kernels; wider rows go through matrix products."""
    widest = {
        entry.width for entry in TABLE[hardware] if entry.kernel in STREAMING and entry.itemsize == dtype.itemsize
    }
    return bool(widest) and width <= max(widest)


def allows_tf32() -> bool:
    """Whether fp32 products on a GPU may be tf32, by whichever of PyTorch's settings the user chose it.

    ``torch.get_float32_matmul_precision()`` would raise after an assignment to ``torch.backends.*.fp32_precision``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def hardware_of(device: torch.device) -> str:
    """The table's name for a device; the CPU runs kernels in Triton's interpreter."""
    return _hardware(device.type, device.index)


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(device.type, device.index)


@functools.cache
def _hardware(kind: str, index: int | None) -> str:
    if kind == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def _multiprocessors(kind: str, index: int | None) -> int:
    return 1 if kind == "cpu" else torch.cuda.get_device_properties(index).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``; Triton's, which kernels can call too, takes a microsecond."""
    return -(-a // b)


@cached
def column_splits(row_blocks: int, column_tiles: int, slots: int) -> int:
    """The number of programs over which the columns of a row-block are split, so that ``slots`` programs stay busy.

    The estimated time is the number of rounds of programs times the tiles of each program. The result is the smallest
    number within 5 % of the least time, with at most 16 rounds in all: the buffer of partial sums grows with it.
    """
    most = max(1, min(column_tiles, 16 * slots // row_blocks))

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * -(-column_tiles // splits)

    enough = 1.05 * min(map(time, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if time(splits) <= enough)
