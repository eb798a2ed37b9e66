"""FitNet's regressor, which other methods use as well."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.validate import check_int, check_type

Shape = Sequence[int]


class Regressor(nn.Module):
    """A convolution with bias from the student's map to the teacher's shape, batch norm, and perhaps ReLU.

    The kernel follows from the heights: 1x1 where they are equal, 3x3 of stride 2 where the student's is twice the
    teacher's, transposed 4x4 of stride 2 where it is half of it, else a valid kernel if the student's is larger.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, relu: bool) -> None:
        super().__init__()
        (C_s, H_s, _), (C_t, H_t, _) = student_shape, teacher_shape
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if H_s == H_t:
            self.conv = nn.Conv2d(C_s, C_t, kernel_size=1)
        elif H_s == 2 * H_t:
            self.conv = nn.Conv2d(C_s, C_t, kernel_size=3, stride=2, padding=1)
        elif 2 * H_s == H_t:
            self.conv = nn.ConvTranspose2d(C_s, C_t, kernel_size=4, stride=2, padding=1)
        elif H_s > H_t:
            self.conv = nn.Conv2d(C_s, C_t, kernel_size=1 + H_s - H_t)
        else:
            raise ValueError(f"student_shape: got height {H_s}, expected at least the teacher's {H_t}, or half of it")
        self.bn = nn.BatchNorm2d(C_t)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn(self.conv(x)))
        return out


def check_shape(name: str, shape: Shape) -> None:
    """The shape (C, H, W) of a map."""
    check_type(name, shape, (list, tuple))
    if len(shape) != 3:
        raise ValueError(f"{name}: got {tuple(shape)}, expected (channels, height, width)")
    for side in shape:
        check_int(name, side, minimum=1)
