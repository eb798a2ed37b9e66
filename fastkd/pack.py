"""Student and teacher rows made ready for the exchange: normalised, cast and packed into one buffer.

The C++/CUDA extension of ``csrc/`` does it in one pass; where it is absent, or does not fit the installed torch, plain
PyTorch does the same. Nothing is ever built here.
"""

import functools
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastkd.backends.reference import accumulation_dtype, unit_rows

LIBRARY = Path(__file__).with_name("_native.so")


def pack_rows(first: Tensor, second: Tensor, dtype: torch.dtype, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The rows of ``first`` and ``second`` [n, D], L2-normalised if asked, as [2, n, D] in ``dtype``; and [2, n, 1].

    The latter are the inverse norms in the accumulation dtype (ones if not normalised); rows that count as zero give 0.
    """
    if extension_covers(first.device.type):
        return torch.ops.fastkd_native.pack_rows(first, second, dtype, normalize)
    accumulate = accumulation_dtype(first.dtype)
    packed = first.new_empty((2, *first.shape), dtype=dtype)
    inverse_norm = first.new_ones((2, len(first), 1), dtype=accumulate)
    for side, x in enumerate((first, second)):
        if normalize:
            units, inverse_norm[side] = unit_rows(x.to(accumulate))
            packed[side] = units
        else:
            packed[side] = x
    return packed, inverse_norm


@functools.cache
def extension_covers(device_type: str) -> bool:
    """Whether the extension is there, loads, and has code for ``device_type``."""
    if device_type not in ("cpu", "cuda") or not _extension_loads():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastkd_native::pack_rows", device_type.upper())


@functools.cache
def _extension_loads() -> bool:
    """Load the extension if it is there; one warning, naming the versions, if it does not fit or fails to load."""
    if not LIBRARY.exists():
        return False
    found = f"torch {torch.__version__} and CUDA {torch.version.cuda or 'none'}"
    stated = re.search(rb"fastkd_native built for ([ -~]+)", LIBRARY.read_bytes())
    built_for = stated.group(1).decode() if stated else "an unknown torch"
    try:
        # torch promises no stable C++ interface: another release can crash instead of failing to load.
        if built_for != found:
            raise OSError("rebuild it: make ext")
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        warnings.warn(
            f"fastkd: {LIBRARY.name} was built for {built_for}, found {found}: it is not used ({error}); "
            "the Python path computes the same",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
