"""Independent float64 cases, with gradients, against every backend."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd import ckd_loss, dcd_loss, kd_loss, masked_contrast_loss, multiscale_pool, sup_con_loss
from fastkd.functional.dcd import dcd_terms
from tests.helpers.checks import assert_close, value_and_grads

GOLDEN = Path(__file__).parents[1] / "golden"
BACKENDS = ("reference", "blocked")


def load(path: Path) -> dict[str, torch.Tensor | str]:
    with np.load(path) as arrays:
        return {name: str(array) if array.dtype.kind == "U" else torch.tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dcd_*.npz")), ids=lambda path: path.stem)
def test_dcd(path: Path, backend: str) -> None:
    case = load(path)
    options = {"alpha": case["alpha"].item(), "consistency": case["direction"], "backend": backend}
    inputs = case["student"], case["teacher"], case["tau"]
    loss, *grads = value_and_grads(lambda s, t, tau: dcd_loss(s, t, tau.exp(), **options), *inputs)
    assert_close(loss, case["loss"], torch.float64)
    for grad, name in zip(grads, ("student", "teacher", "tau"), strict=True):
        assert_close(grad, case[f"grad_{name}"], torch.float64)
    contrast, consistency = dcd_terms(*inputs[:2], case["tau"].exp(), **options)
    assert_close(contrast, case["contrast"], torch.float64)
    assert_close(consistency, options["alpha"] * case["consist"], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("kd_*.npz")), ids=lambda path: path.stem)
def test_kd(path: Path, backend: str) -> None:
    case = load(path)
    loss, grad = value_and_grads(
        lambda s: kd_loss(s, case["teacher_logits"], case["temperature"].item(), backend=backend),
        case["student_logits"],
    )
    assert_close(loss, case["loss"], torch.float64)
    assert_close(grad, case["grad_student_logits"], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ckd_*.npz")), ids=lambda path: path.stem)
def test_ckd(path: Path, backend: str) -> None:
    case = load(path)
    loss, grad, grad_teacher = value_and_grads(
        lambda s, t: ckd_loss(s, t, case["temperature"].item(), backend=backend),
        case["student_logits"],
        case["teacher_logits"],
    )
    assert_close(loss, case["loss"], torch.float64)
    assert_close(grad, case["grad_student_logits"], torch.float64)
    assert not grad_teacher.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("sup_con_*.npz")), ids=lambda path: path.stem)
def test_sup_con(path: Path, backend: str) -> None:
    case = load(path)
    loss, grad = value_and_grads(
        lambda z: sup_con_loss(z, case["labels"], case["scale"].item(), backend=backend), case["z"]
    )
    assert_close(loss, case["loss"], torch.float64)
    assert_close(grad, case["grad_z"], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("masked_*.npz")), ids=lambda path: path.stem)
def test_masked_contrast(path: Path, backend: str) -> None:
    case = load(path)
    labels, scale = case["labels"], case["scale"].item()
    index = torch.arange(len(labels))
    loss, *grads = value_and_grads(
        lambda q, k: masked_contrast_loss(q, k, scale, labels, labels, index, backend=backend),
        case["query"],
        case["key"],
    )
    assert_close(loss, case["loss"], torch.float64)
    for grad, name in zip(grads, ("query", "key"), strict=True):
        assert_close(grad, case[f"grad_{name}"], torch.float64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("pool_*.npz")), ids=lambda path: path.stem)
def test_pool(path: Path, backend: str, memory_format: torch.memory_format) -> None:
    case = load(path)
    leaf = case["x"].contiguous(memory_format=memory_format).requires_grad_()
    out = multiscale_pool(leaf, case["windows"].tolist(), case["strides"].tolist(), backend=backend)
    out.backward(case["grad_out"])
    assert_close(out, case["out"], torch.float64)
    assert_close(leaf.grad, case["grad_x"], torch.float64)


def test_every_expected_case_is_here() -> None:
    counts = {"dcd": 6, "kd": 2, "ckd": 2, "sup_con": 2, "masked": 1, "pool": 2}
    assert {name: len(list(GOLDEN.glob(f"{name}_*.npz"))) for name in counts} == counts
