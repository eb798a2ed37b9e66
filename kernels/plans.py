"""Launches kernels, without the search for what Triton has compiled that makes up most of the time of its launches.

Triton compiles, and makes the first launch of every kind of arguments. The extension (``csrc/launcher.cpp``) remembers
what was compiled for them. From then on Triton's launcher is called with it directly. Without the extension, with a
hook of a profiler, with scratch memory or with clusters, every launch takes Triton's whole way.

FASTKD_LAUNCHER=native lets the extension call the driver, too. It keeps the tensor maps of what is read by blocks, and
takes a tenth of Triton's time. The default is "triton", because no GPU has confirmed the extension's launches yet;
tests compare the parameters of both, byte by byte.
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
OPTIONS = ("num_warps", "num_stages", "maxnreg")
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

    ``arguments``: all of the kernel's, by name, then ``num_warps``, ``num_stages`` and ``maxnreg``, as for Triton.
    A tensor that the kernel reads by blocks is given as :class:`Blocks`.
    """
    known = _known.get(id(kernel)) or _first_met(kernel)
    if known.plans is None or _is_watched():
        kernel[grid](**arguments)
        return
    if is_native():
        if known.plans.launch(grid, arguments):
            return
    elif (found := known.plans.find(arguments)) is not None:
        compiled, ordered = found
        stream = known.stream(known.device())
        x, y, z = (*grid, 1, 1)[:3]
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *ordered)
        return
    _remember(known.plans, kernel[grid](**arguments), arguments)


@functools.cache
def is_native() -> bool:
    """Whether the extension calls the driver."""
    asked = os.environ.get("FASTKD_LAUNCHER", "triton")
    if asked not in ("triton", "native"):
        raise ValueError(f"FASTKD_LAUNCHER: got {asked!r}, expected 'triton' or 'native'")
    if asked == "native" and extension() is None:
        warnings.warn("fastkd: FASTKD_LAUNCHER=native needs the extension (make ext): Triton launches", stacklevel=2)
    return asked == "native" and extension() is not None


class _Known(NamedTuple):
    """A kernel, what the extension remembers of its launches (None: nothing), and who knows the stream to launch on."""

    kernel: Any
    plans: Any = None
    device: Any = None
    stream: Any = None


_known: dict[int, _Known] = {}  # by id, because a kernel's own hash takes longer than a launch


def _first_met(kernel: Any) -> _Known:
    known = _known[id(kernel)] = _new(kernel)
    return known


def _new(kernel: Any) -> _Known:
    is_native()  # says what is wrong with FASTKD_LAUNCHER, if anything is
    if extension() is None or not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks:
        return _Known(kernel)
    driver = triton.runtime.driver.active
    if driver.get_current_target().backend != "cuda":
        return _Known(kernel)
    device, stream = driver.get_current_device, driver.get_current_stream
    plans = extension().Plans(
        parameters=[(parameter.name, parameter.is_constexpr) for parameter in kernel.params],
        options=list(OPTIONS),
        device=device,
        stream=stream,
        blocks=Blocks,
        on_gpu=driver.get_active_torch_device().type == "cuda",
    )
    return _Known(kernel, plans, device, stream)


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
        described = next(left, None) if kind == extension().Kind.BLOCKS else None
        if described is None:
            slots.append((name, kind, (0, 0, 0, [])))
        else:
            slots.append((name, extension().Kind.MAP, _encoding(described)))
    return slots


def _kind(of_type: Any) -> Any:
    """What the extension calls an argument of Triton's type; None where it has no name for it."""
    kinds = extension().Kind
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
