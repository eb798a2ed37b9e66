"""How hard each sample is for the student, and the weight that preview-based learning gives it."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd.distributed.agree import agreeing, eagerly
from fastkd.distributed.group import Group, resolve_group
from fastkd.numerics import accumulation_dtype
from fastkd.validate import check_not_negative, check_number, check_vector


def preview_weight(ce_per_sample: Tensor, threshold: float, *, group: Group = None) -> Tensor:
    r"""The preview weights of PCKD: samples that are still too hard for the student count less.

    .. code-block:: text

        a_i = ce_i / mean_j ce_j        weight_i = 1 if a_i <= threshold else exp(-a_i^2)

    Source: arXiv 2410.14143, and the authors' public code, where ``threshold`` is ``1.005**epoch``.

    Args:
        ce_per_sample: [B], the cross-entropy of every sample, >= 0, in float64, float32, bf16 or fp16. No gradient
            passes. On CUDA, and under torch.compile, a negative one makes the weights NaN instead of raising.
        threshold: the difficulty above which the weight of a sample decays; >= 0.
        group: whose samples the mean is taken over, as for :func:`dcd_loss`. Each rank sends two numbers.

    Returns:
        The weights [B], in float64 for float64 inputs and in float32 otherwise. They are one if every cross-entropy is
        zero.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the shape is not [B] with B >= 1, a cross-entropy or the threshold is negative, or ``group`` is
            unknown.

    Example:
        >>> import torch
        >>> from fastkd import preview_weight
        >>> preview_weight(torch.tensor([0.5, 1.0, 4.5]), threshold=1.0)
        tensor([1.0000, 1.0000, 0.0063])
    """
    process_group = resolve_group(group)
    return eagerly(process_group, _weights)(process_group, ce_per_sample, threshold)


def _weights(group: ProcessGroup | None, ce_per_sample: Tensor, threshold: float) -> Tensor:
    with agreeing(group, "preview_weight") as ranks:
        check_vector("ce_per_sample", ce_per_sample, may_be_empty=ranks.several)
        check_number("threshold", threshold, minimum=0)
        ce = check_not_negative("ce_per_sample", ce_per_sample, "cross-entropies")
        ranks.describe(ce, {"threshold": threshold, "dtype": accumulation_dtype(ce.dtype)})
    ce = ce.detach().to(accumulation_dtype(ce.dtype))
    return weights_by_difficulty(ce, ranks.mean_of_all(ce), threshold)


def weights_by_difficulty(ce: Tensor, mean: Tensor, threshold: float) -> Tensor:
    """:func:`preview_weight` of cross-entropies in the accumulation dtype and their ``mean``. A gradient passes."""
    difficulty = ce / mean.clamp_min(torch.finfo(ce.dtype).tiny)
    return torch.where(difficulty <= threshold, torch.ones_like(difficulty), (-difficulty.square()).exp())
