"""Contrastive representation distillation of multi-scale local features (arXiv 2502.05835)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import backends
from fastkd.backends.reference import NORM_EPS, accumulation_dtype
from fastkd.contrastive import POSITIVES, info_nce_loss, masked_contrast_loss
from fastkd.distributed import Group, Peers, check_group, resolve_group
from fastkd.losses.classifier import Classifier, weight_and_bias
from fastkd.validate import check_choice, check_int, check_number

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens that are looked for in front of a square grid


class MSDCRDLoss(nn.Module):
    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        windows: Sequence[int | None] | None = None,
        strides: Sequence[int] | None = None,
        temperature: float = 0.1,
        positives: str = "index",
        sample_weight: float = 1.0,
        feature_weight: float = 1.0,
        student_prefix_tokens: int | None = None,
        teacher_prefix_tokens: int | None = None,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.windows = None if windows is None else tuple(windows)
        self.strides = None if strides is None else tuple(strides)
        self.temperature = temperature
        self.positives = positives
        self.weights = {"sample": sample_weight, "feature": feature_weight}
        self.student_prefix_tokens = student_prefix_tokens
        self.teacher_prefix_tokens = teacher_prefix_tokens
        self.group = group
        self.backend = backend
        differ = student_channels != teacher_channels
        self.adapter = nn.Conv2d(student_channels, teacher_channels, 1) if differ else nn.Identity()

    def forward(self, student_map: Tensor, teacher_map: Tensor, teacher_classifier: Classifier) -> dict[str, Tensor]:
        from fastkd.pooling import multiscale_pool

        student = as_grid("student_map", student_map, self.student_channels, self.student_prefix_tokens)
        teacher = as_grid("teacher_map", teacher_map, self.teacher_channels, self.teacher_prefix_tokens).detach()
        student = self.adapter(student)
        if student.shape[2:] != teacher.shape[2:]:
            student = F.adaptive_avg_pool2d(student, teacher.shape[2:])
        windows, strides = scales(teacher.shape[2:], self.windows, self.strides)
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        s, t = (
            multiscale_pool(x, windows, strides, backend=self.backend, dtype=dtype).flatten(0, 1)
            for x in (student, teacher)
        )
        weight, bias = weight_and_bias("teacher_classifier", teacher_classifier, self.teacher_channels)
        with torch.no_grad():
            labels = F.linear(t.to(weight.dtype), weight, bias).argmax(dim=1)
        sample = masked_contrast_loss(
            s, t, 1 / self.temperature, labels, labels, positives=self.positives, group=self.group, backend=self.backend
        )
        feature = info_nce_loss(s.T, t.T, 1 / self.temperature, group="local", backend=self.backend)
        return {"sample": self.weights["sample"] * sample, "feature": self.weights["feature"] * feature}


def as_grid(name: str, x: Tensor, channels: int, prefix_tokens: int | None) -> Tensor:
    if x.ndim == 4:
        return x
    k = prefix_tokens
    if k is None:
        k = next(k for k in range(MAX_PREFIX_TOKENS + 1) if math.isqrt(x.shape[1] - k) ** 2 == x.shape[1] - k)
    side = math.isqrt(x.shape[1] - k)
    return x[:, k:].transpose(1, 2).unflatten(2, (side, side))


def scales(
    grid: Sequence[int], windows: Sequence[int | None] | None, strides: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    side = min(grid)
    if windows is None:
        windows = [None, -(-side // 2), -(-side // 4)]
    sizes = [side if window is None else window for window in windows]
    return sizes, list(strides) if strides is not None else [max(1, size // 2) for size in sizes]
