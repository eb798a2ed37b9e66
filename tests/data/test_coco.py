"""Data in the format of COCO: what is read, what is refused in one line, and what becomes of images and boxes."""

import json
import pickle
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.trainer import DataConfig
from fastkd.trainer.batches import DetectionBatch, collate_detection
from fastkd.trainer.data.coco.reader import CocoImages, load_coco
from fastkd.trainer.data.coco.shapes import make_shapes
from fastkd.trainer.data.datasets import build_datasets, names_of_classes
from fastkd.trainer.data.loader import draws_nothing, eval_loader, fetch_seeded, first_images, train_loader
from tests.helpers.images import CATEGORIES, box, write_part

CPU = torch.device("cpu")
SIZES = {7: (60, 80), 2: (50, 50), 900000000001: (40, 120), 5: (64, 64)}
# The images 5 and 2 have no box of an object, the annotations 13 and 14 no area.
BOXES = [
    box(11, 7, 90, (10.5, 20, 30, 16), area=200, iscrowd=0),
    box(12, 7, 3, (60, 50, 40, 40.5), area=None),  # reaches out of the image
    box(13, 7, 3, (5, 5, 0, 8)),
    box(14, 2, 3, (5, 5, 8, 0)),
    box(15, 900000000001, 1000, (1, 2, 3, 4), segmentation=[[1, 2, 3]]),
    box(16, 900000000001, 3, (0, 0, 60, 40), iscrowd=1),
    box(17, 5, 3, (0, 0, 60, 60), iscrowd=1, area=0),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    for part in ("train", "val"):
        write_part(folder, part, SIZES, BOXES)
    return folder


def read(root: Path, **options: Any) -> tuple[CocoImages, CocoImages]:
    return load_coco(str(root), **{"short_side": (64,), "max_side": 128, **options})


def test_images_boxes_and_classes_are_read_whatever_their_ids_and_their_order(root: Path) -> None:
    train, val = build_datasets(DataConfig(name="coco", options={"root": str(root), "short_side": [60], "flip": 0}))
    assert names_of_classes(train) == train.classes == ["cat", "zebra", "cup"]
    # In training, images without boxes and crowds are left out.
    assert (len(train), len(val)) == (2, 4)
    image, target, _ = train[0]
    assert image.shape == (3, 60, 80)
    assert target["boxes"].tolist() == [[10.5, 20, 40.5, 36], [60, 50, 80, 60]]
    assert target["labels"].tolist() == [2, 1]
    assert target["area"].tolist() == [200, 40 * 40.5]
    assert (target["iscrowd"].tolist(), target["scale"].tolist(), int(target["image_id"])) == ([0, 0], [1, 1], 7)
    assert train[1][1]["boxes"].tolist() == [[1.5, 3, 6, 9]]
    assert train[1][1]["labels"].tolist() == [3]
    found = [(int(target["image_id"]), target["iscrowd"].tolist()) for _, target, _ in map(val.__getitem__, range(4))]
    assert found == [(2, []), (5, [1]), (7, [0, 0]), (900000000001, [0, 1])]
    assert val[0][1]["boxes"].shape == (0, 4)
    assert val[1][1]["area"].tolist() == [3600]
    dtypes = {name: value.dtype for name, value in target.items()}
    assert dtypes == dict.fromkeys(("boxes", "area", "scale"), torch.float32) | dict.fromkeys(
        ("labels", "iscrowd", "image_id"), torch.int64
    )
    assert train.note == (
        f"{root}/train.json: 2 images without boxes are not trained on; "
        f"{root}/train.json: 2 boxes of crowds are not trained on; "
        f"{root}/train.json: 2 boxes without width or height are left out; "
        f"{root}/val.json: 2 boxes without width or height are left out"
    )
    assert not draws_nothing(train)


def test_another_layout_a_limit_and_names_that_occur_twice(root: Path, tmp_path: Path) -> None:
    two = [*CATEGORIES, {"id": 4, "name": "cat"}]
    for part in ("train2017", "val2017"):
        content = write_part(tmp_path, part, SIZES, BOXES, categories=two)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{part}.json").rename(tmp_path / "annotations" / f"instances_{part}.json")
    names = {"train": "train2017", "val": "val2017", "annotations": "annotations/instances_{part}.json"}
    train, val = read(tmp_path, **names, limit=1)
    assert (len(train), len(val)) == (1, 4)
    assert train.classes == ["cat (3)", "cat (4)", "zebra", "cup"]
    # The hash is of what is trained on, in any order of the file.
    whole = read(tmp_path, **names)[0].labels_sha256
    assert whole != train.labels_sha256
    content = {key: values[::-1] for key, values in content.items()}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    again = read(tmp_path, **names)[0]
    assert again.labels_sha256 != whole  # the boxes of an image have changed places
    content["annotations"].reverse()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    assert read(tmp_path, **names)[0].labels_sha256 == whole
    for change in ({"bbox": [11, 20, 30, 16]}, {"area": 201}, {"category_id": 4}):
        other = {**content, "annotations": [{**content["annotations"][0], **change}, *content["annotations"][1:]]}
        (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(other))
        assert read(tmp_path, **names)[0].labels_sha256 != whole


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the first annotation."""
    return lambda content: content["annotations"][0].update(changes)


def without(key: str, of: str = "annotations") -> Callable[[dict[str, Any]], None]:
    return lambda content: content[of][0].pop(key)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no images": (lambda content: content.pop("images"), "train.json: lacks images"),
    "images no list": (lambda content: content.update(images={}), "train.json: images is of type dict, expected list"),
    "images empty": (lambda content: content["images"].clear(), "train.json: has no image, expected at least one"),
    "an image's id": (without("id", "images"), "train.json: image number 0 in the file: lacks id"),
    "an image's name": (without("file_name", "images"), "train.json: image 7: lacks file_name"),
    "an image's height": (
        lambda content: content["images"][0].update(height=0),
        "image 7: has 80 x 0 pixels, expected at least 1 x 1",
    ),
    "two images": (lambda content: content["images"][1].update(id=7), "image 7: two have this id"),
    "a file": (lambda content: content["images"][0].update(file_name="no.png"), "image 7: the file 'no.png' is not in"),
    "outside": (
        lambda content: content["images"][0].update(file_name="../val/7.png"),
        "image 7: the file '../val/7.png' is not in",
    ),
    "NUL": (lambda content: content["images"][0].update(file_name="a\0/7.png"), "image 7: the file 'a\\x00/7.png'"),
    "two categories": (lambda content: content["categories"][0].update(id=3), "category 3: two have this id"),
    "a category's name": (without("name", "categories"), "category 90: lacks name"),
    "a category of another type": (
        lambda content: content["categories"].append("dog"),
        "category number 3 in the file: is of type str, expected an object",
    ),
    "an annotation of another type": (
        lambda content: content["annotations"].insert(0, [1]),
        "annotation number 0 in the file: is of type list, expected an object",
    ),
    "without an id": (
        lambda content: content["annotations"][0].pop("id") and content["annotations"][0].pop("bbox"),
        "annotation number 0 in the file: lacks bbox",
    ),
    "an unknown image": (changed(image_id=8), "annotation 11: image_id is 8, expected the id of an image"),
    "an image's id as text": (changed(image_id="7"), "annotation 11: image_id is of type str, expected int"),
    "an unknown category": (changed(category_id=1), "annotation 11: category_id is 1, expected the id of a category"),
    "three numbers": (changed(bbox=[1, 2, 3]), "annotation 11: bbox is [1, 2, 3], expected four finite numbers"),
    "no number": (changed(bbox=[1, 2, 3, "4"]), "annotation 11: bbox is [1, 2, 3, '4'], expected four finite numbers"),
    "NaN": (changed(bbox=[1, 2, 3, float("nan")]), "annotation 11: bbox is [1, 2, 3, nan], expected four finite"),
    "a negative width": (changed(bbox=[50, 2, -3, 4]), "annotation 11: bbox is [50, 2, -3, 4]"),
    "outside of the image": (
        changed(bbox=[81, 2, 3, 4]),
        "annotation 11: bbox is [81, 2, 3, 4], expected a box in its image, which has 80 x 60 pixels",
    ),
    "a negative area": (changed(area=-1), "annotation 11: area is -1, expected a finite number >= 0"),
    "a crowd of two": (changed(iscrowd=2), "annotation 11: iscrowd is 2, expected 0 or 1"),
    "other categories": (
        lambda content: content["categories"][1].update(name="dog"),
        "have different categories, expected the same ids and names; only the first has [(3, 'dog')], only the second "
        "[(3, 'cat')]",
    ),
    "no box": (lambda content: content["annotations"].clear(), "train.json: has no box of an object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(root: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(root / part)
    (tmp_path / "val.json").symlink_to(root / "val.json")
    content = json.loads((root / "train.json").read_text())
    change(content)
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "train.json") in str(caught.value)


def test_files_that_are_missing_or_cut_off_and_options_that_are_wrong_are_one_line(root: Path, tmp_path: Path) -> None:
    def told(message: str, **options: Any) -> None:
        with pytest.raises((ValueError, TypeError)) as caught:
            load_coco(**{"root": str(tmp_path), **options})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    told("nowhere is not a folder, expected one with train/", root="nowhere")
    told(f"{tmp_path}/train is not there, expected the folder of images (data.options.train")
    (tmp_path / "train").symlink_to(root / "train")
    told(f"{tmp_path}/train.json is not there, expected the annotation file (data.options.train")
    (tmp_path / "train.json").write_text((root / "train.json").read_text()[:-20])
    told(f"{tmp_path}/train.json: is not JSON: truncated or corrupted")
    (tmp_path / "train.json").write_text("[" * 100000)
    told(f"{tmp_path}/train.json: is not JSON")
    told("data.options.annotations: got 'x.json', expected {part} in it", annotations="x.json")
    told("data.options.short_side: got no number, expected at least one", short_side=())
    told("data.options.short_side: got 0, expected an int >= 1", short_side=(8, 0))
    told("data.options.short_side: got 800 of type int, expected tuple or list", short_side=800)
    told("data.options.flip: got 2", flip=2)
    told("data.options.limit: got 0", limit=0)
    told("data.options.std: got 0, expected a finite number > 0", std=(1, 0, 1))


def white(image: torch.Tensor) -> list[int]:
    """Left, top, right and bottom of the bright pixels."""
    rows, columns = torch.where(image[0] > 127)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_boxes_follow_their_images_through_scaling_and_mirroring(tmp_path: Path) -> None:
    boxes = [box(number, number, 3, (8, 4, 9, 20)) for number in (1, 2, 3)]
    for part in ("train", "val"):
        write_part(tmp_path, part, {1: (60, 90), 2: (40, 20), 3: (31, 300)}, boxes)
    random.seed(0)
    seen = set()
    train, val = read(tmp_path, short_side=(64, 96, 30), max_side=150)
    for data, count in ((train, 40), (val, 1)):
        for index in range(3):
            for _ in range(count):
                image, target, _ = data[index]
                assert white(image) == pytest.approx(target["boxes"][0].tolist(), abs=1.01), (index, image.shape)
                wide, high = target["scale"].tolist()
                height, width = image.shape[-2:]
                assert (height, width) == (round([60, 40, 31][index] * high), round([90, 20, 300][index] * wide))
                mirrored = abs(float(target["boxes"][0, 0]) - 8 * wide) > 1
                seen.add((count == 40, index, height, width, mirrored))
    expected = {
        (0, 64, 96), (0, 96, 144), (0, 30, 45),
        (1, 128, 64), (1, 150, 75), (1, 60, 30),
        (2, 16, 150),
    }  # fmt: skip
    mirrors = {size[1:4] for size in seen if size[0] and size[4]}
    assert {size[1:4] for size in seen if size[0]} == mirrors == expected
    # In evaluation there is one size, the largest, and nothing is drawn.
    assert {size[1:] for size in seen if not size[0]} == {(0, 96, 144, False), (1, 150, 75, False), (2, 16, 150, False)}
    assert [val[index][2] for index in range(3)] == [0, 1, 2]


def batches_of(data: CocoImages, batch: int, workers: int = 0, ranks: int = 1, epoch: int = 1) -> dict[int, Any]:
    """(seed, image, boxes) of every sample by the image's id."""
    found = {}
    for rank in range(ranks):
        config = DataConfig(batch_size=batch, num_workers=workers, drop_last=False)
        loader, set_epoch = train_loader(data, config, 0, CPU, rank, ranks, collate=collate_detection)
        set_epoch(epoch, 0)
        for one in loader:
            for image, (height, width), target, seed in zip(one.images, one.sizes, one.targets, one.seeds, strict=True):
                assert not image[:, height:].any()
                assert not image[:, :, width:].any()
                values = image[:, :height, :width].tolist(), {name: value.tolist() for name, value in target.items()}
                found[int(target["image_id"])] = (seed, *values)
    return found


def test_a_sample_and_its_seed_are_the_same_for_every_batch_size_and_number_of_workers_and_ranks(
    tmp_path: Path,
) -> None:
    make_shapes(tmp_path, 9, 2, seed=3)
    train, val = read(tmp_path, short_side=(24, 32, 40))
    expected = batches_of(train, 4)
    assert len(expected) == len({seed for seed, *_ in expected.values()}) == 9
    for changes in ({"batch": 9}, {"batch": 4, "workers": 2}, {"batch": 9, "ranks": 2}):
        assert batches_of(train, **changes) == expected, changes
    other = batches_of(train, 4, epoch=2)
    assert not {seed for seed, *_ in expected.values()} & {seed for seed, *_ in other.values()}
    # Options change what is drawn after the seed.
    plain = read(tmp_path, short_side=(24,), flip=0)[0]
    assert {key: seed for key, (seed, *_) in batches_of(plain, 4).items()} == {
        key: seed for key, (seed, *_) in expected.items()
    }
    loader = eval_loader(val, DataConfig(eval_batch_size=2), CPU, collate=collate_detection)
    assert [batch.seeds for batch in loader] == [[0, 1]]


def test_a_batch_is_padded_to_multiples_of_32_and_survives_its_way_from_a_worker(root: Path) -> None:
    train, _ = read(root, short_side=(60,), max_side=80)
    batch = collate_detection([train[0], train[1]])
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.sizes == [(60, 80), (27, 80)]
    sent: DetectionBatch = pickle.loads(pickle.dumps(batch))
    assert (sent.sizes, sent.seeds) == (batch.sizes, batch.seeds)
    assert torch.equal(sent.images, batch.images)
    # Loader processes would open a file for each tensor.
    assert all(type(value) is np.ndarray for target in batch.__getstate__()["targets"] for value in target.values())
    moved = sent.to("meta")
    assert len(moved) == len(sent) == 2
    for one, other, far in zip(sent.targets, batch.targets, moved.targets, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name])
            assert value.dtype == other[name].dtype
            assert far[name].is_meta
            value.zero_()  # can be written
    assert moved.images.is_meta


