"""The kernels of triplet_angles: several tiles and corners, ragged ones, and a part of the corners."""

import pytest
import torch
from fastkd.kernels import triplet_angles

from fastkd.ops.triplet_angles import sum_of_anchors
from tests.helpers.checks import assert_close, value_and_grads
from tests.losses.test_relations import definition, matrices


@pytest.mark.parametrize(("rows", "first", "last"), [(1, 0, 1), (21, 3, 17), (16, 0, 16), (9, 4, 4)])
@pytest.mark.usefixtures("poison")
def test_equals_the_definition(rows: int, first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplet_angles, "CORNERS_TILE", (8, 16))
    monkeypatch.setattr(triplet_angles, "ENDS_TILE", (8, 16))
    given = matrices(rows)
    narrow = [x.float() for x in given]
    found = value_and_grads(lambda *x: sum_of_anchors(*x, *narrow[2:], first, last, "triton"), *narrow[:2])
    for actual, expected in zip(found, definition(given, first, last), strict=True):
        assert_close(actual, expected, torch.float32)
