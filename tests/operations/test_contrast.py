"""What counts as a positive or a negative of a contrast; what holds of every operation is in test_contract."""

import contextlib
import math

import pytest
import torch
from torch import Tensor

from fastkd import dcd_loss, info_nce_loss, masked_contrast_loss, sup_con_loss
from fastkd.backends import reference
from fastkd.backends.masks import Mask
from fastkd.ops.contrast import contrast
from tests.helpers.checks import assert_close, embeddings, relative_error, value_and_grads
from tests.helpers.contract import always_in_tiles

BACKENDS = ("reference", "blocked")


@pytest.mark.parametrize("tensor", [False, True])
def test_a_temperature_is_the_inverse_of_the_scale(tensor: bool) -> None:
    query, key = embeddings(9, 6)
    labels = torch.arange(9) % 3
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True) if tensor else 0.2
    for loss in (
        lambda **options: dcd_loss(query, key, **options),
        lambda **options: info_nce_loss(query, key, **options),
        lambda **options: sup_con_loss(query, labels, **options),
        lambda **options: masked_contrast_loss(query, key, query_labels=labels, key_labels=labels, **options),
    ):
        found, expected = loss(temperature=temperature), loss(logit_scale=5.0)
        assert_close(found, expected, torch.float64)
        if tensor:
            (grad,) = torch.autograd.grad(found, temperature)
            scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
            (of_scale,) = torch.autograd.grad(loss(logit_scale=scale), scale)
            assert_close(grad, -25 * of_scale, torch.float64)


def test_every_contrast_compares_cosines_unless_told_otherwise() -> None:
    query, key = embeddings(9, 6)
    labels = torch.arange(9) % 3
    longer = query * torch.arange(1, 10, dtype=torch.float64)[:, None]
    for loss in (
        lambda x, **options: info_nce_loss(x, key, 5.0, **options),
        lambda x, **options: sup_con_loss(x, labels, 5.0, **options),
        lambda x, **options: masked_contrast_loss(x, key, 5.0, labels, labels, **options),
    ):
        assert_close(loss(longer), loss(query), torch.float64)
        assert abs(loss(longer, normalize=False) - loss(query, normalize=False)) > 1e-3


