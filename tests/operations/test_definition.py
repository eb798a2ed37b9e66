"""The float64 definition: it is the judge of everything else, so it is checked against plain autograd and formulas."""

import pytest
import torch
import torch.nn.functional as F

from fastkd import dcd_loss, numerics
from fastkd.backends import reference
from tests.helpers.checks import CONSISTENCIES, embeddings, relative_error


def test_dual_softmax_is_the_papers_formula_row_by_row() -> None:
    student, teacher = embeddings(6, 4)
    A = 2.5 * F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T + 0.3
    p, q = A.softmax(dim=1), A.T.softmax(dim=1)
    for consistency, (first, second) in zip(CONSISTENCIES, ((p, q), (q, p)), strict=True):
        contrast, consist = reference.dual_softmax(
            student, teacher, torch.tensor(2.5, dtype=torch.float64), 0.3, consistency
        )
        for i in range(6):
            assert contrast[i].item() == pytest.approx(-p[i, i].log().item(), rel=1e-12)
            kl = F.kl_div(second[i].log(), first[i], reduction="sum").item()
            assert consist[i].item() == pytest.approx(kl, rel=1e-10)


def test_soft_target_is_torchs_kl() -> None:
    student, teacher = embeddings(6, 9)
    rows = reference.soft_target(student, teacher, 4.0)
    expected = 16 * F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    assert rows.mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_bias_cancels_in_the_definition() -> None:
    student, teacher = embeddings(7, 5)
    scale = torch.tensor(3.0, dtype=torch.float64)
    plain = reference.dual_softmax(student, teacher, scale)
    biased = reference.dual_softmax(student, teacher, scale, 7.0)
    assert all(relative_error(b, p) < 1e-12 for b, p in zip(biased, plain, strict=True))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_gradient_of_the_bias_is_exactly_zero(backend: str, consistency: str) -> None:
    student, teacher = embeddings(33, 5)
    bias = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    with_bias = dcd_loss(student, teacher, 5.0, bias, consistency=consistency, backend=backend)
    with_bias.backward()
    assert bias.grad is not None
    assert bias.grad.item() == 0.0
    assert with_bias.item() == dcd_loss(student, teacher, 5.0, consistency=consistency, backend=backend).item()


@pytest.mark.parametrize("length", [1e-30, 1e-8, 1.0, 1e30])
def test_unit_rows_have_length_one_at_any_magnitude(length: float) -> None:
    x = torch.tensor([[3.0, 4.0]]) * length
    unit, inverse_norm = numerics.unit_rows(x)
    if length <= 1e-12:
        assert unit.abs().max() == 0
        assert inverse_norm.item() == 0
    else:
        assert torch.allclose(unit, torch.tensor([[0.6, 0.8]]))
        assert inverse_norm.item() == pytest.approx(1 / (5 * length), rel=1e-5)
