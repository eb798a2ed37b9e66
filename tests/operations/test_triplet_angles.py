"""The angles of RKD as an operation: against its definition, in blocks, in loops and on threads."""

import pytest
import torch
from torch import Tensor

from fastkd import native
from fastkd.backends import reference
from fastkd.backends.blocked import triplet_angles as blocked
from fastkd.ops.triplet_angles import sum_of_anchors, triplet_angles
from tests.helpers.checks import assert_close, value_and_grads


def matrices(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gram matrices and inverse distances of student and teacher. Pairs without a direction are in both."""
    generator, found = torch.Generator().manual_seed(0), []
    for width in (3, 5):
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        distances = torch.cdist(x, x)
        is_near = distances < 0.5
        found += [x @ x.T, distances.masked_fill(is_near, 1).reciprocal().masked_fill(is_near, 0)]
    assert rows < 20 or ((found[1] == 0) != (found[3] == 0)).any()
    return [x.to(dtype) for x in found]


def definition(given: list[Tensor], first: int, last: int) -> tuple[Tensor, ...]:
    """The sum over the anchors and its gradients. Pairs without a direction get none."""
    value, *grads = value_and_grads(lambda *x: reference.triplet_angles(*x, *given[2:])[first:last].sum(), *given[:2])
    return value, grads[0], grads[1].masked_fill(given[1] == 0, 0)


@pytest.fixture(params=["loops", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The extension's loops, and torch's operations on a few corners at a time."""
    if request.param == "blocks":
        monkeypatch.setattr(blocked, "extension", lambda: None)
        monkeypatch.setitem(blocked.BLOCK, "cpu", 3 * 70**2)
    elif native.extension() is None:
        pytest.skip("there is no extension")
    return request.param


def test_the_definition_is_the_cosine_of_the_sides() -> None:
    x, y = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = []
    for z in (x, y):
        sides = torch.nn.functional.normalize(z[None] - z[:, None], dim=2)  # [i, j]: from i to j
        angles.append(sides @ sides.mT)
    difference = angles[0] - angles[1]
    huber = torch.where(difference.abs() < 1, difference.square() / 2, difference.abs() - 0.5)
    assert (difference.abs() > 1).any()
    given = [m for z in (x, y) for m in (z @ z.T, torch.cdist(z, z).fill_diagonal_(torch.inf).reciprocal())]
    assert_close(reference.triplet_angles(*given), huber.sum(dim=(1, 2)), torch.float64)


@pytest.mark.parametrize(("rows", "first", "last"), [(1, 0, 1), (3, 0, 3), (70, 0, 70), (70, 13, 41), (9, 4, 4)])
@pytest.mark.usefixtures("way")
def test_equals_the_definition(rows: int, first: int, last: int) -> None:
    given = matrices(rows)
    exact = definition(given, first, last)
    for dtype in (torch.float64, torch.float32):
        narrow = [x.to(dtype) for x in given]
        rest = *narrow[2:], first, last, "blocked"
        found = value_and_grads(lambda *x, rest=rest: 2 * sum_of_anchors(*x, *rest), *narrow[:2])
        for actual, expected in zip(found, exact, strict=True):
            assert actual.dtype == dtype
            assert_close(actual, 2 * expected, dtype)


def test_threads_share_out_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension() is None:
        pytest.skip("there is no extension")
    given, found = matrices(100), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(blocked.triplet_angles(*given, 7, 90))
        again = blocked.triplet_angles(*given, 7, 90)
        assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True))
    for one, three in zip(*found, strict=True):
        assert_close(three, one, torch.float64)


def test_compiled_it_is_one_operation() -> None:
    given = [x.requires_grad_(k < 2) for k, x in enumerate(matrices(6))]
    torch.library.opcheck(triplet_angles, (*given, 1, 5, "blocked"))

    def call(*x: Tensor) -> Tensor:
        return sum_of_anchors(*x, 1, 5, "blocked")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(value_and_grads(compiled, *given), value_and_grads(call, *given), strict=True):
        assert torch.equal(actual, expected)


def test_a_gradient_is_differentiated_once() -> None:
    given = [x.requires_grad_(k < 2) for k, x in enumerate(matrices(5))]
    (grad,) = torch.autograd.grad(sum_of_anchors(*given, 0, 5, "blocked"), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can not be differentiated again"):
        grad.sum().backward()
