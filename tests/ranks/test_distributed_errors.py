"""What is wrong on one rank is an error on all of them, in time; never a hang."""

import re
import time
from typing import Any

import pytest
import torch

from fastkd.distributed.group import configure
from tests.helpers.ranks import Failure, run_ranks
from tests.ranks import rank_programs as programs

EVERYWHERE = range(3)
# the loss, what a rank does otherwise than the others, the error
BAD: list[tuple[str, dict[int, dict[str, Any]], str, str]] = [
    ("dcd", {1: {"d": 4}}, "ValueError", "width of the rows: got 6 on rank 0, 4 on rank 1, 6 on rank 2"),
    ("dcd", {2: {"dtype": torch.float32}}, "ValueError", "dtype: got torch.float64 on rank 0"),
    ("dcd", {0: {"alpha": 0.25}}, "ValueError", "alpha: got 0.25 on rank 0, 0.5 on rank 1"),
    ("dcd", {1: {"consistency": "teacher||student"}}, "ValueError", "consistency: got student||teacher on rank 0, te"),
    ("dcd", {1: {"scale": 3.0}}, "ValueError", "logit_scale: got 2.0 on rank 0, 3.0 on rank 1"),
    ("dcd", {2: {"loss": "info_nce"}}, "ValueError", "operation: got dcd_loss on rank 0"),
    ("dcd", {1: {"configure": {"exchange_dtype": torch.bfloat16}}}, "ValueError", "exchange_dtype=torch.bfloat16"),
    (
        "dcd",
        {1: {"logit_bias": "x"}},
        "TypeError",
        "logit_bias: got 'x' of type str, expected a finite number (on rank 1",
    ),
    ("dcd", {1: {"alpha": -1}}, "ValueError", "alpha: got -1, expected a finite number >= 0 (on rank 1 of 3)"),
    ("dcd", {1: {"key": torch.zeros(2, 2)}}, "ValueError", "teacher: got shape [2, 2]"),
    ("dcd", {2: {"query": "rows"}}, "TypeError", "student: got str, expected a torch.Tensor (on rank 2 of 3)"),
    ("dcd", {0: {"backend": "reference"}}, "ValueError", "backend: got 'reference', expected None, 'blocked' or"),
    ("dcd", {0: {"sample_weight": torch.tensor([1.0, -1.0, 0.0])}}, "ValueError", "sample_weight: got -1.0"),
    ("dcd", {rank: {"rows": 0} for rank in EVERYWHERE}, "ValueError", "got no rows on any of the 3 ranks"),
    (
        "masked",
        {1: {"positives": "label"}},
        "ValueError",
        "positives by label: got False on rank 0, True on rank 1, False on rank 2",
    ),
    ("sup_con", {0: {"exclude_self": False}}, "ValueError", "exclude_self: got False on rank 0, True on rank 1"),
    (
        "masked",
        {1: {"index": torch.tensor([0, 1, 3])}},
        "ValueError",
        "positive_index: got 3, expected rows of key, in [0, 3) (on rank 1 of 3)",
    ),
    (
        "ckd",
        {rank: {"backend": "triton", "dtype": torch.float32} for rank in EVERYWHERE},
        "ValueError",
        "backend: 'triton' needs CUDA tensors, got cpu",
    ),
]


@pytest.mark.parametrize(
    ("name", "by_rank", "kind", "message"), BAD, ids=[f"{name} {message[:24]}" for name, _, _, message in BAD]
)
def test_the_same_error_on_every_rank(name: str, by_rank: dict[int, dict[str, Any]], kind: str, message: str) -> None:
    results = run_ranks(3, programs.call_with, name, by_rank)
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
