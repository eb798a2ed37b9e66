"""Launches kernels: through Triton, or again through the extension, which costs the host a fifth of the time.

Triton binds the arguments of every launch anew. The extension (``csrc/launcher.cpp``) remembers what Triton compiled
for arguments of a kind, and the tensor maps of what is read by blocks. It launches with one look-up and one call of the
driver. Triton compiles and makes the first launch of every kind. It makes every launch that the extension does not
cover: with a hook of a profiler, with scratch memory, with clusters.

FASTKD_LAUNCHER=native asks for the extension. The default is "triton", because no GPU has confirmed the extension's
launches yet; tests compare the parameters of both, byte by byte.
"""

import functools
import os
import warnings
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastkd.native import extension

INTEGERS = ("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64")
OPTIONS = ("num_warps", "num_stages")
_runtime = triton.knobs.runtime
# Triton's metadata of a compiled kernel that the extension launches: what is not listed may be anything.
COVERED = {
    "num_ctas": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
}


class Blocks(TensorDescriptor):
    """A tensor that a kernel reads by blocks of this shape. It becomes a tensor map where the hardware has them.

    A descriptor of Triton that is made in a tenth of the time: it is not checked. The address and all strides but the
    last have to be multiples of 16 bytes, and the last stride 1; the driver refuses others.
    """

    padding = "zero"

    def __init__(self, base: Tensor, block_shape: list[int]) -> None:
        self.base, self.block_shape = base, block_shape

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.base.stride()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel`` on the current stream. ``grid``: programs in up to three dimensions.

    ``arguments``: all of the kernel's, by name, then ``num_warps`` and ``num_stages`` as Triton takes them. A tensor
    that the kernel reads by blocks is given as :class:`Blocks`.
    """
    known = _known.get(id(kernel)) or _first_met(kernel)
    if known.plans is None or _is_watched():
        kernel[grid](**arguments)
    elif not known.plans.launch(grid, arguments):
        _remember(known.plans, kernel[grid](**arguments), arguments)


@functools.cache
def _launcher() -> Any:
    """The extension, if it is asked for; None otherwise, and then Triton launches."""
    asked = os.environ.get("FASTKD_LAUNCHER", "triton")
    if asked not in ("triton", "native"):
        raise ValueError(f"FASTKD_LAUNCHER: got {asked!r}, expected 'triton' or 'native'")
    if asked == "native" and extension() is None:
        warnings.warn("fastkd: FASTKD_LAUNCHER=native needs the extension (make ext): Triton launches", stacklevel=2)
    return extension() if asked == "native" else None


class _Known(NamedTuple):
    """A kernel, and what the extension remembers of its launches; None where Triton makes all of them."""

    kernel: Any
    plans: Any


_known: dict[int, _Known] = {}  # by id, because a kernel's own hash takes longer than a launch


def _first_met(kernel: Any) -> _Known:
    known = _known[id(kernel)] = _Known(kernel, _new_plans(kernel))
    return known


def _new_plans(kernel: Any) -> Any:
    if _launcher() is None or not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks:
        return None
    driver = triton.runtime.driver.active
    if driver.get_current_target().backend != "cuda":
        return None
    return _launcher().Plans(
        parameters=[(parameter.name, parameter.is_constexpr) for parameter in kernel.params]
        + [(name, True) for name in OPTIONS],
        device=driver.get_current_device,
        stream=driver.get_current_stream,
        blocks=Blocks,
        on_gpu=driver.get_active_torch_device().type == "cuda",
    )


def _is_watched() -> bool:
    """Whether a profiler wants to know of launches, which Triton's own path tells it."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


def _remember(plans: Any, compiled: Any, arguments: dict[str, Any]) -> None:
    """Let the extension launch ``compiled`` where such arguments come again, if it can."""
    if compiled is None:  # a hook has taken the place of Triton's compiler
        return
    metadata = compiled.metadata
    slots = _slots(compiled.src.signature, getattr(metadata, "tensordesc_meta", None))
    if slots is not None and all(getattr(metadata, name, wanted) == wanted for name, wanted in COVERED.items()):
        plans.add(arguments, compiled, compiled.function, metadata.num_warps, metadata.shared, slots)


def _slots(signature: dict[str, Any], maps: list[Any] | None) -> list[tuple[str, Any, tuple[Any, ...]]] | None:
    """The parameters of a compiled kernel: name, kind, and how a tensor map is encoded. None: they are not covered.

    ``signature``: {name: Triton's type}. ``maps``: Triton's metadata of every tensor that is read by blocks; empty
    where the hardware has no tensor maps.
    """
    kinds = {name: _kind(of_type) for name, of_type in signature.items() if of_type != "constexpr"}
    if None in kinds.values() or any(described["fp4_padded"] for described in maps or ()):
        return None
    left = iter(maps or ())
    slots: list[tuple[str, Any, tuple[Any, ...]]] = []
    for name, kind in kinds.items():
        described = next(left, None) if kind == _launcher().Kind.BLOCKS else None
        if described is None:
            slots.append((name, kind, (0, 0, 0, [])))
        else:
            slots.append((name, _launcher().Kind.MAP, _encoding(described)))
    return slots


def _kind(of_type: Any) -> Any:
    """What the extension calls an argument of Triton's type; None where it has no name for it."""
    kinds = _launcher().Kind
    if not isinstance(of_type, str):
        return None
    if of_type.startswith("*"):
        return kinds.POINTER
    if of_type.startswith("tensordesc<"):
        return kinds.BLOCKS
    return kinds.FLOAT if of_type == "fp32" else kinds.INTEGER if of_type in INTEGERS else None


def _encoding(described: dict[str, Any]) -> tuple[int, int, int, list[int]]:
    """The element's type as the driver numbers it and its size, the swizzle, and the box."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    element = TMA_DTYPE_DEVICE_TO_HOST[described["elem_type"]]
    return element, described["elem_size"], described["swizzle"], list(described["block_size"])
