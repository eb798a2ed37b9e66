"""Contrastive representation distillation of multi-scale local features (arXiv 2502.05835)."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastkd import backends
from fastkd.distributed.agree import Agreement, agreeing, eagerly
from fastkd.distributed.group import Group, check_group, resolve_group
from fastkd.functional.contrast import masked_contrast_loss
from fastkd.functional.pool import multiscale_pool
from fastkd.losses.base import LossModule
from fastkd.losses.inputs import Classifier, check_layer_input, check_part_weights, weight_and_bias
from fastkd.numerics import NORM_EPS, accumulation_dtype
from fastkd.validate import (
    POSITIVES,
    Backend,
    Positives,
    check_choice,
    check_feature_map,
    check_int,
    check_number,
    check_row_labels,
    check_sides,
    check_temperature,
    check_type,
    check_windows,
)

Selection = Literal["all", "confident", "teacher_class", "image_class", "one_per_class"]
MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens that are looked for in front of a square grid


class MSDCRDLoss(LossModule):
    r"""MSDCRD: contrast of local samples of the feature maps at several scales, by sample and by channel.

    .. code-block:: text

        s, t = the averages of every window of every scale of the two maps, [B * M, C]      one row a local sample
        label_r = argmax(teacher_classifier(t_r))

        sample  = mean_r -log( exp(x_rr) / (exp(x_rr) + sum_{k: label_k != label_r} exp(x_rk)) )
                  x_rk = cos(s_r, t_k) / temperature
        feature = mean_c -log softmax_d(cos(s^c, t^d) / temperature)_c          s^c: channel c of all local samples

    A 1x1 convolution brings the student's map to the teacher's number of channels where they differ. Adaptive average
    pooling brings it to the teacher's grid. The teacher's map and classifier get no gradient. The sample term is
    :func:`fastkd.masked_contrast_loss`, in which a region of the same class is no negative. The feature term needs only
    the products of the channels, [C, C], and their norms, so no sample travels between ranks. Channels no longer than
    1e-12 count as zero.

    Source: arXiv 2502.05835, version 3 (version 2 has one contrastive loss, and says "sample categorization" where
    version 3 says "sample selection"). From the paper: the multi-scale sliding-window pooling, the selection of local
    samples by their category, the sample-wise and the feature-wise contrast within one batch, without a memory of
    samples. Our reading: the scales and strides, the temperature, that the teacher's own classifier categorizes, the
    channels' vectors, equal weights. Which samples the paper selects is not known to us: ``selection`` offers
    candidates.

    All parameters of this module belong in the optimiser, and with several ranks inside the module that
    DistributedDataParallel wraps, as for :class:`fastkd.DCDLoss`. Samples and channels then span all ranks: the average
    of each term over the ranks is the term of the global batch, and the average of its gradients is the global
    gradient.

    Args:
        student_channels, teacher_channels: numbers of channels of the maps (widths of the tokens).
        windows: the scales, each the side of a square window, or None for the whole map. The default is the whole map,
            half of its side and a quarter of it, rounded up: 7, 4, 2 for a side of 7, and 14, 7, 4 for 14.
        strides: the distance of the windows, per scale. The default is half of the window.
        temperature: divides the cosines; in [1e-4, 1e4].
        positives: ``"index"`` is the formula above. With ``"label"`` all teacher samples of the label are positives,
            their mean is taken, and the denominator is over all samples.
        selection: which local samples take part in both terms, as queries and as negatives. ``"all"``: each.
            ``"confident"``: those to whose class the teacher's classifier gives a probability of ``confidence`` or
            more. ``"teacher_class"``: those whose class is the one that it gives the average of the whole map.
            ``"image_class"``: those whose class is the image's label. ``"one_per_class"``: of every class that an image
            has samples of, the one with the highest probability. Where no rank has a sample left, the terms are zero.
            Anything but ``"all"`` waits for the device, and does not compile without a graph break.
        confidence: for ``"confident"``; in [0, 1].
        sample_term_weight, feature_weight: weights of the terms ``sample`` and ``feature``; >= 0. A term of weight zero
            is left out.
        student_prefix_tokens, teacher_prefix_tokens: how many tokens stand before the grid's (class, registers) and are
            dropped. The default is the smallest number that leaves a square grid.
        group, backend: see :class:`fastkd.DCDLoss`.

    Raises:
        TypeError, ValueError: a number is out of range, both weights are zero, or ``positives``, ``group`` or
            ``backend`` is unknown. That windows fit the map is checked in the forward.

    Example:
        >>> import torch
        >>> from fastkd import MSDCRDLoss, total_loss
        >>> student_map = torch.randn(4, 8, 7, 7, requires_grad=True)
        >>> teacher_map, teacher_fc = torch.randn(4, 16, 7, 7), torch.nn.Linear(16, 10)
        >>> terms = MSDCRDLoss(student_channels=8, teacher_channels=16)(student_map, teacher_map, teacher_fc)
        >>> list(terms)
        ['sample', 'feature']
        >>> total_loss(terms).backward()
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        windows: Sequence[int | None] | None = None,
        strides: Sequence[int] | None = None,
        temperature: float = 0.1,
        positives: Positives = "index",
        selection: Selection = "all",
        confidence: float = 0.5,
        sample_term_weight: float = 1.0,
        feature_weight: float = 1.0,
        student_prefix_tokens: int | None = None,
        teacher_prefix_tokens: int | None = None,
        group: Group = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check_int("student_channels", student_channels, minimum=1)
        check_int("teacher_channels", teacher_channels, minimum=1)
        check_temperature(temperature)
        check_choice("positives", positives, POSITIVES)
        check_choice("selection", selection, get_args(Selection))
        check_number("confidence", confidence, 0.0, 1.0)
        check_part_weights(sample_term_weight=sample_term_weight, feature_weight=feature_weight)
        self.weights = {"sample": sample_term_weight, "feature": feature_weight}
        for name, tokens in (("student", student_prefix_tokens), ("teacher", teacher_prefix_tokens)):
            if tokens is not None:
                check_int(f"{name}_prefix_tokens", tokens, minimum=0)
        for name, sides in (("windows", windows), ("strides", strides)):
            if sides is not None:
                check_type(name, sides, Sequence)
            for side in sides or ():
                if side is not None or name == "strides":
                    check_int(name, side, minimum=1)
        check_group(group)
        backends.check_name(backend)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.windows = None if windows is None else tuple(windows)
        self.strides = None if strides is None else tuple(strides)
        self.temperature = temperature
        self.positives = positives
        self.selection = selection
        self.confidence = confidence
        self.student_prefix_tokens = student_prefix_tokens
        self.teacher_prefix_tokens = teacher_prefix_tokens
        self.group = group
        self.backend = backend
        differ = student_channels != teacher_channels
        self.adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=1) if differ else None

    def forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        teacher_classifier: Classifier | Callable[[Tensor], Tensor],
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms ``sample`` and ``feature``, 0-dim, weights applied. Their sum is the MSDCRD loss.

        student_map, teacher_map: [B, C, H, W] or tokens [B, L, C]; one may be a map and the other tokens, and their
        dtypes may differ. teacher_classifier: an nn.Linear, or a pair (weight [classes, teacher_channels], bias or
        None), or any function of the samples [B * M, teacher_channels] that returns their logits, for a teacher with
        further layers between pooling and classes. A layer or a pair computes in its own float dtype, under autocast
        too. A function is called under the caller's autocast. labels: [B], int64, the images' classes; they are read by
        ``selection="image_class"`` alone, which needs them.
        """
        group = resolve_group(self.group)
        return eagerly(group, self._forward)(student_map, teacher_map, teacher_classifier, labels, group)

    def _forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        teacher_classifier: Classifier | Callable[[Tensor], Tensor],
        labels: Tensor | None,
        group: ProcessGroup | None,
    ) -> dict[str, Tensor]:
        with agreeing(group, "MSDCRDLoss") as ranks:
            student = _as_grid("student", student_map, self.student_channels, self.student_prefix_tokens)
            teacher = _as_grid("teacher", teacher_map, self.teacher_channels, self.teacher_prefix_tokens).detach()
            if len(student) != len(teacher):
                raise ValueError(
                    f"teacher_map: got {len(teacher)} samples, expected those of student_map, {len(student)}"
                )
            if student.device != teacher.device:
                raise ValueError(f"teacher_map: got device {teacher.device}, expected {student.device}")
            if len(student) == 0 and not ranks.several:
                raise ValueError(f"student_map: got shape {list(student_map.shape)}, expected at least one sample")
            if self.adapter is not None:
                check_layer_input("student_map", student, self.adapter)
            if isinstance(teacher_classifier, nn.Linear) or not callable(teacher_classifier):
                weight_and_bias("teacher_classifier", teacher_classifier, teacher)
            if self.selection == "image_class":
                check_row_labels("labels", labels, student)
            windows, strides = self.scales(teacher.shape[2], teacher.shape[3])
            check_windows(check_sides("windows", windows), check_sides("strides", strides), teacher)
            if ranks.several:
                dtypes = (student.dtype, teacher.dtype)
                options = {"grid": tuple(teacher.shape[2:]), "dtypes": dtypes, "module": self.extra_repr()}
                ranks.describe(student_map, options)
        if self.adapter is not None:
            student = self.adapter(student)
        height, width = teacher.shape[2:]
        if student.shape[2:] != teacher.shape[2:]:
            student = F.adaptive_avg_pool2d(student, (height, width))
        windows, strides = self.scales(height, width)
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        s, t = (
            multiscale_pool(x, windows, strides, dtype=dtype, backend=self.backend).flatten(0, 1)
            for x in (student, teacher)
        )
        terms = {}
        categories: Tensor | None = None
        if self.selection != "all":
            logits = self._classify(t, teacher_classifier)
            if self.selection == "teacher_class":
                labels = self._classify(teacher.mean(dim=(2, 3)), teacher_classifier).argmax(dim=1)
            chosen = self._chosen(logits, len(teacher), labels)
            s, t, categories = s[chosen], t[chosen], logits.argmax(dim=1)[chosen]
            if int(ranks.sum(chosen.sum())) == 0:
                nothing = 0 * student.sum().to(accumulation_dtype(student.dtype))
                return {name: nothing for name, weight in self.weights.items() if weight > 0}
        if self.weights["sample"] > 0:
            if categories is None:
                categories = self._classify(t, teacher_classifier).argmax(dim=1)
            terms["sample"] = masked_contrast_loss(
                s,
                t,
                1 / self.temperature,
                categories,
                categories,
                positives=self.positives,
                group=self.group,
                backend=self.backend,
            )
        if self.weights["feature"] > 0:
            terms["feature"] = _channel_contrast(s, t, 1 / self.temperature, ranks)
        return {name: self.weights[name] * term for name, term in terms.items()}

    def scales(self, height: int, width: int) -> tuple[list[int | tuple[int, int]], list[int]]:
        """The windows of a map of this grid, with the whole map for None, and their strides."""
        side = min(height, width)
        windows: Sequence[int | None]
        if self.windows is not None:
            windows = self.windows
        else:  # a scale once, also on a grid as small as 2 x 2
            windows = [None, *dict.fromkeys(part for part in (-(-side // 2), -(-side // 4)) if part < side)]
        halves = [1 if window is None else max(1, window // 2) for window in windows]
        filled = [(height, width) if window is None else window for window in windows]
        return filled, halves if self.strides is None else list(self.strides)

    @torch.no_grad()
    def _classify(self, samples: Tensor, classifier: Classifier | Callable[[Tensor], Tensor]) -> Tensor:
        """The logits that the teacher's classifier gives each of its local samples, [samples, classes]."""
        if isinstance(classifier, nn.Linear) or not callable(classifier):
            weight, bias = weight_and_bias("teacher_classifier", classifier, samples)
            with torch.autocast(samples.device.type, enabled=False):  # a rounded tie would be another class
                return F.linear(samples.to(weight.dtype), weight, bias)
        return classifier(samples)

    def _chosen(self, logits: Tensor, images: int, labels: Tensor | None) -> Tensor:
        """Whether each local sample takes part, [images * M]. ``labels``: the classes that the samples must have."""
        category = logits.argmax(dim=1)
        probability = logits.to(accumulation_dtype(logits.dtype)).softmax(dim=1).amax(dim=1)
        if self.selection == "confident":
            return probability >= self.confidence
        per_image = len(logits) // max(images, 1)
        if self.selection != "one_per_class":
            assert labels is not None
            return category == labels.repeat_interleave(per_image)
        row = torch.arange(len(logits), device=logits.device)
        # Sorted by image and class, then by falling probability: a sample is chosen where another class begins.
        order = probability.argsort(descending=True, stable=True)
        group = row // max(per_image, 1) * logits.shape[1] + category
        order = order[group[order].argsort(stable=True)]
        begins = torch.ones_like(row, dtype=torch.bool)
        begins[1:] = group[order][1:] != group[order][:-1]
        return torch.zeros_like(begins).index_put_((order,), begins)

    def extra_repr(self) -> str:
        return (
            f"{self.student_channels}, {self.teacher_channels}, windows={self.windows}, strides={self.strides}, "
            f"temperature={self.temperature}, positives={self.positives!r}, selection={self.selection!r}, "
            f"confidence={self.confidence}, "
            f"sample_term_weight={self.weights['sample']}, feature_weight={self.weights['feature']}"
        )


