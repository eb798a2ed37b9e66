"""``fastkd probe``: how well a linear classifier on a student's frozen features does on other data (DCD, table 2)."""

from __future__ import annotations

import sys
import warnings
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy

from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.commands.train import parse_json
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets, names_of_classes
from fastkd.trainer.data.labels import labels_of
from fastkd.trainer.data.loader import eval_loader, train_loader
from fastkd.trainer.data.options import options_class
from fastkd.trainer.models.features import FeatureModel, measure_shapes
from fastkd.trainer.precision import choose_device
from fastkd.trainer.rng import seed_everything
from fastkd.trainer.tasks.base import find_task
from fastkd.trainer.tasks.evaluate import take_images_of
from fastkd.validate import check_int, check_number


@dataclass
class ProbeResult:
    """Top-1 ``accuracy`` in [0, 1] on the other data's evaluation set, and ``train_accuracy`` on its training set.

    By SGD, ``train_accuracy`` is the mean over the batches of the last epoch, as they were trained on.
    """

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


@dataclass(kw_only=True, frozen=True)
class SGDProbe:
    """How DCD's authors fit the linear classifier (transfer_student.py of their public code).

    Attributes:
        epochs: passes over the training images. The learning rate is divided by 10 after each quarter of them.
        lr: the learning rate. The authors take 0.01 for MobileNetV2, ShuffleV1 and ShuffleV2.
        batch_size: images of a training batch. The last, smaller batch takes part.
        weight_decay: of the classifier.
        seed: of the classifier's weights, the order of the images and their augmentation.
    """

    epochs: int = 120
    lr: float = 0.05
    batch_size: int = 64
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("sgd.epochs", self.epochs, 1)
        check_number("sgd.lr", self.lr, 0.0, exclusive=True)
        check_int("sgd.batch_size", self.batch_size, 1)
        check_number("sgd.weight_decay", self.weight_decay, 0.0)
        check_int("sgd.seed", self.seed, 0)


def linear_probe_by_sgd(
    model: FeatureModel,
    train_data: Any,
    eval_data: Any,
    config: DataConfig,
    device: torch.device,
    settings: SGDProbe = SGDProbe(),
) -> ProbeResult:
    """Fit a linear classifier to the penultimate features of ``model`` by SGD with momentum 0.9, as DCD's authors do.

    The network is in train mode meanwhile: its batch norms normalise with the batch, and their running statistics
    become those of the new images. It is evaluated with these. All of this happens to a copy of ``model``. The training
    set should augment its images. Reseeds torch's, Python's and numpy's generators.
    """
    seed_everything(settings.seed)
    model = deepcopy(model).to(device)
    config = replace(config, batch_size=settings.batch_size, drop_last=False)
    loader, set_epoch = train_loader(train_data, config, settings.seed, device)
    width = measure_shapes(model, take_images_of(model, eval_data)).features
    head = nn.Linear(width, len(names_of_classes(train_data) or ()) or int(labels_of(train_data).max()) + 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    quarters = [settings.epochs * quarter // 4 for quarter in (1, 2, 3)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epoch for epoch in quarters if epoch])
    for epoch in track(range(settings.epochs), "probe", transient=True, disable=not sys.stdout.isatty()):
        set_epoch(epoch, 0)
        model.train()
        right = torch.zeros((), dtype=torch.long, device=device)
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.no_grad():
                features = model(images).features.float()
            logits = head(features)
            optimizer.zero_grad()
            cross_entropy(logits, labels).backward()
            optimizer.step()
            right += (logits.argmax(1) == labels).sum()
        schedule.step()
    x, y = extract_features(model, eval_data, config, device)
    found = head.cpu()(torch.from_numpy(x)).argmax(1).numpy()
    return ProbeResult(
        accuracy=float((found == y).mean()),
        train_accuracy=int(right) / len(train_data),
        features=width,
        train_samples=len(train_data),
        eval_samples=len(y),
        converged=True,
    )


@torch.no_grad()
def extract_features(
    model: FeatureModel, data: Any, config: DataConfig, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The penultimate features [N, D] and the labels [N] of a whole dataset, in its order."""
    model.to(device).eval()
    take_images_of(model, data)
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
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    penalty: float = 1e-4,
    sgd: SGDProbe = SGDProbe(),
    device: str = "auto",
    trust_code: bool = False,
) -> None:
    """A linear classifier on the frozen features of a checkpoint's student, on other data.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest one.
        data: digits, images, cifar, stl10, tiny-imagenet, torchvision:NAME, or package.module:callable.
        options: of the data, as JSON, such as '{"root": "..."}'. Images are augmented for sgd alone.
        best: of a run folder the checkpoint with the highest accuracy, not the newest.
        batch_size: images at a time, where none are trained on.
        num_workers: processes that read them.
        method: lbfgs fits a logistic regression to the features of eval mode. sgd is what DCD's authors do.
        penalty: of the squared weights, for lbfgs.
        sgd: settings of sgd.
        device: auto, cpu, cuda, ...
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
    """
    chosen = parse_json("--options", options)
    kind = options_class(data)
    if kind is not None and "augment" in {field.name for field in fields(kind)}:
        chosen = {"augment": method == "sgd", **chosen}
    reopened = reopen(checkpoint, best=best, with_data=False, trust_code=trust_code)
    config = DataConfig(name=data, options=chosen, eval_batch_size=batch_size, num_workers=num_workers)
    if reopened.config.task == "detection":
        raise ValueError(
            f"checkpoint: {checkpoint} holds a detector, expected a model with one row of features an image"
        )
    classifier = None if reopened.config.student is None else reopened.config.student.classifier
    model = find_task(reopened.config).wrap(reopened.model, {"classifier": classifier}, False)
    sets = build_datasets(config)
    if method == "sgd":
        result = linear_probe_by_sgd(model, *sets, config, choose_device(device), sgd)
    else:
        result = linear_probe(model, *sets, config, choose_device(device), penalty=penalty)
    print(
        f"{reopened.checkpoint.path}: linear probe on {data}: accuracy {result.accuracy:.4f} of "
        f"{result.eval_samples} samples ({result.train_accuracy:.4f} of the {result.train_samples} it was fitted to), "
        f"{result.features} features" + ("" if result.converged else "; the fit did not converge")
    )
