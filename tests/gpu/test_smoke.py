"""One case of every operation on a GPU: the first minute of make gpu-test, and what its racecheck repeats."""

import pytest
import torch

from tests.helpers.checks import assert_close
from tests.helpers.contract import OPERATIONS, Size
from tests.helpers.gpu import gpu

pytest.importorskip("triton")


@gpu
@pytest.mark.smoke
@pytest.mark.racecheck
@pytest.mark.parametrize("name", ["dcd", "index", "self label", "ce and kd", "pool", "pool of unit rows"])
def test_an_operation_equals_the_definition(name: str) -> None:
    case = OPERATIONS[name](Size(n=300, N=300, D=128, dtype=torch.bfloat16, scale=10.0, device="cuda"))
    exact, low, actual = case.exact(), case.results("reference"), case.results("triton")
    assert_close(actual[0], exact[0], torch.float32, low[0])
    for a, e, of_torch in zip(actual[1:], exact[1:], low[1:], strict=True):
        assert_close(a, e, torch.bfloat16, of_torch)
