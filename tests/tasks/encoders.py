"""Small encoders of dicts and of images, data for them, and a run of the trainer on any number of ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastkd.trainer import DataConfig, ObjectiveConfig, OptimConfig, TrainConfig, train

CONFIG = TrainConfig(
    task="embeddings",
    data=DataConfig(batch_size=8, drop_last=False),
    objective=ObjectiveConfig(terms="dcd + info_nce + rkd"),
    optim=OptimConfig(lr=0.05, clip_norm=1.0),
    epochs=2,
    device="cpu",
    log_every=1,
    tensorboard=False,
    progress=False,
    quiet=True,
)


class Sentences(Dataset[Any]):
    """Tokens and a mask, as a dict, of ``count`` sentences; without labels."""

    def __init__(self, count: int, first: int = 0) -> None:
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randint(12, (60, 5), generator=generator)[first : first + count]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"tokens": tokens, "mask": (tokens > 2).to(torch.get_default_dtype())}


class Pooled:
    """What Hugging Face's encoders return."""

    def __init__(self, pooler_output: Tensor) -> None:
        self.pooler_output = pooler_output


class TextEncoder(nn.Module):
    """The mean of the tokens' embeddings, and a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(12, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Pooled:
        weights = mask / mask.sum(1, keepdim=True).clamp_min(1)
        return Pooled(self.fc((weights[..., None] * self.table(tokens)).sum(1)))


def trained(rank: int) -> dict[str, Any]:
    """A run in float64: 21 sentences to train on in batches of 8, 13 to evaluate; its history and its weights."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    student, teacher = TextEncoder(4), TextEncoder(6)
    data = {"train_data": Sentences(21), "eval_data": Sentences(13, 21)}
    found = train(CONFIG, student=student, teacher=teacher, **data)
    weights = {name: value.detach() for name, value in found.distiller.named_parameters()}
    return {"history": found.history, "weights": weights}