def _as_grid(whose: str, x: Tensor, channels: int, prefix_tokens: int | None) -> Tensor:
    """The map [B, C, H, W]. Tokens [B, L, C] become a view of their square grid, without the prefix tokens."""
    name = f"{whose}_map"
    if isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == channels:
        count = operator.index(x.shape[1])  # a number under torch.compile too: it has no square root of a symbol
        prefixes = range(MAX_PREFIX_TOKENS + 1) if prefix_tokens is None else (prefix_tokens,)
        square = [k for k in prefixes if k < count and math.isqrt(count - k) ** 2 == count - k]
        if not square:
            expected = f"at most {MAX_PREFIX_TOKENS}" if prefix_tokens is None else prefix_tokens
            raise ValueError(
                f"{name}: got {count} tokens, expected a square number after {expected} prefix tokens; "
                f"see {whose}_prefix_tokens"
            )
        side = math.isqrt(count - square[0])
        x = x[:, square[0] :].transpose(1, 2).unflatten(2, (side, side))
    elif isinstance(x, Tensor) and (x.ndim != 4 or x.shape[1] != channels):
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, expected [B, {channels}, H, W] or tokens [B, L, {channels}]"
        )
    check_feature_map(name, x)
    return x


def _channel_contrast(s: Tensor, t: Tensor, scale: float, ranks: Agreement) -> Tensor:
    """InfoNCE of the channels of s against the channels of t, over the samples of all ``ranks``; s, t: [samples, C]."""
    dtype = accumulation_dtype(s.dtype)
    with torch.autocast(s.device.type, enabled=False):
        s, t = s.to(dtype), t.to(dtype)
        largest = ranks.largest(torch.stack([_largest(x) for x in (s, t)]))
        # Divided before squaring, as in numerics.unit_rows: the square of 1e20 overflows float32.
        largest = largest.clamp_min(torch.finfo(dtype).tiny)
        s, t = s / largest[0], t / largest[1]
        norms = [torch.linalg.vector_norm(x, dim=0) for x in (s, t)]
        sums = ranks.sum(torch.cat([s.T @ t, torch.stack(norms).square()]))
        squares = sums[-2:]
        is_zero = largest * squares.detach().sqrt() <= NORM_EPS
        inverse_s, inverse_t = squares.masked_fill(is_zero, 1).rsqrt().masked_fill(is_zero, 0)
        cosines = sums[:-2] * inverse_s[:, None] * inverse_t
        return F.cross_entropy(scale * cosines, torch.arange(len(cosines), device=s.device))


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of every column, [C]; zero without rows."""
    return torch.linalg.vector_norm(x.detach(), torch.inf, dim=0) if len(x) > 0 else x.new_zeros(x.shape[1])
