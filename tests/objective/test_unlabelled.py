"""Rows without a label: which they are, what every term makes of them, and a run that is resumed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastkd.trainer import DataConfig, ObjectiveConfig, TensorImages, train
from fastkd.trainer.data.datasets import choose_data
from fastkd.trainer.data.loader import train_loader
from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.objective.options.fused import CEConfig
from tests.helpers.trainer_runs import lines, noisy_data, one_thread, shapes, tiny_config  # noqa: F401
from tests.run.test_resume import assert_same_run, interrupted

FEW = DataConfig(labelled=8, unlabelled=True, batch_size=5, drop_last=False)


class WithIntegers(TensorImages):
    """As data sets of files are: single samples, labels as plain numbers, and an attribute of its own."""

    normalization = ((0.5,), (0.25,))

    def __getitems__(self, indices: Any) -> Any:
        return [(self.images[index], int(self.labels[index])) for index in indices]

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.labels[index])


@pytest.mark.parametrize(("kind", "workers"), [(TensorImages, 0), (TensorDataset, 0), (WithIntegers, 1), (Subset, 0)])
def test_all_images_are_read_and_the_labelled_subset_alone_keeps_its_labels(kind: Any, workers: int) -> None:
    images, labels = torch.arange(40.0).reshape(40, 1), torch.arange(40) % 4
    data = Subset(TensorImages(images, labels), list(range(40))) if kind is Subset else kind(images, labels)
    config = dataclasses.replace(FEW, num_workers=workers)
    chosen, _ = choose_data(config, data, data)
    kept, _ = choose_data(dataclasses.replace(config, unlabelled=False), data, data)
    expected = torch.full((40,), -1)
    for image, label in kept:
        expected[int(image)] = label
    assert sorted(expected[expected >= 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(chosen.labels, expected)
    assert getattr(chosen, "normalization", None) == getattr(data, "normalization", None)
    loader, _ = train_loader(chosen, config, 0, torch.device("cpu"))
    seen = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    order = seen[0].flatten().argsort()
    assert torch.equal(seen[0][order], images)
    assert torch.equal(seen[1][order], expected)


def outputs(rows: int = 8) -> tuple[ModelOutput, ModelOutput]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        ModelOutput(
            torch.randn(rows, 4, generator=generator, dtype=torch.float64),
            torch.randn(rows, d, generator=generator, dtype=torch.float64),
            torch.nn.Linear(d, 4, dtype=torch.float64),
        )
        for d in (6, 9)
    )
    student.logits.requires_grad_()
    return student, teacher


def objective(terms: str, **options: Any) -> Objective:
    torch.manual_seed(0)
    return Objective(ObjectiveConfig(terms=terms, **options), *shapes(6, 9), unlabelled=True).double()


def test_cross_entropy_is_the_mean_over_the_labelled_rows() -> None:
    student, teacher = outputs()
    labels = torch.tensor([3, -1, -1, 0, -1, 2, -1, -1])
    model = objective("ce + kd", ce=CEConfig(label_smoothing=0.2))
    _, named = model(student, teacher, labels, 7.0)  # the weight of a rank's rows does not count for it
    rows = labels >= 0
    torch.testing.assert_close(
        named["ce"], F.cross_entropy(student.logits[rows], labels[rows], label_smoothing=0.2).detach()
    )
    whole = objective("0*ce + kd")(student, teacher, labels.clamp_min(0), 7.0)[1]
    torch.testing.assert_close(named["kd"], whole["kd"])


def test_without_a_labelled_row_cross_entropy_is_zero_and_so_is_its_gradient() -> None:
    student, _ = outputs()
    loss, _ = objective("ce")(student, None, torch.full((8,), -1))
    assert loss.item() == 0.0
    loss.backward()
    assert student.logits.grad is not None
    assert torch.equal(student.logits.grad, torch.zeros(8, 4, dtype=torch.float64))


def test_where_a_term_needs_a_label_the_teachers_class_takes_its_place() -> None:
    student, teacher = outputs()
    labels = torch.tensor([3, -1, -1, 0, -1, 2, -1, -1])
    filled = torch.where(labels >= 0, labels, teacher.logits.argmax(1))
    named, expected = (objective("0*ce + pckd")(student, teacher, given)[1] for given in (labels, filled))
    assert all(torch.equal(named[name], expected[name]) for name in expected)
    seen = []

    def own(student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        seen.append(labels)
        return {"own": student.logits.sum()}

    model = Objective(ObjectiveConfig(terms="ce + own"), *shapes(6, 9), {"own": own}, unlabelled=True)
    model(student, teacher, labels)
    model(student, None, labels)
    assert torch.equal(seen[0], filled)
    assert torch.equal(seen[1], labels)


def test_labels_that_cannot_be_right_are_refused() -> None:
    student, teacher = outputs()
    with pytest.raises(ValueError, match=r"labels: got -2, expected class indices in \[0, 4\), or -1 for none"):
        objective("ce")(student, None, torch.arange(8) % 4 - 2)
    with pytest.raises(ValueError, match=r"data\.unlabelled: got class probabilities"):
        objective("ce + kd")(student, teacher, torch.full((8, 4), 0.25))
    with pytest.raises(TypeError, match=r"data\.unlabelled: got 5"):
        DataConfig(unlabelled=5)  # type: ignore[arg-type]


def test_a_run_with_few_labels_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(tiny_config(tmp_path).data, labelled=8, unlabelled=True)
    config = tiny_config(tmp_path, data=few, epochs=1, save_every_steps=3, run_dir=str(tmp_path / "whole"))
    result = train(config)
    records = [line for line in lines(config.run_dir) if line["kind"] == "step"]
    assert {record["ce"] > 0 for record in records} == {True, False}  # some batches have no labelled row
    assert result.history[-1]["accuracy"] >= 0
    cut = interrupted(monkeypatch, dataclasses.replace(config, run_dir=str(tmp_path / "cut")), 8)
    train(cut)
    assert_same_run(config, cut)


def test_a_label_of_minus_one_is_an_error_without_the_setting(tmp_path: Path) -> None:
    images, test = noisy_data()
    images.labels[7] = -1
    with pytest.raises(ValueError, match=r"data\.unlabelled: got False, but train_data has the label -1"):
        train(tiny_config(tmp_path, run_dir=None), train_data=images, eval_data=test)
