"""``contrast`` of the streaming backend, in all its modes, against the float64 definition."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import ckd_loss, masked_contrast_loss, numerics, sup_con_loss
from fastkd.backends import reference
from fastkd.backends.blocked import contrast as blocked_contrast
from fastkd.backends.blocked import sums as blocked_shared
from fastkd.backends.blocked import tiles
from fastkd.backends.masks import Mask
from fastkd.ops.contrast import contrast, contrast_backward
from tests.helpers.checks import assert_close, embeddings, relative_error, value_and_grads
from tests.operations.test_backends import LargestTensor

MODES = ("paired", "index", "masked", "label", "self_index", "self_masked", "self_label")
BY_INDEX = tuple(mode for mode in MODES if "label" not in mode)
LOW = (torch.float32, torch.float16, torch.bfloat16)
ROWS = st.one_of(st.integers(1, 40), st.sampled_from([511, 513, 600, 1025]))
SCALES = st.sampled_from([0.05, 2.7, 10.0, 39.0, 41.0, 100.0])


def make_mask(mode: str, n: int, N: int, seed: int = 0, classes: int = 5) -> Mask:
    """Some labels are on one side only; positives by index repeat, and some are the query's own row."""
    generator = torch.Generator().manual_seed(seed)
    is_self = mode.startswith("self")
    labels = 1000 * torch.randint(classes, (n,), generator=generator) - 7
    key_labels = 1000 * torch.randint(1, classes + 1, (N,), generator=generator) - 7
    index = torch.randint(N, (n,), generator=generator)
    return Mask(
        query_labels=labels if "label" in mode or "masked" in mode else None,
        key_labels=(labels if is_self else key_labels) if "label" in mode or "masked" in mode else None,
        positive_index=index if "index" in mode or "masked" in mode else None,
        by_label="label" in mode,
        exclude_self=is_self,
    )


def make_loss(mask: Mask, weight: Tensor | None, normalize: bool, backend: str) -> Callable[..., Tensor]:
    """The weighted mean as a function of query, key and scale; a self-contrast leaves the key out."""

    def loss(q: Tensor, k: Tensor, c: Tensor) -> Tensor:
        if backend == "reference":
            rows, _ = reference.contrast(q, q if mask.exclude_self else k, c, normalize, mask)
            return numerics.weighted_sum(rows, weight) / len(q)
        key, key_labels = (None, None) if mask.exclude_self else (k, mask.key_labels)
        return contrast(
            q, key, c, weight, mask.query_labels, key_labels, mask.positive_index, mask.by_label, normalize, backend
        )[0] / len(q)

    return loss


def make_rows(mode: str, n: int, N: int, d: int, seed: int = 0, noise: float = 1.4) -> tuple[Tensor, Tensor, Mask]:
    """Queries near their positives, where these are named by index."""
    n, N = (n, n) if mode == "paired" or mode.startswith("self") else (n, N)
    mask = make_mask(mode, n, N, seed)
    q, k = (x[:count].clone() for x, count in zip(embeddings(max(n, N), d, seed, noise=noise), (n, N), strict=True))
    if mask.positive_index is not None and not mask.exclude_self:
        generator = torch.Generator().manual_seed(seed)
        q = 2 * (k[mask.positive_index] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64))
    return q, k, mask


@settings(max_examples=80, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    n=ROWS,
    N=ROWS,
    d=st.one_of(st.integers(1, 20), st.sampled_from([131, 300])),
    scale=SCALES,
    normalize=st.booleans(),
    weighted=st.booleans(),
    upstream=st.sampled_from([1.0, -0.37, 1e4]),
    seed=st.integers(0, 99),
)
def test_float64_equals_the_definition(
    mode: str, n: int, N: int, d: int, scale: float, normalize: bool, weighted: bool, upstream: float, seed: int
) -> None:
    q, k, mask = make_rows(mode, n, N, d, seed)
    weight = torch.rand(len(q), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inputs = q, k, torch.tensor(scale, dtype=torch.float64)
    expected, actual = (
        value_and_grads(make_loss(mask, weight if weighted else None, normalize, backend), *inputs, upstream=upstream)
        for backend in ("reference", "blocked")
    )
    # A loss is a difference of logits: where it cancels, the error is relative to them.
    size = scale if normalize else scale * (q.norm(dim=1).max() * torch.cat([q, k]).norm(dim=1).max()).item()
    assert_close(actual[0], expected[0], torch.float64, floor=1e-3 * size)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, torch.float64, floor=1e-5 * max(1.0, abs(upstream)) * max(1.0, size))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "N", "d", "scale"), [(2, 3, 1, 3.0), (530, 65, 128, 10.0), (100, 600, 300, 100.0)])
