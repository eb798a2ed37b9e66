"""Embeddings as a task: any encoder and any input, recall of the evaluation set, ranks, resume, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastkd.cli import main
from fastkd.trainer import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TensorImages,
    TrainConfig,
    evaluate_task,
    train,
)
from fastkd.trainer.models.encoder import EncoderModel
from fastkd.trainer.models.small import MLP, SmallConvNet
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.tasks.embeddings import Embeddings
from fastkd.trainer.tasks.recall import nearest_of, recall, same_label
from tests.helpers.checks import relative_error
from tests.helpers.ranks import run_ranks, succeeded
from tests.helpers.trainer_runs import convolutional, noisy_data, one_thread  # noqa: F401
from tests.run.test_resume import assert_same_run, interrupted
from tests.tasks.encoders import CONFIG, Pooled, Sentences, TextEncoder, trained


def images(**changes: Any) -> dict[str, Any]:
    """What ``train`` takes for two convolutional encoders of noisy images."""
    torch.manual_seed(0)
    student, teacher = (SmallConvNet(num_classes=0, width=width) for width in (3, 6))
    train_data, eval_data = noisy_data()
    return {"student": student, "teacher": teacher, "train_data": train_data, "eval_data": eval_data, **changes}


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_the_embedding_is_the_output_or_what_the_classifier_is_given() -> None:
    pictures = torch.randn(4, 1, 8, 8)
    net, layer = SmallConvNet(num_classes=5, width=6), nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    penultimate = net.pool(net.eval().features(pictures)).flatten(1)
    assert torch.equal(EncoderModel(net)(pictures).features, penultimate)  # fastkd's own network
    assert torch.equal(EncoderModel(layer)(pictures).features, layer(pictures))  # anybody's
    assert torch.equal(EncoderModel(layer, "1")(pictures).features, pictures.flatten(1))
    sentence = {name: x[None] for name, x in Sentences(1)[0].items()}
    encoder = TextEncoder(6)  # whose last layer is called fc
    assert torch.equal(EncoderModel(encoder)(sentence).features, encoder(**sentence).pooler_output)
    output = EncoderModel(net).eval()(pictures)
    assert (output.logits.shape, output.classifier) == ((4, 0), None)
    copy = EncoderModel(layer, "1").like(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    assert torch.equal(copy(pictures).features, pictures.flatten(1))


def test_inputs_are_tensors_dicts_and_tuples_in_the_dtype_of_the_model() -> None:
    sample, encoder = Sentences(3)[0], TextEncoder(6).to(torch.bfloat16)
    batch = {name: x[None] for name, x in sample.items()}
    model = EncoderModel(encoder)
    assert model.measure(batch).features == 6
    with torch.autocast("cpu", torch.float16):
        found = model(batch).features
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, model(tuple(batch.values())).features)
    for wrong, message in (
        (lambda x: x.flatten(1).long(), r"Wrong returned torch.int64 \[4, 64\], expected an embedding \[B, D\]"),
        (lambda x: x, r"Wrong returned torch.float32 \[4, 1, 8, 8\]"),
        (lambda x: (x, x), r"Wrong returned tuple, .* image_embeds or text_embeds or pooler_output"),
        (lambda x: Pooled(x[:, 0, 0, :0]), r"Wrong returned torch.float32 \[4, 0\]"),
    ):
        with pytest.raises(TypeError, match=message):
            EncoderModel(type("Wrong", (nn.Module,), {"forward": lambda self, x, f=wrong: f(x)})())(
                torch.ones(4, 1, 8, 8)
            )


def test_evaluation_compares_with_labels_or_with_the_teacher() -> None:
    given = images()
    task, place = Embeddings(config()), torch.device("cpu")
    models = [EncoderModel(given[role]).eval() for role in ("student", "teacher")]
    task.teacher, calls = models[1], []
    models[1].register_forward_hook(lambda *_: calls.append(1))
    pictures, labels = given["eval_data"].images, given["eval_data"].labels.clone()
    labels[3] = 9
    student, teacher = (model(pictures).features for model in models)
    calls.clear()
    for data, right in (
        (TensorImages(pictures, labels), same_label(labels)),
        (TensorDataset(pictures), nearest_of(teacher)),
        (list(pictures), nearest_of(teacher)),
    ):
        loader = torch.utils.data.DataLoader(data, 8, collate_fn=task.collate)
        expected, left_out = recall(student, right, Ranks())
        values = {"recall_1": expected[1], "recall_5": expected[5], **({"left_out": 1.0} if left_out else {})}
        assert task.evaluate(models[0], loader, place, "fp32", Ranks()) == values
        assert left_out == (right.__name__ == "<lambda>")
    assert len(calls) == 3  # batches, once for two evaluations without labels
    with pytest.raises(ValueError, match=r"eval_data: got samples without labels and no teacher"):
        Embeddings(config()).evaluate(models[0], loader, place, "fp32", Ranks())


def test_a_student_comes_near_its_teacher_without_labels() -> None:
    """The labels of the training set are wrong, and nobody reads them."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(256) % 8
    pictures = torch.randn(8, 1, 4, 4, generator=generator)[classes]
    pictures = pictures + 0.9 * torch.randn(256, 1, 4, 4, generator=generator)
    data = {"train_data": TensorImages(pictures, torch.full((256,), -5)), "eval_data": TensorImages(pictures, classes)}
    torch.manual_seed(0)
    teacher = MLP(8, 16, (64,))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(pictures), classes).backward()
        optimizer.step()
    settings = config(objective=ObjectiveConfig(terms="info_nce"), data=DataConfig(batch_size=64), epochs=12, ema=0.9)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    task = Embeddings(settings)
    loader = torch.utils.data.DataLoader(data["eval_data"], 64, collate_fn=task.collate)
    before = task.evaluate(EncoderModel(student), loader, torch.device("cpu"), "fp32", Ranks())["recall_1"]
    found = train(settings, student=student, teacher=teacher, **data)
    best = task.evaluate(found.distiller.teacher, loader, torch.device("cpu"), "fp32", Ranks())["recall_1"]
    assert before < 0.7 < found.accuracy < best
    assert found.deployed.model is not student


