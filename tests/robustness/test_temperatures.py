"""Every loss takes temperatures in one range: within it results are finite, outside of it they are errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import (
    CKDLoss,
    DCDLoss,
    InfoNCELoss,
    KDLoss,
    MSDCRDLoss,
    PCKDLoss,
    SupConLoss,
    ckd_loss,
    dcd_loss,
    info_nce_loss,
    kd_loss,
    masked_contrast_loss,
    sup_con_loss,
)
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import logits

# Of a temperature, a dtype and a backend: the terms, and the student that they reach.
Terms = Callable[[float, torch.dtype, str], tuple[dict[str, Tensor], Tensor]]


def _on_logits(loss: Callable[..., Any]) -> Terms:
    def terms(temperature: float, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], Tensor]:
        student, teacher, labels = logits(9, 5, dtype=dtype)
        return {"loss": loss(student.requires_grad_(), teacher, labels, temperature, backend)}, student

    return terms


def _module(make: Callable[..., nn.Module], call: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]) -> Terms:
    def terms(temperature: float, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], Tensor]:
        module = make(temperature=temperature, backend=backend).to(dtype)
        student, teacher, _ = logits(9, 5, dtype=dtype)
        return call(module, student.requires_grad_(), teacher), student

    return terms


def _pckd(module: nn.Module, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    classifier = nn.Linear(5, 5).to(student.dtype)
    return module(student, teacher, student, teacher, torch.arange(9) % 5, classifier, classifier, 0)


def _msdcrd(module: nn.Module, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    s, t = (x[:, :, None, None].expand(-1, -1, 4, 4) for x in (student, teacher))
    return module(s, t, nn.Linear(5, 3).to(student.dtype))


LOSSES: dict[str, Terms] = {
    "kd_loss": _on_logits(lambda s, t, y, temperature, backend: kd_loss(s, t, temperature, backend=backend)),
    "ce_kd_terms": _on_logits(
        lambda s, t, y, temperature, backend: sum(ce_kd_terms(s, t, y, temperature, backend=backend))
    ),
    "ckd_loss": _on_logits(lambda s, t, y, temperature, backend: ckd_loss(s, t, temperature, backend=backend)),
    "dcd_loss": _on_logits(
        lambda s, t, y, temperature, backend: dcd_loss(s, t, temperature=temperature, backend=backend)
    ),
    "dcd_loss, a tensor": _on_logits(
        lambda s, t, y, temperature, backend: dcd_loss(
            s, t, temperature=torch.tensor(temperature, dtype=torch.float64), backend=backend
        )
    ),
    "info_nce_loss": _on_logits(
        lambda s, t, y, temperature, backend: info_nce_loss(s, t, temperature=temperature, backend=backend)
    ),
    "masked_contrast_loss": _on_logits(
        lambda s, t, y, temperature, backend: masked_contrast_loss(
            s, t, query_labels=y, key_labels=y, temperature=temperature, backend=backend
        )
    ),
    "sup_con_loss": _on_logits(
        lambda s, t, y, temperature, backend: sup_con_loss(s, y, temperature=temperature, backend=backend)
    ),
    "InfoNCELoss": _module(InfoNCELoss, lambda module, s, t: module(s, t)),
    "SupConLoss": _module(SupConLoss, lambda module, s, t: module(s, torch.arange(9) % 3)),
    "KDLoss": _module(KDLoss, lambda module, s, t: module(s, t)),
    "CKDLoss": _module(CKDLoss, lambda module, s, t: module(s, t)),
    "DCDLoss": _module(lambda **x: DCDLoss(5, 5, 4, learnable=False, **x), lambda module, s, t: module(s, t)),
    "PCKDLoss": _module(lambda **x: PCKDLoss(5, 5, **x), _pckd),
    "MSDCRDLoss": _module(lambda **x: MSDCRDLoss(5, 5, **x), _msdcrd),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-320, 1e-45, 9e-5, 1.1e4, 1e30, 1e200])
def test_a_temperature_out_of_range_is_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature: got .*, expected a finite number >= 0\.0001 and <= 10000\.0$"):
        LOSSES[name](bad, torch.float32, "blocked")


@every_loss
@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_at_both_ends_of_the_range_losses_and_gradients_are_finite(name: str, temperature: float) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for backend in ("reference", "blocked"):
            terms, student = LOSSES[name](temperature, dtype, backend)
            total = sum(terms.values())
            total.backward()
            assert terms
            assert total.isfinite(), (dtype, backend)
            assert student.grad.isfinite().all(), (dtype, backend)
