"""What a detector gives and takes beside a batch of images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fastkd.trainer.batches import DetectionBatch
from fastkd.trainer.models.features import ModelOutput


@dataclass
class Regions:
    """Boxes that a student hands to its teacher, with the batch that they lie in.

    Attributes:
        batch: the images. The teacher normalises their bytes itself.
        boxes: [n_i, 4] for each image i, (left, top, right, bottom) in pixels of the image in the batch.
    """

    batch: DetectionBatch
    boxes: list[Tensor]


@dataclass
class DetectorOutput(ModelOutput):
    """What a detector gives in training: a row for each of the R regions that it has sampled in all images.

    ``logits`` [R, C + 1] are those of the box head, where 0 is the background, and ``features`` [R, D] are their input.

    Attributes:
        labels: [R], the class of the object that the region matches, or 0.
        regions: the boxes of the regions.
        losses: the detector's own losses by name, each as a sum and the number of regions or anchors that it is divided
            by, which the ranks add up.

    Example:
        >>> import torch
        >>> output = DetectorOutput(torch.zeros(3, 5), torch.zeros(3, 8), labels=torch.tensor([2, 0, 4]))
        >>> objects, count = output.chosen("foreground")
        >>> count, objects.logits.shape
        (2, torch.Size([2, 5]))
    """

    labels: Tensor | None = None
    regions: Regions | None = None
    losses: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def chosen(self, kind: str) -> tuple[DetectorOutput, int]:
        """The output with only the regions of this kind, and their number.

        Kinds are ``all``, ``foreground`` and ``background``. Where there are none, the number is 0, and the first
        region stays, so that no term gets an empty batch. The losses stay as they are.
        """
        assert self.labels is not None
        if kind == "all":
            return self, len(self.labels)
        keep = self.labels > 0 if kind == "foreground" else self.labels == 0
        count = int(keep.sum())
        if count == 0:
            keep[:1] = True
        regions = self.regions
        if regions is not None:
            parts = keep.split([len(boxes) for boxes in regions.boxes])
            regions = Regions(regions.batch, [boxes[part] for boxes, part in zip(regions.boxes, parts, strict=True)])
        rows = {name: getattr(self, name)[keep] for name in ("logits", "features", "labels")}
        return replace(self, **rows, regions=regions), count
