"""What student and teacher give for the same samples: checked, and in the dtype that a loss is computed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.numerics import accumulation_dtype, unit_rows
from fastkd.validate import check_feature_map, check_pair, check_rows, check_type

Pair = tuple[Tensor, Tensor]


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


def in_loss_dtype(student: Tensor, teacher: Tensor) -> Pair:
    """Both in float64 if one of them is, and in float32 otherwise. The teacher's has no gradient."""
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    return student.to(dtype), teacher.detach().to(dtype)


def logit_pair(student_logits: Tensor, teacher_logits: Tensor, *, may_be_empty: bool = False, classes: int = 1) -> Pair:
    """Logits [B, C] of at least so many classes; with :func:`in_loss_dtype`."""
    names = "student_logits", student_logits, "teacher_logits", teacher_logits
    check_pair(*names, "[B, C]", may_be_empty=may_be_empty, may_differ_in_dtype=True)
    if student_logits.shape[1] < classes:
        raise ValueError(f"student_logits: got shape {list(student_logits.shape)}, expected at least {classes} classes")
    return in_loss_dtype(student_logits, teacher_logits)


def feature_pair(student_features: Tensor, teacher_features: Tensor, *, may_be_empty: bool = False) -> Pair:
    """Features [B, D_s] and [B, D_t]; with :func:`in_loss_dtype`."""
    check_rows("student_features", student_features, "[B, D]", may_be_empty=may_be_empty)
    check_rows("teacher_features", teacher_features, "[B, D]", may_be_empty=may_be_empty)
    _check_same_samples("student_features", student_features, "teacher_features", teacher_features)
    return in_loss_dtype(student_features, teacher_features)


def check_maps(
    student_map: Tensor, teacher_map: Tensor, suffix: str = "", *, may_be_empty: bool = False, channels: bool = False
) -> None:
    """Maps [B, C, H, W] of the same samples; ``suffix`` of their names; ``channels``: as many in both."""
    names = f"student_map{suffix}", f"teacher_map{suffix}"
    for name, features in zip(names, (student_map, teacher_map), strict=True):
        check_feature_map(name, features)
        if len(features) == 0 and not may_be_empty:
            raise ValueError(f"{name}: got shape {list(features.shape)}, expected at least one sample")
    _check_same_samples(names[0], student_map, names[1], teacher_map)
    if channels and student_map.shape[1] != teacher_map.shape[1]:
        expected = f"the channels of {names[0]}, {student_map.shape[1]}"
        raise ValueError(f"{names[1]}: got {teacher_map.shape[1]} channels, expected {expected}")


def check_map_lists(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], count: int | None = None, *, channels: bool = False
) -> None:
    """Two lists of maps, ``count`` or equally many, at least one; see :func:`check_maps`."""
    for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        check_type(name, maps, (list, tuple))
        if len(maps) == 0 or count not in (None, len(maps)):
            raise ValueError(f"{name}: got {len(maps)} maps, expected {'at least one' if count is None else count}")
    if len(student_maps) != len(teacher_maps):
        raise ValueError(f"teacher_maps: got {len(teacher_maps)} maps, expected as many as of the student's, "
                         f"{len(student_maps)}")  # fmt: skip
    for level, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        check_maps(student, teacher, f"s[{level}]", channels=channels)


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` along the last dimension; vectors no longer than 1e-12 give 0, and no gradient."""
    return unit_rows(x.flatten(0, -2))[0].view(x.shape)


def _check_same_samples(name: str, student: Tensor, other_name: str, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"{other_name}: got {len(teacher)} samples, expected those of {name}, {len(student)}")
    if student.device != teacher.device:
        raise ValueError(f"{other_name}: got device {teacher.device}, expected that of {name}, {student.device}")
