"""Feature maps, and rows with their gradients: for all tests of ``multiscale_pool``."""

import torch
from torch import Tensor

from fastkd import multiscale_pool
from tests.helpers.checks import assert_close

FORMATS = (torch.contiguous_format, torch.channels_last)


def feature_map(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def out_and_grad(features: Tensor, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    """The rows and the features' gradient for a random upstream one, the same in every dtype and on every device."""
    leaf = features.detach().requires_grad_()
    out = multiscale_pool(leaf, *arguments, **options)
    upstream = feature_map(*out.shape, dtype=torch.bfloat16, seed=1)
    # Not backward(): it copies a gradient in the wrong memory format into the right one.
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out))
    return out.detach(), grad


def rounding_floor(rows: Tensor) -> float:
    """Of the gradient of ``rows`` [B, M, C] whose channels are all alike: normalised, it is zero, and rounding is left.

    Of terms as long as the inverse norms, which cancel.
    """
    return max(1e-5, torch.linalg.vector_norm(rows.double(), dim=2).reciprocal().norm().item())


def check_pool(x: Tensor, windows: list, strides: list, **options: object) -> tuple[Tensor, Tensor]:
    """The kernels' rows and gradient, after both were held against the definition and ``x`` was found unchanged."""
    before = x.clone()
    normalize = options.get("normalize", False)
    exact = out_and_grad(x.double(), windows, strides, normalize=normalize, backend="reference")
    low = out_and_grad(x, windows, strides, backend="reference", **options)
    out, grad = out_and_grad(x, windows, strides, backend="triton", **options)
    floor = 1e-5
    if normalize and x.shape[1] == 1:
        floor = rounding_floor(multiscale_pool(x.double(), windows, strides, backend="reference"))
    coarser = max(out.dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    assert_close(out, exact[0], out.dtype, low[0])
    assert_close(grad, exact[1], coarser, low[1], floor)
    assert grad.dtype == x.dtype
    assert torch.equal(x, before)
    return out, grad
