"""Strong views of images, which MLKD compares with the usual ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastkd.trainer.data.readers.encoded import Normalization

OPERATIONS = 2
LARGEST_SQUARE = 0.5  # of an image's width
GREY = (125 / 255, 123 / 255, 114 / 255)


class _Operation(v2.TrivialAugmentWide):
    """One random operation of a random strength, with the strengths of FixMatch's RandAugment."""

    # name -> (the strengths, whether they have a random sign); a strength of "Brightness" etc. is added to 1.
    _AUGMENTATION_SPACE = {  # noqa: RUF012 (torchvision's has no annotation either)
        **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), (lambda bins, height, width: None, False)),
        **dict.fromkeys(
            ("Brightness", "Color", "Contrast", "Sharpness"),
            (lambda bins, height, width: torch.linspace(-0.95, -0.05, bins), False),
        ),
        "Posterize": (lambda bins, height, width: torch.linspace(4, 8, bins).int(), False),
        "Solarize": (lambda bins, height, width: torch.linspace(0, 1, bins), False),
        "Rotate": (lambda bins, height, width: torch.linspace(0, 30, bins), True),
        **dict.fromkeys(("ShearX", "ShearY"), (lambda bins, height, width: torch.linspace(0, 0.3, bins), True)),
        "TranslateX": (lambda bins, height, width: torch.linspace(0, 0.3 * width, bins), True),
        "TranslateY": (lambda bins, height, width: torch.linspace(0, 0.3 * height, bins), True),
    }


_operation = _Operation()


def strong_views(images: Tensor, normalization: Normalization | None, seeds: Sequence[int]) -> Tensor:
    """The images [B, C, H, W], each changed by two random operations and a grey square.

    These are the strong views of MLKD's public code, which took them from FixMatch. What happens to an image depends on
    its seed alone. Torch's global generator draws it, and is left with another state.

    Images of uint8 give uint8. ``normalization`` says how others are normalised. Without it the darkest and the
    brightest value of an image stand for black and white.

    Raises:
        ValueError: the images are no maps of one or three channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        got = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"objective.mlkd: got images of {got}, expected one or three channels for its strong views")
    if images.dtype == torch.uint8:
        return torch.stack([_strong_view(image, seed) for image, seed in zip(images, seeds, strict=True)])
    if normalization is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        scale = 1 / (high - low).clamp_min(1e-12)
        shift = -low * scale
    else:
        shift, scale = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in normalization)
    pixels = ((images * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    changed = torch.stack([_strong_view(image, seed) for image, seed in zip(pixels, seeds, strict=True)])
    return (changed.to(images.dtype) / 255 - shift) / scale


def _strong_view(image: Tensor, seed: int) -> Tensor:
    """The same of one image [C, H, W] of bytes."""
    torch.default_generator.manual_seed(seed)
    for _ in range(OPERATIONS):
        image = _operation(image)
    channels, height, width = image.shape
    side, x, y = (torch.rand(3) * torch.tensor([LARGEST_SQUARE * width, width, height])).tolist()
    top, left = max(0, round(y - side / 2)), max(0, round(x - side / 2))
    square = image.clone()
    grey = torch.tensor(GREY if channels == 3 else GREY[1:2]).mul(255).to(torch.uint8).view(-1, 1, 1)
    square[:, top : round(y + side / 2), left : round(x + side / 2)] = grey
    return square
