"""What the streaming operations share: sums of exponentials, gradients from tiles, the way back to the raw rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product

# exp(+-40) summed over any number of rows stays inside float32, so no maximum has to be subtracted.
MAX_SHARED_SCALE = 40.0
MAX_TRANSPOSED = 256  # columns of rows that are copied to be transposed
MAX_PART = 2048  # columns of a product that is added to a gradient: 4 MiB for 512 float32 rows


class OnlineSums:
    """Row-wise ``sum exp(logits)`` and ``sum exp(logits) d`` over columns that come in tiles."""

    def __init__(self, like: Tensor) -> None:
        n = len(like)
        self.maximum = like.new_full((n,), -torch.inf)
        self.total = like.new_zeros(n)
        self.weighted = like.new_zeros(n)

    def add(self, rows: slice, logits: Tensor, d: Tensor | None = None) -> None:
        old = self.maximum[rows]
        new = torch.maximum(old, logits.amax(dim=1))
        # A row that holds only -inf so far has no finite maximum: subtracting 0 keeps exp(-inf) = 0.
        shift = new.masked_fill(new == -torch.inf, 0)
        decay = (old - shift).exp()
        weights = (logits - shift[:, None]).exp()
        self.total[rows] = self.total[rows] * decay + weights.sum(dim=1)
        if d is not None:
            self.weighted[rows] = self.weighted[rows] * decay + (weights * d).sum(dim=1)
        self.maximum[rows] = new

    def add_pair(self, rows: slice, cols: slice, logits: Tensor) -> None:
        """A tile that also holds, transposed, the logits of the rows ``cols``."""
        self.add(rows, logits)
        if rows != cols:
            self.add(cols, logits.T)

    def logsumexp(self) -> Tensor:
        return self.maximum + self.total.log()

    def mean(self, positive: Tensor) -> Tensor:
        """The mean of d, whose value is 0 for a further column with the logit ``positive``."""
        return self.weighted / (self.total + (positive - self.maximum).exp())


class PlainSums(OnlineSums):
    """Sums for bounded logits, which need no maximum; the logits are overwritten."""

    def add(self, rows: slice, logits: Tensor, d: Tensor | None = None) -> None:
        assert d is None
        self.total[rows] += logits.exp_().sum(dim=1)

    def add_pair(self, rows: slice, cols: slice, logits: Tensor) -> None:
        self.add(rows, logits)
        if rows != cols:
            self.total[cols] += logits.sum(dim=0)

    def logsumexp(self) -> Tensor:
        return self.total.log()


def beyond_positive(lse_others: Tensor, positive: Tensor) -> Tensor:
    """``log(1 + exp(lse_others - positive))``: a row's log-sum-exp less its positive's logit."""
    return torch.logaddexp(lse_others - positive, torch.zeros_like(positive))


def row_weights(weight: Tensor | None, grad: Tensor, like: Tensor) -> Tensor:
    """Upstream gradient of each row's loss, [n]."""
    if weight is None:
        return grad.to(like.dtype).expand(len(like))
    return weight.to(like.dtype) * grad.to(like.dtype)


def finish(
    raw_rows: Tensor, grad: Tensor | None, rows: Tensor, diagonal: Tensor, inverse_norm: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """From ``sum_{j != i} G_ij other_j`` to the gradient of the raw rows, and to that of the scale.

    Adds the positives' part ``G_ii other_i`` (``diagonal``) and goes back through the normalisation. Its dot products
    with the unit rows are the gradient of the scale, row by row. Without a gradient: an empty tensor and None.
    """
    if grad is None:
        return raw_rows.new_empty(0), None
    grad += diagonal
    dots = (grad * rows).sum(dim=1, keepdim=True)
    if inverse_norm is not None:
        grad = grad.addcmul_(dots, rows, value=-1) * inverse_norm
    return (grad * scale).to(raw_rows.dtype), dots.sum()


class RowGradient:
    """``sum_j G_ij other_j`` [n, D], from tiles of G (``add_rows``) and of its transpose (``add_cols``).

    Up to ``MAX_TRANSPOSED`` columns, sums over a tile's columns are kept transposed, [D, n]: the products then read the
    tile as it lies in memory. Wider rows cost more to copy than the tile does: there the tile is transposed, and
    products are split so that one that waits to be added stays in the cache.
    """

    def __init__(
        self, like: Tensor, other: Tensor, row_blocks: list[slice], *, by_rows: bool = True, by_cols: bool = True
    ) -> None:
        self._other = other
        self._is_wide = like.shape[1] > MAX_TRANSPOSED
        self._total = torch.zeros_like(like) if by_rows or self._is_wide else None
        if by_cols and not self._is_wide:
            self._transposed = {block.start: other[block].T.contiguous() for block in row_blocks}
            self._by_cols = like.new_zeros(like.shape[1], like.shape[0])

    def add_rows(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G other_cols`` to the gradient of the tile's rows."""
        self.add(rows, G, self._other[cols])

    def add(self, rows: slice, G: Tensor, other: Tensor) -> None:
        """Add ``G other`` to the gradient of the tile's rows."""
        assert self._total is not None
        for part in self._parts():
            # oneDNN takes a transposed matrix as it is, but a transposed slice of columns a thousand times slower.
            self._total[rows, part] += product(G, other[:, part].contiguous().T)

    def add_cols(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G^T other_rows`` to the gradient of the tile's columns."""
        if self._is_wide:
            self.add_rows(cols, rows, G.T.contiguous())
        else:
            self._by_cols[:, cols] += product(self._transposed[rows.start], G.T)

    def total(self) -> Tensor:
        if self._total is None:
            return self._by_cols.T.contiguous()
        return self._total.add_(self._by_cols.T) if hasattr(self, "_by_cols") else self._total

    def _parts(self) -> Iterator[slice]:
        D = self._other.shape[1]
        return (slice(start, start + MAX_PART) for start in range(0, D, MAX_PART))


def shares_exponentials(a: Tensor, scale: Tensor, scale_bound: float) -> bool:
    """Whether ``|A|`` is small enough for one plain exponential; reads the scale itself only where that is free."""
    if scale_bound <= MAX_SHARED_SCALE:
        return True
    return a.device.type == "cpu" and abs(scale.item()) <= MAX_SHARED_SCALE
