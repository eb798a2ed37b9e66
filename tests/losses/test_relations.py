"""The operations of RKD, SP and PKT: against their definitions, in blocks, in loops, on threads and in shares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd import native
from fastkd.backends import reference
from fastkd.backends.blocked import gram_sums as gram_blocks
from fastkd.backends.blocked import tiles
from fastkd.backends.blocked import triplet_angles as triplet_blocks
from fastkd.losses import DISTLoss, PKTLoss, RKDLoss, SPLoss, total_loss
from fastkd.losses.relations import pkt, sp
from fastkd.ops import gram_sums, pair_divergence, triplet_angles
from tests.helpers.checks import assert_close, value_and_grads

EPS = 1e-3


@pytest.fixture(params=["loops", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The extension's loops, and torch's operations. Tiles and blocks are so small that there are several."""
    monkeypatch.setattr(tiles, "MAX_ROWS", 16)
    if request.param == "blocks":
        monkeypatch.setattr(triplet_blocks, "extension", lambda: None)
        monkeypatch.setattr(gram_blocks, "extension", lambda: None)
        monkeypatch.setitem(triplet_blocks.BLOCK, "cpu", 3 * 70**2)
    elif native.extension() is None:
        pytest.skip("there is no extension")
    return request.param


def matrices(rows: int) -> list[Tensor]:
    """Gram matrices and inverse distances of student and teacher. Pairs without a direction are in both."""
    generator, found = torch.Generator().manual_seed(0), []
    for width in (3, 5):
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        distances = torch.cdist(x, x)
        is_near = distances < 0.5
        found += [x @ x.T, distances.masked_fill(is_near, 1).reciprocal().masked_fill(is_near, 0)]
    assert rows < 20 or ((found[1] == 0) != (found[3] == 0)).any()
    return found


def definition(given: list[Tensor], first: int, last: int) -> tuple[Tensor, ...]:
    """The sum over the anchors and its gradients. Pairs without a direction get none."""
    value, *grads = value_and_grads(lambda *x: reference.triplet_angles(*x, *given[2:])[first:last].sum(), *given[:2])
    return value, grads[0], grads[1].masked_fill(given[1] == 0, 0)


def test_the_definition_of_angles_is_the_cosine_of_the_sides() -> None:
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
def test_angles_equal_their_definition(rows: int, first: int, last: int) -> None:
    given = matrices(rows)
    exact = definition(given, first, last)
    for dtype in (torch.float64, torch.float32):
        narrow = [x.to(dtype) for x in given]
        rest = *narrow[2:], first, last, "blocked"
        found = value_and_grads(lambda *x, rest=rest: 2 * triplet_angles.sum_of_anchors(*x, *rest), *narrow[:2])
        for actual, expected in zip(found, exact, strict=True):
            assert actual.dtype == dtype
            assert_close(actual, 2 * expected, dtype)


def test_threads_share_out_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension() is None:
        pytest.skip("there is no extension")
    given, found = matrices(100), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(triplet_blocks.triplet_angles(*given, 7, 90))
        again = triplet_blocks.triplet_angles(*given, 7, 90)
        assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True))
    for one, three in zip(*found, strict=True):
        assert_close(three, one, torch.float64)


