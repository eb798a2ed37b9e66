"""The report's pictures of a run that distils a detector, and its file for ONNX."""

import base64
import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastkd.cli import main
from fastkd.trainer import TrainResult, train
from fastkd.trainer.batches import collate_detection
from fastkd.trainer.commands import export, reopen
from fastkd.trainer.commands.export_detector import difference
from fastkd.trainer.data.coco.reader import load_coco
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.report import pictures
from fastkd.trainer.report.page import render
from fastkd.trainer.report.records import read_groups
from tests.commands.conftest import refused  # noqa: F401
from tests.detection.conftest import configured
from tests.helpers.pages import read_page
from tests.helpers.trainer_runs import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def result(root: Path, teacher: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A student after three steps."""
    return train(configured(root, tmp_path_factory.mktemp("run"), "dcd", epochs=1, teacher=teacher))


@pytest.fixture(autouse=True)
def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are drawn that a model of a few steps is not sure of."""
    monkeypatch.setattr(pictures, "SCORE", 0.15)


def folder(result: TrainResult) -> Path:
    """The folder of the run; the path of a result is that of its checkpoint."""
    assert result.path is not None
    return Path(result.path).parents[1]


def shown(*runs: Path) -> pictures.Pictures:
    found = pictures.pictures_of(read_groups(runs)[0])
    assert found is not None
    return found


def test_the_report_shows_annotations_student_and_teacher(
    result: TrainResult,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(folder(result)), "--out", str(out)]) == 0
    page = read_page(out)
    drawn = [html.unescape(text) for text in page.pictures if re.match(r"Image \d", text)]
    content = json.loads((root / "val.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    distiller, (_, data) = result.distiller, load_coco(str(root), short_side=(64,))
    assert distiller.teacher is not None
    expected, of_student = [], 0
    for index, image in enumerate(content["images"]):
        there = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        for one in there:  # its sides are in percent of the image, which has 128 pixels on disk
            sides = zip(("x", "y", "width", "height"), one["bbox"], strict=True)
            text = " ".join(f'{name}="{round(side / 1.28, 2)}%"' for name, side in sides)
            assert page.text.count(text) == 3  # dashed in the other two views
        views = {"annotations": [names[one["category_id"]] for one in there]}
        batch = collate_detection([data[index]])
        for view, model in (("student", distiller.student), ("teacher", distiller.teacher.model)):
            with torch.no_grad():
                (found,) = model.eval()(batch)
            each = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
            views[view] = [f"{names[label]} {score:.2f}" for label, score in each if score >= 0.15][: pictures.BOXES]
        of_student += len(views["student"])
        expected += [f"Image {index + 1}, {view}: {', '.join(texts) or 'no box'}" for view, texts in views.items()]
    assert drawn == expected
    assert of_student > 0
    assert page.text.count("data:image/jpeg") == len(content["images"])
    assert 'class="missing"' not in page.text
    monkeypatch.setattr("fastkd.trainer.report.page.draw_sections", lambda groups: {})  # which takes most of the time
    assert main(["report", str(folder(result)), "--out", str(out), "--no-pictures"]) == 0
    assert "Image 1" not in out.read_text()


def test_runs_are_compared_on_the_same_images_and_a_common_teacher_is_drawn_once(
    result: TrainResult,
    teacher: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, before, again = folder(result), Path(str(teacher.weights)), tmp_path / "again"
    shutil.copytree(run, again)
    found = shown(run, again)
    for picture in found.items:
        assert [view.title for view in picture.views] == ["annotations", run.name, again.name, "teacher"]
        assert picture.views[1].boxes == picture.views[2].boxes
    assert len(found.items) == 4
    assert not found.problems
    # The teacher's own run is beside it.
    titles = [view.title for view in shown(run, before).items[0].views]
    assert titles == ["annotations", run.name, before.name]
    hashes = iter(("one", "other"))
    monkeypatch.setattr(pictures, "labels_hash", lambda data: next(hashes))
    found = shown(run, again)
    assert found.problems == [f"{again.name}: no boxes of it (its evaluation data are not those of the first run)"]
    assert [view.title for view in found.items[0].views] == ["annotations", run.name, "teacher"]


def test_what_cannot_be_shown_is_a_line(
    result: TrainResult,
    root: Path,
    teacher: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(path: Path) -> pictures.Pictures:
        path.rename(path.with_name("moved"))
        try:
            return shown(folder(result))
        finally:
            path.with_name("moved").rename(path)

    name, weights = folder(result).name, Path(str(teacher.weights))
    found = without(root)
    assert found.problems == [
        f"{name}: no boxes of it (data.options.root: {root} is not a folder, expected one with train/ in it)"
    ]
    assert not found.items
    found = without(weights)
    assert found.problems[0].startswith(f"{name}: no boxes of its teacher ({weights}: no such")
    assert [view.title for view in found.items[0].views] == ["annotations", "student"]
    monkeypatch.setattr(reopen, "weights_hash", lambda model: "of other weights")
    assert "is no longer the teacher that" in shown(folder(result)).problems[0]
    monkeypatch.setattr("fastkd.trainer.report.page.draw_sections", lambda groups: {})
    assert html.escape(found.problems[0]) in render(read_groups([folder(result)])[0], [], found)


def test_crowds_unnamed_classes_and_large_images_are_drawn() -> None:
    image = torch.randint(256, (3, 600, 900), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[90.0, 60, 450, 600], [0, 0, 9, 6]]), "labels": torch.tensor([1, 2])}
    target["iscrowd"] = torch.tensor([0, 1])
    picture = pictures._picture((image, target, 0), ["<a>"])
    (view,) = picture.views
    assert view.boxes == [pictures.Box(10, 10, 40, 90, "<a>"), pictures.Box(0, 0, 1, 1, "2, crowd", is_crowd=True)]
    content = base64.b64decode(picture.jpeg)
    assert len(content) <= pictures.JPEG_BYTES  # of noise, which needs the most
    width, height = Image.open(io.BytesIO(content)).size
    assert width * 600 == pytest.approx(height * 900, rel=0.02)


def test_onnx_finds_what_the_student_finds_in_images_of_any_size(
    result: TrainResult,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out, student = tmp_path / "student.onnx", result.distiller.student.eval()
    assert main(["export", str(result.path), str(out)]) == 0
    assert "checked boxes, scores, labels within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["task"] == "detection"
    whole = load_coco(str(root), short_side=(96,))[1][0][0]  # not noise, in which many boxes have the same score
    for image in (whole, whole[:, 20:70, 10:80]):
        found = session.run(None, {"images": student.normalized(image[None]).numpy()})
        with torch.no_grad():
            (expected,) = student(collate_detection([(image, {}, 0)]))
        values = tuple(expected[name] for name in ("boxes", "scores", "labels"))
        assert len(values[0]) > 0
        assert difference([torch.from_numpy(value) for value in found], values, 70) < 1e-4
    monkeypatch.setattr(export, "write_onnx_detector", lambda *_: (0.01, ""))
    assert "what it finds differs by 0.01" in refused("export", result.path, tmp_path / "wrong.onnx")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no symbolic for nms\nmore")

    monkeypatch.undo()
    monkeypatch.setattr(torch.onnx, "export", fails)
    line = refused("export", result.path, tmp_path / "wrong.onnx")
    assert "this detector (no symbolic for nms), expected a name that ends in .safetensors" in line
    assert sorted(tmp_path.iterdir()) == [out]


def test_the_difference_of_detections_is_the_largest_of_any_box() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 50, 50], [10, 10, 60, 60], [0, 0, 9, 9]]), torch.tensor([0.9, 0.8, 0.05])
    labels = torch.tensor([1, 2, 1])
    one = (boxes, scores, labels)
    order = torch.tensor([1, 2, 0])
    assert difference(one, (boxes[order], scores[order], labels[order]), 100) == 0
    assert difference(one, (boxes + torch.tensor([0, 0, 0, 2.0]), scores, labels), 100) == pytest.approx(0.02)
    assert difference(one, (boxes, scores + torch.tensor([0, 0.03, 0]), labels), 100) == pytest.approx(0.03)
    assert difference(one, (boxes, scores, torch.tensor([1, 3, 1])), 100) == float("inf")
    # The box with the least score may be missing, any other one may not.
    assert difference(one, (boxes[:2], scores[:2], labels[:2]), 100) == 0
    assert difference(one, (boxes[1:], scores[1:], labels[1:]), 100) == pytest.approx(0.85)
    assert difference(one, (boxes[:0], scores[:0], labels[:0]), 100) == float("inf")
    assert difference((boxes[:0], scores[:0], labels[:0]), (boxes[:0], scores[:0], labels[:0]), 100) == 0
