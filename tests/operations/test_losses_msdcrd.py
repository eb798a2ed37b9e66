"""MSDCRD's module: maps and tokens, channels and grids, both terms and their gradients against the formulas."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import MSDCRDLoss
from tests.helpers.checks import assert_close
from tests.helpers.losses_literal import msdcrd

B, CLASSES = 3, 3
# The default scales of a square grid, and how many local samples they make.
DEFAULTS = {
    1: ([(1, 1)], [1], 1),
    2: ([(2, 2), 1], [1, 1], 5),
    4: ([(4, 4), 2, 1], [1, 1, 1], 26),
    7: ([(7, 7), 4, 2], [1, 2, 1], 41),
    8: ([(8, 8), 4, 2], [1, 2, 1], 59),
    14: ([(14, 14), 7, 4], [1, 3, 2], 46),
}


def maps(
    student: tuple[int, ...], teacher: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, nn.Linear]:
    """Maps of these shapes behind the batch that agree in part, and a classifier of the teacher's channels."""
    generator = torch.Generator().manual_seed(4)
    channels = teacher[0] if len(teacher) == 3 else teacher[1]
    s, t = (torch.randn(B, *shape, generator=generator, dtype=torch.float64) for shape in (student, teacher))
    if s.shape == t.shape:
        s += 0.7 * t
    torch.manual_seed(5)
    return s.to(dtype), t.to(dtype), nn.Linear(channels, CLASSES).to(dtype)


IMAGES = torch.tensor([0, 2, 1])


