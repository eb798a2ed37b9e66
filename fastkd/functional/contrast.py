"""The losses over one softmax a row: InfoNCE, CKD, supervised contrast and contrast with masked negatives.

All are one operation, ``fastkd::contrast``, which differs in what counts as a positive and as a negative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd import backends, numerics
from fastkd.backends import reference
from fastkd.backends.masks import Mask
from fastkd.distributed.agree import agreeing, eagerly, kind_of
from fastkd.distributed.group import Group, resolve_group
from fastkd.ops.contrast import weighted_sum
from fastkd.validate import (
    POSITIVES,
    Backend,
    Positives,
    check_bool,
    check_choice,
    check_no_tangent,
    check_pair,
    check_positive_index,
    check_query_and_key,
    check_row_labels,
    check_rows,
    check_scale,
    check_student_and_teacher,
    check_temperature,
    check_weight,
    one_scale,
)


@dataclass(frozen=True)
class ContrastInputs:
    """Checked arguments of the operation, in its order; without ``key``, the queries are contrasted with each other."""

    query: Tensor
    key: Tensor | None
    scale: Tensor
    weight: Tensor | None
    normalize: bool
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive_index: Tensor | None = None
    by_label: bool = False


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float | None = None,
    *,
    temperature: Tensor | float | None = None,
    normalize: bool = True,
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""InfoNCE with in-batch negatives: key i is the positive of query i, and all other keys are its negatives.

    .. code-block:: text

        loss = mean_i w_i [-log softmax_j(logit_scale * q_i . k_j)_i]     q, k: L2-normalised rows if ``normalize``

    Source: arXiv 1807.03748, eq. 4, with scaled dot products as the scores.

    Args:
        query, key: [n, D], both in float64, float32, bf16 or fp16.
        logit_scale: the positive multiplier. A float, or a 0-dim tensor that may need a gradient.
        temperature: its inverse, of the same types. One of the two is given.
        normalize: L2-normalise the rows first, so that cosines are compared. Rows no longer than 1e-12 count as the
            zero vector and get no gradient.
        sample_weight, group, backend: as for :func:`dcd_loss`.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise; with several ranks this rank's part, as
        for :func:`dcd_loss`.

    Raises:
        TypeError: an argument has the wrong type or dtype, query and key differ in dtype, or not exactly one of
            ``logit_scale`` and ``temperature`` is given.
        ValueError: shapes or devices do not fit, there are no rows, a number is out of range, or an option is unknown
            or not available here.

    Example:
        >>> import torch
        >>> from fastkd import info_nce_loss
        >>> query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> info_nce_loss(query, key, temperature=0.07).backward()
    """

    def check(may_be_empty: bool) -> ContrastInputs:
        check_pair("query", query, "key", key, "[n, D]", may_be_empty=may_be_empty)
        check_bool("normalize", normalize)
        scale = check_scale(one_scale(logit_scale, temperature, query), query)
        return ContrastInputs(query, key, scale, check_weight(sample_weight, query), normalize)

    process_group = resolve_group(group)
    return eagerly(process_group, _mean)("info_nce_loss", check, process_group, backend)


def ckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""CKD, contrast on logits: the teacher's logits of a sample against the student's logits of all samples.

    .. code-block:: text

        loss = mean_i w_i [-log softmax_j(cos(teacher_i, student_j) / temperature)_i]

    The student's logits of sample i are the positive, and its logits of all other samples are the negatives. The
    authors' recipes weigh this loss with 100 on CIFAR-100 and with 10 on ImageNet, beside cross-entropy with 1.

    Source: arXiv 2404.14109, eq. 5-7.

    Args:
        student_logits, teacher_logits: [B, C] of the same samples, in float64, float32, bf16 or fp16. The teacher's are
            cast to the student's dtype, and get no gradient.
        temperature: divides the cosines; in [1e-4, 1e4].
        sample_weight, group, backend: as for :func:`dcd_loss`.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise; with several ranks this rank's part, as
        for :func:`dcd_loss`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, there are no rows, a number is out of range, or an option is unknown
            or not available here.

    Example:
        >>> import torch
        >>> from fastkd import ckd_loss
        >>> student_logits, teacher_logits = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> ckd_loss(student_logits, teacher_logits).backward()
    """

    def check(may_be_empty: bool) -> ContrastInputs:
        teacher = check_student_and_teacher(
            "student_logits", student_logits, "teacher_logits", teacher_logits, "[B, C]", may_be_empty=may_be_empty
        )
        check_temperature(temperature)
        scale = check_scale(1 / temperature, student_logits)
        weight = check_weight(sample_weight, student_logits)
        return ContrastInputs(teacher.detach(), student_logits, scale, weight, normalize=True)

    process_group = resolve_group(group)
    return eagerly(process_group, _mean)("ckd_loss", check, process_group, backend)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float | None = None,
    *,
    temperature: Tensor | float | None = None,
    exclude_self: bool = True,
    normalize: bool = True,
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Supervised contrast: every row is an anchor, and the rows of its label are its positives.

    .. code-block:: text

        loss = mean_{i: P_i not empty} w_i [logsumexp_{a in A_i} x_ia - mean_{p in P_i} x_ip]
        x_ia = logit_scale * f_i . f_a      A_i: all rows but i      P_i: the rows of A_i with i's label

    Source: arXiv 2004.11362, eq. 2 (``L_out``), without its outer factor of the temperature.

    Args:
        features: [n, D] in float64, float32, bf16 or fp16.
        labels: [n], int64, any values.
        logit_scale: the positive multiplier. A float, or a 0-dim tensor that may need a gradient.
        temperature: its inverse, of the same types. One of the two is given.
        exclude_self: ``False`` counts row i among A_i and P_i.
        normalize: as for :func:`info_nce_loss`. ``False`` is for rows whose lengths carry meaning.
        sample_weight: [n], >= 0, of the anchors. The mean still divides by the number of anchors with a positive.
        group, backend: as for :func:`dcd_loss`.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise. It is zero if no anchor has a positive.
        With several ranks it is this rank's part, as for :func:`dcd_loss`, of the mean over all anchors with a
        positive.

    Raises:
        TypeError: an argument has the wrong type or dtype, or not exactly one of ``logit_scale`` and ``temperature`` is
            given.
        ValueError: shapes or devices do not fit, there are no rows, a number is out of range, or an option is unknown
            or not available here.

    Example:
        >>> import torch
        >>> from fastkd import sup_con_loss
        >>> features, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) % 3
        >>> sup_con_loss(features, labels, temperature=0.1).backward()
    """

    def check(may_be_empty: bool) -> ContrastInputs:
        check_rows("features", features, may_be_empty=may_be_empty)
        check_row_labels("labels", labels, features)
        check_bool("exclude_self", exclude_self)
        check_bool("normalize", normalize)
        scale = check_scale(one_scale(logit_scale, temperature, features), features)
        weight = check_weight(sample_weight, features)
        if exclude_self:
            return ContrastInputs(features, None, scale, weight, normalize, labels, by_label=True)
        return ContrastInputs(features, features, scale, weight, normalize, labels, labels, by_label=True)

    process_group = resolve_group(group)
    return eagerly(process_group, _mean)("sup_con_loss", check, process_group, backend)


