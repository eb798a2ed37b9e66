"""What is wrong on one rank is an error on all of them, in time; never a hang."""

import re
import time
from typing import Any

import pytest
import torch

from fastkd.distributed.group import configure
from tests.helpers.ranks import Failure, run_ranks
from tests.ranks import rank_programs as programs

BAD = [
    ({1: {"d": 4}}, "ValueError", "width of the rows: got 6 on rank 0, 4 on rank 1, 6 on rank 2"),
    ({2: {"dtype": torch.float32}}, "ValueError", "dtype: got torch.float64 on rank 0"),
    ({0: {"alpha": 0.25}}, "ValueError", "alpha: got 0.25 on rank 0, 0.5 on rank 1"),
    ({1: {"consistency": "teacher||student"}}, "ValueError", "consistency: got student||teacher on rank 0, teacher||"),
    ({1: {"scale": 3.0}}, "ValueError", "logit_scale: got 2.0 on rank 0, 3.0 on rank 1"),
    ({2: {"loss": "info_nce"}}, "ValueError", "operation: got dcd_loss on rank 0"),
    ({1: {"configure": {"exchange_dtype": torch.bfloat16}}}, "ValueError", "exchange_dtype=torch.bfloat16"),
    ({1: {"alpha": -1}}, "ValueError", "alpha: got -1, expected a finite number >= 0 (on rank 1 of 3)"),
    ({1: {"teacher": torch.zeros(2, 2)}}, "ValueError", "teacher: got shape [2, 2]"),
    ({2: {"student": "rows"}}, "TypeError", "student: got str, expected a torch.Tensor (on rank 2 of 3)"),
    ({0: {"backend": "reference"}}, "ValueError", "backend: got 'reference', expected None, 'blocked' or"),
    ({0: {"sample_weight": torch.tensor([1.0, -1.0, 0.0])}}, "ValueError", "sample_weight: got -1.0"),
    ({r: {"rows": 0} for r in range(3)}, "ValueError", "got no rows on any of the 3 ranks"),
]


@pytest.mark.parametrize(("by_rank", "kind", "message"), BAD, ids=[message[:24] for _, _, message in BAD])
def test_the_same_error_on_every_rank(by_rank: dict[int, dict[str, Any]], kind: str, message: str) -> None:
    results = run_ranks(3, programs.call_with, by_rank)
    for result in results:
        assert isinstance(result, Failure)
        assert result.kind == kind
        assert message in result.message
    assert len({result.message for result in results}) == 1


@pytest.mark.parametrize("collective", range(4), ids=["agreement", "first chunk", "second chunk", "numbers"])
@pytest.mark.parametrize("path", ["extension", "python"])
def test_a_rank_that_dies_is_an_error_on_the_others(path: str, collective: int, request: pytest.FixtureRequest) -> None:
    library = str(request.getfixturevalue("library")) if path == "extension" else None
    begun = time.monotonic()
    results = run_ranks(3, programs.die_in_forward, 1, collective, library, timeout=25, group_timeout=10)
    assert results[1] is None
    for rank in (0, 2):
        assert isinstance(results[rank], Failure), results[rank]
        assert results[rank].kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"exchange_dtype": torch.int8}, ValueError, "exchange_dtype: got torch.int8, expected None or one of"),
        ({"max_gathered_bytes": 1.5}, TypeError, "max_gathered_bytes: got float, expected an int >= 0"),
        ({"max_gathered_bytes": -1}, ValueError, "max_gathered_bytes: got -1, expected an int >= 0"),
    ],
)
def test_wrong_settings_of_the_exchange(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        configure(**arguments)