def check(
    module: MSDCRDLoss,
    s: Tensor,
    t: Tensor,
    classifier: nn.Linear,
    literal: dict[str, Any],
    as_maps: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Both terms and the gradients of the map and the adapter against the formulas; ``as_maps``: tokens as maps."""
    s, t = s.requires_grad_(), t.requires_grad_()
    actual = module(s, t, classifier, IMAGES)
    pair = (classifier.weight, classifier.bias)
    expected = msdcrd(*(as_maps or (s, t)), pair, adapter=module.adapter, **literal)
    assert list(actual) == ["sample", "feature"]
    trained = [s, *module.parameters()]
    for name, term in actual.items():
        assert_close(term, expected[name], torch.float64)
        gradients = (torch.autograd.grad(x, trained, retain_graph=True) for x in (term, expected[name]))
        for grad, other in zip(*gradients, strict=True):
            assert_close(grad, other, torch.float64)
            assert grad.abs().sum() > 0
    sum(actual.values()).backward()
    assert t.grad is None
    assert classifier.weight.grad is None


@pytest.mark.parametrize(
    ("side", "positives"), [*((side, "index") for side in DEFAULTS), *((side, "label") for side in (1, 4, 7))]
)
def test_maps_of_one_shape(side: int, positives: str) -> None:
    windows, strides, count = DEFAULTS[side]
    module = MSDCRDLoss(5, 5, positives=positives).double()
    assert module.adapter is None
    assert module.scales(side, side) == (windows, strides)
    s, t, classifier = maps((5, side, side), (5, side, side))
    check(module, s, t, classifier, {"windows": windows, "strides": strides, "positives": positives})
    samples = sum(
        ((side - (w if isinstance(w, int) else w[0])) // stride + 1) ** 2
        for w, stride in zip(windows, strides, strict=True)
    )
    assert samples == count


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("student", [(4, 4, 4), (4, 8, 8), (4, 5, 7)], ids=str)
def test_other_channels_and_grids(student: tuple[int, ...], backend: str | None) -> None:
    module = MSDCRDLoss(4, 6, temperature=0.3, backend=backend).double()
    s, t, classifier = maps(student, (6, 7, 7))
    windows, strides, _ = DEFAULTS[7]
    check(module, s, t, classifier, {"windows": windows, "strides": strides, "temperature": 0.3})


@pytest.mark.parametrize("positives", ["index", "label"])
@pytest.mark.parametrize("selection", ["confident", "teacher_class", "image_class", "one_per_class"])
def test_the_selected_samples_alone_take_part(selection: str, positives: str) -> None:
    options: dict[str, Any] = {"selection": selection, "positives": positives, "confidence": 0.4}
    s, t, classifier = maps((4, 7, 7), (6, 7, 7))
    windows, strides, _ = DEFAULTS[7]
    literal = {"windows": windows, "strides": strides, "image_labels": IMAGES.tolist(), **options}
    module = MSDCRDLoss(4, 6, **options).double()
    check(module, s, t, classifier, literal)
    selected = module(s, t, classifier, IMAGES)["sample"]
    module.selection = "all"
    assert module(s, t, classifier)["sample"] != selected


def test_a_batch_without_a_selected_sample_costs_nothing() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4))
    s.requires_grad_()
    terms = MSDCRDLoss(5, 5, selection="confident", confidence=1.0)(s, t, classifier)
    sum(terms.values()).backward()
    assert {name: term.item() for name, term in terms.items()} == {"sample": 0, "feature": 0}
    assert not s.grad.any()


def test_a_rectangular_map_has_its_global_window() -> None:
    module = MSDCRDLoss(4, 6).double()
    s, t, classifier = maps((4, 6, 4), (6, 6, 4))
    assert module.scales(6, 4) == ([(6, 4), 2, 1], [1, 1, 1])
    check(module, s, t, classifier, {"windows": [(6, 4), 2, 1], "strides": [1, 1, 1]})


def test_given_windows_and_strides() -> None:
    s, t, classifier = maps((5, 7, 7), (5, 7, 7))
    literal = {"windows": [(7, 7), 3], "strides": [1, 2]}
    check(MSDCRDLoss(5, 5, windows=(None, 3), strides=(1, 2)).double(), s, t, classifier, literal)
    check(MSDCRDLoss(5, 5, windows=[4]).double(), s, t, classifier, {"windows": [4], "strides": [2]})


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("named", [False, True])
def test_tokens_are_the_map_of_their_grid(prefix: int, named: bool) -> None:
    """A student of tokens at a teacher's map, the reverse, and tokens at tokens."""
    windows, strides, _ = DEFAULTS[4]
    literal = {"windows": windows, "strides": strides}
    prefixes = {f"{whose}_prefix_tokens": prefix for whose in ("student", "teacher")} if named else {}
    s, t, classifier = maps((16 + prefix, 5), (16 + prefix, 6))
    s_map, t_map = (x[:, prefix:].reshape(B, 4, 4, -1).permute(0, 3, 1, 2) for x in (s.requires_grad_(), t))
    check(MSDCRDLoss(5, 6, **prefixes).double(), s, t, classifier, literal, (s_map, t_map))
    module = MSDCRDLoss(5, 6, **prefixes).double()
    both = module(s, t, classifier)
    for mixed in (module(s, t_map, classifier), module(s_map, t, classifier), module(s_map, t_map, classifier)):
        for name, term in mixed.items():
            assert_close(term, both[name], torch.float64)


def test_the_number_of_prefix_tokens_can_be_named() -> None:
    """17 tokens are 1 and a grid of 4 x 4, or 8 and one of 3 x 3."""
    s, t, classifier = maps((17, 5), (17, 5))
    module = MSDCRDLoss(5, 5, student_prefix_tokens=8, teacher_prefix_tokens=8)
    as_maps = [x[:, 8:].reshape(B, 3, 3, 5).permute(0, 3, 1, 2) for x in (s, t)]
    for name, term in module(s, t, classifier).items():
        assert_close(term, MSDCRDLoss(5, 5)(*as_maps, classifier)[name], torch.float64)


def test_channels_last_maps_and_sliced_ones() -> None:
    module = MSDCRDLoss(4, 6).double()
    s, t, classifier = maps((4, 7, 7), (6, 7, 7))
    expected = module(s, t, classifier)
    wide = torch.randn(B, 4, 14, 9, dtype=torch.float64)
    wide[:, :, ::2, 1:8] = s
    for variant in (s.contiguous(memory_format=torch.channels_last), wide[:, :, ::2, 1:8]):
        leaf = variant.detach().requires_grad_()
        actual = module(leaf, t.contiguous(memory_format=torch.channels_last), classifier)
        for name, term in actual.items():
            assert_close(term, expected[name], torch.float64)
        sum(actual.values()).backward()
        assert leaf.grad.shape == leaf.shape


def test_weights_and_terms_of_weight_zero() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4))
    plain = MSDCRDLoss(5, 5)(s, t, classifier)
    weighted = MSDCRDLoss(5, 5, sample_term_weight=0.5, feature_weight=3.0)(s, t, classifier)
    assert_close(weighted["sample"], 0.5 * plain["sample"], torch.float64)
    assert_close(weighted["feature"], 3 * plain["feature"], torch.float64)
    assert MSDCRDLoss(5, 5, sample_term_weight=0)(s, t, classifier) == {"feature": plain["feature"]}
    assert MSDCRDLoss(5, 5, feature_weight=0)(s, t, classifier) == {"sample": plain["sample"]}


def test_a_pair_is_as_good_as_a_linear_layer() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4))
    module = MSDCRDLoss(5, 5)
    assert module(s, t, (classifier.weight, classifier.bias)) == module(s, t, classifier)


def test_copies_and_reloads_give_the_same_loss() -> None:
    inputs = maps((4, 4, 4), (6, 4, 4))
    module, other = MSDCRDLoss(4, 6).double(), MSDCRDLoss(4, 6).double()
    assert other(*inputs) != module(*inputs)
    other.load_state_dict(module.state_dict())
    assert other(*inputs) == module(*inputs) == copy.deepcopy(module)(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [None, torch.float32], ids=str)
