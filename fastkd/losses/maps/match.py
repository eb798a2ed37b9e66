"""Maps of student and teacher brought to one size, and their channels checked."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.inputs import check_layer_input
from fastkd.losses.pairs import Pair
from fastkd.validate import check_int, check_type


def match(student: Tensor, teacher: Tensor) -> Pair:
    """Of two maps [B, C, H, W] the higher one, or the wider of two as high, is averaged to the size of the other."""
    if student.shape[2:] > teacher.shape[2:]:
        return averaged(student, teacher), teacher
    if student.shape[2:] < teacher.shape[2:]:
        return student, averaged(teacher, student)
    return student, teacher


def averaged(x: Tensor, like: Tensor) -> Tensor:
    """The map averaged, by adaptive pooling, to the size of another."""
    return F.adaptive_avg_pool2d(x, (like.shape[2], like.shape[3]))


def level_weights(count: int) -> list[float]:
    """1 for the last of ``count`` maps, and half of the next one's weight for every other."""
    return [2.0 ** (level + 1 - count) for level in range(count)]


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """That a map [B, C, ...] has as many channels as the module was made for."""
    if x.shape[1] != channels:
        raise ValueError(f"{name}: got {x.shape[1]} channels, expected {channels}, as the module was made for")


def check_connected(name: str, x: Tensor, channels: int, layer: nn.Module, *, norms: bool = False) -> None:
    """That ``layer`` can read the map; ``norms``: and a batch norm in training mode what the layer makes of it."""
    check_channels(name, x, channels)
    check_layer_input(name, x, layer)
    if norms and x[:, 0].numel() < 2:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected two values per channel in training mode")


def check_same_grid(student: Tensor, teacher: Tensor, suffix: str = "") -> None:
    """That the student's map, behind its connector, has the teacher's size."""
    if student.shape[2:] != teacher.shape[2:]:
        got = f"a size that the connector takes to {list(student.shape[2:])}"
        raise ValueError(f"student_map{suffix}: got {got}, expected the teacher's {list(teacher.shape[2:])}")


def channel_lists(student_channels: Sequence[int], teacher_channels: Sequence[int]) -> list[tuple[int, int]]:
    """Both numbers of channels of every map, checked."""
    for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
        check_type(name, channels, (list, tuple))
        if len(channels) == 0:
            raise ValueError(f"{name}: got none, expected the number of channels of every map")
        for number in channels:
            check_int(name, number, minimum=1)
    if len(student_channels) != len(teacher_channels):
        raise ValueError(f"teacher_channels: got {len(teacher_channels)} numbers, expected as many as of the student's "
                         f"maps, {len(student_channels)}")  # fmt: skip
    return list(zip(student_channels, teacher_channels, strict=True))
