"""What both similarity operations share: sums of exponentials, gradients from tiles, the way back to the raw rows."""

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product
from fastkd.backends.inputs import ContrastRows
from fastkd.native import extension
from fastkd.numerics import MAX_PLAIN_NORM, MIN_PLAIN_NORM, accumulation_dtype, unit_rows_quickly

# exp(+-40) summed over any number of rows stays inside float32, so no maximum has to be subtracted.
MAX_SHARED_SCALE = 40.0
LOG_2 = math.log(2)
MAX_TRANSPOSED = 256  # columns of rows that are copied to be transposed
BLOCK_ELEMENTS = 1 << 18  # of the rows in a row-wise step: 1 MiB in float32
MAX_PART = 2048  # columns of a product that is added to a gradient: 4 MiB for 512 float32 rows


class OnlineSums:
    """Row-wise ``sum 2^logits`` and ``sum 2^logits d`` over columns that come in tiles."""

    def __init__(self, like: Tensor) -> None:
        n = len(like)
        self.maximum = like.new_full((n,), -torch.inf)
        self.total = like.new_zeros(n)
        self.weighted = like.new_zeros(n)

    def add(self, rows: slice, logits: Tensor, d: Tensor | None = None) -> None:
        old = self.maximum[rows]
        new = torch.maximum(old, logits.amax(dim=1))
        # A row that holds only -inf so far has no finite maximum: subtracting 0 keeps 2^-inf = 0.
        shift = new.masked_fill(new == -torch.inf, 0)
        decay = (old - shift).exp2()
        weights = (logits - shift[:, None]).exp2_()
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
        """The log-sum-exp in nats."""
        return (self.maximum + self.total.log2()).mul_(LOG_2)

    def beyond_positive(self, positive: Tensor) -> Tensor:
        """The log-sum-exp with one more logit, ``positive``, less that logit; in nats."""
        return log_one_plus_power((self.maximum - positive).add_(self.total.log2()))

    def above(self, logit: Tensor) -> Tensor:
        """The log-sum-exp less ``logit``, which is not above it, in nats."""
        return (self.maximum - logit).add_(self.total.log2()).mul_(LOG_2)

    def mean(self, positive: Tensor) -> Tensor:
        """The mean of d, whose value is 0 for a further column with the logit ``positive``."""
        return self.weighted / (self.total + (positive - self.maximum).exp2())


class PlainSums(OnlineSums):
    """Sums for bounded logits, which need no maximum; the logits are overwritten."""

    def add(self, rows: slice, logits: Tensor, d: Tensor | None = None) -> None:
        assert d is None
        self.total[rows] += logits.exp2_().sum(dim=1)

    def add_pair(self, rows: slice, cols: slice, logits: Tensor) -> None:
        self.add(rows, logits)
        if rows != cols:
            self.total[cols] += logits.sum(dim=0)

    def logsumexp(self) -> Tensor:
        return self.total.log()

    def beyond_positive(self, positive: Tensor) -> Tensor:
        return (self.total / positive.exp2()).log1p_()

    def above(self, logit: Tensor) -> Tensor:
        power = logit.exp2()
        return (self.total - power).div_(power).log1p_()


def log_one_plus_power(x: Tensor) -> Tensor:
    """``log(1 + 2^x)``."""
    x = x * LOG_2
    return torch.logaddexp(x, torch.zeros_like(x))


def row_weights(weight: Tensor | None, grad: Tensor, like: Tensor) -> Tensor:
    """Upstream gradient of each row's loss, [n]."""
    if weight is None:
        return grad.to(like.dtype).expand(len(like))
    return weight.to(like.dtype) * grad.to(like.dtype)