def test_autocast_keeps_the_terms_and_their_gradients(dtype: torch.dtype, teacher_dtype: torch.dtype | None) -> None:
    s, t, classifier = maps((4, 7, 7), (6, 7, 7))
    module = MSDCRDLoss(4, 6, temperature=1.0).double()
    expected = module(s, t, classifier)
    s, t = s.to(dtype).requires_grad_(), t.to(teacher_dtype or dtype)
    module, classifier = module.float(), classifier.float()
    with torch.autocast("cpu", dtype):
        terms = module(s, t, classifier)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert abs(term.item() - expected[name].item()) < 0.02 * expected[name].item(), name
    sum(terms.values()).backward()
    assert s.grad.dtype == dtype
    assert s.grad.isfinite().all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    s, t, classifier = maps((16, 5), (6, 4, 4), torch.float32)
    module = MSDCRDLoss(5, 6, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, module):
        leaf = s.clone().requires_grad_()
        terms = function(leaf, t, classifier)
        grads.append(torch.autograd.grad(sum(terms.values()), [leaf, *module.parameters()]))
    for grad, expected in zip(*grads, strict=True):
        assert_close(grad, expected, torch.float32)


def test_dead_channels_and_zero_maps_are_finite() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4))
    module = MSDCRDLoss(5, 5)
    s[:, 2], t[:, 3] = 0, 0
    s.requires_grad_()
    pair = (classifier.weight, classifier.bias)
    actual, expected = module(s, t, classifier), msdcrd(s, t, pair, DEFAULTS[4][0], DEFAULTS[4][1])
    for name, term in actual.items():
        assert_close(term, expected[name], torch.float64)
    grads = [torch.autograd.grad(terms["feature"], s)[0] for terms in (actual, expected)]
    assert not grads[0][:, 2].any()  # by convention; the literal formula divides by its epsilon there
    alive = [0, 1, 3, 4]
    assert_close(grads[0][:, alive], grads[1][:, alive], torch.float64)
    zeros = torch.zeros_like(s, requires_grad=True)
    terms = module(zeros, torch.zeros_like(t), classifier)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert zeros.grad.isfinite().all()
    assert not sum(module(torch.full_like(s, torch.nan), t, classifier).values()).isfinite()


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, (5, 7, 7), (6, 7, 7), r"student_map: got shape \[3, 5, 7, 7\], expected \[B, 4, H, W\] or tokens"),
        ({}, (4, 7, 7), (5, 7, 7), r"teacher_map: got shape \[3, 5, 7, 7\], expected \[B, 6, H, W\] or tokens"),
        ({}, (17, 5), (6, 7, 7), r"student_map: got shape \[3, 17, 5\], expected \[B, 4, H, W\] or tokens \[B, L, 4\]"),
        ({}, (4,), (6, 7, 7), r"student_map: got shape \[3, 4\]"),
        ({}, (35, 4), (6, 7, 7), "student_map: got 35 tokens, expected a square number after at most 8 prefix tokens"),
        ({"teacher_prefix_tokens": 2}, (4, 7, 7), (17, 6), "teacher_map: got 17 tokens, .* after 2 prefix"),
        ({"teacher_prefix_tokens": 17}, (4, 7, 7), (17, 6), "teacher_map: got 17 tokens"),
        ({"windows": (None, 9)}, (4, 9, 9), (6, 7, 7), "windows: got 9 x 9, expected at most the map's 7 x 7"),
        ({"strides": (1, 2)}, (4, 7, 7), (6, 7, 7), "strides: got 2 entries, expected one per window, 3"),
        ({}, (4, 0, 7), (6, 7, 7), r"student_map: got shape \[3, 4, 0, 7\]"),
    ],
)  # fmt: skip
def test_errors_of_maps(
    options: dict[str, Any], student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    s, t, _ = maps(student, teacher)
    with pytest.raises(ValueError, match=message):
        MSDCRDLoss(4, 6, **options).double()(s, t, nn.Linear(6, CLASSES).double())


def test_a_function_of_the_samples_can_be_the_classifier() -> None:
    s, t, classifier = maps((4, 7, 7), (6, 7, 7))
    module = MSDCRDLoss(4, 6).double()
    expected = module(s, t, classifier)
    assert module(s, t, lambda samples: classifier(samples)) == expected
    assert module(s, t, lambda samples: -classifier(samples))["sample"] != expected["sample"]


def test_more_errors_name_the_argument() -> None:
    s, t, classifier = maps((4, 7, 7), (6, 7, 7))
    module = MSDCRDLoss(4, 6).double()
    with pytest.raises(
        ValueError, match=r"teacher_classifier: got a weight of shape \[3, 4\], expected \[classes, 6\]"
    ):
        module(s, t, nn.Linear(4, CLASSES))
    with pytest.raises(TypeError, match=r"student_map: got torch.float32, expected the dtype of the module"):
        module(s.float(), t, classifier)
    with pytest.raises(TypeError, match=r"teacher_map: got torch.int64"):
        module(s, t.long(), classifier)
    with pytest.raises(ValueError, match="teacher_map: got 2 samples, expected those of student_map, 3"):
        module(s, t[:2], classifier)
    with pytest.raises(ValueError, match=r"student_map: got shape \[0, 4, 7, 7\], expected at least one sample"):
        module(s[:0], t[:0], classifier)
    for options, message in (
        ({"windows": (0,)}, "windows: got 0"),
        ({"strides": (0,)}, "strides: got 0"),
        ({"positives": "class"}, "positives: got 'class'"),
        ({"selection": "best"}, "selection: got 'best'"),
        ({"confidence": 1.5}, "confidence: got 1.5"),
        ({"student_prefix_tokens": -1}, "student_prefix_tokens: got -1"),
        ({"sample_term_weight": 0, "feature_weight": 0}, "sample_term_weight, feature_weight: got 0 for all"),
    ):
        with pytest.raises(ValueError, match=message):
            MSDCRDLoss(4, 6, **options)
    with pytest.raises(TypeError, match="labels: got NoneType"):
        MSDCRDLoss(4, 6, selection="image_class").double()(s, t, classifier)
    with pytest.raises(TypeError, match="strides: got None"):
        MSDCRDLoss(4, 6, strides=(None,))


def test_errors_of_the_classifier_name_it() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4))
    module, weight = MSDCRDLoss(5, 5), classifier.weight.detach()
    with pytest.raises(TypeError, match=r"teacher_classifier: weight: got torch.int8, expected float64"):
        module(s, t, (weight.to(torch.int8), None))
    with pytest.raises(TypeError, match=r"teacher_classifier: got a bias of torch.float32, expected the dtype of the"):
        module(s, t, (weight, torch.zeros(CLASSES)))
    with pytest.raises(ValueError, match="teacher_classifier: got device meta, expected that of the features, cpu"):
        module(s, t, (weight.to("meta"), None))
    assert module(s, t, (weight.bfloat16(), None))["feature"] == module(s, t, (weight, None))["feature"]


