"""Rows as they are multiplied, and over how many programs their columns are split."""

import math

import pytest
import torch
from fastkd.kernels import launch, normalize, tiles
from fastkd.kernels.normalize import unit_rows, vectors

from fastkd import numerics
from tests.helpers.checks import assert_close, embeddings


@pytest.mark.parametrize("BLOCK_ELEMENTS", [2048, 32], ids=["one piece", "several"])
@pytest.mark.parametrize(("n", "d", "width"), [(5, 1, 16), (40, 20, 32), (3, 100, 104)])
def test_unit_rows_are_padded_with_zeros(
    n: int, d: int, width: int, BLOCK_ELEMENTS: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalize, "BLOCK_ELEMENTS", BLOCK_ELEMENTS)
    sides = embeddings(n, d, dtype=torch.float32)
    units, inverse_norm = unit_rows(*sides, width)
    for k, side in enumerate(sides):
        expected, inverse = numerics.unit_rows(side.double())
        assert_close(units[k, :, :d], expected, torch.float32)
        assert_close(inverse_norm[k], inverse[:, 0], torch.float32)
        alone, _ = vectors(side, width, normalize=True)
        assert torch.equal(alone, units[k])
    assert units[:, :, d:].count_nonzero() == 0


def is_rounded(rows: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether rows are ``exact`` to the 10 bits of a tf32 mantissa, without a bias towards zero."""
    valid = ~exact.isnan()
    assert torch.equal(valid, ~rows.isnan())  # a NaN stays one
    assert (rows.view(torch.int32)[valid] & 0x1FFF).count_nonzero() == 0
    error = ((rows - exact) * exact.sign())[valid].double()
    assert (error.abs() <= 2**-11 * exact[valid].abs()).all()
    return bool(error.mean().abs() <= 0.1 * error.abs().mean())  # truncated, both would be equal


def test_unit_rows_are_rounded_to_tf32_and_not_truncated() -> None:
    x, y = embeddings(40, 100, dtype=torch.float32)
    y[3, 7] = math.nan
    assert is_rounded(unit_rows(x, y, 128, to_tf32=True)[0], unit_rows(x, y, 128)[0])


@pytest.mark.parametrize(("d", "width"), [(100, 128), (128, 128)])
def test_rows_that_arrive_normalised_are_padded_and_rounded(d: int, width: int) -> None:
    """From other ranks: rows of both sides in one tensor, or a part of it, or rows of one side."""
    packed, _ = unit_rows(*embeddings(40, d, dtype=torch.float32), d)
    for given in (packed, packed[:, 7:19], packed[1]):
        rows, inverse_norm = vectors(given, width, normalize=False, to_tf32=True)
        assert inverse_norm is None
        assert rows.shape == (*given.shape[:-1], width)
        assert rows.is_contiguous()
        assert is_rounded(rows[..., :d], given)
        assert rows[..., d:].count_nonzero() == 0
        assert torch.equal(vectors(given, width, normalize=False)[0][..., :d], given)


def test_rows_that_need_nothing_are_not_copied() -> None:
    packed, _ = unit_rows(*embeddings(40, 32, dtype=torch.float16), 32)
    for given in (packed, packed[0], packed[1, 8:]):
        assert vectors(given, 32, normalize=False)[0] is given
    misplaced = torch.zeros(3 * 32 + 1, dtype=torch.float16)[1:].view(3, 32)  # not where a kernel can load blocks from
    for given in (packed[:, 1:5], packed[0, :, :16], misplaced):
        rows, _ = vectors(given, given.shape[-1], normalize=False)
        assert rows is not given
        assert torch.equal(rows, given)
        assert rows.data_ptr() % 16 == 0


def test_splits_are_chosen_for_all_columns_and_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 rows a rank, 64 ranks: the first block, a rank's own, would fill 16 of 264 places on an H100."""
    monkeypatch.setattr(tiles, "hardware_of", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    rows, block, last = (torch.empty(count, 128, dtype=torch.bfloat16) for count in (256, 4096, 100))

    def splits(columns: torch.Tensor, **options: int | None) -> tuple[int, int]:
        """SPLITS, and how many tiles each has."""
        options = {"splits": None, "all_columns": None, **options}
        config, (_, found), arguments = tiles.tiling("dual_softmax_backward", rows, columns, bounded=True, **options)
        assert found * arguments["tiles_per_split"] * config.BLOCK_N >= len(columns)
        return found, arguments["tiles_per_split"]

    wanted = launch.column_splits(4, 256, 264)
    assert splits(rows) == (4, 1)
    assert splits(rows, all_columns=256 * 64) == (wanted, 1)
    assert wanted > 16
    assert splits(block, splits=wanted) == (wanted, 1)
    assert splits(last, splits=wanted, all_columns=256 * 64) == (wanted, 1)
