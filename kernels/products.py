"""What ``dual_softmax`` and ``contrast`` share where torch.mm multiplies: blocks of pairs, and products in fp32.

That is the way of rows too wide for the streaming kernels, and of fp32 rows where PyTorch's settings do not allow
tf32, because torch.mm honours these settings. A block of products at a time keeps memory linear in the number of rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, COLUMNS = 2048, 4096  # of a block


def blocks(n: int, n_cols: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and columns that cover all pairs. The columns of one row-block come in ascending order."""
    for row in range(0, n, ROWS):
        for column in range(0, n_cols, COLUMNS):
            yield slice(row, min(row + ROWS, n)), slice(column, min(column + COLUMNS, n_cols))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
