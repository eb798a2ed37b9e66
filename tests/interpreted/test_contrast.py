"""What holds of ``contrast`` alone: rows as they are, losses near zero, numbered labels, blocks of columns."""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fastkd.kernels import tiles
from fastkd.kernels.contrast import streaming, wide
from fastkd.kernels.contrast.per_row import Side, coefficients, gradients, statistics
from fastkd.kernels.normalize import vectors
from torch import Tensor

from fastkd import numerics
from fastkd.backends import reference
from fastkd.backends.masks import Mask, label_codes
from fastkd.ops import contrast as op
from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import MODES, Problem, check_against_definition, problem


@pytest.mark.parametrize("mode", MODES)
def test_rows_as_they_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.kernels.normalize.BLOCK_ELEMENTS", 16)
    check_against_definition(problem(mode, 18, 18, 20, torch.float16, normalize=False, scale=1.5))


@pytest.mark.parametrize("mode", ["index", "masked", "self index", "self masked"])
def test_losses_near_zero_keep_their_digits(mode: str, route: str) -> None:
    """Every loss is about exp(-50): 1 plus it is 1, and G of a positive would be 0."""
    n, D = 20, 24
    query = torch.eye(n, D)
    index = torch.arange(n)
    if mode.startswith("self"):
        query[1::2] = query[::2]
        index = index ^ 1
    labels = torch.arange(n) // 4
    inputs = (query,) if mode.startswith("self") else (query, query.clone())
    p = Problem(
        inputs=(*(x * 1.0 for x in inputs), torch.tensor(50.0)),
        query_labels=labels if "masked" in mode else None,
        key_labels=labels if mode == "masked" else None,
        positive_index=index,
        by_label=False,
        normalize=True,
    )
    exact = value_and_grads(stable_definition(p), *(x.double() for x in p.inputs))
    assert 0 < exact[0] < 1e-18
    for a, e in zip(value_and_grads(p.kernel, *p.inputs), exact, strict=True):
        assert_close(a, e, torch.float32, floor=1e-30)


def stable_definition(p: Problem) -> Callable[..., Tensor]:
    """By index, ``log1p(sum_{j != p} exp(x_ij - x_ip))``: the definition itself drops what is below 1e-16."""

    def loss(*inputs: Tensor) -> Tensor:
        query, key = (numerics.unit_rows(x)[0] for x in (inputs[0], inputs[-2]))
        positive, denominator = p.mask().dense(len(query), len(key), query.device)
        logits = inputs[-1] * (query @ key.T)
        others = logits.masked_fill(~denominator | positive, -torch.inf) - logits[positive][:, None]
        return others.exp().sum(1).log1p().sum()

    return loss


# The first: a row-block's last positive is the first column of a whole tile.
STREAMED, SPLIT, WIDE = (streaming, 1, 1, 37, (33, 34)), (streaming, 3, 13, 37, (19, 20)), (wide, 1, 13, 37, (19, 20))


