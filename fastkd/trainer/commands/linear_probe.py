"""Linear probing: how far the frozen features of a student carry to other data (DCD's table 2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.models.features import FeatureModel
from fastkd.validate import check_number


@dataclass
class ProbeResult:
    """``accuracy``: top-1 on the other data's evaluation set, in [0, 1]; ``train_accuracy``: on its training set."""

    accuracy: float
    train_accuracy: float
    features: int
    train_samples: int
    eval_samples: int
    converged: bool


def linear_probe(
    model: FeatureModel,
    train_data: Any,
    eval_data: Any,
    config: DataConfig,
    device: torch.device,
    *,
    penalty: float = 1e-4,
    iterations: int = 1000,
) -> ProbeResult:
    """Multinomial logistic regression (scikit-learn's, L-BFGS) on the penultimate features of the frozen ``model``.

    Features are standardised with the training set's mean and deviation. ``penalty``: of the squared weights, beside
    the mean loss of a sample. The images come as the datasets give them: for a probe, without augmentation.
    """
    from sklearn.linear_model import LogisticRegression

    check_number("penalty", penalty, 0.0, exclusive=True)
    x, y = extract_features(model, train_data, config, device)
    x_eval, y_eval = extract_features(model, eval_data, config, device)
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
    x, x_eval = (x - mean) / deviation, (x_eval - mean) / deviation
    regression = LogisticRegression(C=1 / (penalty * len(x)), max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge: told in the result
        regression.fit(x, y)
    return ProbeResult(
        accuracy=float(regression.score(x_eval, y_eval)),
        train_accuracy=float(regression.score(x, y)),
        features=x.shape[1],
        train_samples=len(x),
        eval_samples=len(x_eval),
        converged=bool(np.max(regression.n_iter_) < iterations),
    )


@torch.no_grad()
def extract_features(
    model: FeatureModel, data: Any, config: DataConfig, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Penultimate features [N, D] and labels [N] of a whole dataset, in its order."""
    model.to(device).eval()
    features, labels = [], []
    for images, batch in eval_loader(data, config, device):
        features.append(model(images.to(device, non_blocking=True)).features.float().cpu())
        labels.append(batch)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()
