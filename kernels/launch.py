"""The launch table: which tile sizes, warps and stages a kernel gets, by hardware. No search happens at run time.

Where it was filled: every entry was chosen from ahead-of-time compilation (``python -m bench.aot``: no spill, shared
memory within the limit, warpgroup matrix instructions on sm_90). None has been measured yet.

An entry is a pure function of (kernel, element size, padded D, BOUNDED, hardware); ``contrast`` has no BOUNDED.
``sm_80`` entries stay below 99 KiB of shared memory, so that they also fit consumer cards of compute capability 8.6 and
8.9, which use them. So do 12.x, where those of ``dual_softmax`` spill: there they run only if asked for.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

HARDWARE = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")


@dataclass(frozen=True)
class LaunchConfig:
    """ctas_per_sm: how many programs the compiled code lets a multiprocessor hold. apart: one launch a side."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1
    apart: bool = False


# (kernel, bytes an element, padded D): (BOUNDED, not BOUNDED), or one entry for both. Rows of 16 and 32 use that of 64.
_Entries = dict[tuple[str, int, int], tuple[LaunchConfig, LaunchConfig]]
_FORWARD, _BACKWARD = "dual_softmax_forward", "dual_softmax_backward"


def _both(config: LaunchConfig) -> tuple[LaunchConfig, LaunchConfig]:
    return config, config


_SM80: _Entries = {
    (_FORWARD, 2, 64): _both(LaunchConfig(64, 32, 8, 2)),
    (_FORWARD, 2, 128): _both(LaunchConfig(64, 32, 8, 2)),
    (_FORWARD, 4, 64): _both(LaunchConfig(32, 16, 8, 1)),
    (_FORWARD, 4, 128): _both(LaunchConfig(32, 16, 8, 1)),
    (_BACKWARD, 2, 64): _both(LaunchConfig(32, 32, 8, 2)),
    (_BACKWARD, 2, 128): _both(LaunchConfig(32, 32, 8, 2)),
    (_BACKWARD, 4, 64): _both(LaunchConfig(32, 32, 8, 2)),
    (_BACKWARD, 4, 128): _both(LaunchConfig(32, 16, 8, 1)),
}
_SM90: _Entries = {
    (_FORWARD, 2, 64): _both(LaunchConfig(128, 64, 8, 2, ctas_per_sm=2)),
    (_FORWARD, 2, 128): _both(LaunchConfig(128, 64, 8, 2)),
    (_FORWARD, 2, 256): _both(LaunchConfig(128, 32, 8, 2)),
    (_FORWARD, 4, 64): _both(LaunchConfig(128, 64, 8, 2)),
    (_FORWARD, 4, 128): _both(LaunchConfig(128, 32, 8, 2)),
    (_BACKWARD, 2, 64): _both(LaunchConfig(64, 64, 4, 2, ctas_per_sm=2)),
    (_BACKWARD, 2, 128): (
        LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
        LaunchConfig(64, 64, 4, 2, ctas_per_sm=2, apart=True),
    ),
    (_BACKWARD, 2, 256): _both(LaunchConfig(64, 16, 4, 2, ctas_per_sm=2, apart=True)),
    (_BACKWARD, 4, 64): _both(LaunchConfig(64, 32, 4, 2, ctas_per_sm=2)),
    (_BACKWARD, 4, 128): _both(LaunchConfig(128, 32, 8, 2, apart=True)),
}
_SM100: _Entries = _SM90 | {
    (_FORWARD, 2, 64): _both(LaunchConfig(64, 64, 4, 2, ctas_per_sm=3)),
    (_FORWARD, 2, 128): _both(LaunchConfig(64, 64, 4, 2, ctas_per_sm=2)),
    (_FORWARD, 2, 256): _both(LaunchConfig(64, 64, 4, 2)),
    (_FORWARD, 4, 64): _both(LaunchConfig(64, 64, 4, 2, ctas_per_sm=2)),
    (_FORWARD, 4, 128): _both(LaunchConfig(64, 64, 4, 2)),
    (_BACKWARD, 2, 128): (LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 4, 2, apart=True)),
    (_BACKWARD, 2, 256): (LaunchConfig(64, 64, 8, 2, apart=True), LaunchConfig(64, 32, 8, 2, apart=True)),
    (_BACKWARD, 4, 64): _both(LaunchConfig(64, 32, 8, 2)),
    (_BACKWARD, 4, 128): _both(LaunchConfig(64, 32, 8, 2, apart=True)),
}
_GFX942: _Entries = {
    (kernel, itemsize, block_d): _both(LaunchConfig(64, 16, 4, 1))
    for kernel in (_FORWARD, _BACKWARD)
    for itemsize in (2, 4)
    for block_d in (64, 128)
}
_TABLE = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "gfx942": _GFX942}
_INTERPRETER = LaunchConfig(16, 16, 4, 1)

