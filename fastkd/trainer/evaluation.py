"""Top-1 accuracy of a model, and of a checkpoint whose model is rebuilt from the checkpoint's own config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.trainer import nets
from fastkd.trainer.checkpoint import STUDENT, CheckpointError, find_checkpoint, load_into, read_checkpoint
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data import DATASETS, build_datasets, eval_loader
from fastkd.trainer.models import FeatureModel, build_model, count_parameters
from fastkd.trainer.ranks import Ranks
from fastkd.validate import check_labels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EvalResult:
    """``accuracy``: top-1 in [0, 1]; ``loss``: mean cross-entropy in nats; ``step``: of the checkpoint at ``path``."""

    accuracy: float
    loss: float
    parameters: int
    samples: int
    step: int
    path: Path


def choose_device(name: str, precision: str = "fp32") -> torch.device:
    """``auto``: CUDA when present, else CPU. ValueError when the device is unknown, absent or lacks the precision."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected 'auto' or a torch device ({error})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch sees no CUDA device")
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision: got 'bf16', which this CUDA device does not support; use 'fp16' or 'fp32'")
    return device


@torch.no_grad()
def evaluate(
    model: FeatureModel, loader: Any, device: torch.device, precision: str = "fp32", ranks: Ranks | None = None
) -> dict[str, float]:
    """``{"accuracy": top-1 in [0, 1], "eval_loss": mean cross-entropy in nats}``; leaves ``model`` in eval mode.

    With several ``ranks``, over the loaders of all of them.
    """
    ranks = ranks or Ranks()
    ranks.share_buffers(model)
    model.eval()
    correct, loss = torch.zeros((), dtype=torch.long, device=device), torch.zeros((), device=device)
    count = torch.zeros((), dtype=torch.long, device=device)
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            logits = model(images).logits.float()
        check_labels(labels, logits)
        correct += (logits.argmax(1) == labels).sum()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    correct, loss, count = ranks.sum(correct), ranks.sum(loss), ranks.sum(count)
    if count == 0:
        raise ValueError("eval_data: got an empty dataset, expected at least one sample")
    return {"accuracy": correct.item() / count.item(), "eval_loss": loss.item() / count.item()}


def evaluate_checkpoint(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    eval_data: Any = None,
    device: str = "auto",
    trust_code: bool = False,
) -> EvalResult:
    """Evaluate the student of a checkpoint (or of the newest one of a run folder).

    Model and data are rebuilt from the config in the checkpoint unless given. A config may name any
    ``package.module:callable``, which would be imported and called: from a checkpoint that needs ``trust_code=True``,
    except for timm, torchvision and fastkd's own.

    Raises CheckpointError: missing, damaged, needs ``trust_code``, or its student or data were given to ``train`` as
    objects, which no config names, and are not given here.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    try:
        config = TrainConfig.from_dict(checkpoint.manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / 'manifest.json'}: its config is not valid ({error})") from error
    given = checkpoint.manifest.get("given_as_objects", [])
    if model is None:
        if config.student is None or "student" in given:
            raise CheckpointError(f"{checkpoint.path}: its student was given as a module; pass it as model=...")
        _check_trust(checkpoint.path, config.student.name, _is_known_model(config.student.name), trust_code)
        model = build_model(replace(config.student, pretrained=False, weights=None))
    elif isinstance(model, FeatureModel):
        model = model.model
    if eval_data is None:
        if "data" in given:
            raise CheckpointError(f"{checkpoint.path}: its data was given as objects; pass it as eval_data=...")
        _check_trust(checkpoint.path, config.data.name, config.data.name in DATASETS, trust_code)
        _, eval_data = build_datasets(config.data)
    load_into(model, checkpoint.student, checkpoint.path / STUDENT)
    target = choose_device(device, config.precision)
    wrapped = FeatureModel(model, optional=True).to(target)
    values = evaluate(wrapped, eval_loader(eval_data, config.data, target), target, config.precision)
    return EvalResult(
        accuracy=values["accuracy"],
        loss=values["eval_loss"],
        parameters=count_parameters(model),
        samples=len(eval_data),
        step=checkpoint.manifest["step"],
        path=checkpoint.path,
    )


def _is_known_model(name: str) -> bool:
    """Whether ``name`` can build nothing but a model of timm or torchvision, or a class defined in our ``nets``."""
    source, _, attribute = name.rpartition(":")
    # Looked up without following dots, and not what the module merely imports: nets:nn.functional... reaches anything.
    found = vars(nets).get(attribute) if source == nets.__name__ else None
    own = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == nets.__name__
    return own or source in ("timm", "torchvision", "")


def _check_trust(path: Path, name: str, known: bool, trust_code: bool) -> None:
    if not known and not trust_code:
        raise CheckpointError(f"{path}: its config would import and call {name!r}; allow it with trust_code=True")