@pytest.mark.parametrize(
    ("mode", "kernels", "splits", "start", "stop", "cuts"),
    # Every mode once: as it is, split over programs, or wider than a tile. test_ranks.py has all modes in blocks, too.
    [(mode, *(STREAMED, SPLIT, WIDE)[i % 3]) for i, mode in enumerate(MODES)],
)
def test_own_rows_against_columns_that_arrive_in_blocks(
    kernels: ModuleType, mode: str, splits: int, start: int, stop: int, cuts: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiles, "column_splits", lambda *_: splits)
    N, D = 37, 20
    weight = torch.linspace(0, 2, N)
    p = problem(mode, N, N, D, weight=weight)
    exact = value_and_grads(p.definition, *(x.double() for x in p.inputs))
    losses, _ = reference.contrast(p.inputs[0], p.inputs[-2], p.inputs[-1], True, p.mask())

    mask, scale, own = p.mask(), p.inputs[-1], slice(start, stop)
    blocks = [slice(0, cuts[0]), slice(*cuts), slice(cuts[1], N)]
    options = {"by_label": p.by_label, "exclude_self": mask.exclude_self}
    query_ids, key_ids, count = None, None, None
    if mask.query_labels is not None:
        query_ids, key_ids = label_codes(mask.query_labels, mask.key_labels)
        codes = dataclasses.replace(mask, query_labels=query_ids, key_labels=key_ids)
        count = codes.positive_counts(len(query_ids)) if p.by_label else None
    (q, inverse_q), (k, inverse_k) = (vectors(x, 32, normalize=True) for x in (p.inputs[0], p.inputs[-2]))
    queries = Side(vectors=q, labels=query_ids, positive=p.positive_index)
    keys = Side(vectors=k, labels=key_ids)

    state = None
    for block in blocks:
        state = kernels.running_statistics(queries.part(own), keys.part(block), scale, state=state, **options)
    own_count = None if count is None else count[own].contiguous()
    loss, own_stats, _ = statistics(state, weight[own].contiguous(), own_count)
    assert_close(loss, (weight * losses)[own].double(), torch.float32)
    whole = kernels.running_statistics(queries, keys, scale, **options)
    _, stats, together = statistics(whole, weight, count, needs_coef=True)
    assert_close(own_stats, stats[:, own], torch.float32)

    coef, unscale = coefficients(stats, weight, by_label=p.by_label)
    assert torch.equal(coef, together[0])
    assert torch.equal(unscale, together[1])
    queries = dataclasses.replace(queries, coef=coef)
    sides = (
        [(queries, queries, inverse_q)]
        if mask.exclude_self
        else [(queries, keys, inverse_q), (keys, queries, inverse_k)]
    )
    for (rows, columns, inverse_norm), expected in zip(sides, exact[1:], strict=False):
        partial = None
        for block in blocks:
            partial = kernels.gradient_sums(rows.part(own), columns.part(block), scale, partial=partial, **options)
        own_rows, own_inverse = rows.part(own).vectors, inverse_norm[own].contiguous()
        one = torch.tensor(1.0)
        grad, _ = gradients(partial, own_rows, own_inverse, scale, unscale, one, D=D, dtype=torch.float32)
        assert_close(grad, expected[own], torch.float32)


def test_numbers_are_equal_where_labels_are() -> None:
    queries, keys = torch.tensor([5, -(2**60), 7, 2**60, 5, 6]), torch.tensor([7, 5, 5, -(2**60), 2**61])
    query_ids, key_ids = label_codes(queries, keys)
    count = Mask(query_labels=query_ids, key_labels=key_ids, by_label=True).positive_counts(len(queries))
    assert torch.equal(query_ids[:, None] == key_ids, queries[:, None] == keys)
    assert torch.equal(count.long(), (queries[:, None] == keys).sum(1))
    assert query_ids.dtype == key_ids.dtype == torch.int32


def test_sliced_and_transposed_inputs(route: str) -> None:
    p = problem("masked, given index", 40, 40, 24)
    leaves = [x.T.contiguous().requires_grad_() for x in p.inputs[:2]]
    strided = dataclasses.replace(
        p,
        query_labels=p.query_labels[::2],
        key_labels=p.key_labels[::2],
        positive_index=(p.positive_index // 2)[::2],
        weight=torch.rand(40)[::2],
    )
    exact = value_and_grads(strided.definition, *(x[::2, 3:].double() for x in p.inputs[:2]), p.inputs[2].double())
    value = strided.kernel(*(leaf.T[::2, 3:] for leaf in leaves), p.inputs[2])
    value.backward()
    assert_close(value, exact[0], torch.float32)
    for leaf, expected in zip(leaves, exact[1:], strict=False):
        assert_close(leaf.grad.T[::2, 3:], expected, torch.float32)


def test_a_weight_of_nan_makes_loss_and_gradient_nan() -> None:
    weight = torch.ones(20)
    weight[3] = math.nan  # what validation makes of a positive_index that it may not read
    p = problem("given index", 20, 20, 6, weight=weight)
    results = value_and_grads(p.kernel, *p.inputs)
    assert results[0].isnan()
    assert results[1].isnan().any()


@pytest.mark.parametrize("mode", ["label", "self masked"])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_operators_keep_their_schema_and_shapes(needed: tuple[bool, bool], mode: str) -> None:
    p = problem(mode, 6, 6, 5, torch.float16, weight=torch.rand(6))
    query, key, scale = p.inputs if len(p.inputs) == 3 else (p.inputs[0], None, p.inputs[1])
    common = query, key, scale, p.weight, p.query_labels, p.key_labels, p.positive_index
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.contrast, (*common, p.by_label, True, "triton"), test_utils=checks)
    stats = op.contrast(*common, p.by_label, True, "triton")[1]
    arguments = *common, stats, torch.tensor(0.5), p.by_label, True, *needed, "triton"
    torch.library.opcheck(op.contrast_backward, arguments, test_utils=checks)
