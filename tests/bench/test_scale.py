"""The model of bench/scale.py: its bytes are those that are counted, and they keep the promise."""

import pytest
import torch

from bench import scale
from tests.ranks.cases import Case, run_cases


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True])
def test_the_modelled_bytes_are_the_counted_ones(ring: bool) -> None:
    (results,) = run_cases([Case("dcd", (8, 8, 8), d=scale.WIDTH, dtype=torch.float32, ring=ring, weighted=False)])
    expected = scale.METHOD_BYTES["fastkd ring" if ring else "fastkd"](3, 8, 4)
    assert {sum(result["bytes"].values()) for result in results} == {expected}


def test_the_model_keeps_the_promised_traffic() -> None:
    by_key = {(point.method, point.ranks, point.bandwidth): point for point in scale.model(gpu_ms=4.7)}
    for ranks in scale.MODELLED_RANKS:
        own = by_key["fastkd", ranks, 50]
        assert own.bytes <= (ranks - 1) * scale.MODELLED_ROWS * (2 * scale.WIDTH * 2 + 20)
        assert 1.9 < by_key["gather + reduce-scatter", ranks, 50].bytes / own.bytes < 2.0
        assert by_key["fastkd", ranks, 400].seconds < own.seconds
        assert by_key["fastkd ring", ranks, 50].memory < own.memory
