"""What the examples share: two small networks, generated images, and a teacher that is trained in a second."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10


class Net(nn.Module):
    """A network that gives its penultimate features beside its logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.classifier(features)


def generated_images(count: int = 1024, seed: int = 0) -> TensorDataset:
    """``count`` noisy copies of one 8 x 8 pattern for each class, with their labels."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 1.5 * torch.randn(count, 1, 8, 8, generator=generator), labels)


def batches(size: int = 128) -> DataLoader:
    return DataLoader(generated_images(), batch_size=size, shuffle=True, drop_last=True)


def trained_teacher() -> Net:
    """A wide network, trained on the labels, and frozen."""
    teacher = Net(width=128)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(5):
        for images, labels in batches():
            optimizer.zero_grad()
            cross_entropy(teacher(images)[1], labels).backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Of a network like ``Net``, on images that no example trains with."""
    images, labels = generated_images(count=2048, seed=1).tensors
    return (model.eval()(images)[1].argmax(dim=1) == labels).float().mean().item()
