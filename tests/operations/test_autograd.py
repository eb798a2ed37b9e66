"""What autograd may do with a loss: keep its graph, checkpoint it, and find inputs that were changed."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastkd import dcd_loss, info_nce_loss, masked_contrast_loss, multiscale_pool
from fastkd.ops.contrast import contrast, contrast_backward
from fastkd.ops.dual_softmax import dual_softmax, dual_softmax_backward
from tests.helpers.checks import assert_close, embeddings


@pytest.mark.parametrize(("need_first", "need_second"), [(True, True), (True, False), (False, True)])
def test_gradients_of_the_custom_ops_are_dense_as_their_fakes_say(need_first: bool, need_second: bool) -> None:
    first, second = embeddings(128, 128, dtype=torch.float32)  # so many that oneDNN multiplies
    one, scale = torch.ones(()), torch.tensor(5.0)
    stats = dual_softmax(first, second, scale, None, "student||teacher", 5.0, "blocked")[2]
    options = "student||teacher", 5.0, need_first, need_second, "blocked"
    found = dual_softmax_backward(first, second, scale, None, stats, one, one, *options)
    stats = contrast(first, second, scale, None, None, None, None, False, True, "blocked")[1]
    arguments = first, second, scale, None, None, None, None, stats, one, False, True, need_first, need_second
    found += contrast_backward(*arguments, "blocked")
    assert all(grad.is_contiguous() for grad in found)
    assert [bool(grad.numel()) for grad in found] == [need_first, need_second, True] * 2


def test_a_graph_of_the_first_gradient_changes_nothing() -> None:
    features = embeddings(12, 36)[0].view(3, 4, 6, 6).requires_grad_()
    expected = torch.autograd.grad(multiscale_pool(features, [3, 2], [1, 1]).sum(), features)[0]
    pooled = multiscale_pool(features, [3, 2], [1, 1]).sum()
    assert torch.equal(torch.autograd.grad(pooled, features, create_graph=True)[0], expected)
    rows, other = embeddings(8, 4)
    for loss in (dcd_loss, info_nce_loss):
        leaf = rows.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf * 2, other, 5.0), leaf)[0]
        value = checkpoint(lambda x: loss(x * 2, other, 5.0), leaf, use_reentrant=False)  # noqa: B023
        assert_close(torch.autograd.grad(value, leaf, create_graph=True)[0], expected, torch.float64)


@pytest.mark.parametrize("n", [40, 1200])
def test_what_a_mask_is_made_of_must_not_change_before_the_backward(n: int) -> None:
    query = embeddings(n, 8)[0].requires_grad_()
    for number in range(3):
        inputs = [torch.arange(n) % 5, torch.arange(n) % 5, torch.arange(n).flip(0).contiguous()]
        loss = masked_contrast_loss(query, query.detach(), 3.0, *inputs)
        inputs[number].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_many_keys_near_the_largest_shared_scale_do_not_overflow() -> None:
    N = 20000
    query, key = torch.zeros(1, 4), torch.zeros(N, 4)
    query[:, 0] = key[:, 0] = 1
    key[0, 0] = -1
    labels = torch.tensor([0]), torch.arange(1, N + 1), torch.tensor([0])
    losses = [masked_contrast_loss(query, key, 40.0, *labels, backend=x) for x in ("blocked", "reference")]
    assert_close(*losses, torch.float32)
