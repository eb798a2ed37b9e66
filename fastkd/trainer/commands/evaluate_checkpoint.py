"""``fastkd eval``: the accuracy of a checkpoint, a file of weights or a published model, on its own or other data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from fastkd.trainer.commands.evaluate_task import evaluate_task, task_of
from fastkd.trainer.commands.reopen import other_data, reopen
from fastkd.trainer.commands.train import parse_json
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets, names_of_classes
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.data.options import TransformOptions
from fastkd.trainer.models.build import ModelConfig, build_model, count_parameters, torchvision_weights
from fastkd.trainer.models.extended import extended_like
from fastkd.trainer.models.features import FeatureModel, measure_shapes
from fastkd.trainer.models.weights import Origin
from fastkd.trainer.precision import choose_device
from fastkd.trainer.run.check import origin_of
from fastkd.trainer.run.saved.checkpoint import find_weights
from fastkd.trainer.tasks.evaluate import evaluate, take_images_of
from fastkd.trainer.text import printable


@dataclass(frozen=True)
class DataChoice:
    """Other data than a run's own, as flags.

    Attributes:
        name: digits, images, cifar, or package.module:callable.
        options: of the data, as JSON. Without a name they are changes of the run's own options.
    """

    name: str | None = None
    options: str = "{}"

    def apply(self, config: DataConfig, root: str | None) -> DataConfig:
        """``config`` with what was chosen, and with the data in ``root`` if given: images, if none are named."""
        options = parse_json("--data.options", self.options)
        if root is not None and self.name in (None, "images"):
            config = other_data(config, root)
        elif self.name is not None and self.name != config.name:
            config = replace(config, name=self.name, options={})
        options = options if root is None else {"root": root, **options}
        return replace(config, options={**config.options, **options})


NO_CHOICE = DataChoice()


@dataclass
class EvalResult:
    """What ``evaluate_checkpoint`` found.

    Attributes:
        accuracy, top5: in [0, 1]. With fewer than five classes, ``top5`` is 1.
        loss: the mean cross-entropy in nats.
        confusion: [C, C], the number of samples of the row's class that were taken for the column's class.
        classes: the names of the classes, or their numbers where the data have no names.
        parameters: of the student.
        samples: of the evaluation data.
        step: of the checkpoint. None if a model was evaluated that is no checkpoint.
        path: the checkpoint, the file of weights, or the name of the published model.

    Example:
        >>> result = evaluate_checkpoint("runs/digits")  # doctest: +SKIP
        >>> weakest = min(zip(result.per_class(), result.classes))  # doctest: +SKIP
    """

    accuracy: float
    top5: float
    loss: float
    confusion: Tensor
    classes: list[str]
    parameters: int
    samples: int
    step: int | None
    path: Path

    def per_class(self) -> list[float]:
        """The accuracy on the samples of each class. NaN for a class without any."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. A class without samples has the accuracy None."""
        values = {name: getattr(self, name) for name in ("accuracy", "top5", "loss", "parameters", "samples", "step")}
        per_class = {
            name: value if value == value else None for name, value in zip(self.classes, self.per_class(), strict=True)
        }
        return {**values, "path": str(self.path), "per_class": per_class, "confusion": self.confusion.tolist()}


def evaluate_checkpoint(
    path: str | Path,
    *,
    best: bool = False,
    model: nn.Module | None = None,
    data: DataConfig | None = None,
    eval_data: Any = None,
    device: str = "auto",
    trust_code: bool = False,
) -> EvalResult:
    """Evaluate the student of a checkpoint, or of a run folder's newest (or ``best``) checkpoint.

    Model and data are rebuilt from the config in the checkpoint, unless they are given: the data as ``data``, or as the
    data set ``eval_data``. Classes of other data are matched with those of the run by their names. ``trust_code``
    allows that config to import and call any ``package.module:callable``. The models of timm, torchvision and fastkd
    and the data sets of fastkd do not need it.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or it needs ``trust_code``; or its student or data were
            given to ``train`` as objects, which no config names, and are not given here.
        ValueError: the run is of another task (see ``evaluate_task``), or the data have classes that it does not know,
            or images that the model cannot take.

    Example:
        >>> accuracy = evaluate_checkpoint("runs/digits").accuracy  # doctest: +SKIP
        >>> best = evaluate_checkpoint("runs/mine", model=MyNet(), eval_data=my_test_set)  # doctest: +SKIP
    """
    reopened = reopen(path, best=best, model=model, data=data, eval_data=eval_data, trust_code=trust_code)
    if reopened.config.task != "classification":
        raise ValueError(f"{path}: is a run of the task {reopened.config.task!r}, expected evaluate_task for it")
    return _measure(
        FeatureModel(reopened.model, optional=True),
        reopened.eval_data,
        reopened.data,
        classes=reopened.checkpoint.manifest.get("classes"),
        device=choose_device(device, reopened.config.precision),
        precision=reopened.config.precision,
        step=reopened.checkpoint.manifest["step"],
        path=str(reopened.checkpoint.path),
    )