def test_two_ranks_take_the_steps_of_one_process() -> None:
    """The batches and the evaluation set have odd sizes, the inputs are dicts, and there are no labels."""
    before = torch.get_default_dtype()
    try:
        alone = trained(0)
    finally:
        torch.set_default_dtype(before)
    for result in succeeded(run_ranks(2, trained, timeout=60)):
        for name, value in alone["weights"].items():
            assert relative_error(result["weights"][name], value) < 1e-10, name
        for record, other in zip(result["history"], alone["history"], strict=True):
            assert record == pytest.approx(other, rel=1e-5, abs=1e-6)  # the meter keeps float32
            assert record["recall_1"] == other["recall_1"] > 0


def test_a_run_resumes_bit_for_bit_with_an_average_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = ObjectiveConfig(terms="dcd + 10*sp + fitnet")
    whole = config(run_dir=str(tmp_path / "whole"), objective=terms, ema=0.8, precision="bf16", save_every_steps=5)
    given = images()
    train(whole, **given)
    cut = interrupted(monkeypatch, dataclasses.replace(whole, run_dir=str(tmp_path / "cut")), 9, **images())
    torch.rand(7)
    assert train(cut, **images()).resumed_from == 7
    assert_same_run(whole, cut)


def test_a_run_of_a_recipe_is_evaluated_and_knows_the_classes_of_its_teacher(tmp_path: Path, capsys: Any) -> None:
    """The teacher is a classifier of four classes, whose run says so; the student has no classifier."""
    name = "fastkd.trainer.models.small:SmallConvNet"
    data = DataConfig(name="tests.helpers.trainer_runs:noisy_data", batch_size=8)
    teacher = ModelConfig(name=name, options={"width": 5})
    train(config(task="classification", student=teacher, data=data, objective=ObjectiveConfig(terms="ce"),
                 run_dir=str(tmp_path / "teacher")))  # fmt: skip
    teacher = dataclasses.replace(teacher, weights=str(tmp_path / "teacher"), min_accuracy=0.1)
    student = ModelConfig(name=name, options={"width": 3})
    settings = config(student=student, teacher=teacher, data=data, chunks=2, run_dir=str(tmp_path / "run"))
    found = train(settings)
    assert found.distiller.teacher.model.model.classifier.out_features == 4
    again = evaluate_task(tmp_path / "run", trust_code=True)
    assert (again.metric, again.values["recall_1"]) == ("recall@1", found.accuracy)
    with pytest.raises(ValueError, match=r"teacher.min_accuracy: the teacher reaches"):
        train(dataclasses.replace(settings, run_dir=None, teacher=dataclasses.replace(teacher, min_accuracy=1.0)))


def test_what_does_not_go_with_embeddings_is_said_before_the_run(tmp_path: Path, capsys: Any) -> None:
    def run(given: dict[str, Any] | None = None, **changes: Any) -> None:
        train(config(run_dir=str(tmp_path / "run"), **changes), **(images() if given is None else given))

    one = images()["eval_data"]
    sentences = {"student": TextEncoder(4), "teacher": TextEncoder(6)}
    sentences |= {"train_data": Sentences(20), "eval_data": Sentences(9, 20)}
    deep, deepest = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Flatten(2)), SmallConvNet(0, width=3, depth=3)
    for changes, message in (
        ({"objective": ObjectiveConfig(terms="dcd + kd")},
         r"objective.terms: got 'kd' with the task 'embeddings', .* among ab, at, cc, dcd, .*info_nce, .*sp, vid$"),
        ({"objective": ObjectiveConfig(terms="crd")}, r"objective.terms: got 'crd' with the task 'embeddings'"),
        ({"objective": ObjectiveConfig(terms="ce + dcd")}, r"objective.terms: got 'ce' with the task 'embeddings'"),
        ({"objective": ObjectiveConfig(terms="0*dcd")}, r"expected at least one term with a positive weight"),
        ({"data": DataConfig(mixup=0.2)}, r"data.mixup: got 0.2 with the task 'embeddings', which reads no labels"),
        ({"student": ModelConfig(name="x", feature_map="y"), "given": images(student=deep)},
         r"feature_map: got 'y' with the task 'embeddings', expected None"),
        ({"given": images(eval_data=TensorImages(one.images[:1], one.labels[:1]))}, r"eval_data: got 1 samples, exp"),
        ({"given": images(eval_data=TensorImages(one.images, torch.arange(20)))}, r"eval_data: got no label twice"),
        ({"data": DataConfig(batch_size=17, drop_last=False), "given": images(student=deepest)},
         r"data.batch_size: got 17 .* batch norm .*'features.7'"),
        ({"given": sentences, "chunks": 2}, r"chunks: got 2 with inputs of type dict, expected 1, or tensors"),
        ({"given": sentences, "objective": ObjectiveConfig(terms="sp")}, r"of feature maps with inputs of type dict"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            run(**changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(
        ValueError, match=r"student.num_classes: got 0 with the task 'classification', expected at leas"
    ):
        TrainConfig(student=ModelConfig(name="timm:resnet10t", num_classes=0))
    assert main(["train", "embeddings", "--objective.terms", "pckd", "--run-dir", str(tmp_path / "cli")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