def row_blocks(x: Tensor) -> list[slice]:
    """Parts of the rows for row-wise steps, small enough for the cache."""
    size = max(1, BLOCK_ELEMENTS // x.shape[1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def unit_rows_of(sides: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Unit rows of sides of one shape, [sides, n, D], and their inverse norms, in the accumulation dtype."""
    native = extension()
    if native is not None and all(
        x.is_contiguous() and x.dtype == accumulation_dtype(x.dtype) and x.is_cpu for x in sides
    ):
        found = native.unit_rows(sides, MIN_PLAIN_NORM, MAX_PLAIN_NORM)
        if found is not None:
            return found
    return unit_rows_quickly(torch.stack(sides).to(accumulation_dtype(sides[0].dtype)))


def to_raw_rows(grad: Tensor, rows: Tensor, inverse_norm: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """From ``grad``, the sums ``sum_j G_ij other_j``, to the gradients of the raw rows and of the scale.

    ``grad`` is overwritten and returned. Its dot products with the rows, which the normalisation needs, sum to the
    scale's.
    """
    dots = grad.new_empty(len(grad), 1)
    for block in row_blocks(grad):
        part, row = grad[block], rows[block]
        dot = torch.sum(part * row, dim=1, keepdim=True, out=dots[block])
        if inverse_norm is not None:
            part.addcmul_(dot, row, value=-1).mul_(inverse_norm[block])
        part.mul_(scale)
    return grad, dots.sum()


class RowGradient:
    """``sum_j G_ij other_j`` [n, D], from tiles of G (``add_rows``) and of its transpose (``add_cols``).

    Up to ``MAX_TRANSPOSED`` columns, sums over a tile's columns are kept transposed, [D, n]: the products then read the
    tile as it lies in memory. Wider rows cost more to copy than the tile does. There the tile is transposed, and
    products are split so that one that waits to be added stays in the cache.
    """

    def __init__(self, like: Tensor, other: Tensor) -> None:
        self._like, self._other = like, other
        self._is_wide = like.shape[1] > MAX_TRANSPOSED
        self._by_rows: Tensor | None = None
        self._by_cols: Tensor | None = None
        self._transposed: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def add_rows(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G other_cols`` to the gradient of the tile's rows."""
        self.add(rows, G, self._other[cols])

    def add(self, rows: slice, G: Tensor, other: Tensor) -> None:
        """Add ``G other`` to the gradient of the tile's rows."""
        if self._by_rows is None:
            self._allocate()
        assert self._by_rows is not None
        for part in self._parts():
            # oneDNN takes a transposed matrix as it is, but a transposed slice of columns a thousand times slower.
            self._by_rows[rows, part] += product(G, other[:, part].contiguous().T)

    def add_cols(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G^T other_rows`` to the gradient of the tile's columns."""
        if self._is_wide:
            self.add_rows(cols, rows, G.T.contiguous())
            return
        if self._by_cols is None:
            self._allocate_transposed()
        assert self._by_cols is not None
        if rows.start not in self._transposed:
            self._transposed[rows.start] = self._other[rows].T.contiguous()
        self._by_cols[:, cols] += product(self._transposed[rows.start], G.T)

    def _allocate(self) -> None:
        with self._lock:  # tiles of one round run side by side
            if self._by_rows is None:
                self._by_rows = torch.zeros_like(self._like)

    def _allocate_transposed(self) -> None:
        with self._lock:
            if self._by_cols is None:
                self._by_cols = self._like.new_zeros(self._like.shape[1], self._like.shape[0])

    def total(self) -> Tensor:
        """The sum of everything that was added."""
        if self._by_rows is None:
            return torch.zeros_like(self._like) if self._by_cols is None else self._by_cols.T.contiguous()
        return self._by_rows if self._by_cols is None else self._by_rows.add_(self._by_cols.T.contiguous())

    def _parts(self) -> Iterator[slice]:
        D = self._other.shape[1]
        return (slice(start, start + MAX_PART) for start in range(0, D, MAX_PART))


def add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """``sums[index_i] += rows_i``, in an order that is the same every time."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows.to(sums.dtype))
    else:
        sums.index_put_((index,), rows.to(sums.dtype), accumulate=True)


def shares_exponentials(a: Tensor, scale: Tensor, scale_bound: float) -> bool:
    """Whether ``|A|`` is small enough for one plain exponential; reads the scale itself only where that is free."""
    if scale_bound <= MAX_SHARED_SCALE:
        return True
    return a.device.type == "cpu" and abs(scale.item()) <= MAX_SHARED_SCALE


def are_bounded(q: Tensor, k: Tensor, rows: ContrastRows) -> bool:
    """Whether one plain exponential per logit is safe; looks only where that costs no wait, on a CPU.

    Not for raw rows of several ranks, because other ranks' may be longer. Nor for positives by label over ranks: what a
    plain exponential rounds away would be all that is left of a gradient near convergence.
    """
    if q.device.type != "cpu" or (rows.is_packed and (rows.mask.by_label or not rows.normalized)):
        return False
    bound = abs(rows.scale.item())
    if not rows.normalized:
        longest = [torch.linalg.vector_norm(x, dim=1).amax().item() for x in ((q,) if q is k else (q, k))]
        bound *= longest[0] * longest[-1]
    # The sum over all keys is divided by the positive's exponential, and exp(88) is the largest of float32.
    return bound <= min(MAX_SHARED_SCALE, (88 - math.log(max(1, rows.columns))) / 2)
