"""The losses over the rows of several ranks: agree on what is computed, compute this rank's part, scale it by W / N."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd import backends
from fastkd.distributed.agree import Call, Peers, agree
from fastkd.functional.contrast import ContrastInputs
from fastkd.ops.dual_softmax import GlobalDualSoftmax
from fastkd.ops.global_contrast import global_contrast
from fastkd.validate import (
    CONSISTENCIES,
    check_choice,
    check_number,
    check_pair,
    check_scale,
    check_weight,
    scale_bound,
)


@torch.compiler.disable
def global_dcd_means(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float,
    alpha: float,
    consistency: str,
    sample_weight: Tensor | None,
    max_scale: float,
    group: ProcessGroup,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the means over the global batch, before alpha."""
    scale, weight = torch.empty(0), None

    def describe() -> Call:
        nonlocal scale, weight
        check_pair("student", student, "teacher", teacher, "[n, D]", may_be_empty=True)
        scale = check_scale(logit_scale, student)
        check_number("alpha", alpha, minimum=0)
        check_choice("consistency", consistency, CONSISTENCIES)
        weight = check_weight(sample_weight, student)
        options = {"alpha": alpha, "consistency": consistency}
        return _call(student, teacher, scale, weight, "dual_softmax", backend, options)

    peers = agree(group, "dcd_loss", describe)
    bound = scale_bound(logit_scale, max_scale)
    name = backends.resolve(backend, "dual_softmax", student)
    sums = GlobalDualSoftmax.apply(student, teacher, scale, weight, consistency, bound, peers, name)
    return _global_mean(sums[0], peers), _global_mean(sums[1], peers)


@torch.compiler.disable
def global_contrast_mean(
    name: str, check: Callable[[], ContrastInputs], group: ProcessGroup, backend: str | None
) -> Tensor:
    """This rank's part of the mean over the global batch, of the loss ``name`` of the inputs that ``check`` returns."""
    x: ContrastInputs

    def describe() -> Call:
        nonlocal x
        x = check()
        key = x.query if x.key is None else x.key
        options: dict[str, object] = {
            "normalize": x.normalize,
            "positives by label": x.by_label,
            "labels": x.query_labels is not None,
            "exclude_self": x.key is None,
        }
        call = _call(x.query, key, x.scale, x.weight, "contrast", backend, options)
        call.key_rows = len(key)
        call.needs_key_grad = torch.is_grad_enabled() and key.requires_grad
        return call

    peers = agree(group, name, describe)
    own_sum, has_positive = global_contrast(
        x.query, x.key, x.scale, x.weight, x.query_labels, x.key_labels, x.positive_index, x.by_label, x.normalize,
        peers, backends.resolve(backend, "contrast", x.query),
    )  # fmt: skip
    if not x.by_label:
        return _global_mean(own_sum, peers)
    dist.all_reduce(has_positive, group=group)
    return own_sum * peers.world_size / has_positive.clamp_min(1)


def _call(
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    operation: str,
    backend: str | None,
    options: dict[str, object],
) -> Call:
    """What the ranks must agree on before rows are exchanged."""
    if backends.resolve(backend, operation, first) == "reference":
        raise ValueError("backend: got 'reference', expected None, 'blocked' or 'triton' for a group of several ranks")
    same = {"width of the rows": first.shape[1], "dtype": first.dtype, "device": first.device.type}
    return Call(
        rows=len(first),
        options={**same, **options},
        scale=math.nan if scale.is_cuda else scale.item(),
        has_weight=weight is not None,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (first, second, scale)),
    )


def _global_mean(own_sum: Tensor, peers: Peers) -> Tensor:
    """W / N times the sum over this rank's rows: the average over the ranks is the global mean."""
    return own_sum * (peers.world_size / peers.total)
