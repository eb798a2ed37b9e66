"""A detector's average precision: computed by hand, in the pixels on disk, and with crowds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.trainer import extras
from fastkd.trainer.batches import DetectionBatch, DetectionSample, collate_detection
from fastkd.trainer.extras import MissingExtraError
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.tasks.detection.evaluate import evaluate

CPU = torch.device("cpu")
Found = list[tuple[list[float], float, int]]  # box, score, label


def sample(number: int, boxes: list[list[float]], labels: list[int], **others: Any) -> DetectionSample:
    given = {"scale": [1.0, 1.0], "iscrowd": [0] * len(labels), **others}
    target = {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "iscrowd": torch.tensor(given["iscrowd"], dtype=torch.long),
        "area": torch.tensor(given.get("area", [1000.0] * len(labels))),
        "scale": torch.tensor(given["scale"]),
        "image_id": torch.tensor(number),
    }
    return torch.zeros(3, 32, 32, dtype=torch.uint8), target, number


class Knows(nn.Module):
    """A detector that finds what it was told, by the images' ids. Its numbers are rounded as those of bf16 are."""

    def __init__(self, found: dict[int, Found]) -> None:
        super().__init__()
        self.found = found

    def forward(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        return [self._in(int(target["image_id"])) for target in batch.targets]

    def _in(self, image: int) -> dict[str, Tensor]:
        boxes, scores, labels = zip(*self.found[image], strict=True) if self.found.get(image) else ([], [], [])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.bfloat16).reshape(-1, 4),
            "scores": torch.tensor(scores, dtype=torch.bfloat16),
            "labels": torch.tensor(labels, dtype=torch.long),
        }


class Loader(list[DetectionBatch]):
    dataset = SimpleNamespace(classes=["cat", "zebra", "cup", "dog"])


def loader_of(*samples: DetectionSample, batch: int = 2) -> Loader:
    return Loader(collate_detection(samples[start : start + batch]) for start in range(0, len(samples), batch))


def values_of(found: dict[int, Found], *samples: DetectionSample, **options: Any) -> dict[str, float]:
    return evaluate(Knows(found), loader_of(*samples), CPU, **options)


def test_the_values_are_those_of_a_computation_by_hand() -> None:
    """Two cats: one found exactly, one with an IoU of 0.8 * 0.8 = 0.64, and between them a cat that is not there.

    Up to the IoU 0.6 precision is 1 up to the recall 0.5 (51 of COCO's 101 points) and 2 / 3 beyond. Above 0.64 the
    recall ends at 0.5. Zebras are all found, cups are found in a crowd, dogs where there is none.
    """
    samples = (
        sample(1, [[10, 10, 30, 30], [40, 40, 60, 60]], [1, 2]),
        sample(2, [[0, 0, 100, 100], [0, 0, 200, 200]], [1, 3], iscrowd=[0, 1], area=[5000.0, 0.0]),
        sample(3, [], []),
    )
    found: dict[int, Found] = {
        1: [([10, 10, 30, 30], 0.875, 1), ([40, 40, 60, 60], 0.5, 2), ([40, 40, 60, 60], 0.75, 1)],
        2: [([0, 0, 80, 80], 0.625, 1), ([50, 50, 60, 60], 0.875, 3)],
        3: [([5, 5, 20, 20], 0.5, 4)],
    }
    per_class: dict[str, Any] = {}
    values = values_of(found, *samples, per_class=per_class)
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    cat = (3 * loose + 7 * strict) / 10
    assert values == pytest.approx(
        {
            "map": (cat + 1) / 2,
            "map_50": (loose + 1) / 2,
            "map_75": (strict + 1) / 2,
            "map_small": 1.0,
            "map_medium": 3 * 1 / 10,
        },
        abs=1e-6,
    )
    assert per_class == {
        "classes": ["cat", "zebra", "cup", "dog"],
        "scores": [pytest.approx(cat), 1.0, None, None],
        "samples": [2, 1, 0, 0],
    }


def test_boxes_are_compared_in_the_pixels_on_disk() -> None:
    """The image was scaled by 4 and 2: a wrong box of 64 x 40 pixels has 16 x 20 on disk, and counts as small."""
    image = sample(1, [[0, 0, 80, 40]], [1], scale=[4.0, 2.0], area=[400.0])
    values = values_of({1: [([0, 0, 80, 40], 0.5, 1), ([100, 60, 164, 100], 0.75, 1)]}, image)
    assert values == pytest.approx(dict.fromkeys(("map", "map_50", "map_75", "map_small"), 0.5))


def test_what_is_found_in_a_crowd_is_not_counted_and_nothing_found_is_zero() -> None:
    plain = sample(1, [[0, 0, 20, 20]], [1])
    crowd = sample(1, [[0, 0, 20, 20], [40, 40, 90, 90]], [1, 1], iscrowd=[0, 1])
    found: dict[int, Found] = {1: [([0, 0, 20, 20], 0.5, 1), ([50, 50, 60, 60], 0.75, 1), ([60, 60, 70, 70], 0.75, 1)]}
    assert values_of(found, plain)["map"] == pytest.approx(1 / 3)
    assert values_of(found, crowd)["map"] == pytest.approx(1.0)
    assert values_of({}, plain)["map"] == 0


def test_an_evaluation_without_images_or_boxes_or_packages_is_told_and_one_that_was_stopped_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="eval_data: got an empty dataset, expected at least one sample"):
        values_of({})
    with pytest.raises(ValueError, match="eval_data: got no box of an object, expected at least one"):
        values_of({}, sample(1, [[1, 1, 5, 5]], [1], iscrowd=[1]))
    per_class: dict[str, Any] = {}
    stop: Any = SimpleNamespace(signal=15)
    assert values_of({}, sample(1, [], []), stop=stop, per_class=per_class) == {"map": 0, "map_50": 0, "map_75": 0}
    assert per_class == {}
    monkeypatch.setattr(extras, "is_missing", lambda package: package == "faster_coco_eval")
    with pytest.raises(MissingExtraError, match=r"faster_coco_eval; in a checkout .* '\.\[detection\]'"):
        values_of({}, sample(1, [], []))


# What follows is what tests/ranks/trainer_programs.py runs on ranks.
def some_samples(count: int) -> tuple[list[DetectionSample], dict[int, Found]]:
    """Images with up to four boxes, and a detector's findings of which many have the same score."""
    torch.manual_seed(0)
    samples, found = [], {}
    for number in range(count):
        corner, size = torch.rand(number % 5, 2) * 50, torch.rand(number % 5, 2) * 60 + 4
        boxes, labels = torch.cat([corner, corner + size], 1), torch.randint(1, 4, (number % 5,))
        samples.append(sample(number, boxes.tolist(), labels.tolist()))
        moved = boxes + torch.randn(len(boxes), 4) * 3
        found[number] = [(box, float(torch.randint(1, 4, ()) / 4), label)
                         for box, label in zip(moved.tolist(), labels.tolist(), strict=True)]  # fmt: skip
    return samples, found


def results_of(rank: int, world_size: int, ranks: Ranks) -> Any:
    """What the evaluation of seven images gives on a rank."""
    samples, found = some_samples(7)
    per_class: dict[str, Any] = {}
    values = evaluate(Knows(found), loader_of(*samples[rank::world_size]), CPU, "fp32", ranks, per_class=per_class)
    return values, per_class
