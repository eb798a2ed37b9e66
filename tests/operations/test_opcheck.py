"""torch.library.opcheck of every custom operation: schema, fake, autograd registration, tracing."""

import pytest
import torch
from torch import Tensor

from fastkd.ops.contrast import contrast, contrast_backward
from fastkd.ops.dual_softmax import dual_softmax, dual_softmax_backward
from fastkd.ops.multiscale_pool import multiscale_pool, multiscale_pool_backward
from fastkd.ops.soft_target import soft_target, soft_target_backward
from tests.helpers.checks import embeddings
from tests.helpers.contrast_cases import MODES, problem
from tests.helpers.pool_cases import FORMATS, feature_map

pytestmark = pytest.mark.slow


def samples(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = (x.requires_grad_() for x in embeddings(n, d, dtype=dtype))
    return student, teacher, torch.tensor(5.0, dtype=dtype, requires_grad=True), torch.rand(n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
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


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
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