# (kernel): (rows of at most BLOCK_N classes, ...), the last one for all that are wider. A row that fits one tile needs
# no running maximum, and a tile of one warp no barrier.
_SOFT_TARGET: dict[str, tuple[LaunchConfig, ...]] = {
    "soft_target_forward": (
        LaunchConfig(32, 16, 1, 1),
        LaunchConfig(8, 64, 1, 1),
        LaunchConfig(4, 128, 1, 1),
        LaunchConfig(2, 256, 1, 1),
        LaunchConfig(1, 512, 1, 1),
        LaunchConfig(1, 1024, 1, 1),
        LaunchConfig(1, 2048, 2, 1),
        LaunchConfig(1, 4096, 4, 1),
        LaunchConfig(1, 8192, 8, 1),
        LaunchConfig(1, 2048, 8, 1, ctas_per_sm=2),
    ),
    "soft_target_backward": (
        LaunchConfig(32, 16, 1, 1),
        LaunchConfig(8, 64, 1, 1),
        LaunchConfig(4, 128, 1, 1),
        LaunchConfig(2, 256, 1, 1),
        LaunchConfig(1, 512, 1, 1),
        LaunchConfig(1, 1024, 2, 1),
    ),
}
_SOFT_TARGET_INTERPRETER = (LaunchConfig(4, 32, 4, 1), LaunchConfig(2, 64, 4, 1))