def test_an_image_that_is_broken_or_has_another_size_is_replaced_with_its_boxes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        boxes = [box(number, number, 3, (number, 2, 30, 30)) for number in (1, 2, 3)]
        write_part(tmp_path, part, dict.fromkeys((1, 2, 3), (40, 60)), boxes)
    (tmp_path / "train" / "1.png").write_bytes(b"nothing")
    rotated = Image.open(tmp_path / "train" / "2.png").transpose(Image.Transpose.ROTATE_90)
    rotated.save(tmp_path / "train" / "2.png")
    train, val = read(tmp_path, max_broken=2)
    with pytest.warns(RuntimeWarning) as told:
        _, target, _ = train[0]
    assert (int(target["image_id"]), target["boxes"].shape) == (3, (1, 4))
    assert len(told) == 2
    assert "has 40 x 60 pixels, the annotations say 60 x 40" in str(told[1].message)
    assert train.broken == 2
    # A rotation that is noted in the file is not applied.
    image = Image.open(tmp_path / "val" / "1.png")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "val" / "1.png", exif=exif)
    assert val[0][0].shape == (3, 64, 96)
    assert white(val[0][0]) == pytest.approx(val[0][1]["boxes"][0].tolist(), abs=1.01)


def test_shapes_are_drawn_in_their_boxes_the_same_for_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in "abc"]
    make_shapes(folders[0], 12, 4, seed=1)
    make_shapes(folders[1], 6, 4, seed=1)
    monkeypatch.setattr(sys, "argv", ["shapes", str(folders[2]), "--train", "6", "--val", "4"])
    monkeypatch.delitem(sys.modules, "fastkd.trainer.data.coco.shapes")
    runpy.run_module("fastkd.trainer.data.coco.shapes", run_name="__main__")
    first, second, other = ([path.read_bytes() for path in sorted((folder / "train").iterdir())] for folder in folders)
    assert first[:6] == second
    assert not set(second) & set(other)
    assert not set(first) & {path.read_bytes() for path in (folders[0] / "val").iterdir()}
    train, val = read(folders[0], short_side=(128,), flip=0)
    assert (len(train), len(val), train.classes) == (12, 4, ["circle", "square", "triangle", "cross"])
    labels = torch.cat([train[index][1]["labels"] for index in range(12)])
    assert set(labels.tolist()) == {1, 2, 3, 4}
    squares = 0
    for index in range(12):
        image, target, _ = train[index]
        left, top, right, bottom = target["boxes"].int()[-1].tolist()  # nothing covers the last one
        if target["labels"][-1] == 2:  # it fills its box, and nothing beside it
            inside = image[:, top + 1 : bottom - 1, left + 1 : right - 1].float()
            beside = image[:, top:bottom, right : right + 2].float()
            assert inside.std((1, 2)).max() < 8
            assert beside.numel() == 0 or (beside.mean((1, 2)) - inside.mean((1, 2))).abs().max() > 8
            squares += 1
    assert squares > 0


def test_samples_are_read_by_their_numbers(root: Path) -> None:
    train, _ = read(root)
    samples = fetch_seeded(train, [1, 0], np.array([5, 5]))
    assert [int(target["image_id"]) for _, target, _ in samples] == [900000000001, 7]
    assert samples[0][2] == samples[1][2]  # drawn from the same state
    with pytest.raises(TypeError, match=r"train_data: gives images with boxes, expected \(images, labels\)"):
        first_images(train)  # as classification asks for them
