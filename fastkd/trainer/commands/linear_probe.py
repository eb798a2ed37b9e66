"""``fastkd probe``: how well a linear classifier on a student's frozen features does on other data (DCD, table 2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.commands.train import parse_json
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.precision import choose_device
from fastkd.validate import check_number


@dataclass
class ProbeResult:
    """Top-1 ``accuracy`` in [0, 1] on the other data's evaluation set, and ``train_accuracy`` on its training set."""

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
    """Fit a logistic regression (scikit-learn's, L-BFGS) to the penultimate features of the frozen ``model``.

    The features are standardised with the training set's mean and deviation. ``penalty`` multiplies the squared
    weights, beside the mean loss per sample. The datasets should not augment their images.
    """
    from sklearn.linear_model import LogisticRegression

    check_number("penalty", penalty, 0.0, exclusive=True)
    x, y = extract_features(model, train_data, config, device)
    x_eval, y_eval = extract_features(model, eval_data, config, device)
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
    x, x_eval = (x - mean) / deviation, (x_eval - mean) / deviation
    regression = LogisticRegression(C=1 / (penalty * len(x)), max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result says whether it converged
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
    """The penultimate features [N, D] and the labels [N] of a whole dataset, in its order."""
    model.to(device).eval()
    features, labels = [], []
    for images, batch in eval_loader(data, config, device):
        features.append(model(images.to(device, non_blocking=True)).features.float().cpu())
        labels.append(batch)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def probe_command(
    checkpoint: tyro.conf.Positional[str],
    data: str,
    options: str = "{}",
    best: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    penalty: float = 1e-4,
    device: str = "auto",
    trust_code: bool = False,
) -> None:
    """Logistic regression on the frozen features of a checkpoint's student, on other data.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest one.
        data: digits, images, cifar, or package.module:callable.
        options: of the data, as JSON; without augmentation, such as '{"root": "...", "augment": false}'.
        best: of a run folder the checkpoint with the highest accuracy, not the newest.
        batch_size: images at a time.
        num_workers: processes that read them.
        penalty: of the squared weights.
        device: auto, cpu, cuda, ...
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
    """
    reopened = reopen(checkpoint, best=best, with_data=False, trust_code=trust_code)
    config = DataConfig(
        name=data, options=parse_json("--options", options), eval_batch_size=batch_size, num_workers=num_workers
    )
    classifier = None if reopened.config.student is None else reopened.config.student.classifier
    model = FeatureModel(reopened.model, classifier)
    result = linear_probe(model, *build_datasets(config), config, choose_device(device), penalty=penalty)
    print(
        f"{reopened.checkpoint.path}: linear probe on {data}: accuracy {result.accuracy:.4f} of "
        f"{result.eval_samples} samples ({result.train_accuracy:.4f} of the {result.train_samples} it was fitted to), "
        f"{result.features} features" + ("" if result.converged else "; the fit did not converge")
    )
