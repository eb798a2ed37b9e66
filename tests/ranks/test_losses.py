"""The loss modules over several ranks: terms and gradients are those of one process on the concatenated batch."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import preview_weight
from tests.helpers.checks import assert_close
from tests.helpers.gpu import on_every_device
from tests.helpers.ranks import Failure, run_ranks, succeeded
from tests.ranks import loss_rank_programs as programs

SIZES = [(3, 3), (4, 1), (0, 3), (2, 1, 3), (3, 0, 1)]
WEIGHTS = {"category": 0.7, "center": 1.3, "feature": -0.4, "sample": 2.1}  # upstream gradients that differ by term

# name of a case -> module, options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ckd": ("ckd", {}),
    "pckd": ("pckd", {"same": True}),
    "pckd of other widths": ("pckd", {"category_weight": 3.0, "kd_weight": 0.5}),
    "pckd without category": ("pckd", {"same": True, "category_weight": 0}),
    "msdcrd": ("msdcrd", {}),
    "msdcrd by label": ("msdcrd", {"positives": "label", "same": True}),
    "pckd of the authors' code": (
        "pckd",
        {"same": True, "preview_base": 1.01, "preview_gradient": True, "category_eps": 0.01, "first_epoch": 1},
    ),
    "msdcrd of one sample per class": ("msdcrd", {"selection": "one_per_class"}),
    "msdcrd of sure samples": ("msdcrd", {"selection": "confident", "confidence": 0.36}),
    "msdcrd of channels": ("msdcrd", {"sample_term_weight": 0, "feature_weight": 0.5}),
}


def check(case: str, sizes: tuple[int, ...], how: str = "bare", device: str = "cpu") -> None:
    name, options = CASES[case]
    given = (name, sizes, options, how, WEIGHTS, device)
    results = succeeded(run_ranks(len(sizes), programs.module_on_rank, *given, device=device))
    inputs = programs.batch(sum(sizes), options.get("same", False))
    expected = programs.terms_and_gradients(programs.Student(name, **options), inputs, WEIGHTS)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(dim=0)

    assert len(expected["terms"]) > 0
    for term, value in expected["terms"].items():
        assert_close(mean([result["terms"][term] for result in results]), value, torch.float64)
    assert_close(torch.cat([result["rows"] for result in results]) / len(sizes), expected["rows"], torch.float64)
    assert set(results[0]["gradients"]) == set(expected["gradients"])
    for parameter, value in expected["gradients"].items():
        grads = [result["gradients"][parameter] for result in results]
        if how == "ddp":
            assert all(torch.equal(grad, grads[0]) for grad in grads)
        assert_close(mean(grads), value, torch.float64)


@on_every_device
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(case: str, sizes: tuple[int, ...], device: str) -> None:
    check(case, sizes, device=device)


@on_every_device
@pytest.mark.parametrize("case", ["pckd", "msdcrd", "pckd without category", "msdcrd of channels"])
def test_gradients_under_ddp_are_those_of_the_global_batch(case: str, device: str) -> None:
    check(case, (2, 1, 3), "ddp", device)


@pytest.mark.parametrize("case", ["pckd", "msdcrd", "pckd without category", "msdcrd of channels"])
def test_compiled_modules_leave_the_exchange_to_eager_code(case: str) -> None:
    check(case, (4, 1), "compile")


def test_maps_whose_squares_overflow_are_no_exception() -> None:
    expected = succeeded(run_ranks(2, programs.feature_term_of_size, 1.0))
    for value in succeeded(run_ranks(2, programs.feature_term_of_size, 1e25)):
        assert_close(value, expected[0], torch.float32)


def test_a_second_derivative_is_refused() -> None:
    for result in run_ranks(2, programs.second_derivative):
        assert isinstance(result, Failure)
        assert "differentiate" in result.message


@pytest.mark.parametrize("name", ["ckd", "pckd", "msdcrd"])
def test_local_modules_communicate_nothing(name: str) -> None:
    assert run_ranks(2, programs.local_bytes, name) == [{}, {}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_preview_weights_compare_with_the_global_mean(sizes: tuple[int, ...]) -> None:
    ce = torch.arange(1, sum(sizes) + 1, dtype=torch.float64).square()
    weights = succeeded(run_ranks(len(sizes), programs.preview_on_rank, sizes, ce, 1.1, None))
    expected = preview_weight(ce, 1.1)
    assert_close(torch.cat(weights), expected, torch.float64)
    assert 0 < (expected == 1).sum() < len(ce)


def test_preview_weights_are_of_one_dtype() -> None:
    for result in run_ranks(2, programs.preview_of_two_dtypes):
        assert isinstance(result, Failure)
        assert "group: the ranks disagree: dtype: got torch.float32 on rank 0, torch.float64" in result.message


def test_local_preview_weights_compare_with_their_own_mean() -> None:
    ce = torch.tensor([1.0, 2.0, 30.0, 60.0])
    weights = succeeded(run_ranks(2, programs.preview_on_rank, (2, 2), ce, 1.1, "local"))
    assert all(torch.equal(own, preview_weight(x, 1.1)) for own, x in zip(weights, ce.split(2), strict=True))


@pytest.mark.parametrize(
    ("name", "deviation", "message"),
    [
        ("pckd", {"labels": torch.full((3,), 9)}, r"labels: got 9, .* \(on rank 1 of 2\)"),
        ("pckd", {"temperature": 2.0}, "group: the ranks disagree: module"),
        ("msdcrd", {"teacher": torch.zeros(3, 2, 7, 7).double()}, r"teacher_map: got shape .* \(on rank 1 of 2\)"),
        ("dcd", {"teacher": torch.zeros(3, 5, 7, 7).double()}, r"teacher_features: got shape .* \(on rank 1 of 2\)"),
        ("msdcrd", {"positives": "label"}, "group: the ranks disagree: module"),
        ("msdcrd", {"teacher": torch.zeros(3, 6, 5, 5).double()}, "group: the ranks disagree: grid"),
        (
            "pckd",
            {"classifier": (torch.zeros(4, 5).double(), None)},
            "group: the ranks disagree: center: got True on rank 0",
        ),
        (
            "msdcrd",
            {"classifier": (torch.zeros(4, 6), torch.zeros(4).double())},
            r"teacher_classifier: got a bias of torch.float64, .* \(on rank 1 of 2\)",
        ),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(name: str, deviation: dict[str, Any], message: str) -> None:
    for result in run_ranks(2, programs.with_deviation, name, deviation):
        assert isinstance(result, Failure)
        assert re.search(message, str(result)), str(result)
