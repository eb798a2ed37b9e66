"""Every operation as one row of a table: inputs, and the public call as a function of a backend and of the inputs.

The definition is the call with the backend ``reference``, in float64.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ckd_loss, dcd_loss, info_nce_loss, kd_loss, masked_contrast_loss, multiscale_pool, sup_con_loss
from fastkd.backends.blocked import soft_target_rows as blocked_rows
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense_dual_softmax
from fastkd.backends.blocked.dense import soft_target as dense_soft_target
from fastkd.functional.kd import ce_kd_terms, soft_target_rows
from fastkd.numerics import weighted_sum
from tests.helpers.checks import assert_close, embeddings, logits, value_and_grads
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, problem
from tests.helpers.pool_cases import feature_map


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the rows of the table are made of: n rows or queries, N keys where these are others, D columns."""

    n: int = 20
    N: int = 15
    D: int = 6
    dtype: torch.dtype = torch.float64
    scale: float = 4.0
    seed: int = 0
    noise: float = 1.4
    weight: Tensor | None = None
    device: str = "cpu"

    @property
    def logit_scale(self) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(self.scale, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """An operation of given inputs, as a loss of one number."""

    compute: Callable[..., Tensor]  # of a backend's name and of the inputs
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    frozen: tuple[int, ...] = ()  # numbers of the inputs that no gradient reaches
    largest: float = 1.0  # logit: of a loss or gradient that cancels, rounding of this size is left
    is_unit: bool = False  # whether rows are normalised, which the kernels then round to the inputs' dtype

    def results(self, backend: str, *inputs: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
        """The loss, and the gradient of every input; zero where there is none."""
        return value_and_grads(partial(self.compute, backend), *(inputs or self.inputs), upstream=upstream)

    def exact(self, upstream: float = 1.0) -> tuple[Tensor, ...]:
        return self.results("reference", *(x.double() for x in self.inputs), upstream=upstream)

    def check(self, backend: str, floor: float = 1e-5) -> None:
        """Loss and gradients against the definition: no worse than torch's of rows in the dtype that they have there.

        The kernels multiply unit rows in the inputs' dtype. Elsewhere they are float32, and the loss has its digits.
        """
        exact, actual, dtype = self.exact(), self.results(backend), self.inputs[0].dtype
        is_rounded = self.is_unit and backend == "triton"
        low = self.results("reference")
        if is_rounded:
            low = value_and_grads(lambda *x: self.compute("reference", *map(_unit_rows, x)), *self.inputs)
        assert_close(actual[0], exact[0], dtype if is_rounded else torch.float32, low[0], floor)
        for a, e, of_torch, given in zip(actual[1:], exact[1:], low[1:], self.inputs, strict=True):
            assert a.dtype == given.dtype
            assert_close(a, e, dtype, of_torch, floor)


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).to(x.dtype) if x.ndim == 2 else x


@contextlib.contextmanager
def always_in_tiles() -> Iterator[None]:
    """Within it the blocked backend visits tiles, however few the rows are."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dense_dual_softmax, "MAX_ROWS", 0)
        patches.setattr(dense_contrast, "MAX_ELEMENTS", 0)
        patches.setattr(dense_soft_target, "covers", lambda *_: False)
        patches.setattr(blocked_rows, "loops", lambda _: None)
        yield


def _pair(loss: Callable[..., Tensor], **options: object) -> Callable[[Size], Case]:
    def case(size: Size) -> Case:
        def compute(backend: str, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
            return loss(first, second, scale, sample_weight=size.weight, backend=backend, **options)

        rows = (x.to(size.device) for x in embeddings(size.n, size.D, size.seed, size.dtype, size.noise))
        return Case(compute, (*rows, size.logit_scale), largest=size.scale, is_unit=True)

    return case


def _on_logits(loss: Callable[..., Tensor], largest: float) -> Callable[[Size], Case]:
    """``loss`` of student, teacher and labels; no gradient reaches the teacher."""

    def case(size: Size) -> Case:
        student, teacher, labels = (x.to(size.device) for x in logits(size.n, size.D, size.seed, size.dtype))

        def compute(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
            return loss(student, teacher, labels, sample_weight=size.weight, backend=backend)

        return Case(compute, (student, teacher), (labels,), frozen=(1,), largest=largest)

    return case


def _weighted_terms(student: Tensor, teacher: Tensor, labels: Tensor, **options: object) -> Tensor:
    ce, kd = ce_kd_terms(student, teacher, labels, 3.0, label_smoothing=0.1, **options)
    return 0.3 * ce - 2.0 * kd


def _rows(student: Tensor, teacher: Tensor, labels: Tensor, **options: object) -> Tensor:
    """A mean of all that ``soft_target_rows`` gives, at two temperatures, with its options; of two classes at least."""
    weight = options.pop("sample_weight")
    options |= {"labels": labels, "exclude_label": True, "standardize": True}
    rows = soft_target_rows(student, teacher, [1.0, 3.0], **options)
    each = 2.0 * rows.divergence[0] - 9.0 * rows.divergence[1] + 0.1 * (rows.entropy - rows.teacher_label).sum(dim=0)
    return weighted_sum(each - 0.3 * rows.student_label[0] + 0.5 * rows.student_label[1], weight) / len(student)


def _contrast(mode: str, normalize: bool) -> Callable[[Size], Case]:
    """The public function that has this mode; the operation itself where none has."""

    def case(size: Size) -> Case:
        N = size.n if mode in NEEDS_PAIRS or mode.startswith("self") else size.N
        p = problem(
            mode, size.n, N, size.D, size.dtype, scale=size.scale, normalize=normalize, weight=size.weight,
            noise=size.noise, seed=size.seed, classes=2 if size.n < 10 else 5, device=size.device,
        )  # fmt: skip
        labels, index = (p.query_labels, p.key_labels), p.positive_index

        def compute(backend: str, *x: Tensor) -> Tensor:
            options = {"normalize": normalize, "sample_weight": size.weight, "backend": backend}
            if mode == "index":
                return info_nce_loss(*x, **options)
            if mode == "self label":
                return sup_con_loss(x[0], labels[0], x[1], **options)
            if mode == "label":
                return masked_contrast_loss(*x, *labels, positives="label", **options)
            if mode.startswith("masked"):
                return masked_contrast_loss(*x, *labels, index, **options)
            return (p.definition(*x) if backend == "reference" else p.kernel(*x, backend=backend)) / size.n

        constants = tuple(x for x in (*labels, index) if x is not None)
        longest = 1.0 if normalize else max(x.double().norm(dim=1).max().item() for x in p.inputs[:-1])
        largest = size.scale * longest**2
        return Case(compute, (*p.inputs[:-1], size.logit_scale), constants, largest=largest, is_unit=normalize)

    return case


def _sup_con_with_self(size: Size) -> Case:
    labels = torch.arange(size.n, device=size.device) % 3

    def compute(backend: str, features: Tensor, scale: Tensor) -> Tensor:
        options = {"exclude_self": False, "normalize": True, "sample_weight": size.weight}
        return sup_con_loss(features, labels, scale, backend=backend, **options)

    features, _ = embeddings(size.n, size.D, size.seed, size.dtype)
    inputs = features.to(size.device), size.logit_scale
    return Case(compute, inputs, (labels,), largest=size.scale, is_unit=True)


def _pool(normalize: bool) -> Callable[[Size], Case]:
    def case(size: Size) -> Case:
        def compute(backend: str, features: Tensor) -> Tensor:
            options = {"normalize": normalize, "dtype": torch.promote_types(features.dtype, torch.float32)}
            out = multiscale_pool(features, [(4, 5), 2], [1, (2, 1)], backend=backend, **options)
            return (out * torch.arange(out.numel(), device=out.device).view(out.shape).cos()).sum() / len(features)

        features = feature_map(min(size.n, 40), 2 + size.D % 60, 4, 6, dtype=size.dtype, seed=size.seed)
        return Case(compute, (features.to(size.device),), largest=10.0)

    return case


# Names of contrasts that no public function computes; the operation itself does.
OPERATION_ALONE = ("given index", "self index", "self masked")
OPERATIONS: dict[str, Callable[[Size], Case]] = {
    "dcd": _pair(dcd_loss, alpha=0.5),
    "dcd reversed": _pair(dcd_loss, alpha=2.0, consistency="teacher||student"),
    "kd": _on_logits(lambda s, t, labels, **options: kd_loss(s, t, 3.0, **options), 10.0),
    "ce and kd": _on_logits(_weighted_terms, 10.0),
    "rows": lambda size: _on_logits(_rows, 10.0)(replace(size, D=size.D + 2)),
    "ckd": _on_logits(lambda s, t, labels, **options: ckd_loss(s, t, 0.25, **options), 4.0),
    "sup_con with self": _sup_con_with_self,
    **{mode: _contrast(mode, True) for mode in MODES},
    **{f"raw {mode}": _contrast(mode, False) for mode in MODES},
    "pool": _pool(False),
    "pool of unit rows": _pool(True),
}
