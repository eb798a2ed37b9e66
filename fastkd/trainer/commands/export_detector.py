"""A detector as an ONNX file: an image in, boxes, scores and labels out.

torch.export does not follow torchvision's detectors, whose numbers of boxes depend on the image: the file is made by
torch's older exporter, which traces the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.trainer.batches import DetectionBatch
from fastkd.trainer.extras import require_extras
from fastkd.trainer.models.detection.model import DetectorModel

OUTPUTS = ("boxes", "scores", "labels")
OPSET = 17
STRIDE = 32  # sides of a batch are multiples of it, see DetectionBatch
_TIE = 1e-3  # a box whose score is this near to the least one may be kept or not


class OneImage(nn.Module):
    """A detector whose input is one image [1, 3, H, W], normalised, and whose output is a tuple of what it finds.

    These are boxes [n, 4] as (left, top, right, bottom) in pixels of the image, scores [n] and labels [n].
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.model = DetectorModel(detector, optional=True)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[2], image.shape[3]
        padded = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE))
        (found,) = self.model(DetectionBatch(padded, [(height, width)], [], []))
        return tuple(found[name] for name in OUTPUTS)


def write_onnx_detector(
    detector: nn.Module, path: Path, images: Sequence[Tensor], metadata: dict[str, str]
) -> tuple[float, str]:
    """Write the file, and run it on each of the normalised ``images`` [1, 3, H, W]; returns the error and the input.

    The error is ``difference``, the largest of all images and of the first one scaled to another size.
    """
    require_extras("export", by="the export to ONNX")
    import onnx
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]

    model = OneImage(detector).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's about constants, which the check below would find, and torch's
        torch.onnx.export(
            model,
            (images[0],),
            str(path),
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_axes={"images": {2: "H", 3: "W"}, **{name: {0: "n"} for name in OUTPUTS}},
            opset_version=OPSET,
            dynamo=False,
        )
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    height, width = images[0].shape[2:]
    largest = 0.0
    # Not noise, in which many boxes have the same score, so that the last digit decides which ones are kept.
    for image in (*images, F.interpolate(images[0], (height + STRIDE, 2 * width))):
        with torch.no_grad():
            expected = model(image)
        found = [torch.from_numpy(value) for value in session.run(list(OUTPUTS), {"images": image.numpy()})]
        largest = max(largest, difference(found, expected, max(image.shape[2:])))
    return largest, "3 x H x W, one at a time"


def difference(one: Sequence[Tensor], other: Sequence[Tensor], side: int) -> float:
    """How far the (boxes, scores, labels) of one model are from those of another one, at most.

    For each box it is the distance to the nearest one of the same label: the largest of the differences of the four
    sides, divided by ``side``, and of the scores. It is infinite where there is none.
    """
    left, right = (torch.cat([boxes / side, scores[:, None]], dim=1).double() for boxes, scores, _ in (one, other))
    distance = torch.cdist(left, right, p=math.inf)
    distance = distance.masked_fill(one[2][:, None] != other[2], math.inf)
    found = 0.0
    for by_row, scores in ((distance, one[1]), (distance.T, other[1])):
        for row, score in zip(by_row, scores, strict=True):
            if score > scores.min() + _TIE or len(one[1]) == len(other[1]):
                found = max(found, row.min().item() if len(row) else math.inf)
    return found