def evaluate_model(config: ModelConfig, data: DataConfig, *, device: str = "auto") -> EvalResult:
    """Evaluate a model with its weights, published ones or those of a file, on the evaluation set of ``data``.

    Images are given the size and the normalisation that the file of weights says (``fastkd export`` writes them), else
    the model's own, unless the options of ``data`` say otherwise. Classes that the file names are matched with those of
    the data by their names. Without ``num_classes`` a model whose weights come from a file has as many as the file
    names, or else as the data have.

    Raises:
        ValueError: the model has another number of outputs than the data have classes.
        CheckpointError: the weights are missing, damaged or do not fit.
        OSError: the published weights cannot be downloaded.

    Example:
        >>> config = ModelConfig(name="timm:resnet10t.c3_in1k", pretrained=True)
        >>> result = evaluate_model(config, DataConfig(name="images", options={"root": "imagenet"}))  # doctest: +SKIP
    """
    origin = Origin() if config.weights is None else origin_of(config.weights)
    if data.name == "images":
        data = replace(data, options={**_input_of(config), **origin.input, **data.options})
    _, eval_data = build_datasets(data)
    classes = origin.classes or names_of_classes(eval_data)
    if config.weights is not None and config.num_classes is None and classes is not None:
        config = replace(config, num_classes=len(classes))
    model = build_model(config)
    if "image_size" in data.options:
        size, crop = data.options["image_size"], data.options.get("crop", TransformOptions.crop)
        print(f"images of {size} x {size}, crop {crop:g} (another: --data.options '{{\"image_size\": {size}}}')")
    if config.weights is not None:
        found = find_weights(config.weights)
        model = extended_like(model, found.state, found.path)
        print(found.load_into(model))
    return _measure(
        FeatureModel(model, optional=True),
        eval_data,
        data,
        classes=origin.classes,
        device=choose_device(device),
        precision="fp32",
        step=None,
        path=config.weights or config.name,
    )


def _input_of(config: ModelConfig) -> dict[str, Any]:
    """The options of the data set ``images`` that suit the model: its image size, crop, means and deviations."""
    model = build_model(config.without_weights())
    if not hasattr(model, "pretrained_cfg"):
        if not config.pretrained:
            return {}
        published = torchvision_weights(config.name.rpartition(":")[2]).transforms()
        size, crop = published.crop_size[0], published.crop_size[0] / published.resize_size[0]
        return {"image_size": size, "crop": crop, "mean": published.mean, "std": published.std}
    import timm

    found = timm.data.resolve_model_data_config(model)
    return {
        "image_size": found["input_size"][-1],
        "crop": found["crop_pct"],
        "mean": found["mean"],
        "std": found["std"],
    }


def _measure(
    model: FeatureModel,
    eval_data: Any,
    config: DataConfig,
    *,
    classes: list[str] | None,
    device: torch.device,
    precision: str,
    step: int | None,
    path: str,
) -> EvalResult:
    """Evaluate ``model``, whose outputs stand for ``classes`` if they are known."""
    if len(eval_data) == 0:
        raise ValueError("eval_data: got an empty dataset, expected at least one sample")
    model.to(device)
    images = take_images_of(model, eval_data)
    try:
        count = measure_shapes(model, images).classes
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data: {path} cannot take images of {list(images.shape[1:])} ({reason})") from error
    found = names_of_classes(eval_data)
    order = torch.arange(max(count, len(found or ())))
    if classes is not None and found is not None and found != classes:
        if unknown := [name for name in found if name not in classes]:
            raise ValueError(
                f"data: has the classes {shown(unknown)}, which {path} does not know; its own: {shown(classes)}"
            )
        order = torch.tensor([classes.index(name) for name in found])
    elif step is None and found is not None and len(found) != count:
        raise ValueError(
            f"num_classes: {path} has {count} outputs and the data have {len(found)} classes, expected as many "
            f"(--num-classes {len(found)}, with weights that were trained for them)"
        )
    confusion = torch.zeros((count, count), dtype=torch.long)
    loader = eval_loader(eval_data, config, device)
    batches = ((images, order[labels]) for images, labels in loader)
    values = evaluate(model, batches, device, precision, confusion=confusion)
    return EvalResult(
        accuracy=values["accuracy"],
        top5=values["top5"],
        loss=values["eval_loss"],
        confusion=confusion,
        classes=class_names(classes or found, count),
        parameters=count_parameters(model),
        samples=len(eval_data),
        step=step,
        path=Path(path),
    )


