"""The public function of multi-scale pooling: validate, choose a backend, call the operation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import backends
from fastkd.backends import reference
from fastkd.ops.multiscale_pool import pooled
from fastkd.validate import (
    Backend,
    check_bool,
    check_feature_map,
    check_float_dtype,
    check_no_tangent,
    check_sides,
    check_windows,
)

Sides = Sequence[int | tuple[int, int]]


def multiscale_pool(
    features: Tensor,
    windows: Sides,
    strides: Sides,
    *,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""The averages of all windows of all scales of a feature map, in one read of the map; one row per window.

    .. code-block:: text

        out[b, m, c] = mean over (y, x) in window m of features[b, c, y, x]
        windows of scale k: height_k x width_k, at every multiple of its stride that leaves them inside the map
        m: scales in the order given, the windows of a scale row by row; no padding
        out[b, m] / |out[b, m]|                                            if ``normalize``

    This equals ``avg_pool2d`` at each scale, flattened and concatenated.

    Source: the multi-scale pooling of MSDCRD, arXiv 2502.05835.

    Args:
        features: [B, C, H, W] in float64, float32, bf16 or fp16. NCHW and channels-last are read as they are; slices of
            either may be copied. Sums are taken in float32 (float64 for float64). A sum that overflows it may be inf.
            On a GPU every new combination of H, W, windows and strides compiles its kernels once, for some seconds.
        windows: the sides of the windows in pixels, one entry per scale: an int (a square) or a pair (height, width),
            at most H and W. The window of the whole of a rectangular map is the pair (H, W).
        strides: the distances of the windows in pixels, one entry per scale: an int or a pair (vertical, horizontal);
            >= 1.
        normalize: L2-normalise each row of C channels. The default is False, because the losses normalise rows
            themselves. Rows no longer than 1e-12 give zero and get no gradient.
        dtype: the dtype of the result; ``None`` keeps the dtype of the features.
        backend: ``None`` picks the fastest that runs here; ``"triton"``, ``"blocked"`` or ``"reference"`` as for
            :func:`dcd_loss`.

    Returns:
        [B, M, C], contiguous. The gradient has the dtype and the memory format of the features. A value that is not
        finite reaches the windows that contain it, and with ``normalize`` all channels of these windows. It can be
        differentiated once, backwards; with ``"reference"`` also twice, and forwards.

    Raises:
        TypeError: ``features`` is no tensor of an accepted dtype, or an option has the wrong type.
        ValueError: the map is empty or has the wrong shape, a window does not fit it, a stride is below 1, or
            ``backend`` is unknown or not available here.

    Example:
        >>> import torch
        >>> from fastkd import multiscale_pool
        >>> multiscale_pool(torch.randn(2, 16, 7, 7), windows=[7, 4], strides=[1, 1]).shape
        torch.Size([2, 17, 16])
    """
    check_feature_map("features", features)
    sides, steps = check_sides("windows", windows), check_sides("strides", strides)
    check_windows(sides, steps, features)
    check_bool("normalize", normalize)
    out_dtype = features.dtype if dtype is None else check_float_dtype("dtype", dtype)
    chosen = backends.resolve(backend, "multiscale_pool", features)
    if chosen == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference.multiscale_pool(features, sides, steps, normalize, out_dtype)
    check_no_tangent(features)
    return pooled(features, sides, steps, normalize, out_dtype, chosen)
