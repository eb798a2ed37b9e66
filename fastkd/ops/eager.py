"""Whether an operation runs as a plain autograd function, or as the custom op that a tracer needs.

A custom op costs tens of microseconds a call, which is much for a small batch. Only torch.compile and fake tensors need
one.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey

_TRACERS = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FUNCTIONAL)
_PLAIN = (Tensor, torch.nn.Parameter)
_nothing = contextlib.nullcontext()
Backward = Callable[..., tuple[Tensor | None, ...]]


def is_traced(*inputs: Tensor | None) -> bool:
    """Whether something looks at the operation on these inputs, rather than at its result."""
    if torch.compiler.is_compiling():
        return True
    for x in inputs:
        if x is not None and type(x) not in _PLAIN:
            return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(_get_dispatch_mode(mode) is not None for mode in _TRACERS)


def computing(x: Tensor) -> Any:
    """A context in which operations on ``x`` keep their dtypes, and kernels run on its device."""
    device = x.device
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    if is_current and not torch.is_autocast_enabled(device.type):
        return _nothing
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(torch.cuda.device_of(x))
    return stack


def differentiable_once(backward: Backward) -> Backward:
    """A ``backward`` whose gradients raise when they are differentiated again, however they reach a second loss.

    ``backward`` gets ``ctx``, its saved tensors, and the upstream gradients. The inputs must be among the saved.
    torch's ``once_differentiable`` forgets them: a gradient penalty that is added to a loss would then silently be
    without effect.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint lets every tensor be unpacked once
        with torch.no_grad():
            found = backward(ctx, saved, *upstream)
        sources = [x for x in (*saved, *upstream) if x is not None and x.requires_grad]
        tensors = [*sources, *(x for x in found if x is not None)]
        if not torch.is_grad_enabled() or not sources or len(tensors) == len(sources):
            return found
        message = b"fastkd: a gradient of a loss can not be differentiated again, but by backend='reference'"
        grads = iter(torch._C._functions.DelayedError(message, len(tensors))(*tensors)[len(sources) :])
        return tuple(None if x is None else next(grads) for x in found)

    return wrapped
