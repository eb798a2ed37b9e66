"""Preview-based category contrastive distillation (arXiv 2410.14143)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastkd import backends
from fastkd.backends.reference import cross_entropy, soft_target
from fastkd.distributed.agree import Agreement, agreeing, eagerly
from fastkd.distributed.gather import gather_rows
from fastkd.distributed.group import Group, check_group, resolve_group
from fastkd.functional.contrast import sup_con_loss
from fastkd.functional.kd import kd_loss
from fastkd.functional.preview import weights_by_difficulty
from fastkd.losses.base import LossModule
from fastkd.losses.inputs import Classifier, check_layer_input, check_part_weights, weight_and_bias
from fastkd.losses.pairs import full_precision
from fastkd.numerics import accumulation_dtype, unit_rows
from fastkd.validate import (
    Backend,
    check_int,
    check_labels,
    check_number,
    check_rows,
    check_student_and_teacher,
    check_temperature,
    check_type,
)

MAX_LOG_THRESHOLD = 700.0  # beyond it, exp overflows a float; no sample is that hard


class PCKDLoss(LossModule):
    r"""PCKD: contrast of the samples' relations to the class centres, alignment of centres and features, and KD.

    .. code-block:: text

        r1_i = W_s norm(L1 f_i)     r2_i = W_t norm(L2 f_i)          f: student features; W: the classifiers' weights
        Z = [r1; r2]     x_ab = relation_scale * Z_a . Z_b           2 B anchors, each with the label of its sample
        anchor_a = logsumexp_{b != a} x_ab - mean_{p != a of a's label} x_ap

        category = category_weight * mean_i w_i (anchor_i + anchor_{B + i})
        center   = center_weight   * mean of the squares of [W_s | b_s] - [W_t | b_t]
        feature  = feature_weight  * mean_i (2 - 2 cos(MLP(f_i), teacher feature_i))
        kd       = kd_weight       * mean_i w_i temperature^2 KL(teacher_i || student_i), logits / temperature
        w        = preview_weight(cross-entropy of the student, preview_base^(epoch + first_epoch))

    ``norm`` scales a vector to L2 norm 1. L1 and L2 are linear layers to the widths of the two classifiers. The
    category term is twice :func:`fastkd.sup_con_loss`, because that function's mean is over all 2 B anchors: each has
    at least its counterpart as a positive. The teacher's classifier, features and logits get no gradient. The student's
    classifier gets one.

    Source: arXiv 2410.14143, as in the authors' public code (MuHeDing/PCKD). That code multiplies the category term by
    4 / 0.07 in addition to its weight; here the constant belongs to ``category_weight``. That code differs from the
    defaults in three more places, each an option: ``first_epoch=1, preview_gradient=True, category_eps=1e-7``. Two
    things are our reading. The code fixes no weights (its options default to 0); ours are 1. The form of the MLP is not
    published; ours is two linear layers with a ReLU, ``min(16 * teacher_dim, 4096)`` wide, which is the authors' width
    for teachers of up to 256 features. The MLP has no batch norm, which theirs may have, so that several ranks compute
    what one rank computes.

    All parameters of this module belong in the optimiser, and with several ranks inside the module that
    DistributedDataParallel wraps, as for :class:`fastkd.DCDLoss`. Every term already contains the scaling by W n / N
    that :func:`fastkd.dcd_loss` describes.

    Args:
        student_dim, teacher_dim: widths of the features, which are the input widths of the classifiers.
        temperature: KD divides the logits by it; in [1e-4, 1e4]. The authors' code uses 4.
        relation_scale: multiplies the products of relations; > 0. The authors' code uses 1 / 4.
        category_weight, center_weight, feature_weight, kd_weight: weights of the four parts; >= 0. A part of weight
            zero is left out: it is not computed, it is not among the terms, and it has no parameters.
        preview_base: the preview's threshold is ``preview_base^(epoch + first_epoch)``; > 0. The authors' code uses
            1.005.
        first_epoch: is added to the epoch; an int >= 0. The authors' code counts epochs from 1.
        preview_gradient: let a gradient pass through the weights w of the part ``kd``, as the authors' loop does. With
            it, KD is computed in plain PyTorch, and two numbers per row travel between ranks. The part ``category``
            never passes one.
        category_eps: is added inside the logarithm of the part ``category``, which then is ``max_b x_ab + log(eps +
            sum_{b != a} exp(x_ab - max_b x_ab)) - mean_p x_ap``; in [0, 1]. The authors' code uses 1e-7. Their maximum
            includes ``x_aa``, so that eps may outweigh the sum. With it, every rank gathers all relations and computes
            whole matrices of them.
        hidden_dim: width of the MLP's hidden layer; ``None`` chooses it as above.
        group, backend: see :class:`fastkd.DCDLoss`.

    Raises:
        TypeError, ValueError: a width is not an int >= 1, a number is out of range, all weights are zero, or ``group``
            or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import PCKDLoss, total_loss
        >>> student_fc, teacher_fc = torch.nn.Linear(8, 10), torch.nn.Linear(16, 10)
        >>> f_s, f_t, labels = torch.randn(6, 8), torch.randn(6, 16), torch.arange(6)
        >>> pckd = PCKDLoss(student_dim=8, teacher_dim=16)
        >>> terms = pckd(f_s, f_t, student_fc(f_s), teacher_fc(f_t), labels, student_fc, teacher_fc, epoch=0)
        >>> list(terms)
        ['category', 'feature', 'kd']
        >>> total_loss(terms).backward()
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        temperature: float = 4.0,
        relation_scale: float = 0.25,
        category_weight: float = 1.0,
        center_weight: float = 1.0,
        feature_weight: float = 1.0,
        kd_weight: float = 1.0,
        preview_base: float = 1.005,
        first_epoch: int = 0,
        preview_gradient: bool = False,
        category_eps: float = 0.0,
        hidden_dim: int | None = None,
        group: Group = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = min(16 * teacher_dim, 4096) if hidden_dim is None else hidden_dim
        for name, size in (("student_dim", student_dim), ("teacher_dim", teacher_dim), ("hidden_dim", hidden_dim)):
            check_int(name, size, minimum=1)
        check_temperature(temperature)
        for name, value in (("relation_scale", relation_scale), ("preview_base", preview_base)):
            check_number(name, value, minimum=0, exclusive=True)
        check_int("first_epoch", first_epoch, minimum=0)
        check_type("preview_gradient", preview_gradient, bool)
        check_number("category_eps", category_eps, 0.0, 1.0)
        self.weights = {
            "category": category_weight,
            "center": center_weight,
            "feature": feature_weight,
            "kd": kd_weight,
        }
        check_part_weights(**{f"{name}_weight": value for name, value in self.weights.items()})
        check_group(group)
        backends.check_name(backend)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.temperature = temperature
        self.relation_scale = relation_scale
        self.preview_base = preview_base
        self.first_epoch = first_epoch
        self.preview_gradient = preview_gradient
        self.category_eps = category_eps
        self.group = group
        self.backend = backend
        self.student_head = nn.Linear(student_dim, student_dim) if category_weight > 0 else None
        self.teacher_head = nn.Linear(student_dim, teacher_dim) if category_weight > 0 else None
        self.mlp = (
            nn.Sequential(nn.Linear(student_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, teacher_dim))
            if feature_weight > 0
            else None
        )

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student_classifier: Classifier,
        teacher_classifier: Classifier,
        epoch: float,
    ) -> dict[str, Tensor]:
        """Returns ``category``, ``center``, ``feature`` and ``kd``, 0-dim, weights applied. Their sum is the PCKD loss.

        student_features: [B, student_dim]; teacher_features: [B, teacher_dim]; student_logits, teacher_logits: [B, C];
        labels: [B], int64, in [0, C). student_classifier, teacher_classifier: the layers between features and logits,
        each an nn.Linear or a pair (weight, bias or None). epoch: >= 0; the preview's threshold follows from it.

        ``center`` is absent if the classifiers' weights differ in shape, as they do between models of unequal widths,
        or if only one classifier has a bias. Where no other part has a weight, this raises ValueError. The classifiers
        may have another float dtype than the features.
        """
        arguments = student_features, teacher_features, student_logits, teacher_logits, labels
        group = resolve_group(self.group)
        return eagerly(group, self._forward)(*arguments, student_classifier, teacher_classifier, epoch, group)

    def _forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student_classifier: Classifier,
        teacher_classifier: Classifier,
        epoch: float,
        group: ProcessGroup | None,
    ) -> dict[str, Tensor]:
        with agreeing(group, "PCKDLoss") as ranks:
            logits = "student_logits", student_logits, "teacher_logits", teacher_logits
            teacher_logits = check_student_and_teacher(*logits, "[B, C]", may_be_empty=ranks.several)
            check_labels(labels, student_logits)
            check_number("epoch", epoch, minimum=0)
            self._check_features("student_features", student_features, self.student_dim, student_logits)
            for layer in (self.student_head, self.mlp and self.mlp[0]):
                if layer is not None:
                    check_layer_input("student_features", student_features, layer)
            self._check_features("teacher_features", teacher_features, self.teacher_dim, student_logits)
            classes = student_logits.shape[1]
            student = weight_and_bias("student_classifier", student_classifier, student_features, classes)
            teacher = weight_and_bias("teacher_classifier", teacher_classifier, teacher_features, classes)
            has_center = self._has_center(student, teacher)
            if not has_center and not any(weight > 0 for name, weight in self.weights.items() if name != "center"):
                raise ValueError(
                    f"student_classifier: got {_form(student)}, expected that of the teacher's, {_form(teacher)}: "
                    "center is the only part with a weight"
                )
            if ranks.several:
                options = {"epoch": epoch, "module": self.extra_repr(), "center": has_center}
                ranks.describe(student_logits, {"dtype": student_logits.dtype, **options})
        per_sample = ranks.part_per_row(len(student_logits))
        threshold = self._threshold(epoch)
        with torch.no_grad():
            ce = cross_entropy(student_logits, labels)
            preview = weights_by_difficulty(ce, ranks.mean_of_all(ce), threshold)
        terms = {}
        if self.student_head is not None and self.teacher_head is not None:
            own = _relations(self.student_head, student_features, student[0])
            other = _relations(self.teacher_head, student_features, teacher[0].detach())
            if self.category_eps > 0:
                own, other, y, w = (_all_rows(x, ranks) for x in (own, other.to(own.dtype), labels, preview))
                terms["category"] = _category_with_eps(own, other, y, w, self.relation_scale, self.category_eps)
            else:
                terms["category"] = 2 * sup_con_loss(
                    torch.cat([own, other.to(own.dtype)]),
                    torch.cat([labels, labels]),
                    self.relation_scale,
                    normalize=False,  # the lengths of relations carry meaning
                    sample_weight=torch.cat([preview, preview]),
                    group=self.group,
                    backend=self.backend,
                )
        if has_center:
            terms["center"] = _mean_square(student, teacher)
        if self.mlp is not None:
            terms["feature"] = per_sample * _cosine_distances(self.mlp(student_features), teacher_features).sum()
        if self.weights["kd"] > 0 and self.preview_gradient:
            with full_precision(student_logits):
                kd = soft_target(student_logits, teacher_logits.detach(), self.temperature)
                both = torch.stack([cross_entropy(student_logits, labels), kd], dim=1)
                ce, kd = _all_rows(both, ranks).unbind(dim=1)
                terms["kd"] = (weights_by_difficulty(ce, ce.mean(), threshold) * kd).mean()
        elif self.weights["kd"] > 0:
            terms["kd"] = per_sample * self._kd_sum(student_logits, teacher_logits, preview)
        return {name: self.weights[name] * term for name, term in terms.items()}

    def _check_features(self, name: str, features: Tensor, width: int, logits: Tensor) -> None:
        check_rows(name, features, "[B, D]", may_be_empty=True)
        if features.shape != (len(logits), width):
            raise ValueError(f"{name}: got shape {list(features.shape)}, expected [{len(logits)}, {width}]")
        if features.device != logits.device:
            raise ValueError(f"{name}: got device {features.device}, expected that of the logits, {logits.device}")

    def _has_center(self, student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]) -> bool:
        """Whether the centre term is wanted, and the two classifiers' [weight | bias] can be compared."""
        has_bias = [bias is not None for _, bias in (student, teacher)]
        return self.weights["center"] > 0 and student[0].shape == teacher[0].shape and has_bias[0] == has_bias[1]

    def _threshold(self, epoch: float) -> float:
        epoch = epoch + self.first_epoch
        is_finite = epoch * math.log(self.preview_base) < MAX_LOG_THRESHOLD
        return self.preview_base**epoch if is_finite else math.inf

    def _kd_sum(self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor) -> Tensor:
        n = len(student_logits)
        if n == 0:
            return student_logits.sum().to(weight.dtype)
        return n * kd_loss(student_logits, teacher_logits, self.temperature, sample_weight=weight, backend=self.backend)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}_weight={value}" for name, value in self.weights.items())
        options = (
            f"temperature={self.temperature}, relation_scale={self.relation_scale}, preview_base={self.preview_base}, "
            f"first_epoch={self.first_epoch}, preview_gradient={self.preview_gradient}, "
            f"category_eps={self.category_eps}"
        )
        return f"{self.student_dim}, {self.teacher_dim}, {options}, {weights}"


