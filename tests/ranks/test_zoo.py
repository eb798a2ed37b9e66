"""The classical losses that relate samples, over several ranks: those of one process on the concatenated batch."""

import pytest
import torch

from tests.helpers.checks import assert_close
from tests.helpers.ranks import Failure, run_ranks, succeeded
from tests.losses.calls import RELATIONAL
from tests.ranks import zoo_programs as programs


@pytest.mark.parametrize("sizes", [(4,), (3, 4), (0, 3), (2, 1, 3)], ids=str)
def test_ranks_equal_one_process(sizes: tuple[int, ...]) -> None:
    results = succeeded(run_ranks(len(sizes), programs.on_rank, sizes))
    for name in RELATIONAL:
        for key, value in programs.one_process(name, sum(sizes)).items():
            parts = [result[name][key] for result in results]
            # The gradient of a rank's own rows is W times that of the average over the ranks.
            actual = torch.cat(parts) / len(sizes) if " rows " in key else torch.stack(parts).mean(dim=0)
            if key.startswith("equal"):
                assert all(torch.equal(part, parts[0]) for part in parts)
            assert_close(actual, value, torch.float64)


def test_a_local_group_is_this_ranks_rows() -> None:
    assert succeeded(run_ranks(2, programs.with_own_rows)) == [[True, False]] * 2


def test_ranks_with_different_options_are_told() -> None:
    for result in run_ranks(2, programs.with_different_options):
        assert isinstance(result, Failure)
        assert "the ranks disagree: module: got temperature=2.0, beta=1.0, gamma=0 on rank 0" in result.message


def test_a_gradient_on_some_ranks_only_is_refused() -> None:
    for result in run_ranks(2, programs.with_a_gradient_on_one_rank):
        assert isinstance(result, Failure)
        assert "group: got rows that need a gradient on some ranks only" in result.message
