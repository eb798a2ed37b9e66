"""Arithmetic that every layer shares: the accumulation dtype, unit rows, weighted sums, window counts."""

import torch
from torch import Tensor

NORM_EPS = 1e-12  # rows no longer than this count as zero
STD_EPS = 1e-7  # added to the standard deviation of a row's logits before they are divided by it
MIN_PLAIN_NORM, MAX_PLAIN_NORM = 1e-10, 1e18  # of rows whose squares can be summed as they are


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a loss is computed in: float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(rows: Tensor, weight: Tensor | None) -> Tensor:
    """``sum_i w_i rows_i``; ``None``: weights of one."""
    return rows.sum() if weight is None else (rows * weight.to(rows.dtype)).sum()


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x_i / |x_i|`` [n, D] and ``1 / |x_i|`` [n, 1]; rows with ``|x_i| <= NORM_EPS`` give 0 and 0, and no gradient.

    Rows are divided by their largest magnitude before they are squared. The square of 1e30 would overflow float32, and
    the square of 1e-30 would vanish. Rows that are not finite give NaN.
    """
    largest = x.detach().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    scaled = x / largest  # its norm is at least 1, but for zero rows
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(0.5)
    is_zero = largest * norm.detach() <= NORM_EPS
    return (scaled / norm).masked_fill(is_zero, 0), (largest * norm).reciprocal().masked_fill(is_zero, 0)


def unit_rows_quickly(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`unit_rows`, up to rounding, for rows [..., n, D] on a CPU: looks at their norms first.

    Where no norm is near the ends of the range, the squares neither overflow nor vanish, and no row counts as zero.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if norm.numel() and x.device.type == "cpu":
        shortest, longest = torch.aminmax(norm)
        if shortest.item() > MIN_PLAIN_NORM and longest.item() < MAX_PLAIN_NORM:
            return x / norm, norm.reciprocal()
    units, inverse_norm = unit_rows(x.flatten(0, -2))
    return units.view(x.shape), inverse_norm.view(norm.shape)


def window_counts(height: int, width: int, windows: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """How many windows of each scale lie below and beside each other; windows, strides: height and width in turn."""
    return [
        ((height - windows[k]) // strides[k] + 1, (width - windows[k + 1]) // strides[k + 1] + 1)
        for k in range(0, len(windows), 2)
    ]
