"""``contrast`` of several ranks, in one process, against the float64 definition."""

import pytest
import torch
from fastkd.kernels import tiles
from fastkd.kernels.contrast import streaming as contrast

from fastkd.backends.triton import contrast_rows as triton_contrast_rows
from tests.helpers.contrast_blocks import ranks_problem
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, check_against_definition

# Tiles are 16 x 16. The second rank is empty, or has keys alone.
SIZES = (5, 0, 19)
WEIGHT = torch.tensor([0.0, 5.0, 1.0]).repeat(8)


def key_sizes(mode: str) -> tuple[int, ...]:
    if MODES[mode][3] or mode in NEEDS_PAIRS:
        return SIZES
    # A query with a positive by index needs a key on its rank.
    return (0, 17, 4) if mode == "label" else (1, 17, 4)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_with_weights(mode: str, route: str) -> None:
    p, loss = ranks_problem(mode, SIZES, key_sizes(mode), 20, weight=WEIGHT)
    check_against_definition(p, upstream=-37.0, kernel=loss)


@pytest.mark.parametrize("mode", MODES)
def test_rows_as_they_are_in_half_precision(mode: str) -> None:
    p, loss = ranks_problem(mode, SIZES, key_sizes(mode), 16, dtype=torch.float16, normalize=False, scale=1.5)
    check_against_definition(p, kernel=loss)


@pytest.mark.parametrize("mode", ["masked, given index", "self label"])
def test_columns_split_over_programs_and_a_scale_that_needs_the_maximum(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "column_splits", lambda *_: 3)
    p, loss = ranks_problem(mode, SIZES, key_sizes(mode), 6, scale=120.0)
    check_against_definition(p, kernel=loss)


def test_rows_wider_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "running_statistics", None)
    monkeypatch.setattr(contrast, "gradient_sums", None)
    p, loss = ranks_problem("index", SIZES, SIZES, 300)
    check_against_definition(p, kernel=loss)


def test_a_rank_whose_weights_are_zero() -> None:
    weight = torch.ones(24)
    weight[:5] = 0
    p, loss = ranks_problem("masked", SIZES, SIZES, 16, weight=weight)
    check_against_definition(p, kernel=loss)


def test_rows_are_rounded_to_tf32_wherever_they_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block and the own rows: a tf32 product would truncate what is left of the mantissa."""
    monkeypatch.setattr(triton_contrast_rows, "rounds_to_tf32", lambda rows: True)
    seen = []
    launchers = contrast.running_statistics, contrast.gradient_sums

    def recorded(launcher):
        def launch(rows, columns, *args, **kwargs):
            seen.extend([rows.vectors, columns.vectors])
            return launcher(rows, columns, *args, **kwargs)

        return launch

    monkeypatch.setattr(contrast, "running_statistics", recorded(launchers[0]))
    monkeypatch.setattr(contrast, "gradient_sums", recorded(launchers[1]))
    p, loss = ranks_problem("index", SIZES, SIZES, 16)
    check_against_definition(p, tolerance=torch.float16, kernel=loss)
    assert seen
    assert all((x.view(torch.int32) & 0x1FFF).count_nonzero() == 0 for x in seen)