def test_low_precision_is_no_worse_than_torch(
    mode: str, normalize: bool, dtype: torch.dtype, n: int, N: int, d: int, scale: float
) -> None:
    q, k, mask = make_rows(mode, n, N, d)
    scale = scale if normalize else scale / d  # raw rows are about sqrt(d) long
    inputs = q.to(dtype), k.to(dtype), torch.tensor(scale)
    exact = value_and_grads(make_loss(mask, None, normalize, "reference"), *(x.double() for x in inputs))
    torch_result = value_and_grads(make_loss(mask, None, normalize, "reference"), *inputs)
    actual = value_and_grads(make_loss(mask, None, normalize, "blocked"), *inputs)
    assert actual[0].dtype == torch.float32
    # By label, a loss is a difference: the one that cancels here is zero in exact arithmetic.
    floor = 0.5 if mode == "self_label" and n == 2 else 1e-5
    assert_close(actual[0], exact[0], torch.float32, torch_result[0], floor)
    for a, e, low, given_input in zip(actual[1:], exact[1:], torch_result[1:], inputs, strict=True):
        assert a.dtype == given_input.dtype
        assert_close(a, e, dtype, low, floor)


@pytest.mark.parametrize("mode", ["paired", "index", "masked"])
@pytest.mark.parametrize(("scale", "noise"), [(10.0, 0.05), (1 / 0.07, 0.05), (39.0, 1.0), (41.0, 1.0)])
@pytest.mark.parametrize(("n", "N"), [(256, 300), (600, 1100)])
def test_gradients_keep_their_digits_where_the_loss_has_almost_vanished(
    mode: str, scale: float, noise: float, n: int, N: int
) -> None:
    q, k, mask = make_rows(mode, n, N, 128, noise=noise)
    inputs = q.float(), k.float(), torch.tensor(scale)
    exact = value_and_grads(make_loss(mask, None, True, "reference"), *(x.double() for x in inputs))
    actual = value_and_grads(make_loss(mask, None, True, "blocked"), *inputs)
    allowed = 8 * scale * torch.finfo(torch.float32).eps
    assert all(relative_error(a, e, floor=1e-30) < allowed for a, e in zip(actual, exact, strict=True))


def test_a_long_row_leaves_the_digits_of_its_short_positives() -> None:
    features = embeddings(8, 16)[0].float()
    features[0] *= 1e5
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    exact = value_and_grads(lambda f: sup_con_loss(f, labels, 1e-5, backend="reference"), features.double())
    actual = value_and_grads(lambda f: sup_con_loss(f, labels, 1e-5, backend="blocked"), features)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a[1:] if a.ndim else a, e[1:] if e.ndim else e, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [24, 300])