@pytest.mark.slow
@pytest.mark.parametrize("student", [(17, 5), (5, 4, 4)], ids=str)
def test_compiles_without_a_graph_break_for_changing_shapes(student: tuple[int, ...]) -> None:
    torch.compiler.reset()
    s, t, classifier = maps(student, (6, 4, 4))
    module = MSDCRDLoss(5, 6, backend="blocked").double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 2):
        expected = module(s[:rows], t[:rows], classifier)
        for name, term in compiled(s[:rows], t[:rows], classifier).items():
            assert_close(term, expected[name], torch.float64)


def test_labels_are_those_without_autocast() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4), torch.float32)
    with torch.no_grad():  # in bfloat16 all classes would tie
        classifier.weight.mul_(1e-3).add_(1)
        classifier.bias.zero_()
    module = MSDCRDLoss(5, 5, feature_weight=0)
    expected = module(s, t, classifier)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(s, t, classifier) == expected


@pytest.mark.parametrize("size", [1e-8, 1e14, 1e25, 1e36])
def test_the_size_of_maps_changes_nothing_but_the_size_of_gradients(size: float) -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4), torch.float32)
    module = MSDCRDLoss(5, 5, sample_term_weight=0)
    s[:, 3] *= 1e-3  # channels of different sizes
    results = []
    for factor in (1.0, size):
        leaf = (factor * s).requires_grad_()
        term = module(leaf, factor * t, classifier)["feature"]
        (grad,) = torch.autograd.grad(term, leaf)
        results.append((term, factor * grad))
    for actual, expected in zip(*results[::-1], strict=True):
        assert_close(actual, expected, torch.float32)


def test_maps_that_are_not_finite_give_nan() -> None:
    s, t, classifier = maps((5, 4, 4), (5, 4, 4), torch.float32)
    s[0, 0, 0, 0] = torch.inf
    assert MSDCRDLoss(5, 5, sample_term_weight=0)(s, t, classifier)["feature"].isnan()


@pytest.mark.parametrize("name", ["windows", "strides"])
def test_scales_are_a_sequence(name: str) -> None:
    for value, kind in ((7, "int"), (torch.tensor([3, 2]), "Tensor")):
        with pytest.raises(TypeError, match=rf"{name}: got .* of type {kind}, expected Sequence"):
            MSDCRDLoss(5, 5, **{name: value})
