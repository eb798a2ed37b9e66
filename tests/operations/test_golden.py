"""Independent float64 cases, with gradients, against every backend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd import ckd_loss, dcd_loss, kd_loss, masked_contrast_loss, multiscale_pool, preview_weight, sup_con_loss
from fastkd.functional.dcd import dcd_terms
from tests.helpers.checks import assert_close, value_and_grads

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {"dcd": 6, "kd": 2, "ckd": 2, "sup_con": 2, "masked": 1, "pool": 2, "preview": 1}
every_backend = pytest.mark.parametrize("backend", ["reference", "blocked"])


def load(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: str(array) if array.dtype.kind == "U" else torch.tensor(array) for name, array in arrays.items()}


def paths(*names: str) -> pytest.MarkDecorator:
    found = [path for name in names for path in sorted(GOLDEN.glob(f"{name}_*.npz"))]
    assert len(found) == sum(COUNTS[name] for name in names)
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def dcd_options(case: dict[str, Any]) -> dict[str, Any]:
    return {"alpha": case["alpha"].item(), "consistency": case["direction"]}


def masked(case: dict[str, Any], query: Tensor, key: Tensor, **options: Any) -> Tensor:
    labels = case["labels"]
    index = torch.arange(len(labels))
    return masked_contrast_loss(query, key, case["scale"].item(), labels, labels, index, **options)


# file -> the loss of a case and of its inputs, the inputs' names
LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "dcd": (
        lambda case, s, t, tau, **options: dcd_loss(s, t, tau.exp(), **dcd_options(case), **options),
        ("student", "teacher", "tau"),
    ),
    "kd": (
        lambda case, s, t, **options: kd_loss(s, t, case["temperature"].item(), **options),
        ("student_logits", "teacher_logits"),
    ),
    "ckd": (
        lambda case, s, t, **options: ckd_loss(s, t, case["temperature"].item(), **options),
        ("student_logits", "teacher_logits"),
    ),
    "sup_con": (
        lambda case, z, **options: sup_con_loss(z, case["labels"], case["scale"].item(), normalize=False, **options),
        ("z",),
    ),
    "masked": (masked, ("query", "key")),
}


@every_backend
@paths(*LOSSES)
def test_losses_and_gradients(path: Path, backend: str) -> None:
    case = load(path)
    loss, names = LOSSES[path.stem.rpartition("_")[0]]
    value, *grads = value_and_grads(lambda *x: loss(case, *x, backend=backend), *(case[name] for name in names))
    assert_close(value, case["loss"], torch.float64)
    for grad, name in zip(grads, names, strict=True):
        if name == "teacher_logits":
            assert not grad.any()
        else:
            assert_close(grad, case[f"grad_{name}"], torch.float64)


@every_backend
@paths("dcd")
def test_terms_of_dcd(path: Path, backend: str) -> None:
    case = load(path)
    options = dcd_options(case)
    contrast, consistency = dcd_terms(case["student"], case["teacher"], case["tau"].exp(), backend=backend, **options)
    assert_close(contrast, case["contrast"], torch.float64)
    assert_close(consistency, options["alpha"] * case["consist"], torch.float64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_backend
@paths("pool")
def test_pool(path: Path, backend: str, memory_format: torch.memory_format) -> None:
    case = load(path)
    leaf = case["x"].contiguous(memory_format=memory_format).requires_grad_()
    out = multiscale_pool(leaf, case["windows"].tolist(), case["strides"].tolist(), backend=backend)
    out.backward(case["grad_out"])
    assert_close(out, case["out"], torch.float64)
    assert_close(leaf.grad, case["grad_x"], torch.float64)


@paths("preview")
def test_preview_weights(path: Path) -> None:
    case = load(path)
    weight = preview_weight(case["ce"].requires_grad_(), case["threshold"].item())
    assert_close(weight, case["weight"], torch.float64)
    assert not weight.requires_grad
