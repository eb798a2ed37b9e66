"""Factor transfer (arXiv 1802.04977)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.maps.at import attention
from fastkd.losses.maps.match import check_connected, match
from fastkd.losses.pairs import check_maps, in_loss_dtype, unit
from fastkd.validate import check_choice, check_feature_map, check_int, check_number, check_type

Reading = Literal["attention", "factors"]
Distance = Literal["mse", "l1"]


class Paraphraser(LossModule):
    r"""The first stage of FT: an autoencoder of the teacher's last maps, whose code is the factor.

    .. code-block:: text

        factor         = three 3x3 convolutions, C -> C -> rate * C -> rate * C, each with LeakyReLU(0.1)
        reconstruction = mean (decoder(factor) - F^t)^2                     decoder: the mirror, transposed convolutions

    The public code trains it for 30 epochs. ``distance="l1"`` is the mean of the magnitudes, which is the authors'
    code; ``"mse"`` is RepDistiller's and the paper's, and the default. Afterwards :class:`fastkd.losses.FTLoss` takes
    it.

    Source: arXiv 1802.04977.

    Args:
        teacher_channels: C.
        rate: of the factor's channels to the map's; > 0.
        distance: see above.

    Raises:
        TypeError, ValueError: a number is out of range, or ``distance`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import Paraphraser
        >>> terms = Paraphraser(teacher_channels=16)(torch.randn(4, 16, 8, 8))
        >>> terms["reconstruction"].backward()
    """

    def __init__(self, teacher_channels: int, rate: float = 0.5, distance: Distance = "mse") -> None:
        super().__init__()
        check_int("teacher_channels", teacher_channels, minimum=1)
        check_number("rate", rate, minimum=0, exclusive=True)
        check_choice("distance", distance, get_args(Distance))
        self.channels, self.distance = teacher_channels, distance
        self.factor_channels = max(1, int(teacher_channels * rate))
        C, factor = self.channels, self.factor_channels
        self.encoder = _stack([(C, C), (C, factor), (factor, factor)], nn.Conv2d)
        self.decoder = _stack([(factor, factor), (factor, C), (C, C)], nn.ConvTranspose2d)

    def forward(self, teacher_map: Tensor) -> dict[str, Tensor]:
        """Returns ``{"reconstruction": loss}``, 0-dim. teacher_map: [B, C, H, W], in the dtype of the parameters."""
        check_feature_map("teacher_map", teacher_map)
        check_connected("teacher_map", teacher_map, self.channels, self.encoder[0])
        pair = in_loss_dtype(self.decoder(self.encoder(teacher_map)), teacher_map)
        return {"reconstruction": F.mse_loss(*pair) if self.distance == "mse" else F.l1_loss(*pair)}


class FTLoss(LossModule):
    r"""FT: the student's last map, translated, is the teacher's, paraphrased.

    .. code-block:: text

        f^t = paraphraser(F^t)     f^s = translator(F^s)               the translator is an encoder as the paraphraser's

        reading="attention":  Q  = flatten(mean over the channels of f^2), divided by its norm
        reading="factors":    Q  = flatten(f), divided by its norm
        ft = mean |Q^s - Q^t|                                                                      over all entries

    ``"attention"`` is RepDistiller's (weight 200), whose translator has batch norms, and the default. ``"factors"`` is
    the paper's and the authors' (weight 500), without batch norms. They are two losses, not one at two scales. Of two
    factors the higher one is averaged to the size of the other.

    The paraphraser is trained before; this module switches its gradients off. Its other parameters belong in the
    optimiser. With several ranks the mean is over the rows of this rank.

    Source: arXiv 1802.04977.

    Args:
        student_channels: of the student's last map.
        paraphraser: of the teacher's last map.
        reading: see above.

    Raises:
        TypeError, ValueError: ``student_channels`` is not an int >= 1, ``paraphraser`` is none, or ``reading`` is
            unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import FTLoss, Paraphraser
        >>> ft = FTLoss(student_channels=8, paraphraser=Paraphraser(teacher_channels=16))
        >>> terms = ft(torch.randn(4, 8, 8, 8, requires_grad=True), torch.randn(4, 16, 8, 8))
        >>> (200 * terms["ft"]).backward()
    """

    def __init__(self, student_channels: int, paraphraser: Paraphraser, reading: Reading = "attention") -> None:
        super().__init__()
        check_int("student_channels", student_channels, minimum=1)
        check_type("paraphraser", paraphraser, Paraphraser)
        check_choice("reading", reading, get_args(Reading))
        self.channels, self.reading = student_channels, reading
        self.paraphraser = paraphraser.requires_grad_(False)
        C, factor = student_channels, paraphraser.factor_channels
        widths = [(C, C), (C, factor), (factor, factor)]
        self.translator = _stack(widths, nn.Conv2d, norm=reading == "attention")

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Returns ``{"ft": loss}``, 0-dim. The teacher gets no gradient.

        student_map: [B, student_channels, H, W]. teacher_map: [B, teacher_channels, H', W']. Both in the dtype of the
        parameters unless autocast is on.
        """
        check_maps(student_map, teacher_map)
        norms = self.training and self.reading == "attention"
        check_connected("student_map", student_map, self.channels, self.translator[0], norms=norms)
        check_connected("teacher_map", teacher_map, self.paraphraser.channels, self.paraphraser.encoder[0])
        with torch.no_grad():
            teacher = self.paraphraser.encoder(teacher_map)
        factors = match(*in_loss_dtype(self.translator(student_map), teacher))
        student, teacher = (attention(f) if self.reading == "attention" else unit(f.flatten(1)) for f in factors)
        return {"ft": F.l1_loss(student, teacher)}

    def extra_repr(self) -> str:
        return f"reading={self.reading!r}"


def _stack(
    widths: list[tuple[int, int]], layer: type[nn.Conv2d] | type[nn.ConvTranspose2d], norm: bool = False
) -> nn.Sequential:
    """3x3 convolutions that keep the size, each with LeakyReLU; ``norm``: with batch norm before it."""
    parts: list[nn.Module] = []
    for C_in, C_out in widths:
        parts += [layer(C_in, C_out, kernel_size=3, padding=1), nn.BatchNorm2d(C_out) if norm else nn.Identity()]
        parts += [nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)