def test_queries_without_positives_count_for_nothing_and_stay_keys() -> None:
    features = embeddings(5, 6)[0].requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = sup_con_loss(features, labels, 3.0, normalize=False, backend="blocked")
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_are_over_the_queries_that_have_a_positive(backend: str) -> None:
    query, key = embeddings(30, 6)
    key, weight, scale = key[:20], torch.rand(30, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    labels = {"query_labels": torch.arange(30) % 7, "key_labels": 1000 * (torch.arange(20) % 4)}
    labels["key_labels"][::5] = 3
    rows, count = reference.contrast(query, key, scale, True, Mask(by_label=True, **labels))
    assert 0 < (count > 0).sum() < 30
    loss = masked_contrast_loss(query, key, 4.0, **labels, positives="label", sample_weight=weight, backend=backend)
    assert_close(loss, (rows * weight).sum() / (count > 0).sum(), torch.float64)
    index = torch.arange(30) % 20
    rows, _ = reference.contrast(query, key, scale, True, Mask(positive_index=index, **labels))
    loss = masked_contrast_loss(query, key, 4.0, **labels, positive_index=index, backend=backend)
    assert_close(loss, rows.mean(), torch.float64)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_a_query_without_negatives_has_no_loss(scale: float) -> None:
    query, key = embeddings(4, 6, dtype=torch.float32)
    same, itself = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for rows, loss in (
        (1, lambda q, k, c: info_nce_loss(q, k, c, backend="blocked")),
        (4, lambda q, k, c: masked_contrast_loss(q, k, c, same, same, same, backend="blocked")),
        (1, lambda q, k, c: contrast(q, None, c, None, None, None, itself, False, True, "blocked")[0]),
        (4, lambda q, k, c: contrast(q, None, c, None, same, None, same, False, True, "blocked")[0]),
    ):
        assert all(not x.any() for x in value_and_grads(loss, query[:rows], key[:rows], torch.tensor(scale)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_positive_beside_finite_negatives_gives_a_non_finite_loss(backend: str) -> None:
    query, key = torch.ones(1, 2), torch.tensor([[math.inf, 1.0], [1.0, 2.0]])
    labels = torch.tensor([0]), torch.tensor([1, 2])
    loss = masked_contrast_loss(query, key, 1.0, *labels, torch.tensor([0]), normalize=False, backend=backend)
    assert not loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_raw_rows_are_masked_all_the_same(backend: str) -> None:
    """Their logits are beyond what a masked one is lowered by where logits are known to be small."""
    query = torch.tensor([[1e19, 0.0]])
    key = torch.tensor([[0.0, 1.0], [2e19, 0.0], [1.0, 0.0]])
    labels = torch.tensor([7]), torch.tensor([7, 7, 8])
    loss = masked_contrast_loss(query, key, 1.0, *labels, torch.tensor([0]), normalize=False, backend=backend)
    assert_close(loss, torch.tensor(1e19, dtype=torch.float64), torch.float32)


@pytest.mark.parametrize("in_tiles", [True, False])
@pytest.mark.parametrize("loss", ["sup_con", "masked by index", "masked by label"])
def test_labels_are_sorted_once_in_tiles_and_never_for_few_rows(
    loss: str, in_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward: the backward reads what came of it."""
    calls, sort = [], torch.Tensor.sort

    def counted(x: torch.Tensor, *arguments: object, **options: object) -> object:
        calls.append(len(x))
        return sort(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "sort", counted)
    monkeypatch.setattr(torch, "unique", None)
    query, key = (x.requires_grad_() for x in embeddings(20, 6))
    labels, key_labels = torch.arange(20) % 5, torch.arange(20) % 4
    with always_in_tiles() if in_tiles else contextlib.nullcontext():
        if loss == "sup_con":
            sup_con_loss(query, labels, 3.0, normalize=False, backend="blocked").backward()
        else:
            positives = loss.split()[-1]
            masked_contrast_loss(query, key, 3.0, labels, key_labels, positives=positives, backend="blocked").backward()
    assert calls == ([20 if loss == "sup_con" else 40] if in_tiles else [])


def test_gradients_by_label_are_as_close_as_plain_torch_near_convergence() -> None:
    centres = embeddings(128, 64)[0]
    rows = torch.cat([centres, centres + 0.05 * embeddings(128, 64, seed=1)[0]])
    labels, errors = torch.arange(128).repeat(2), {}
    exact = value_and_grads(lambda f: sup_con_loss(f, labels, 10.0, normalize=True, backend="reference"), rows)
    for backend in BACKENDS:
        found = value_and_grads(
            lambda f, backend=backend: sup_con_loss(f, labels, 10.0, normalize=True, backend=backend), rows.float()
        )
        errors[backend] = relative_error(found[1], exact[1], floor=1e-30)
    assert errors["blocked"] < 4 * errors["reference"]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("D", [97, 128])
def test_the_two_sums_of_nearly_equal_rows_are_rounded_alike(D: int, tiled: bool) -> None:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(30) % 3
    rows = torch.randn(10, 1, D, generator=generator) + 1e-6 * torch.randn(10, 30, D, generator=generator)
    rows /= rows.norm(dim=2, keepdim=True).mean(1, keepdim=True)

    def losses(dtype: torch.dtype, backend: str) -> Tensor:
        options = {"exclude_self": False, "normalize": False, "backend": backend}
        return torch.stack([sup_con_loss(batch.to(dtype), labels, 1000.0, **options) for batch in rows])

    with always_in_tiles() if tiled else contextlib.nullcontext():
        exact, low = losses(torch.float64, "reference"), losses(torch.float32, "reference")
        assert_close(losses(torch.float32, "blocked"), exact, torch.float32, low)