def features(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(rows, 7, generator=generator, dtype=torch.float64)
    return student, student[:, :5] + torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def in_shares(operation: Callable[..., Tensor], world_size: int) -> Callable[..., Tensor]:
    return lambda *x: sum((operation(*x, rank, world_size) for rank in range(world_size)), torch.zeros(()))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.usefixtures("way")
def test_sums_of_gram_matrices_equal_their_definition(rows: int) -> None:
    student, teacher = features(rows)
    weight = torch.arange(3 * rows, dtype=torch.float64).view(3, rows)
    exact = value_and_grads(lambda x: (weight * reference.gram_sums(x, teacher)).sum(), student)
    for dtype in (torch.float64, torch.float32):
        narrow = teacher.to(dtype)
        call = in_shares(lambda x, *rest, t=narrow: (weight * gram_sums.sums_of_rows(x, t, *rest)).sum(), 3)
        found = value_and_grads(call, student.to(dtype))
        for actual, expected in zip(found, exact, strict=True):
            assert_close(actual, expected, dtype)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.usefixtures("way")
def test_divergence_of_pairs_equals_its_definition(rows: int) -> None:
    student, teacher = (x / 9 for x in features(rows))
    inverse_s, inverse_t = torch.linspace(0.01, 0.02, 2 * rows, dtype=torch.float64).view(2, rows)
    exact = value_and_grads(
        lambda x, r: reference.pair_divergence(x, r, teacher, inverse_t, EPS).sum(), student, inverse_s
    )
    for dtype in (torch.float64, torch.float32):
        rest = teacher.to(dtype), inverse_t.to(dtype), EPS
        call = in_shares(lambda *x, rest=rest: pair_divergence.sum_of_pairs(*x[:2], *rest, *x[2:]), 3)
        found = value_and_grads(call, student.to(dtype), inverse_s.to(dtype))
        for actual, expected in zip(found, exact, strict=True):
            assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("module", "loss"), [(sp, SPLoss()), (pkt, PKTLoss())], ids=["sp", "pkt"])
def test_without_a_matrix_the_losses_are_the_same(
    module: object, loss: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (x.clone() for x in features(50))
    student[3], student[5], teacher[7] = 0, student[4], 0
    monkeypatch.setattr(tiles, "MAX_ROWS", 16)
    expected = value_and_grads(lambda x: sum(loss(x, teacher).values()), student)
    monkeypatch.setattr(module, "WHOLE", 0)
    for scale, dtype in ((1, torch.float64), (1, torch.float32), (1e-12, torch.float32), (1e12, torch.float32)):
        if scale != 1 and module is pkt:
            continue
        given = (scale * x.to(dtype) for x in (student, teacher))
        value, grad = value_and_grads(lambda x, t: sum(loss(x, t).values()), *given)[:2]
        assert value.dtype == grad.dtype == dtype
        assert_close(value, expected[0], dtype)
        assert_close(grad.double() * scale, expected[1], dtype)


def test_compiled_they_are_custom_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sp, pkt):
        monkeypatch.setattr(module, "WHOLE", 0)
    modules = RKDLoss(), SPLoss(), PKTLoss(), DISTLoss(2.0)

    def losses(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.stack([total_loss(module(student, teacher)) for module in modules]).sum()

    student, teacher = features(6)
    teacher = torch.cat([teacher, teacher[:, :2]], dim=1)
    expected = value_and_grads(losses, student, teacher)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(value_and_grads(compiled, student, teacher), expected, strict=True):
        assert_close(actual, exact, torch.float64)
    matrix, inverse = (x.requires_grad_() for x in matrices(6)[:2])
    rows, r = (student / 9).requires_grad_(), torch.full((6,), 0.1).double().requires_grad_()
    for operation, inputs in (
        (triplet_angles.triplet_angles, (matrix, inverse, matrix, inverse, 1, 5, "blocked")),
        (pair_divergence.pair_divergence, (rows, r, rows, r, EPS, 0, 1)),
        (gram_sums.gram_sums, (rows, rows, 0, 1)),
    ):
        torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def test_their_gradients_are_not_differentiated_again() -> None:
    given = [x.requires_grad_() for x in (*matrices(6)[:2], features(6)[0] / 9, torch.full((6,), 0.1).double())]
    for k, total in enumerate(
        (
            triplet_angles.sum_of_anchors(*given[:2], *given[:2], 0, 5, "blocked"),
            gram_sums.sums_of_rows(given[2], given[2], 0, 1).sum(),
            pair_divergence.sum_of_pairs(*given[2:], *given[2:], EPS, 0, 1),
        )
    ):
        (grad,) = torch.autograd.grad(total, given[0 if k == 0 else 2], create_graph=True)
        with pytest.raises(RuntimeError, match="can not be differentiated again"):
            grad.sum().backward()
