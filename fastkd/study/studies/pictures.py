"""The pictures of DCD's figures 2 and 3, from the logits of finished students."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastkd.study.figures import heat_map, scatter_map
from fastkd.study.grid import Cell, Picture, Study
from fastkd.study.records import read_record
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.models.build import build_model
from fastkd.trainer.precision import choose_device
from fastkd.trainer.run.saved.checkpoint import load_weights

LIMIT = 3.0  # of the colour scale, as in the authors' script
CLASSES, PERPLEXITY, ITERATIONS = 20, 40, 300


def correlation_differences(study: Study, folder: Path) -> list[Picture]:
    """DCD's figure 2: |teacher - student| of every class's mean standardised logits, diagonal 0, colours to 3."""
    drawn, teachers = [], {}
    text = (
        "The logits of every test image are standardised, and averaged over the images of each class. Shown is the "
        "absolute difference of the teacher's and the student's means: dark where the student is like its teacher."
    )
    for number, (cell, config) in enumerate(_finished(study, folder)):
        if config.teacher is None or config.teacher.weights is None:
            continue
        key = config.teacher.weights
        if key not in teachers:
            teachers[key] = class_means(*logits_of_teacher(config))
        gap = np.abs(class_means(*logits_of_run(folder / cell.place)) - teachers[key])
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
    for number, (cell, _) in enumerate(_finished(study, folder)):
        logits, labels = logits_of_run(folder / cell.place)
        chosen = labels < CLASSES
        perplexity = min(PERPLEXITY, (int(chosen.sum()) - 1) / 3)
        with threadpool_limits(1):
            points = TSNE(max_iter=ITERATIONS, perplexity=perplexity, random_state=0).fit_transform(logits[chosen])
        alt = f"t-SNE of the logits of the student by {study.display(cell.row)}, coloured by class."
        svg = scatter_map(points, labels[chosen], f"tsne{number}", alt)
        drawn.append(Picture(f"{cell.column}: t-SNE of the logits", study.display(cell.row), svg, text))
    return drawn


def _finished(study: Study, folder: Path) -> Iterator[tuple[Cell, TrainConfig]]:
    """The first seed of every finished student, with its config."""
    for cell in study.cells:
        record = read_record(folder / cell.place)
        if cell.shown and cell.seed == 0 and cell.row != "teacher" and record and record.status == "finished":
            yield cell, TrainConfig.from_dict({k: v for k, v in record.settings.items() if k != "stages"})


def class_means(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean [C, C] over the images of each class of their standardised logits [n, C]."""
    standard = (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)
    return np.stack([standard[labels == label].mean(0) for label in range(logits.shape[1])])


def logits_of_run(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The logits [n, C] of the student in a run folder on its evaluation set, and the labels [n]."""
    opened = reopen(str(folder), best=False, with_data=False, trust_code=False)
    return _logits(opened.model, opened.config)


def logits_of_teacher(config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the run's teacher on its evaluation set, and the labels."""
    assert config.teacher is not None
    assert config.teacher.weights is not None
    model = build_model(config.teacher, "teacher")
    model.load_state_dict(load_weights(config.teacher.weights))
    return _logits(model, config)


def _logits(model: torch.nn.Module, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    device = choose_device(config.device)
    _, evaluation = build_datasets(config.data)
    model.to(device).eval()
    logits, labels = [], []
    with torch.no_grad():
        for images, batch in eval_loader(evaluation, config.data, device):
            logits.append(model(images.to(device)).double().cpu())
            labels.append(batch)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()
