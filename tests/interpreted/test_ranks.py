"""Both similarity operations over several ranks, in one process, against the float64 definition."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fastkd.kernels import tiles
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.dual_softmax import streaming as dual_softmax
from torch import Tensor

from fastkd import dcd_loss
from tests.helpers.blocks_of_ranks import contrast_over_ranks, dcd_over_ranks
from tests.helpers.checks import CONSISTENCIES, assert_close, embeddings, value_and_grads
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, check_against_definition

# Tiles are 16 x 16. The second rank is empty, or has keys alone.
SIZES = (5, 0, 19)
WEIGHT = torch.tensor([0.0, 5.0, 1.0]).repeat(8)


def key_sizes(mode: str) -> tuple[int, ...]:
    if MODES[mode][3] or mode in NEEDS_PAIRS:
        return SIZES
    # A query with a positive by index needs a key on its rank.
    return (0, 17, 4) if mode == "label" else (1, 17, 4)


@pytest.mark.parametrize(("consistency", "bound"), zip(CONSISTENCIES, (40.0, math.inf), strict=True))
def test_dcd(consistency: str, bound: float, route: str) -> None:
    inputs = *embeddings(sum(SIZES), 20), torch.tensor(6.0, dtype=torch.float64)
    expected = value_and_grads(lambda *x: dcd_loss(*x, consistency=consistency, backend="reference"), *inputs)
    loss = dcd_over_ranks(SIZES, consistency, bound)
    for found, wanted in zip(value_and_grads(loss, *(x.float() for x in inputs)), expected, strict=True):
        assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_contrast_with_weights(mode: str, route: str) -> None:
    p, loss = contrast_over_ranks(mode, SIZES, key_sizes(mode), 20, weight=WEIGHT)
    check_against_definition(p, upstream=-37.0, kernel=loss)


@pytest.mark.parametrize("mode", MODES)
def test_contrast_of_rows_as_they_are_in_half_precision(mode: str) -> None:
    p, loss = contrast_over_ranks(mode, SIZES, key_sizes(mode), 16, dtype=torch.float16, normalize=False, scale=1.5)
    check_against_definition(p, kernel=loss)


@pytest.mark.parametrize("mode", ["masked, given index", "self label"])
def test_columns_split_over_programs_and_a_scale_that_needs_the_maximum(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "column_splits", lambda *_: 3)
    p, loss = contrast_over_ranks(mode, SIZES, key_sizes(mode), 6, scale=120.0)
    check_against_definition(p, kernel=loss)


def test_rows_wider_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "running_statistics", None)
    monkeypatch.setattr(contrast, "gradient_sums", None)
    p, loss = contrast_over_ranks("index", SIZES, SIZES, 300)
    check_against_definition(p, kernel=loss)


def test_a_rank_whose_weights_are_zero() -> None:
    weight = torch.ones(24)
    weight[:5] = 0
    p, loss = contrast_over_ranks("masked", SIZES, SIZES, 16, weight=weight)
    check_against_definition(p, kernel=loss)


def recorded(module: ModuleType, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the rows and columns of every launch of ``module`` into ``seen``; returns a list of ``all_columns``."""
    columns_told: list[int] = []

    def watch(launcher: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def launch(rows, columns, *args, **options):
            seen.extend(x if isinstance(x, Tensor) else x.vectors for x in (rows, columns))
            columns_told.append(options["all_columns"])
            return launcher(rows, columns, *args, **options)

        return launch

    for name in ("running_statistics", "gradient_sums"):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    return columns_told


@pytest.mark.parametrize("operation", ["dual_softmax", "contrast"])
def test_rows_are_rounded_to_tf32_wherever_they_are_multiplied(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block and the own rows: a tf32 product would truncate what is left of the mantissa."""
    seen: list[Tensor] = []
    monkeypatch.setattr("fastkd.backends.triton.rows.rounds_to_tf32", lambda rows: True)
    told = recorded({"dual_softmax": dual_softmax, "contrast": contrast}[operation], seen, monkeypatch)
    if operation == "contrast":
        p, loss = contrast_over_ranks("index", SIZES, SIZES, 16)
        check_against_definition(p, tolerance=torch.float16, kernel=loss)
    else:
        inputs = *embeddings(sum(SIZES), 16, dtype=torch.float32), torch.tensor(6.0)
        value_and_grads(dcd_over_ranks(SIZES, CONSISTENCIES[0], 40.0), *inputs)
    assert len(seen) > 8
    assert all((x.view(torch.int32) & 0x1FFF).count_nonzero() == 0 for x in seen)
    # The columns are split over programs as suits all of them, not a rank's own.
    assert set(told) == {sum(SIZES)}
