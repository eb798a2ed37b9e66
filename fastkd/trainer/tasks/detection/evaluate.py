"""The average precision of a detector on an evaluation set, as COCO defines it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.batches import DetectionBatch
from fastkd.trainer.data.datasets import names_of_classes
from fastkd.trainer.extras import require_extras
from fastkd.trainer.precision import autocast
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest

Boxes = dict[str, Any]  # of one image: a tensor or an array for each of several names
ALWAYS, WHERE_KNOWN = ("map", "map_50", "map_75"), ("map_small", "map_medium", "map_large")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    precision: str = "fp32",
    ranks: Ranks | None = None,
    *,
    stop: StopRequest | None = None,
    per_class: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The average precisions (AP) of a detector, in [0, 1].

    ========================================== ========================================================================
    map                                        mean over the classes and the IoUs 0.50, 0.55, ... 0.95
    map_50, map_75                             mean over the classes at one IoU
    map_small, map_medium, map_large           ``map`` of boxes below 32², up to 96² and above 96² pixels. A size of
                                               which there is no box is left out.
    ========================================== ========================================================================

    ``model(batch)`` gives for each image ``boxes`` [n, 4] in the pixels of the batch, ``scores`` [n] and ``labels``
    [n], of which the 100 with the best scores count. Boxes are compared in the pixels of the images on disk. What is
    found in a crowd counts neither as right nor as wrong.

    Leaves ``model`` in eval mode. With several ``ranks`` the values cover the images of all ranks' loaders, and are
    those of one process. Once ``stop`` is requested the remaining batches are left out, and the values mean nothing.

    ``per_class`` gets ``classes``, the names; ``scores``, their AP; and ``samples``, the number of their boxes. The AP
    of a class of which there is no box is None.

    Raises:
        ValueError: the evaluation set is empty, or has no box that is not a crowd.
        MissingExtraError: the packages of the extra ``detection`` are not installed.

    Example::

        evaluate(detector, DataLoader(dataset, 8, collate_fn=collate_detection), torch.device("cpu"))["map"]
    """
    require_extras("detection", by="the evaluation of a detector")
    ranks = ranks or Ranks()
    ranks.broadcast_buffers(model)
    model.eval()
    results: list[tuple[Boxes, Boxes]] = []
    for batch in loader:
        if stop is not None and stop.signal:
            break
        with autocast(device, precision):
            found = model(batch.to(device, non_blocking=True))
        results += _in_pixels_on_disk(found, batch)
    if ranks.largest(int(stop is not None and bool(stop.signal))):
        return dict.fromkeys(ALWAYS, 0.0)
    # Every rank's loader has every W-th image: in turns they are in the order of the data set again.
    turns = itertools.zip_longest(*ranks.gather(results))
    everything = [one for turn in turns for one in turn if one is not None]
    values, by_label = ranks.on_main(lambda: average_precision(everything))
    if per_class is not None:
        names = names_of_classes(loader.dataset) or [str(label) for label in range(1, max(by_label) + 1)]
        known = [by_label.get(label, (None, 0)) for label in range(1, len(names) + 1)]
        per_class |= {"classes": names, "scores": [ap for ap, _ in known], "samples": [boxes for _, boxes in known]}
    return values


def _in_pixels_on_disk(found: list[dict[str, Tensor]], batch: DetectionBatch) -> list[tuple[Boxes, Boxes]]:
    """(what was found, what is there) in each image. The arrays are numpy's, which are sent in less time."""
    results = []
    for one, target in zip(found, batch.targets, strict=True):
        scale = target["scale"].cpu().repeat(2)
        finding = {"boxes": one["boxes"].cpu() / scale, "scores": one["scores"].float().cpu()}
        finding["labels"] = one["labels"].cpu()
        there = {name: target[name].cpu() for name in ("labels", "iscrowd", "area")}
        there["boxes"] = target["boxes"].cpu() / scale
        results.append((_each(finding, Tensor.numpy), _each(there, Tensor.numpy)))
    return results


def _each(boxes: Boxes, function: Callable[[Any], Any]) -> Boxes:
    return {name: function(value) for name, value in boxes.items()}


def average_precision(results: list[tuple[Boxes, Boxes]]) -> tuple[dict[str, float], dict[int, tuple[float, int]]]:
    """The values of ``evaluate``, and of each label that has a box its AP and the number of its boxes.

    ``results`` are (what was found, what is there) of all images.
    """
    from torchmetrics.detection import MeanAveragePrecision

    if not results:
        raise ValueError("eval_data: got an empty dataset, expected at least one sample")
    # ``extended_summary`` gives the precisions themselves. Asking for classes would evaluate each one anew.
    metric = MeanAveragePrecision(backend="faster_coco_eval", extended_summary=True, sync_on_compute=False)
    metric.warn_on_many_detections = False
    findings, there = zip(*results, strict=True)
    metric.update([_each(one, torch.as_tensor) for one in findings], [_each(one, torch.as_tensor) for one in there])
    found = metric.compute()
    values = {name: found[name].item() for name in (*ALWAYS, *WHERE_KNOWN)}
    if values["map"] < 0:
        raise ValueError("eval_data: got no box of an object, expected at least one")
    # torchmetrics gives a single class without its axis.
    curves = found["precision"][:, :, :, 0, -1]  # [10 IoUs, 101 recalls, labels]; -1 where there is no box
    boxes = Counter(itertools.chain.from_iterable(one["labels"][one["iscrowd"] == 0].tolist() for one in there))
    by_label = {
        label: (curve.mean().item(), boxes[label])
        for label, curve in zip(found["classes"].reshape(-1).tolist(), curves.unbind(2), strict=True)
        if boxes[label]
    }
    return {name: value for name, value in values.items() if name in ALWAYS or value >= 0}, by_label
