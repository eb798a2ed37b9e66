"""Two small towers, distilled one after the other from a large pair of towers by the trainer, without labels.

A tower is any module from an input to an embedding. Each small tower learns by InfoNCE to give what its large
counterpart gives for the same input (``embedding_dim=None``: without heads in between). So all four share one space,
and a small tower also works together with the large one of the other kind.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastkd import info_nce_loss
from fastkd.trainer import DataConfig, InfoNCEConfig, ObjectiveConfig, OptimConfig, TrainConfig, train

PIXELS, WORDS, WIDTH = 64, 32, 64


def tower(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    """Images and texts that show the same hidden things."""
    thing = torch.randn(rows, 16)
    return thing @ TO_PIXELS + 0.3 * torch.randn(rows, PIXELS), thing @ TO_WORDS + 0.3 * torch.randn(rows, WORDS)


def found(images: Tensor, texts: Tensor) -> float:
    """The share of the images whose nearest text is theirs."""
    near = nn.functional.normalize(images) @ nn.functional.normalize(texts).T
    return (near.argmax(dim=1) == torch.arange(len(near))).float().mean().item()


torch.manual_seed(0)
TO_PIXELS, TO_WORDS = torch.randn(16, PIXELS) / 4, torch.randn(16, WORDS) / 4
large = nn.ModuleList([tower(PIXELS, 256), tower(WORDS, 256)])
optimizer = torch.optim.AdamW(large.parameters(), lr=3e-3)
for _ in range(100):
    images, texts = (one(x) for one, x in zip(large, pairs(256), strict=True))
    optimizer.zero_grad()
    (info_nce_loss(images, texts, 14.0) + info_nce_loss(texts, images, 14.0)).backward()
    optimizer.step()

without_heads = ObjectiveConfig(terms="info_nce", info_nce=InfoNCEConfig(embedding_dim=None))
settings = {"epochs": 8, "eval_every": 8, "quiet": True, "data": DataConfig(batch_size=256)}
optim = OptimConfig(name="adamw", lr=1e-2)
config = TrainConfig(task="embeddings", objective=without_heads, optim=optim, **settings)
seen, held = pairs(4096), pairs(256)
small = [tower(PIXELS, 32), tower(WORDS, 32)]
for student, teacher, x, y in zip(small, large, seen, held, strict=True):
    result = train(config, student=student, teacher=teacher, train_data=TensorDataset(x), eval_data=TensorDataset(y))
    print(f"recall@1 {result.accuracy:.3f} of the teacher's nearest neighbours")
with torch.no_grad():
    texts = large[1](held[1])
    print(f"student accuracy {found(small[0](held[0]), small[1](held[1])):.3f}, with the large text tower", end=" ")
    print(f"{found(small[0](held[0]), texts):.3f}, teacher {found(large[0](held[0]), texts):.3f}")
