"""Samples regions and anchors with a random number of each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler, which draws with a generator of its own for every image once it has ``seeds``.

    What is sampled of an image then depends on its seed alone. It depends neither on the other images of the batch nor
    on what was drawn before. So it is the same on every number of ranks and in a resumed run. Without seeds it draws as
    torchvision does.

    Args:
        batch_size_per_image: how many are sampled of each image.
        positive_fraction: at most this part of them are positive.
        salt: added to the seeds, so that two samplers draw different numbers.

    Example:
        >>> sampler = SeededSampler(2, 0.5)
        >>> sampler.seeds = [7]
        >>> positive, negative = sampler([torch.tensor([1, 1, 0, 0, -1])])  # -1: neither
        >>> int(positive[0].sum()), int(negative[0].sum())
        (1, 1)
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int = 0) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.salt = salt
        self.seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The masks of the sampled positives and of the sampled negatives of each image.

        ``matched_idxs`` [n] of each image: an element is positive from 1 on, negative at 0, and neither below.
        """
        if self.seeds is None:
            found: tuple[list[Tensor], list[Tensor]] = super().__call__(matched_idxs)
            return found
        masks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for matched, seed in zip(matched_idxs, self.seeds, strict=True):
            generator = torch.Generator(matched.device).manual_seed((seed + self.salt) % 2**63)
            wanted = int(self.batch_size_per_image * self.positive_fraction)
            for which, mask in zip((matched >= 1, matched == 0), masks, strict=True):
                places = torch.where(which)[0]
                order = torch.randperm(len(places), generator=generator, device=matched.device)
                mask.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, places[order[:wanted]], 1))
                wanted = self.batch_size_per_image - min(wanted, len(places))
        return masks
