"""Every mask of ``contrast`` on one set of inputs, for the tests in Triton's interpreter and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import numerics
from fastkd.backends import reference
from fastkd.backends.masks import Mask
from fastkd.ops.contrast import contrast
from tests.helpers.checks import assert_close, value_and_grads

# (labels, by label, positive_index, queries contrasted with themselves)
MODES = {
    "index": (False, False, False, False),
    "given index": (False, False, True, False),
    "masked": (True, False, False, False),
    "masked, given index": (True, False, True, False),
    "label": (True, True, False, False),
    "self label": (True, True, False, True),
    "self index": (False, False, True, True),
    "self masked": (True, False, True, True),
}
NEEDS_PAIRS = ("index", "masked")  # as many queries as keys


@dataclass(frozen=True)
class Problem:
    """Inputs (query, key unless it is the query, scale) and everything that says what to compute of them."""

    inputs: tuple[Tensor, ...]
    query_labels: Tensor | None
    key_labels: Tensor | None
    positive_index: Tensor | None
    by_label: bool
    normalize: bool
    weight: Tensor | None = None

    @property
    def floors(self) -> tuple[float, float]:
        """What the loss and the scale's gradient are measured against where they are smaller.

        Both are sums over the queries of terms as large as the weights: where those cancel, so does their rounding.
        """
        size = len(self.inputs[0]) * (1 if self.weight is None else self.weight.abs().max().item())
        return 0.1 * size, 0.1 * size

    def kernel(self, *inputs: Tensor, backend: str = "triton") -> Tensor:
        query, key, scale = inputs if len(inputs) == 3 else (inputs[0], None, inputs[1])
        return contrast(
            query, key, scale, self.weight, self.query_labels, self.key_labels, self.positive_index, self.by_label,
            self.normalize, backend,
        )[0]  # fmt: skip

    def mask(self) -> Mask:
        is_self = len(self.inputs) == 2
        return Mask(
            query_labels=self.query_labels,
            key_labels=self.query_labels if is_self else self.key_labels,
            positive_index=self.positive_index,
            by_label=self.by_label,
            exclude_self=is_self,
        )

    def definition(self, *inputs: Tensor) -> Tensor:
        losses, _ = reference.contrast(inputs[0], inputs[-2], inputs[-1], self.normalize, self.mask())
        return numerics.weighted_sum(losses, self.weight)

    def eager(self, *inputs: Tensor) -> Tensor:
        """What a careful user writes in low precision: rows and product in the inputs' dtype, softmax in float32."""
        query, key, scale = inputs[0], inputs[-2], inputs[-1]
        if self.normalize:
            query, key = (F.normalize(x.float()).to(x.dtype) for x in (query, key))
        logits = scale * (query @ key.T).float()
        positive, denominator = self.mask().dense(len(query), len(key), query.device)
        count = positive.sum(1)
        lse = logits.masked_fill(~denominator & (count > 0)[:, None], -torch.inf).logsumexp(1)
        losses = lse - logits.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
        return numerics.weighted_sum(losses.masked_fill(count == 0, 0), self.weight)


def problem(
    mode: str,
    n: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 8.0,
    normalize: bool = True,
    weight: Tensor | None = None,
    device: str = "cpu",
    classes: int = 5,
    noise: float = 1.4,
    seed: int = 0,
) -> Problem:
    """Queries that agree in part with their positives; labels of which some occur once, or on one side only."""
    has_labels, by_label, has_index, is_self = MODES[mode]
    assert not (is_self or mode in NEEDS_PAIRS) or n == N
    generator = torch.Generator().manual_seed(100 * n + D + seed)
    key = torch.randn(N, D, generator=generator, dtype=torch.float64)
    index = torch.randint(N, (n,), generator=generator)
    partner = torch.arange(n) if n == N and not has_index else index
    query = 2 * (key[partner] + noise * torch.randn(n, D, generator=generator, dtype=torch.float64))
    if not normalize:
        query, key = query / D**0.5, key / D**0.5
    labels = [torch.randint(-1, classes, (count,), generator=generator) * 2**40 for count in (n, N)]
    labels[0][::7] = 3  # no key has it, if the keys are others
    rows = [query] if is_self else [query, key]
    return Problem(
        inputs=(*(x.to(dtype).to(device) for x in rows), torch.tensor(scale, device=device)),
        query_labels=labels[0].to(device) if has_labels else None,
        key_labels=labels[1].to(device) if has_labels and not is_self else None,
        positive_index=index.to(device) if has_index else None,
        by_label=by_label,
        normalize=normalize,
        weight=None if weight is None else weight.to(device),
    )


def check_against_definition(
    p: Any, upstream: float = 1.0, tolerance: torch.dtype | None = None, kernel: Callable[..., Tensor] | None = None
) -> None:
    """Loss and gradients of a problem (of contrast or dual_softmax) against the float64 definition."""
    dtype = p.inputs[0].dtype
    exact = value_and_grads(p.definition, *(x.double() for x in p.inputs), upstream=upstream)
    low = value_and_grads(p.eager, *p.inputs, upstream=upstream)
    actual = value_and_grads(kernel or p.kernel, *p.inputs, upstream=upstream)
    assert actual[0].dtype == torch.float32
    of_loss, of_scale = p.floors
    assert_close(actual[0], exact[0], tolerance or dtype, low[0], of_loss)
    for a, e, torch_result, given in zip(actual[1:], exact[1:], low[1:], p.inputs, strict=True):
        assert a.dtype == given.dtype
        assert_close(a, e, tolerance or dtype, torch_result, of_scale * abs(upstream) if given.ndim == 0 else 1e-5)
