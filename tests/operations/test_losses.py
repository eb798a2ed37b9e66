"""The modules: heads, the learnable temperature and its clamp, fixed temperature, state dicts, named terms."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fastkd import (
    CKDLoss,
    DCDLoss,
    InfoNCELoss,
    KDLoss,
    SupConLoss,
    ckd_loss,
    dcd_loss,
    info_nce_loss,
    kd_loss,
    sup_con_loss,
    total_loss,
)
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import CONSISTENCIES, assert_close, logits, value_and_grads


def features(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randn(n, 9, generator=generator)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_terms_sum_to_the_functional_loss_of_the_projections(consistency: str) -> None:
    module = DCDLoss(6, 9, 4, alpha=2.0, consistency=consistency)
    student, teacher = features()
    weight = torch.rand(12)
    terms = module(student, teacher, weight)
    assert set(terms) == {"contrast", "consistency"}
    expected = dcd_loss(
        module.student_head(student), module.teacher_head(teacher), math.e, alpha=2.0, consistency=consistency,
        sample_weight=weight, backend="reference",
    )  # fmt: skip
    assert_close(sum(terms.values()), expected, torch.float32)


def test_kd_module_is_the_functional_loss() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    terms = KDLoss(3.0)(student, teacher)
    assert list(terms) == ["kd"]
    assert_close(terms["kd"], kd_loss(student, teacher, 3.0, backend="reference"), torch.float32)


def test_defaults_are_the_papers() -> None:
    module = DCDLoss(6, 9)
    assert (module.alpha, module.consistency, module.max_scale) == (0.5, "student||teacher", 10.0)
    assert module.tau.item() == 1.0
    assert module.student_head.out_features == module.teacher_head.out_features == 128
    assert {name for name, _ in module.named_parameters()} == {
        "tau", "student_head.weight", "student_head.bias", "teacher_head.weight", "teacher_head.bias",
    }  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_the_modules_of_contrast_are_the_functional_losses(normalize: bool) -> None:
    query, key = torch.randn(5, 7), torch.randn(5, 7)
    labels, weight = torch.arange(5) % 2, torch.rand(5)
    options = {"normalize": normalize, "group": "local", "backend": "reference"}
    terms = InfoNCELoss(0.2, **options)(query, key, weight)
    assert list(terms) == ["info_nce"]
    expected = info_nce_loss(query, key, 5.0, normalize=normalize, sample_weight=weight, backend="reference")
    assert_close(terms["info_nce"], expected, torch.float32)
    for exclude_self in (True, False):
        terms = SupConLoss(0.2, exclude_self=exclude_self, **options)(query, labels, weight)
        assert list(terms) == ["sup_con"]
        same = {"exclude_self": exclude_self, "normalize": normalize, "sample_weight": weight}
        expected = sup_con_loss(query, labels, 5.0, backend="reference", **same)
        assert_close(terms["sup_con"], expected, torch.float32)
    assert (InfoNCELoss().temperature, SupConLoss().temperature) == (0.07, 0.1)


def test_the_total_is_the_sum_of_the_terms() -> None:
    one, other = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    total = total_loss({"one": one, "other": other})
    assert total.item() == 5.0
    total.backward()
    assert (one.grad, other.grad) == (1.0, 1.0)
    with pytest.raises(ValueError, match="terms: got none"):
        total_loss({})


S6, T9 = features()
Error = type[Exception]


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (S6[:, :5], T9, ValueError, r"student_features: got shape \[12, 5\], expected \[n, 6\]$"),
        (S6, T9[:, :8], ValueError, r"teacher_features: got shape \[12, 8\], expected \[n, 9\]$"),
        (
            S6,
            T9[:, :, None, None],
            ValueError,
            r"teacher_features: got shape \[12, 9, 1, 1\], expected .* average a map",
        ),
        (S6, T9[:7], ValueError, "teacher_features: got 7 rows, expected those of student_features, 12"),
        (
            S6.half(),
            T9,
            TypeError,
            "student_features: got torch.float16, expected the dtype of the module's parameters",
        ),
        (S6, T9.long(), TypeError, "teacher_features: got torch.int64"),
        (S6, None, TypeError, "teacher_features: got NoneType, expected a torch.Tensor"),
        (S6.to("meta"), T9, ValueError, "student_features: got device meta"),
    ],
)
def test_features_are_checked_before_the_heads(student: Tensor, teacher: Tensor, error: Error, message: str) -> None:
    with pytest.raises(error, match=message):
        DCDLoss(6, 9, 4)(student, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_teacher_is_cast_to_the_students_dtype(dtype: torch.dtype) -> None:
    student, teacher, labels = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5).to(dtype), torch.arange(9) % 5
    module = DCDLoss(5, 5, 4)
    for loss in (
        lambda t: KDLoss()(student, t)["kd"],
        lambda t: CKDLoss()(student, t)["ckd"],
        lambda t: dcd_loss(student, t, 3.0),
        lambda t: ce_kd_terms(student, t, labels)[1],
        lambda t: total_loss(module(student, t)),
    ):
        found, expected = loss(teacher), loss(teacher.float())
        assert found.item() == expected.item()
        assert found.dtype == torch.float32


def test_every_parameter_gets_a_gradient_and_moves() -> None:
    module = DCDLoss(6, 9, 4)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    sum(module(*features()).values()).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("bounds", "start", "bound"), [((None, 10.0), 5.0, 10.0), ((1.0, 100.0), -3.0, 1.0)])
def test_tau_is_held_at_its_bound_and_comes_back(
    bounds: tuple[float | None, float], start: float, bound: float
) -> None:
    module = DCDLoss(6, 6, 6, min_scale=bounds[0], max_scale=bounds[1])
    outward = 1 if start > 0 else -1
    with torch.no_grad():
        module.tau.fill_(start)
    optimizer = torch.optim.SGD([module.tau], lr=1.0)

    def step(direction: int) -> float:
        optimizer.zero_grad()
        module.project_tau()  # as every forward does
        (-direction * module.logit_scale()).backward()  # descent moves the scale that way
        assert module.tau.grad.item() != 0
        optimizer.step()
        return module.logit_scale().item()

    assert module.logit_scale().item() == pytest.approx(bound, rel=1e-6)
    for _ in range(50):
        assert step(outward) == pytest.approx(bound, rel=1e-6)
    # However long it was pushed against the bound, one step inwards leaves it.
    assert outward * (bound - step(-outward)) > 0.1 * bound


def test_reading_the_scale_does_not_write_tau() -> None:
    module = DCDLoss(6, 9)
    with torch.no_grad():
        module.tau.fill_(5.0)
    assert module.logit_scale().item() == pytest.approx(10.0)
    assert module.bounded_tau().item() == pytest.approx(math.log(10.0))
    assert module.tau.item() == 5.0
    module(*features())
    assert module.tau.item() == pytest.approx(math.log(10.0))


def test_without_bounds_tau_is_free() -> None:
    module = DCDLoss(6, 9, max_scale=None)
    with torch.no_grad():
        module.tau.fill_(5.0)
    assert module.logit_scale().item() == pytest.approx(math.exp(5.0), rel=1e-6)
    assert all(term.isfinite() for term in module(*features()).values())


def test_fixed_temperature_has_no_parameter_and_no_clamp() -> None:
    module = DCDLoss(6, 9, learnable=False)
    assert module.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert "tau" not in dict(module.named_parameters())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tau"):
        module.load_state_dict(DCDLoss(6, 9).state_dict())
    sum(module(*features()).values()).backward()
    assert module.tau.grad is None


def test_state_dict_with_a_bias_loads_and_changes_nothing() -> None:
    plain, biased = DCDLoss(6, 9, 4), DCDLoss(6, 9, 4, logit_bias=True)
    biased.load_state_dict({**plain.state_dict(), "logit_bias": torch.tensor(-10.0)})
    terms, expected = biased(*features()), plain(*features())
    assert all(terms[name].item() == expected[name].item() for name in terms)
    sum(terms.values()).backward()
    assert biased.logit_bias.grad.item() == 0.0


@pytest.mark.parametrize("learnable", [True, False])
def test_copies_and_reloads_give_the_same_loss(learnable: bool) -> None:
    module = DCDLoss(6, 9, 4, learnable=learnable)
    other = DCDLoss(6, 9, 4, learnable=learnable)
    other.load_state_dict(module.state_dict())
    values = [sum(m(*features()).values()).item() for m in (module, copy.deepcopy(module), other)]
    assert len(set(values)) == 1


def test_ckd_module_is_the_functional_loss() -> None:
    student, teacher, _ = logits(9, 5)
    weight = torch.rand(9, dtype=torch.float64)
    loss, grad = value_and_grads(lambda s: CKDLoss(0.5)(s, teacher, weight)["ckd"], student)
    expected = value_and_grads(lambda s: ckd_loss(s, teacher, 0.5, sample_weight=weight, backend="reference"), student)
    assert_close(loss, expected[0], torch.float64)
    assert_close(grad, expected[1], torch.float64)
    assert CKDLoss().temperature == 1.0
    assert not list(CKDLoss().parameters())


def test_backend_and_group_reach_ckd() -> None:
    student, teacher, _ = logits(9, 5)
    assert list(CKDLoss(backend="reference", group="local")(student, teacher)) == ["ckd"]


def test_ckd_compiles_without_a_graph_break() -> None:
    student, teacher, _ = logits(9, 5, dtype=torch.float32)
    module = CKDLoss(backend="blocked")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        value_and_grads(lambda s: compiled(s, teacher)["ckd"], student),
        value_and_grads(lambda s: module(s, teacher)["ckd"], student),
        strict=True,
    ):
        assert_close(actual, expected, torch.float32)
