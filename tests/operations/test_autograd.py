"""What autograd and tracing may do with a loss: opcheck of the operations, graphs, checkpoints, inputs that change."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd import dcd_loss, info_nce_loss, masked_contrast_loss
from fastkd import multiscale_pool as pool
from fastkd.ops.contrast import contrast, contrast_backward
from fastkd.ops.dual_softmax import dual_softmax, dual_softmax_backward
from fastkd.ops.multiscale_pool import multiscale_pool, multiscale_pool_backward
from fastkd.ops.soft_target import soft_target, soft_target_backward
from fastkd.ops.soft_target_rows import soft_target_rows, soft_target_rows_backward
from tests.helpers.checks import assert_close, embeddings
from tests.helpers.contrast_cases import MODES, problem
from tests.helpers.pool_cases import FORMATS, feature_map


def samples(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = (x.requires_grad_() for x in embeddings(n, d, dtype=dtype))
    return student, teacher, torch.tensor(5.0, dtype=dtype, requires_grad=True), torch.rand(n, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "weighted"), [(torch.float64, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_opcheck(dtype: torch.dtype, weighted: bool) -> None:
    a, b, c, weight = samples(7, 5, dtype)
    w = weight if weighted else None
    torch.library.opcheck(dual_softmax, (a, b, c, w, "student||teacher", 10.0, "blocked"))
    labels = torch.arange(7) % 5
    for teacher, classes in ((b.detach(), labels), (b.detach(), None), (None, labels)):
        torch.library.opcheck(soft_target, (a, teacher, classes, w, 4.0, 0.1, "blocked"))
    a, b, c = a.detach(), b.detach(), c.detach()
    *_, stats = dual_softmax(a, b, c, w, "student||teacher", 10.0, "blocked")
    one = torch.ones((), dtype=stats.dtype)
    for need in (True, False):
        torch.library.opcheck(
            dual_softmax_backward, (a, b, c, w, stats, one, one, "student||teacher", 10.0, need, True, "blocked")
        )
    *_, stats = soft_target(a, b, labels, w, 4.0, 0.1, "blocked")
    torch.library.opcheck(soft_target_backward, (a, b, labels, w, stats, one, one, 4.0, 0.1, "blocked"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows(dtype: torch.dtype) -> None:
    student, teacher, _, _ = samples(7, 5, dtype)
    scales = torch.rand(2, 2, 7, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True).unbind()
    rows = student, teacher.detach(), torch.arange(7) % 5, *scales
    torch.library.opcheck(soft_target_rows, (*rows, True, True, True, "blocked"))
    rows = tuple(x.detach() for x in rows)
    found, kept = soft_target_rows(*rows, True, True, True, "blocked")
    torch.library.opcheck(soft_target_rows_backward, (*rows, kept, torch.ones_like(found), True, True, "blocked"))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "weighted"), [(torch.float64, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_contrast(mode: str, weighted: bool, dtype: torch.dtype) -> None:
    p = problem(mode, 7, 7, 4, dtype, scale=5.0)
    query, *key, scale = (x.requires_grad_() for x in p.inputs)
    weight = torch.rand(7, dtype=dtype) if weighted else None
    inputs = query, key[0] if key else None, scale, weight, p.query_labels, p.key_labels, p.positive_index
    torch.library.opcheck(contrast, (*inputs, p.by_label, True, "blocked"))
    inputs = tuple(None if x is None else x.detach() for x in inputs)
    _, stats = contrast(*inputs, p.by_label, True, "blocked")
    one = torch.ones((), dtype=stats.dtype)
    for need_query, need_key in ((True, True), (True, False), (False, True), (False, False)):
        needed = need_query, need_key and bool(key)
        torch.library.opcheck(contrast_backward, (*inputs, stats, one, p.by_label, True, *needed, "blocked"))


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "normalize"), [(torch.float64, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_multiscale_pool(dtype: torch.dtype, memory_format: torch.memory_format, normalize: bool) -> None:
    x = feature_map(2, 3, 5, 6, dtype=dtype).contiguous(memory_format=memory_format)
    windows, strides = [5, 6, 2, 2], [1, 1, 2, 2]
    torch.library.opcheck(multiscale_pool, (x.requires_grad_(), windows, strides, normalize, torch.float32, "blocked"))
    out, inverse_norm = multiscale_pool(x.detach(), windows, strides, normalize, torch.float32, "blocked")
    unit = out if normalize else None
    is_last = memory_format == torch.channels_last
    torch.library.opcheck(
        multiscale_pool_backward, (out, unit, inverse_norm, [5, 6], windows, strides, is_last, dtype, "blocked")
    )


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
    expected = torch.autograd.grad(pool(features, [3, 2], [1, 1]).sum(), features)[0]
    pooled = pool(features, [3, 2], [1, 1]).sum()
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


def test_a_scale_near_the_largest_number_is_no_error_of_torch() -> None:
    first, second = embeddings(16, 8, dtype=torch.float32)
    for loss in (dcd_loss, info_nce_loss):
        assert isinstance(loss(first, second, 3.4e38).item(), float)
