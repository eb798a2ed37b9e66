"""``dual_softmax`` on one set of inputs, for the tests in Triton's interpreter and on a GPU; see contrast_cases.py."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.functional.dcd import dcd_terms
from tests.helpers import contrast_cases
from tests.helpers.checks import embeddings

BOUNDED, ONLINE = 40.0, math.inf
# (direction of the KL, largest scale): with a small one the kernels need no running maximum.
DUAL_MODES = {
    "dcd bounded": ("student||teacher", BOUNDED),
    "dcd online": ("student||teacher", ONLINE),
    "dcd swapped bounded": ("teacher||student", BOUNDED),
    "dcd swapped online": ("teacher||student", ONLINE),
}


@dataclass(frozen=True)
class DualProblem:
    """Inputs (student, teacher, scale) and everything that says what to compute of them."""

    inputs: tuple[Tensor, ...]
    consistency: str = "student||teacher"
    max_scale: float = BOUNDED
    weight: Tensor | None = None
    alpha: float = 0.5
    floors = 1e-5, 0.1  # the scale's gradient is a mean of terms as large as 1, which may cancel

    def kernel(self, *inputs: Tensor, backend: str | None = "triton") -> Tensor:
        return sum(
            dcd_terms(
                *inputs, alpha=self.alpha, consistency=self.consistency, sample_weight=self.weight,
                max_scale=self.max_scale, backend=backend,
            )
        )  # fmt: skip

    def definition(self, *inputs: Tensor) -> Tensor:
        return self.kernel(*inputs, backend="reference")

    def eager(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        """What a careful user writes in low precision: unit rows and product in the inputs' dtype, softmax in fp32."""
        s, t = (F.normalize(x.float()).to(x.dtype) for x in (student, teacher))
        A = scale * (s @ t.T).float()
        log_p, log_q = A.log_softmax(1), A.T.log_softmax(1)
        first, second = (log_p, log_q) if self.consistency == "student||teacher" else (log_q, log_p)
        rows = -log_p.diagonal() + self.alpha * (first.exp() * (first - second)).sum(1)
        return (rows if self.weight is None else self.weight * rows).mean()


def dual_problem(
    mode: str,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 10.0,
    device: str = "cpu",
    weight: Tensor | None = None,
    alpha: float = 0.5,
) -> DualProblem:
    consistency, max_scale = DUAL_MODES[mode]
    inputs = *(x.to(device) for x in embeddings(n, d, dtype=dtype)), torch.tensor(scale, device=device)
    return DualProblem(inputs, consistency, max_scale, weight, alpha)


def any_problem(mode: str, n: int, d: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The problem of a mode of dual_softmax or of contrast, with as many queries as keys."""
    if mode in DUAL_MODES:
        return dual_problem(mode, n, d, dtype, **options)
    return contrast_cases.problem(mode, n, n, d, dtype, **options)
