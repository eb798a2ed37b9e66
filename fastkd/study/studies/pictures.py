"""The pictures of DCD's figures 2 and 3, from the logits of finished students."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastkd.study.figures import heat_map, scatter_map
from fastkd.study.grid import TEACHER, Cell, Picture, Study
from fastkd.study.records import read_record
from fastkd.trainer.commands.reopen import Reopened, reopen
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.models.build import build_model
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.precision import choose_device
from fastkd.trainer.run.saved.checkpoint import load_weights
from fastkd.trainer.tasks.evaluate import take_images_of

LIMIT = 3.0  # of the colour scale, as in the authors' script
CLASSES, PERPLEXITY, ITERATIONS = 20, 40, 300


def correlation_differences(study: Study, folder: Path) -> list[Picture]:
    """DCD's figure 2: |teacher - student| of every class's mean standardised logits, diagonal 0, colours to 3."""
    drawn: list[Picture] = []
    teachers: dict[str, np.ndarray] = {}
    text = (
        "The logits of every test image are standardised, and averaged over the images of each class. Shown is the "
        "absolute difference of the teacher's and the student's means: dark where the student is like its teacher."
    )
    for number, (cell, opened) in enumerate(_finished(study, folder)):
        teacher = opened.config.teacher
        if teacher is None or teacher.weights is None:
            continue
        if teacher.weights not in teachers:
            model = build_model(teacher, "teacher")
            model.load_state_dict(load_weights(teacher.weights))
            teachers[teacher.weights] = class_means(*logits_of(model, opened.config))
        gap = np.abs(class_means(*logits_of(opened.model, opened.config)) - teachers[teacher.weights])
        np.fill_diagonal(gap, 0)
        name = f"{study.display(cell.row)}: mean {gap.mean():.3f}"
        alt = f"Difference of the mean logits by class of the teacher and the student by {study.display(cell.row)}."
        svg = heat_map(gap, LIMIT, f"gap{number}", alt)
        drawn.append(Picture(f"{cell.column}: distance to the teacher", name, svg, text))
    return drawn


def embeddings_of_logits(study: Study, folder: Path) -> list[Picture]:
    """DCD's figure 3: t-SNE of the logits of the test images of the first 20 classes."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    drawn = []
    text = (
        f"The test images of the first {CLASSES} classes by the student's logits, in two dimensions (perplexity "
        f"{PERPLEXITY}, {ITERATIONS} iterations). Place, distance between groups and rotation mean nothing."
    )
    for number, (cell, opened) in enumerate(_finished(study, folder)):
        logits, labels = logits_of(opened.model, opened.config)
        chosen = labels < CLASSES
        perplexity = min(PERPLEXITY, (int(chosen.sum()) - 1) / 3)
        with threadpool_limits(1):
            points = TSNE(max_iter=ITERATIONS, perplexity=perplexity, random_state=0).fit_transform(logits[chosen])
        alt = f"t-SNE of the logits of the student by {study.display(cell.row)}, coloured by class."
        svg = scatter_map(points, labels[chosen], f"tsne{number}", alt)
        drawn.append(Picture(f"{cell.column}: t-SNE of the logits", study.display(cell.row), svg, text))
    return drawn


def _finished(study: Study, folder: Path) -> Iterator[tuple[Cell, Reopened]]:
    """The first seed of every finished student, opened again."""
    for cell in study.cells:
        record = read_record(folder / cell.place)
        if cell.shown and cell.seed == 0 and cell.row != TEACHER and record and record.status == "finished":
            yield cell, reopen(folder / cell.place, with_data=False)


def class_means(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean [C, C] over the images of each class of their standardised logits [n, C]; 0 for one without images."""
    standard = (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)
    means = np.zeros((logits.shape[1], logits.shape[1]))
    for label in np.unique(labels):
        means[label] = standard[labels == label].mean(0)
    return means


def logits_of(model: torch.nn.Module, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """The logits [n, C] of a model on the evaluation set of a run, and the labels [n]."""
    device = choose_device(config.device)
    _, evaluation = build_datasets(config.data)
    reader = FeatureModel(model, optional=True)
    take_images_of(reader, evaluation)
    reader.to(device).eval()
    logits, labels = [], []
    with torch.no_grad():
        for images, batch in eval_loader(evaluation, config.data, device):
            logits.append(reader(images.to(device)).logits.double().cpu())
            labels.append(batch)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()