def _relations(head: nn.Linear, features: Tensor, centers: Tensor) -> Tensor:
    """``W norm(L f)``, [B, C]. The norm is taken in the accumulation dtype."""
    projected = head(features)
    units = unit_rows(projected.to(accumulation_dtype(projected.dtype)))[0]
    return F.linear(units.to(centers.dtype), centers)


def _all_rows(x: Tensor, ranks: Agreement) -> Tensor:
    return x if ranks.peers is None else gather_rows(x, ranks.peers)


def _category_with_eps(own: Tensor, other: Tensor, labels: Tensor, weight: Tensor, scale: float, eps: float) -> Tensor:
    """The part ``category`` with ``eps`` inside its logarithm, of the relations [N, C] of all ranks."""
    with full_precision(own):
        Z = torch.cat([own, other]).to(accumulation_dtype(own.dtype))
        x = scale * (Z @ Z.T)  # [2N, 2N]
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        peak = x.detach().amax(dim=1)
        total = (x - peak[:, None]).exp().masked_fill(itself, 0).sum(dim=1)
        positive = (labels[:, None] == labels).repeat(2, 2) & ~itself
        mean = x.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
        return (weight.repeat(2) * (peak + (total + eps).log() - mean)).sum() / len(own)


def _cosine_distances(x: Tensor, teacher: Tensor) -> Tensor:
    """``2 - 2 cos`` of the rows, [B]."""
    dtype = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(teacher.dtype))
    return 2 - 2 * (unit_rows(x.to(dtype))[0] * unit_rows(teacher.detach().to(dtype))[0]).sum(dim=1)


def _form(classifier: tuple[Tensor, Tensor | None]) -> str:
    return f"{list(classifier[0].shape)} {'without' if classifier[1] is None else 'with'} a bias"


def _mean_square(student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]) -> Tensor:
    total, count = None, 0
    for own, other in zip(student, teacher, strict=True):
        if own is not None and other is not None:
            difference = own.to(accumulation_dtype(own.dtype)) - other.detach()
            square = difference.square().sum()
            total, count = square if total is None else total + square, count + difference.numel()
    assert total is not None
    return total / count