# Windows or positions (BLOCK_M) x channels (BLOCK_N) of an accumulator of multiscale_pool, forward and backward.
# On sm_100 64 rows would go through tensor memory, where Triton 3.6 fails to compile; 32 x 64 spills with 8 warps.
_POOL = {
    "sm_80": LaunchConfig(32, 64, 8, 1),
    "sm_90": LaunchConfig(64, 64, 8, 1),
    "sm_100": LaunchConfig(32, 32, 4, 1),
    "gfx942": LaunchConfig(32, 32, 4, 1),
}
# As _TABLE, one entry for every mask; contrast_self is the backward of queries contrasted with themselves.
_CONTRAST_SM80: dict[tuple[str, int, int], LaunchConfig] = {
    ("contrast_forward", 2, 64): LaunchConfig(64, 32, 8, 2),
    ("contrast_forward", 2, 128): LaunchConfig(64, 32, 8, 2),
    ("contrast_forward", 4, 64): LaunchConfig(32, 32, 8, 2),
    ("contrast_forward", 4, 128): LaunchConfig(32, 32, 8, 2),
    ("contrast_backward", 2, 64): LaunchConfig(64, 32, 8, 2),
    ("contrast_backward", 2, 128): LaunchConfig(64, 32, 8, 2),
    ("contrast_backward", 4, 64): LaunchConfig(32, 32, 8, 2),
    ("contrast_backward", 4, 128): LaunchConfig(32, 32, 8, 2),
    ("contrast_self", 2, 64): LaunchConfig(64, 32, 8, 2),
    ("contrast_self", 2, 128): LaunchConfig(32, 32, 8, 2),
    ("contrast_self", 4, 64): LaunchConfig(32, 32, 8, 2),
    ("contrast_self", 4, 128): LaunchConfig(32, 32, 8, 2),
}
_CONTRAST_SM90 = {
    ("contrast_forward", 2, 64): LaunchConfig(128, 64, 8, 2, ctas_per_sm=2),
    ("contrast_forward", 2, 128): LaunchConfig(128, 64, 8, 2, ctas_per_sm=2),
    ("contrast_forward", 2, 256): LaunchConfig(128, 64, 8, 2),
    ("contrast_forward", 4, 64): LaunchConfig(128, 64, 8, 2, ctas_per_sm=2),
    ("contrast_forward", 4, 128): LaunchConfig(128, 64, 8, 2),
    ("contrast_backward", 2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=3),
    ("contrast_backward", 2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_backward", 2, 256): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
    ("contrast_backward", 4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_backward", 4, 128): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
    ("contrast_self", 2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_self", 2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_self", 2, 256): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
    ("contrast_self", 4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_self", 4, 128): LaunchConfig(64, 32, 4, 2, ctas_per_sm=2),
}
_CONTRAST_SM100 = _CONTRAST_SM90 | {
    ("contrast_forward", 2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_forward", 2, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_forward", 2, 256): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_forward", 4, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_forward", 4, 128): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_backward", 2, 64): LaunchConfig(64, 64, 4, 2, ctas_per_sm=2),
    ("contrast_backward", 2, 256): LaunchConfig(64, 64, 8, 2),
    ("contrast_backward", 4, 128): LaunchConfig(64, 32, 4, 2),
    ("contrast_self", 2, 256): LaunchConfig(64, 32, 8, 2),
    ("contrast_self", 4, 128): LaunchConfig(64, 32, 4, 2),
}
_CONTRAST_GFX942 = {
    (kernel, itemsize, block_d): LaunchConfig(64, 16, 4, 1)
    for kernel in ("contrast_forward", "contrast_backward", "contrast_self")
    for itemsize in (2, 4)
    for block_d in (64, 128)
}
_CONTRAST = {"sm_80": _CONTRAST_SM80, "sm_90": _CONTRAST_SM90, "sm_100": _CONTRAST_SM100, "gfx942": _CONTRAST_GFX942}


def launch_config(kernel: str, *, dtype: torch.dtype, block_d: int, bounded: bool, hardware: str) -> LaunchConfig:
    """The entry of ``kernel`` ("dual_softmax_forward", "dual_softmax_backward"); KeyError where there is none."""
    if hardware == "interpreter":
        return _INTERPRETER
    row = _TABLE[hardware][kernel, dtype.itemsize, max(block_d, 64)]
    return row[0] if bounded else row[1]


def entries(hardware: str) -> Iterator[tuple[str, int, int, bool, LaunchConfig]]:
    """(kernel, bytes an element, padded D, BOUNDED, config) of every entry."""
    for (kernel, itemsize, block_d), row in _TABLE[hardware].items():
        for bounded, config in zip((True, False), row, strict=True):
            yield kernel, itemsize, block_d, bounded, config


def soft_target_config(kernel: str, *, classes: int, hardware: str) -> LaunchConfig:
    """The entry of "soft_target_forward" or "soft_target_backward": the narrowest that holds a row, else the last."""
    configs = soft_target_entries(kernel, hardware)
    return next((config for config in configs if classes <= config.BLOCK_N), configs[-1])


def soft_target_entries(kernel: str, hardware: str) -> tuple[LaunchConfig, ...]:
    return _SOFT_TARGET_INTERPRETER if hardware == "interpreter" else _SOFT_TARGET[kernel]


def pool_config(hardware: str) -> LaunchConfig:
    """The entry of multiscale_pool's kernels."""
    return _INTERPRETER if hardware == "interpreter" else _POOL[hardware]


def fits(dtype: torch.dtype, block_d: int, hardware: str) -> bool:
    """Whether rows this wide fit the streaming kernels; wider ones go through matrix products."""
    table = _SM90 if hardware == "interpreter" else _TABLE[hardware]
    return (_BACKWARD, dtype.itemsize, max(block_d, 64)) in table


def contrast_config(kernel: str, *, dtype: torch.dtype, block_d: int, hardware: str) -> LaunchConfig:
    """The entry of "contrast_forward", "contrast_backward" or "contrast_self"; KeyError where there is none."""
    if hardware == "interpreter":
        return _INTERPRETER
    return _CONTRAST[hardware][kernel, dtype.itemsize, max(block_d, 64)]


def contrast_entries(hardware: str) -> Iterator[tuple[str, int, int, LaunchConfig]]:
    """(kernel, bytes an element, padded D, config) of every entry."""
    for (kernel, itemsize, block_d), config in _CONTRAST[hardware].items():
        yield kernel, itemsize, block_d, config


def contrast_fits(dtype: torch.dtype, block_d: int, hardware: str) -> bool:
    """As :func:`fits`, for contrast."""
    table = _CONTRAST_SM90 if hardware == "interpreter" else _CONTRAST[hardware]
    return ("contrast_backward", dtype.itemsize, max(block_d, 64)) in table


def allows_tf32() -> bool:
    """Whether fp32 products on a GPU may be tf32, by whichever of PyTorch's settings the user chose it.

    ``torch.get_float32_matmul_precision()`` would raise after an assignment to ``torch.backends.*.fp32_precision``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def hardware_of(device: torch.device) -> str:
    """The table's name for a device; the CPU runs kernels in Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def column_splits(row_blocks: int, column_tiles: int, slots: int) -> int:
    """Over how many programs the columns of a row-block are split so that ``slots`` resident programs stay busy.

    The time is rounds of programs times tiles a program. Of the numbers within 5 % of the least time the smallest, and
    at most 16 rounds in all: the buffer of partial sums grows with it.
    """
    most = max(1, min(column_tiles, 16 * slots // row_blocks))

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * -(-column_tiles // splits)

    enough = 1.05 * min(map(time, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if time(splits) <= enough)