def hardest(result: EvalResult, count: int = 5) -> list[str]:
    """At most two lines: the ``count`` classes with the lowest accuracy, and the most frequent confusions."""
    names = list(map(printable, result.classes))
    lowest = sorted((accuracy, name) for name, accuracy in zip(names, result.per_class(), strict=True) if accuracy < 1)
    wrong = result.confusion.clone().fill_diagonal_(0)
    most, places = wrong.flatten().topk(min(count, wrong.numel()))
    found = {
        "lowest accuracy": [f"{name} {accuracy:.3f}" for accuracy, name in lowest[:count]],
        "most confused": [
            f"{names[place // len(wrong)]} as {names[place % len(wrong)]} {number}"
            for number, place in zip(most.tolist(), places.tolist(), strict=True)
            if number > 0
        ],
    }
    return [f"{title}: {', '.join(items)}" for title, items in found.items() if items]


def class_names(names: list[str] | None, count: int) -> list[str]:
    """The names of the ``count`` outputs: those of the classes as far as there are any, then numbers."""
    known = names if names is not None and len(names) <= count else []
    return [*known, *map(str, range(len(known), count))]


def shown(names: list[str], most: int = 10) -> str:
    """The first names, for a message. They come from folders or from a file."""
    return ", ".join(map(printable, names[:most])) + (f", ... ({len(names)})" if len(names) > most else "")


def eval_command(
    checkpoint: tyro.conf.Positional[str],
    best: bool = False,
    root: str | None = None,
    data: DataChoice = NO_CHOICE,
    model: str | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    trust_code: bool = False,
    json: str | None = None,
) -> None:
    """Accuracy of a checkpoint, of a file of weights, or of a published model.

    Model and data of a checkpoint are rebuilt from its own config, unless other data are named.

    Args:
        checkpoint: a run folder (its newest checkpoint), a checkpoint folder, a file of weights with --model, or the
            name of a published model such as timm:resnet10t.
        best: of a run folder the checkpoint with the highest accuracy, not the newest.
        root: evaluate on the images in this folder, a folder for each class (in its folder val, if it has one). With
            --data.name the folder of those data; for a detector a folder in COCO's format.
        data: other data.
        model: the model that a file of weights belongs to, such as timm:resnet18.
        num_classes: the model's outputs; as many as the data have classes for a file of weights.
        device: auto, cpu, cuda, ...
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
        json: a file to write everything to, the accuracy of every class and the confusion matrix included.
    """
    named = model if model is not None else checkpoint if checkpoint.startswith(("timm:", "torchvision:")) else None
    if named is None and Path(checkpoint).is_file():
        raise ValueError(f"--model: got nothing for the weights in {checkpoint}, expected a name such as timm:resnet18")
    if named is None and num_classes is not None:
        raise ValueError(
            f"--num-classes: got {num_classes}, expected it with a file of weights or a published model only"
        )
    if named is None:
        chosen = None
        if root is not None or data != NO_CHOICE:
            own = reopen(checkpoint, best=best, with_data=False, trust_code=trust_code).config.data
            chosen = data.apply(own, root)
            folders = [str(Path(data_of.options.get("root", "")).resolve()) for data_of in (own, chosen)]
            if own.name == chosen.name == "images" and chosen.options.get("val") == "." and len(set(folders)) == 1:
                print(f"{root}: the run was trained on most of these images; without --root it reads the others")
        if task_of(checkpoint, best) != "classification":
            found = evaluate_task(checkpoint, best=best, data=chosen, device=device, trust_code=trust_code)
            print("\n".join(found.lines()))
            if json is not None:
                Path(json).write_text(dumps(found.to_dict(), indent=1) + "\n")
            return
        result = evaluate_checkpoint(checkpoint, best=best, data=chosen, device=device, trust_code=trust_code)
    else:
        weights = None if model is None else checkpoint
        config = ModelConfig(name=named, num_classes=num_classes, weights=weights, pretrained=weights is None)
        if root is None and data.name is None:
            raise ValueError("--root: got nothing, expected a folder of images, or other data by --data.name")
        result = evaluate_model(config, data.apply(DataConfig(), root), device=device)
    at = "" if result.step is None else f"step {result.step}, "
    print(
        f"{result.path}: {at}accuracy {result.accuracy:.4f}, top-5 {result.top5:.4f}, "
        f"loss {result.loss:.4f} on {result.samples} samples ({result.parameters:,} parameters)"
    )
    if result.classes != class_names(None, len(result.classes)):
        print(f"classes: {shown(result.classes, 20)}")
    for line in hardest(result):
        print(line)
    if json is not None:
        Path(json).write_text(dumps(result.to_dict(), indent=1) + "\n")
