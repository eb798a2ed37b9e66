"""The accuracy of a model on an evaluation set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.data.labels import normalization_of
from fastkd.trainer.data.loader import first_images
from fastkd.trainer.models.features import FeatureModel, are_bytes
from fastkd.trainer.precision import autocast
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest
from fastkd.validate import check_labels


def take_images_of(model: FeatureModel, dataset: Any) -> Tensor:
    """Let ``model`` normalise the bytes that ``dataset`` gives, if it does; returns the first two images."""
    images = first_images(dataset)
    model.take_images("bytes" if are_bytes(images) else None, normalization_of(dataset))
    return images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    precision: str = "fp32",
    ranks: Ranks | None = None,
    *,
    confusion: Tensor | None = None,
    per_class: Tensor | None = None,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """``accuracy`` (top-1) and ``top5`` in [0, 1], ``eval_loss`` (mean cross-entropy in nats)::

        evaluate(FeatureModel(module), DataLoader(dataset, 256), torch.device("cpu"))["accuracy"]

    Leaves ``model`` in eval mode. With several ``ranks`` the values cover the samples of all ranks' loaders.
    ``confusion`` [C, C], int64, gets 1 added at (label, prediction) for every sample of this rank's loader.
    ``per_class`` [2, C], int64 on ``device``, gets the right samples and all samples of every class, over all ranks.
    Once ``stop`` is requested the remaining batches are left out, and the values mean nothing.
    """
    ranks = ranks or Ranks()
    ranks.broadcast_buffers(model)
    model.eval()
    counts = torch.zeros(3, dtype=torch.long, device=device)  # right, among the first five, samples
    loss = torch.zeros((), device=device)
    for images, labels in loader:
        if stop is not None and stop.signal:
            break
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = model(images).logits.float()
        check_labels(labels, logits)
        found = logits.argmax(1)
        first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts += torch.stack([(found == labels).sum(), first.sum(), torch.full_like(counts[2], len(labels))])
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        if per_class is not None:
            per_class[0].index_add_(0, labels, (found == labels).long())
            per_class[1].index_add_(0, labels, torch.ones_like(labels))
        if confusion is not None:
            classes = len(confusion)
            confusion += torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes).cpu()
    counts, loss = ranks.sum(counts), ranks.sum(loss)
    if per_class is not None:
        per_class.copy_(ranks.sum(per_class))
    right, among_five, samples = counts.tolist()
    if samples == 0 and not (stop is not None and stop.signal):
        raise ValueError("eval_data: got an empty dataset, expected at least one sample")
    samples = max(samples, 1)
    return {"accuracy": right / samples, "top5": among_five / samples, "eval_loss": loss.item() / samples}