def test_sliced_and_transposed_inputs(mode: str, d: int) -> None:
    q, k, mask = make_rows(mode, 20, 33, d)
    scale = torch.tensor(4.0, dtype=torch.float64)
    expected = value_and_grads(make_loss(mask, None, False, "reference"), q[:, 3:], k[:, 3:], scale)
    leaves = [x.T.repeat_interleave(2, dim=1).requires_grad_() for x in (q, k)]
    rows = [leaf.T[::2, 3:] for leaf in leaves]
    assert not rows[0].is_contiguous()
    value = make_loss(mask, None, False, "blocked")(*rows, scale)
    value.backward()
    assert_close(value, expected[0], torch.float64)
    assert_close(leaves[0].grad.T[::2, 3:], expected[1], torch.float64)
    if not mask.exclude_self:
        assert_close(leaves[1].grad.T[::2, 3:], expected[2], torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_inputs_get_no_gradient_and_change_nothing(mode: str) -> None:
    q, k, mask = make_rows(mode, 20, 13, 6)
    scale = torch.tensor(4.0, dtype=torch.float64)
    loss = make_loss(mask, None, True, "blocked")
    full = value_and_grads(loss, q, k, scale)
    for wanted in (0, 2) if mask.exclude_self else (0, 1, 2):
        inputs = [q.clone(), k.clone(), scale.clone()]
        inputs[wanted].requires_grad_()
        loss(*inputs).backward()
        assert_close(inputs[wanted].grad, full[1 + wanted], torch.float64)
        assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_left_bitwise_unchanged(mode: str, normalize: bool) -> None:
    q, k, mask = make_rows(mode, 600, 530, 8)
    weight, scale = torch.rand(len(q), dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    labels = [x for x in (mask.query_labels, mask.key_labels, mask.positive_index) if x is not None]
    leaves = [x.requires_grad_() for x in (q, k, scale)]
    before = [x.detach().clone() for x in (*leaves, weight, *labels)]
    make_loss(mask, weight, normalize, "blocked")(*leaves).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip((*leaves, weight, *labels), before, strict=True))


@pytest.mark.parametrize("scale", [3.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_an_empty_tensor_is_written(mode: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = make_rows(mode, 530, 600, 7)
    inputs = q, k, torch.tensor(scale, dtype=torch.float64)
    expected = value_and_grads(make_loss(mask, None, True, "blocked"), *inputs)
    for owner, name in ((torch, "empty_like"), (torch, "empty"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def poisoned(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(math.nan if made.is_floating_point() else -1)

        monkeypatch.setattr(owner, name, poisoned)
    actual = value_and_grads(make_loss(mask, None, True, "blocked"), *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_queries_without_positives_count_for_nothing_and_stay_keys() -> None:
    features = embeddings(5, 6)[0].requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = sup_con_loss(features, labels, 3.0, backend="blocked")
    x = 3.0 * features.detach() @ features.detach().T
    x.fill_diagonal_(-torch.inf)
    rows = [x[i].logsumexp(0) - x[i, j] for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert_close(loss, sum(rows) / 4, torch.float64)
    loss.backward()
    assert features.grad[4].abs().max() > 0
    alone = embeddings(3, 6)[0].requires_grad_()
    loss = sup_con_loss(alone, torch.arange(3), 3.0, backend="blocked")
    loss.backward()
    assert loss.item() == 0
    assert not alone.grad.any()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_means_are_over_the_queries_that_have_a_positive(backend: str) -> None:
    q, k, mask = make_rows("label", 30, 20, 6)
    weight = torch.rand(30, dtype=torch.float64)
    rows, count = reference.contrast(q, k, torch.tensor(4.0, dtype=torch.float64), True, mask)
    assert 0 < (count > 0).sum() < 30
    labels = mask.query_labels, mask.key_labels
    loss = masked_contrast_loss(q, k, 4.0, *labels, positives="label", sample_weight=weight, backend=backend)
    assert_close(loss, (rows * weight).sum() / (count > 0).sum(), torch.float64)
    index = torch.arange(30) % 20
    rows, _ = reference.contrast(
        q, k, torch.tensor(4.0, dtype=torch.float64), True, Mask(query_labels=labels[0], key_labels=labels[1],
        positive_index=index)
    )  # fmt: skip
    assert_close(masked_contrast_loss(q, k, 4.0, *labels, index, backend=backend), rows.mean(), torch.float64)


def hard_rows() -> dict[str, Tensor]:
    rows = embeddings(9, 6)[0].float()
    zero = rows.clone()
    zero[[0, 4]] = 0
    return {"zero rows": zero, "all zero": 0 * rows, "huge": 1e30 * rows, "identical": rows[:1].expand(9, 6).clone()}


@pytest.mark.parametrize("case", hard_rows())
@pytest.mark.parametrize("scale", [1e-6, 5.0, 100.0, 3000.0])
@pytest.mark.parametrize("mode", MODES)
def test_hard_inputs_give_finite_losses_and_gradients(mode: str, case: str, scale: float) -> None:
    rows = hard_rows()[case]
    results = value_and_grads(
        make_loss(make_mask(mode, 9, 9), None, True, "blocked"), rows, rows.flip(0), torch.tensor(scale)
    )
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("mode", BY_INDEX)
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_a_query_without_negatives_has_no_loss(mode: str, scale: float) -> None:
    q, k = (x.float() for x in embeddings(4, 6))
    same = torch.zeros(4, dtype=torch.int64)
    masked = mode in ("masked", "self_masked")
    mask = Mask(
        query_labels=same if masked else None,
        key_labels=same if masked else None,
        positive_index=same if masked else None,
        exclude_self=mode.startswith("self"),
    )
    if not masked:
        q, k = q[:1], k[:1]
    results = value_and_grads(make_loss(mask, None, True, "blocked"), q, k, torch.tensor(scale))
    assert all(not x.any() for x in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_inputs_give_a_non_finite_loss(
    mode: str, where: int, normalize: bool, scale: float, bad: float
) -> None:
    q, k, mask = make_rows(mode, 600, 700, 6)
    inputs = [q.float(), k.float(), torch.tensor(scale)]
    if mask.exclude_self and where:
        return
    inputs[where][550, 2] = bad
    assert not make_loss(mask, None, normalize, "blocked")(*inputs).isfinite()
    finite = [q.float(), k.float(), torch.tensor(math.nan)]
    assert not make_loss(mask, None, normalize, "blocked")(*finite).isfinite()


def test_an_infinite_positive_beside_finite_negatives_gives_a_non_finite_loss() -> None:
    query, key = torch.ones(1, 2), torch.tensor([[math.inf, 1.0], [1.0, 2.0]])
    mask = Mask(positive_index=torch.tensor([0]))
    scale = torch.tensor(1.0)
    assert not make_loss(mask, None, False, "reference")(query, key, scale).isfinite()
    assert not make_loss(mask, None, False, "blocked")(query, key, scale).isfinite()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_running_maxima_change_nothing(mode: str, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = make_rows(mode, 600, 530, 16)
    inputs = q, k, torch.tensor(9.0 if normalize else 9e-3, dtype=torch.float64)
    shared = value_and_grads(make_loss(mask, None, normalize, "blocked"), *inputs)
    # Exponentials that overflow if no maximum is subtracted.
    monkeypatch.setattr(blocked_contrast, "MAX_SHARED_SCALE", 0.0)
    monkeypatch.setattr(blocked_shared.PlainSums, "add", None)
    for a, e in zip(value_and_grads(make_loss(mask, None, normalize, "blocked"), *inputs), shared, strict=True):
        assert_close(a, e, torch.float64)


@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_same_bits_for_any_number_of_workers(
    mode: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, mask = make_rows(mode, 1100, 1500, 24)
    inputs = q.float(), k.float(), torch.tensor(scale)
    sizes = {len(x): tiles.blocks(len(x), x.device) for x in (q, k)}
    for module in (blocked_contrast, tiles):
        monkeypatch.setattr(module, "blocks", lambda n, _: sizes[n])
    results = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(tiles, "worker_count", lambda *_, workers=workers: workers)
        results.append(value_and_grads(make_loss(mask, None, True, "blocked"), *inputs))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_grows_with_the_number_of_pairs(mode: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = make_rows(mode, 4096, 3000, 16)
    monkeypatch.setattr(tiles, "worker_count", lambda *_: 1)  # the recording sees the calling thread alone
    key = None if mask.exclude_self else k.float()
    key_labels = None if key is None else mask.key_labels
    labels = mask.query_labels, key_labels, mask.positive_index
    inputs = q.float(), key, torch.tensor(scale), None, *labels
    with LargestTensor() as largest:
        _, stats = contrast(*inputs, mask.by_label, True, "blocked")
        contrast_backward(*inputs, stats, torch.tensor(1.0), mask.by_label, True, True, True, "blocked")
    assert 0 < largest.elements <= tiles.MAX_ROWS**2


def test_ckd_leaves_the_teacher_alone() -> None:
    student, teacher = (x.requires_grad_() for x in embeddings(40, 300))
    ckd_loss(student, teacher, 0.5, backend="blocked").backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_huge_raw_rows_are_masked_all_the_same() -> None:
    """Their logits are beyond what a masked one is lowered by where logits are known to be small."""
    query = torch.tensor([[1e19, 0.0]])
    key = torch.tensor([[0.0, 1.0], [2e19, 0.0], [1.0, 0.0]])
    labels = torch.tensor([7]), torch.tensor([7, 7, 8])
    for backend in ("reference", "blocked"):
        loss = masked_contrast_loss(query, key, 1.0, *labels, torch.tensor([0]), normalize=False, backend=backend)
        assert_close(loss, torch.tensor(1e19, dtype=torch.float64), torch.float32)
