"""Implementations of the operations: the definition (``reference``), the streaming ``blocked``, and ``triton``."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "blocked", "triton")
# The operations that have a kernel; the others stream through ``blocked`` on every device.
TRITON_OPERATIONS = frozenset(
    {"contrast", "dual_softmax", "multiscale_pool", "soft_target", "soft_target_rows", "triplet_angles"}
)
MAX_WIDTH = 1 << 13  # of a row that one program normalises


@functools.cache
def implementation(operation: str, backend: str) -> ModuleType:
    """The module of a streaming backend that computes ``operation``.

    It is imported when it is first used, so that importing fastkd does not load Triton.
    """
    return importlib.import_module(f"fastkd.backends.{backend}.{operation}")


def check_name(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {BACKENDS}")


def resolve(backend: str | None, operation: str, like: Tensor) -> str:
    """The backend to use for inputs like ``like``; ``None`` picks the fastest one that runs on them.

    With ``None``, ``dual_softmax`` streams through ``blocked`` on compute capability 11.0 and above (consumer Blackwell
    among them): the launch table has no entries for these that do not spill.
    """
    check_name(backend)
    if backend is None:
        if not like.is_cuda or _why_not_triton(operation, like) is not None:
            return "blocked"
        return "blocked" if operation == "dual_softmax" and _spills_on(like.device.index) else "triton"
    if backend == "triton":
        reason = _why_not_triton(operation, like)
        if reason is not None:
            raise ValueError(f"backend: 'triton' {reason}; use None or 'blocked'")
    return backend


def _why_not_triton(operation: str, like: Tensor) -> str | None:
    if operation not in TRITON_OPERATIONS:
        return f"has no kernel for {operation}"
    if like.dtype == torch.float64:
        return "computes float32, bfloat16 and float16, got float64"
    if like.dtype == torch.bfloat16 and like.device.type == "cpu":
        return "runs in the interpreter on CPU tensors, which multiplies bfloat16 wrongly"
    if operation == "dual_softmax" and like.ndim == 2 and like.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH} elements, got {like.shape[1]}"
    return _why_not_triton_on(like.device.type, like.device.index)


def _why_not_triton_on(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda":
        return None if interpreted else f"needs CUDA tensors, got {device_type}"
    if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        return f"needs compute capability 8.0, got {torch.cuda.get_device_capability(index)}"
    return _launch_error()


def _spills_on(index: int | None) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(index) >= (11, 0)


# What torch.compiler.assume_constant_result does; the function itself imports the compiler, and Triton with it.
_why_not_triton_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
_spills_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _launch_error() -> str | None:
    """Why no kernel can be launched in this process; warns of it, once.

    Triton builds its launcher with a C compiler, Python's headers and the driver's library when it first needs them.
    """
    try:
        implementation("dual_softmax", "triton")
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # what is missing decides its type
        reason = f"cannot launch kernels here ({type(error).__name__}: {error})"
        warnings.warn(f"fastkd: Triton {reason}; CUDA tensors stream through PyTorch, slower", stacklevel=2)
        return reason
    return None
