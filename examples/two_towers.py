"""Two towers as in CLIP, here of images and of words, and a small pair of towers distilled from a large one.

Image i belongs to text i, and all other texts of the batch are its negatives. The small towers learn from the same
contrast (:func:`fastkd.info_nce_loss`, both ways), and each from its large counterpart (:func:`fastkd.dcd_loss`). Over
several ranks under torch.distributed the negatives are those of all ranks.
"""

import math

import torch
from torch import Tensor, nn

from fastkd import dcd_loss, info_nce_loss

ROWS, PIXELS, WORDS, WIDTH = 256, 64, 32, 64


class Towers(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))
        self.text = nn.Sequential(nn.Linear(WORDS, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def contrast(self, images: Tensor, texts: Tensor) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        return (info_nce_loss(images, texts, scale) + info_nce_loss(texts, images, scale)) / 2


def pairs(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """An image and a text that show the same hidden thing."""
    thing = torch.randn(rows, 16)
    return thing @ TO_PIXELS + 0.3 * torch.randn(rows, PIXELS), thing @ TO_WORDS + 0.3 * torch.randn(rows, WORDS)


def fit(towers: Towers, large: Towers | None = None, steps: int = 100) -> Towers:
    optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        pixels, words = pairs()
        images, texts = towers.image(pixels), towers.text(words)
        loss = towers.contrast(images, texts)
        if large is not None:
            with torch.no_grad():
                large_images, large_texts = large.image(pixels), large.text(words)
            loss = loss + dcd_loss(images, large_images, 10.0) + dcd_loss(texts, large_texts, 10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return towers


torch.manual_seed(0)
TO_PIXELS, TO_WORDS = torch.randn(16, PIXELS) / 4, torch.randn(16, WORDS) / 4
large = fit(Towers(hidden=256))
small = fit(Towers(hidden=16), large)
pixels, words = pairs()
similarity = nn.functional.normalize(small.image(pixels)) @ nn.functional.normalize(small.text(words)).T
found = (similarity.argmax(dim=1) == torch.arange(ROWS)).float().mean()
print(f"student accuracy {found:.3f}, the right one of {ROWS} texts")
