"""PCKD's module and the preview weights: every term and gradient against the formulas written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import PCKDLoss, preview_weight
from tests.helpers.checks import assert_close
from tests.helpers.losses_literal import pckd

B, C, D_S, D_T = 10, 4, 6, 9


class Case:
    """A module, two classifiers and inputs; as many students' features as the teacher's if ``same``."""

    def __init__(self, same: bool = False, bias: bool = True, **options: Any) -> None:
        torch.manual_seed(3)
        width = D_S if same else D_T
        self.module = PCKDLoss(D_S, width, hidden_dim=7, **options).double()
        self.student_classifier = nn.Linear(D_S, C, bias=bias).double()
        self.teacher_classifier = nn.Linear(width, C, bias=bias).double()
        self.student_features = torch.randn(B, D_S, dtype=torch.float64, requires_grad=True)
        self.teacher_features = torch.randn(B, width, dtype=torch.float64, requires_grad=True)
        self.student_logits = (2 * torch.randn(B, C, dtype=torch.float64)).requires_grad_()
        self.teacher_logits = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
        self.labels = torch.arange(B) % 3

    def arguments(self) -> tuple[Tensor, ...]:
        return (self.student_features, self.teacher_features, self.student_logits, self.teacher_logits, self.labels)

    def terms(self, epoch: float = 20, **changes: Any) -> dict[str, Tensor]:
        names = ("student_features", "teacher_features", "student_logits", "teacher_logits", "labels")
        arguments = {
            **dict(zip(names, self.arguments(), strict=True)),
            "student_classifier": self.student_classifier,
            "teacher_classifier": self.teacher_classifier,
            "epoch": epoch,
        }
        return self.module(**{**arguments, **changes})

    def literal(self, epoch: float = 20, **options: Any) -> dict[str, Tensor]:
        classifiers = [(layer.weight, layer.bias) for layer in (self.student_classifier, self.teacher_classifier)]
        return pckd(self.module, *self.arguments(), *classifiers, epoch, **options)

    def trained(self) -> dict[str, Tensor]:
        return {
            **dict(self.module.named_parameters()),
            **{f"student_classifier.{name}": x for name, x in self.student_classifier.named_parameters()},
            "student_features": self.student_features,
            "student_logits": self.student_logits,
        }


AUTHORS = {"first_epoch": 1, "preview_gradient": True, "category_eps": 0.01}


def compare(case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    trained = list(case.trained().values())
    for name, term in actual.items():
        assert_close(term, expected[name], torch.float64)
        gradients = (
            torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True)
            for value in (term, expected[name])
        )
        for grad, other in zip(*gradients, strict=True):
            assert_close(grad, other, torch.float64)


@pytest.mark.parametrize("option", AUTHORS)
def test_the_readings_of_the_authors_code_are_the_formula_and_not_the_default(option: str) -> None:
    chosen: dict[str, Any] = {"preview_base": 1.2, option: AUTHORS[option]}
    case = Case(same=True, **chosen)
    actual = case.terms(1)
    compare(case, actual, case.literal(1, **chosen))
    del chosen[option]
    default = case.literal(1, **chosen)
    changed = {"first_epoch": "kd", "preview_gradient": "kd", "category_eps": "category"}[option]
    values = actual, default
    if option == "preview_gradient":  # the value is the same
        values = tuple({"kd": torch.autograd.grad(x["kd"], case.student_logits)[0]} for x in values)
    assert not torch.allclose(values[0][changed], values[1][changed], rtol=1e-5)
    # Once every sample is easy, the weights are constant.
    assert_close(case.terms(2000)["kd"], case.literal(2000, **chosen)["kd"], torch.float64)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_every_term_and_gradient_is_the_formula(same: bool, bias: bool, backend: str | None) -> None:
    case = Case(same, bias, backend=backend)
    actual, expected = case.terms(), case.literal()
    assert list(actual) == ["category", *(["center"] if same else []), "feature", "kd"]
    compare(case, actual, expected)


def test_some_samples_are_too_hard_at_first_and_none_in_the_end() -> None:
    case = Case()
    early, late = case.terms(epoch=0), case.terms(epoch=2000)
    assert early["kd"] < late["kd"]
    assert early["category"] < late["category"]
    assert early["feature"] == late["feature"]


def test_options_and_weights_reach_their_terms() -> None:
    options = {"temperature": 2.0, "relation_scale": 0.7, "preview_base": 1.3}
    weights = {"category_weight": 0.5, "center_weight": 2.0, "feature_weight": 3.0, "kd_weight": 0.25}
    case = Case(same=True, **options, **weights)
    expected = case.literal(2, **options)
    for name, term in case.terms(2).items():
        assert_close(term, weights[f"{name}_weight"] * expected[name], torch.float64)


def test_the_teacher_gets_no_gradient_and_every_parameter_does() -> None:
    case = Case(same=True)
    sum(case.terms().values()).backward()
    teacher = [case.teacher_features, case.teacher_logits, *case.teacher_classifier.parameters()]
    assert all(x.grad is None for x in teacher)
    assert all(x.grad.abs().sum() > 0 for x in case.trained().values())


def test_a_pair_is_as_good_as_a_linear_layer() -> None:
    case = Case(same=True)
    layers = {"student_classifier": case.student_classifier, "teacher_classifier": case.teacher_classifier}
    pairs = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    assert case.terms() == case.terms(**pairs)
    # [weight | bias] and [weight] differ in shape.
    assert "center" not in case.terms(student_classifier=(case.student_classifier.weight, None))


def test_a_part_of_weight_zero_is_left_out() -> None:
    case = Case(category_weight=0.0, feature_weight=0.0)
    assert list(case.terms()) == ["kd"]
    assert not list(case.module.parameters())
    assert list(Case(same=True, kd_weight=0, center_weight=0, category_weight=0).terms()) == ["feature"]
    with pytest.raises(ValueError, match="category_weight, center_weight, feature_weight, kd_weight: got 0 for all"):
        PCKDLoss(4, 4, category_weight=0, center_weight=0, feature_weight=0, kd_weight=0)


def test_defaults() -> None:
    module = PCKDLoss(64, 256)
    assert (module.temperature, module.relation_scale, module.preview_base) == (4.0, 0.25, 1.005)
    assert set(module.weights.values()) == {1.0}
    assert module.mlp[0].out_features == 4096
    assert PCKDLoss(4, 2048).mlp[0].out_features == 4096
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"student_head", "teacher_head", "mlp"}


def test_copies_and_reloads_give_the_same_loss() -> None:
    case, other = Case(), Case()
    other.module = PCKDLoss(D_S, D_T, hidden_dim=7).double()
    assert other.terms() != case.terms()
    other.module.load_state_dict(case.module.state_dict())
    assert other.terms() == case.terms()
    other.module = copy.deepcopy(case.module)
    assert other.terms() == case.terms()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_terms_and_their_gradients(dtype: torch.dtype) -> None:
    case = Case(same=True)
    expected = case.literal()
    for name in ("module", "student_classifier", "teacher_classifier"):
        getattr(case, name).float()
    for name in ("student_features", "teacher_features", "student_logits", "teacher_logits"):
        setattr(case, name, getattr(case, name).detach().to(dtype).requires_grad_())
    with torch.autocast("cpu", dtype):
        terms = case.terms()
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert abs(term.item() - expected[name].item()) < 0.02 * (1 + abs(expected[name].item())), name
    sum(terms.values()).backward()
    assert all(x.grad.isfinite().all() for x in case.trained().values())
    assert case.student_features.grad.dtype == dtype


def test_compiles_without_a_graph_break() -> None:
    case = Case(same=True, backend="blocked")
    compiled = torch.compile(case.module, fullgraph=True, backend="aot_eager")
    expected = case.terms()
    layers = case.student_classifier, case.teacher_classifier
    for epoch in (20, 21, 22):
        actual = compiled(*case.arguments(), *layers, epoch)
        if epoch == 20:
            for name, term in actual.items():
                assert_close(term, expected[name], torch.float64)
    sum(actual.values()).backward()
    assert all(x.grad is not None for x in case.trained().values())


ERRORS = {
    "student_features": (
        torch.zeros(B, D_S + 1).double(),
        r"student_features: got shape \[10, 7\], expected \[10, 6\]",
    ),
    "teacher_features": (torch.zeros(B - 1, D_T).double(), r"teacher_features: got shape \[9, 9\], expected \[10, 9\]"),
    "teacher_logits": (torch.zeros(B, C + 1).double(), "teacher_logits: got shape"),
    "labels": (torch.full((B,), C), r"labels: got 4, expected class indices in \[0, 4\)"),
    "student_classifier": (nn.Linear(D_T, C), r"student_classifier: got a weight of shape \[4, 9\], expected \[4, 6\]"),
    "teacher_classifier": (nn.Linear(D_T, 5), r"teacher_classifier: got a weight of shape \[5, 9\], expected \[4, 9\]"),
    "epoch": (-1, "epoch: got -1, expected a finite number >= 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    value, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        Case().terms(**{name: value})


def test_more_errors_name_the_argument() -> None:
    case = Case()
    with pytest.raises(TypeError, match=r"student_features: got torch.float32, expected the dtype of the module"):
        case.terms(student_features=case.student_features.float())
    with pytest.raises(TypeError, match=r"teacher_classifier: got Sequential, expected an nn.Linear or a pair"):
        case.terms(teacher_classifier=nn.Sequential())
    with pytest.raises(ValueError, match=r"student_classifier: got a bias of shape \[3\], expected \[4\]"):
        case.terms(student_classifier=(case.student_classifier.weight, torch.zeros(3)))
    for options, message in (
        ({"relation_scale": -1.0}, "relation_scale: got -1.0"),
        ({"kd_weight": -1.0}, "kd_weight: got -1.0"),
        ({"hidden_dim": 0}, "hidden_dim: got 0"),
        ({"preview_base": 0}, "preview_base: got 0"),
        ({"first_epoch": -1}, "first_epoch: got -1"),
        ({"category_eps": 2.0}, "category_eps: got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PCKDLoss(4, 4, **options)


@pytest.mark.parametrize("biased", [False, True])
def test_a_center_that_is_all_there_is_must_be_possible(biased: bool) -> None:
    case = Case()
    module = PCKDLoss(D_S, D_S, category_weight=0, feature_weight=0, kd_weight=0).double()
    case.teacher_features = case.student_features
    own, other = (nn.Linear(D_S, C).double() for _ in range(2))
    assert list(module(*case.arguments(), own, other, 1)) == ["center"]
    wide = torch.randn(len(case.student_features), D_S + 1, dtype=torch.float64)
    arguments = [case.student_features, case.teacher_features, *case.arguments()[2:]]
    other = nn.Linear(D_S, C, bias=False).double()
    expected = (
        rf"student_classifier: got \[{C}, {D_S}\] with a bias, expected that of the teacher's, \[{C}, {D_S}\] without"
    )
    if not biased:
        module = PCKDLoss(D_S, D_S + 1, category_weight=0, feature_weight=0, kd_weight=0).double()
        arguments[1], other = wide, nn.Linear(D_S + 1, C).double()
        expected = rf"expected that of the teacher's, \[{C}, {D_S + 1}\] with a bias: center is the only part"
    with pytest.raises(ValueError, match=expected):
        module(*arguments, own, other, 1)


def test_zero_features_are_finite() -> None:
    case = Case()
    with torch.no_grad():
        case.student_features.zero_()
        for parameter in case.module.parameters():
            parameter.zero_()
    terms = case.terms()
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in case.trained().values())


def test_preview_weight_of_edges() -> None:
    assert preview_weight(torch.zeros(3), 1.0).tolist() == [1.0, 1.0, 1.0]
    assert preview_weight(torch.ones(3), 1.0).tolist() == [1.0, 1.0, 1.0]  # all as hard as the threshold
    assert preview_weight(torch.tensor([0.0, 3e38]), 1.0).isfinite().all()
    assert preview_weight(torch.tensor([1.0, float("nan")]), 1.0).isnan().all()
    assert preview_weight(torch.ones(2, dtype=torch.bfloat16), 1.0).dtype == torch.float32


@pytest.mark.parametrize("biased", ["student", "teacher"])
def test_weights_and_biases_that_agree_in_total_width_alone_have_no_center(biased: str) -> None:
    case = Case()
    module = PCKDLoss(D_S, D_S + 1, hidden_dim=7).double()
    case.teacher_features = case.teacher_features[:, : D_S + 1]
    own = nn.Linear(D_S, C, bias=biased == "student").double()
    other = nn.Linear(D_S + 1, C, bias=biased == "teacher").double()
    assert list(module(*case.arguments(), own, other, 1)) == ["category", "feature", "kd"]


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_errors_of_classifiers_name_them(whose: str) -> None:
    case = Case(same=True)
    name, weight = f"{whose}_classifier", getattr(case, f"{whose}_classifier").weight.detach()
    for dtype in (torch.int64, torch.int8):
        with pytest.raises(TypeError, match=rf"{name}: weight: got {dtype}, expected float64"):
            case.terms(**{name: (weight.to(dtype), None)})
    with pytest.raises(TypeError, match=rf"{name}: got a bias of torch.float32, expected the dtype of the weight"):
        case.terms(**{name: (weight, torch.zeros(C))})
    with pytest.raises(ValueError, match=rf"{name}: got device meta, expected that of the features, cpu"):
        case.terms(**{name: (weight.to("meta"), None)})
    with pytest.raises(ValueError, match=rf"{name}: got device meta, expected that of the features, cpu"):
        case.terms(**{name: (weight, torch.zeros(C, device="meta").double())})


def test_a_teacher_classifier_of_another_dtype_is_converted() -> None:
    case = Case(same=True)
    expected = case.terms()
    case.teacher_classifier.to(torch.bfloat16)
    for name, term in case.terms().items():
        assert abs(term.item() - expected[name].item()) < 0.02 * (1 + abs(expected[name].item())), name


@pytest.mark.slow
def test_compiles_without_a_graph_break_for_changing_shapes() -> None:
    torch.compiler.reset()
    case = Case(same=True, backend="blocked")
    compiled = torch.compile(case.module, fullgraph=True, backend="aot_eager", dynamic=True)
    layers = case.student_classifier, case.teacher_classifier
    for rows, epoch in ((10, 20), (9, 21)):
        arguments = [x[:rows] for x in case.arguments()]
        expected = case.module(*arguments, *layers, epoch)
        for name, term in compiled(*arguments, *layers, epoch).items():
            assert_close(term, expected[name], torch.float64)


def test_no_sample_is_too_hard_in_the_limit() -> None:
    case = Case()
    assert case.terms(epoch=200_000) == case.terms(epoch=1e300) == case.terms(epoch=20_000)


def test_a_negative_cross_entropy_gives_nan_where_it_cannot_raise() -> None:
    torch.compiler.reset()
    ce = torch.tensor([1.0, -2.0])
    assert torch.compile(preview_weight, backend="aot_eager", fullgraph=True)(ce, 1.0).isnan().all()