def masked_contrast_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float | None = None,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive_index: Tensor | None = None,
    *,
    temperature: Tensor | float | None = None,
    positives: Positives = "index",
    normalize: bool = True,
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""InfoNCE without false negatives: keys of the query's label are no negatives.

    .. code-block:: text

        loss = mean_i w_i [logsumexp_{j in D_i} x_ij - x_i,p(i)]        x_ij = logit_scale * q_i . k_j
        p(i) = positive_index[i]        D_i: the key p(i), and all keys j with key_labels[j] != query_labels[i]

    ``positives="label"`` is another form. All keys of the query's label are positives, the loss is ``logsumexp_j x_ij``
    over all keys less the mean of ``x_ij`` over the positives, and the mean is over the queries that have a positive.

    Source: the sample-wise contrast of MSDCRD, arXiv 2502.05835.

    Args:
        query, key: [n, D] and [N, D], both in float64, float32, bf16 or fp16.
        logit_scale: the positive multiplier. A float, or a 0-dim tensor that may need a gradient.
        temperature: its inverse, of the same types. One of the two is given.
        query_labels, key_labels: [n] and [N], int64, any values. They must be given.
        positive_index: [n], int64, in [0, N): rows of this rank's ``key``. With ``None`` query i's positive is key i,
            and n = N. On CUDA, and under torch.compile, another value makes the loss NaN, because raising would wait
            for the device.
        positives: ``"index"``, or ``"label"``, which takes no ``positive_index``.
        normalize: as for :func:`info_nce_loss`.
        sample_weight: [n], as for :func:`dcd_loss`.
        group, backend: as for :func:`dcd_loss`.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise; with several ranks this rank's part, as
        for :func:`dcd_loss`.

    Raises:
        TypeError: an argument has the wrong type or dtype, query and key differ in dtype, or not exactly one of
            ``logit_scale`` and ``temperature`` is given.
        ValueError: shapes or devices do not fit, there are no rows, an index or a number is out of range, an option is
            unknown or not available here, or ``positive_index`` comes with ``positives="label"``.

    Example:
        >>> import torch
        >>> from fastkd import masked_contrast_loss
        >>> query, key, labels = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), torch.arange(8) % 3
        >>> masked_contrast_loss(query, key, 10.0, labels, labels).backward()
    """

    def check(may_be_empty: bool) -> ContrastInputs:
        check_choice("positives", positives, POSITIVES)
        by_label = positives == "label"
        check_query_and_key(query, key, may_be_empty=may_be_empty)
        check_row_labels("query_labels", query_labels, query)
        check_row_labels("key_labels", key_labels, key)
        check_bool("normalize", normalize)
        scale = check_scale(one_scale(logit_scale, temperature, query), query)
        weight = check_weight(sample_weight, query)
        if by_label and positive_index is not None:
            raise ValueError("positive_index: got a tensor with positives='label', expected None")
        if not by_label:
            weight = check_positive_index(positive_index, query, key, weight)
        return ContrastInputs(query, key, scale, weight, normalize, query_labels, key_labels, positive_index, by_label)

    process_group = resolve_group(group)
    return eagerly(process_group, _mean)("masked_contrast_loss", check, process_group, backend)


def _mean(
    name: str, check: Callable[[bool], ContrastInputs], group: ProcessGroup | None, backend: str | None
) -> Tensor:
    """The loss ``name`` of the inputs that ``check(may_be_empty)`` returns; this rank's part if there are several."""
    with agreeing(group, name) as ranks:
        x = check(ranks.several)
        key = x.query if x.key is None else x.key
        backend = backends.resolve(backend, "contrast", x.query)
        options = {
            **kind_of(x.query),
            "normalize": x.normalize,
            "positives by label": x.by_label,
            "labels": x.query_labels is not None,
            "exclude_self": x.key is None,
        }
        ranks.describe(x.query, options, other=key, scale=x.scale, weight=x.weight, backend=backend)
    if backend == "reference":
        total, positives = _reference(x, key)
        if not x.by_label:
            total = total / x.query.shape[0]
    else:
        check_no_tangent(x.query, key, x.scale)
        total, stats = weighted_sum(
            x.query, x.key, x.scale, x.weight, (x.query_labels, x.key_labels), x.positive_index,
            by_label=x.by_label, normalize=x.normalize, backend=backend,
            factor=1.0 if x.by_label else ranks.part_per_row(x.query.shape[0]), peers=ranks.peers,
        )  # fmt: skip
        positives = stats[1]
    return ranks.mean_over(total, (positives > 0).sum()) if x.by_label else total


def _reference(x: ContrastInputs, key: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum, and the number of positives of every query."""
    mask = Mask(
        query_labels=x.query_labels,
        key_labels=x.query_labels if x.key is None else x.key_labels,
        positive_index=x.positive_index,
        by_label=x.by_label,
        exclude_self=x.key is None,
    )
    with torch.autocast(x.query.device.type, enabled=False):
        rows, positives = reference.contrast(x.query, key, x.scale, x.normalize, mask)
        return numerics.weighted_sum(rows, x.weight), positives
