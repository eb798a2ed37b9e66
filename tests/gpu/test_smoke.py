"""One case of every operation on a GPU: the first minute of make gpu-test, and what its racecheck repeats."""

import pytest
import torch

from tests.helpers.contract import OPERATIONS, Size
from tests.helpers.gpu import gpu

pytest.importorskip("triton")


@gpu
@pytest.mark.smoke
@pytest.mark.racecheck
@pytest.mark.parametrize("name", ["dcd", "index", "self label", "ce and kd", "pool", "pool of unit rows"])
def test_an_operation_equals_the_definition(name: str) -> None:
    OPERATIONS[name](Size(n=300, N=300, D=128, dtype=torch.bfloat16, scale=10.0, device="cuda")).check("triton")
