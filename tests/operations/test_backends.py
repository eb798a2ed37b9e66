"""The streaming backend against the float64 definition: values, gradients, dtypes, shapes, weights, hard inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import dcd_loss, info_nce_loss, kd_loss
from fastkd.backends.blocked import sums as blocked_shared
from fastkd.backends.blocked import tiles
from fastkd.ops.contrast import contrast, contrast_backward
from fastkd.ops.dual_softmax import dual_softmax, dual_softmax_backward
from tests.helpers.checks import CONSISTENCIES, assert_close, embeddings, relative_error, value_and_grads

LOW = (torch.float32, torch.float16, torch.bfloat16)
# Either side of a tile's edge, one row, one column, widths that are no multiple of 8.
ROWS = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 600, 1023, 1025, 1100]))
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([128, 131]))
SCALES = st.sampled_from([0.05, 2.7, 10.0, 39.0, 41.0, 100.0])


def losses(weight: Tensor | None, **options: object) -> dict[str, object]:
    """Every loss as a function of (rows, rows, scale), with the options that vary here."""
    return {
        "dcd": lambda a, b, c: dcd_loss(a, b, c, alpha=0.5, sample_weight=weight, **options),
        "dcd_reversed": lambda a, b, c: dcd_loss(
            a, b, c, alpha=2.0, consistency="teacher||student", sample_weight=weight, **options
        ),
        "info_nce": lambda a, b, c: info_nce_loss(a, b, c, sample_weight=weight, **options),
        "info_nce_raw": lambda a, b, c: info_nce_loss(a, b, c, normalize=False, sample_weight=weight, **options),
        "kd": lambda a, b, c: kd_loss(a, b, 3.0, sample_weight=weight, **options) + 0 * c,
    }


NAMES = tuple(losses(None))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n=ROWS,
    d=WIDTHS,
    scale=SCALES,
    weighted=st.booleans(),
    upstream=st.sampled_from([1.0, -0.37, 1e4]),
    seed=st.integers(0, 99),
)
def test_float64_equals_the_definition(
    name: str, n: int, d: int, scale: float, weighted: bool, upstream: float, seed: int
) -> None:
    student, teacher = embeddings(n, d, seed)
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) if weighted else None
    inputs = student, teacher, torch.tensor(scale, dtype=torch.float64)
    expected = value_and_grads(losses(weight, backend="reference")[name], *inputs, upstream=upstream)
    actual = value_and_grads(losses(weight, backend="blocked")[name], *inputs, upstream=upstream)
    # A loss is a difference of logits, which are at most `scale` (times the norms, for raw rows): where it cancels, the
    # error is relative to them. One row has no negatives: all of it is zero but for rounding.
    size = scale * (student.norm(dim=1) * teacher.norm(dim=1)).max().item() if name == "info_nce_raw" else scale
    assert_close(actual[0], expected[0], torch.float64, floor=1e-3 * size)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, torch.float64, floor=1e-5 * max(1.0, abs(upstream)) * max(1.0, size))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "d", "scale"), [(2, 1, 3.0), (65, 20, 10.0), (530, 128, 10.0), (100, 33, 100.0)])
def test_low_precision_is_no_worse_than_torch(name: str, dtype: torch.dtype, n: int, d: int, scale: float) -> None:
    student, teacher = embeddings(n, d, dtype=dtype)
    inputs = student, teacher, torch.tensor(scale)
    exact = value_and_grads(losses(None, backend="reference")[name], *(x.double() for x in inputs))
    torch_result = value_and_grads(losses(None, backend="reference")[name], *inputs)
    actual = value_and_grads(losses(None, backend="blocked")[name], *inputs)
    assert actual[0].dtype == torch.float32
    for a, e, low, given_input in zip(actual[1:], exact[1:], torch_result[1:], inputs, strict=True):
        assert a.dtype == given_input.dtype
        assert_close(a, e, dtype, low)
    assert_close(actual[0], exact[0], torch.float32, torch_result[0])


@pytest.mark.parametrize("name", ["dcd", "dcd_reversed", "info_nce"])
@pytest.mark.parametrize(("scale", "noise"), [(10.0, 0.05), (1 / 0.07, 0.05), (39.0, 1.0), (41.0, 1.0)])
@pytest.mark.parametrize("n", [256, 1100])
def test_gradients_keep_their_digits_where_the_loss_has_almost_vanished(
    name: str, scale: float, noise: float, n: int
) -> None:
    inputs = *embeddings(n, 128, dtype=torch.float32, noise=noise), torch.tensor(scale)
    exact = value_and_grads(losses(None, backend="reference")[name], *(x.double() for x in inputs))
    actual = value_and_grads(losses(None, backend="blocked")[name], *inputs)
    # A logit's rounding is relative to its size, and becomes the exponential's relative error. Plain float32 code loses
    # p_ii - 1 in rounding here: its error is up to ten thousand times as large.
    allowed = 8 * scale * torch.finfo(torch.float32).eps
    assert all(relative_error(a, e, floor=1e-30) < allowed for a, e in zip(actual, exact, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_sliced_and_transposed_inputs(name: str) -> None:
    student, teacher = embeddings(40, 24)
    scale = torch.tensor(4.0, dtype=torch.float64)
    expected = value_and_grads(losses(None, backend="reference")[name], student[::2, 3:], teacher[::2, 3:], scale)
    storage_s, storage_t = student.T.contiguous(), teacher.T.contiguous()
    leaves = [storage_s.requires_grad_(), storage_t.requires_grad_()]
    rows = [leaf.T[::2, 3:] for leaf in leaves]
    assert not rows[0].is_contiguous()
    value = losses(None, backend="blocked")[name](*rows, scale)
    value.backward()
    assert_close(value, expected[0], torch.float64)
    assert_close(leaves[0].grad.T[::2, 3:], expected[1], torch.float64)
    if name != "kd":
        assert_close(leaves[1].grad.T[::2, 3:], expected[2], torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_weights_are_the_weighted_gradients_of_single_rows(name: str) -> None:
    student, teacher = embeddings(6, 5)
    scale = torch.tensor(4.0, dtype=torch.float64)
    weight = torch.tensor([0.0, 2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64)
    total = value_and_grads(losses(weight, backend="blocked")[name], student, teacher, scale)
    parts = [
        value_and_grads(losses(row, backend="blocked")[name], student, teacher, scale) for row in torch.eye(6).double()
    ]
    for index, value in enumerate(total):
        assert_close(value, sum(w * part[index] for w, part in zip(weight, parts, strict=True)), torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_inputs_get_no_gradient_and_change_nothing(name: str) -> None:
    student, teacher = embeddings(20, 6)
    scale = torch.tensor(4.0, dtype=torch.float64)
    full = value_and_grads(losses(None, backend="blocked")[name], student, teacher, scale)
    for wanted in range(3):
        inputs = [student.clone(), teacher.clone(), scale.clone()]
        inputs[wanted].requires_grad_()
        value = losses(None, backend="blocked")[name](*inputs)
        if name == "kd" and wanted == 1:
            assert not value.requires_grad
            continue
        value.backward()
        assert_close(inputs[wanted].grad, full[1 + wanted], torch.float64)
        assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_bitwise_unchanged(name: str, backend: str) -> None:
    inputs = [x.requires_grad_() for x in (*embeddings(600, 8, dtype=torch.float32), torch.tensor(4.0))]
    weight = torch.rand(600)
    before = [x.detach().clone() for x in (*inputs, weight)]
    losses(weight, backend=backend)[name](*inputs).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip((*inputs, weight), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_every_element_of_an_empty_tensor_is_written(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = embeddings(530, 7)
    inputs = student, teacher, torch.tensor(scale, dtype=torch.float64)
    expected = value_and_grads(losses(None, backend="blocked")[name], *inputs)
    poisoned = 0

    def poison(make):
        def empty(*args, **kwargs):
            nonlocal poisoned
            poisoned += 1
            return make(*args, **kwargs).fill_(math.nan)

        return empty

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    actual = value_and_grads(losses(None, backend="blocked")[name], *inputs)
    monkeypatch.undo()
    assert poisoned > 0 or name.startswith("info_nce")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def hard_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    student, teacher = embeddings(9, 6, dtype=torch.float32)
    zero_rows = student.clone()
    zero_rows[[0, 4]] = 0
    return {
        "zero_rows": (zero_rows, teacher),
        "all_zero": (torch.zeros_like(student), torch.zeros_like(teacher)),
        "huge": (student * 1e30, teacher * 1e30),
        "tiny": (student * 1e-10, teacher * 1e-10),
        "identical": (student[:1].expand(9, 6).contiguous(), teacher[:1].expand(9, 6).contiguous()),
        "equal": (student, student.clone()),
        "opposite": (student, -student),
    }


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("tau", [-20.0, 0.0, math.log(10), math.log(100), 8.0])
@pytest.mark.parametrize("name", ["dcd", "dcd_reversed", "info_nce"])
@pytest.mark.parametrize("case", hard_inputs())
def test_hard_inputs_give_finite_losses_and_gradients(case: str, name: str, tau: float, backend: str) -> None:
    inputs = *hard_inputs()[case], torch.tensor(tau)
    loss = losses(None, backend=backend)[name]
    results = value_and_grads(lambda s, t, tau: loss(s, t, tau.exp()), *inputs)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_zero_rows_get_no_gradient_in_half_precision(backend: str) -> None:
    student, teacher = (x.half() for x in embeddings(9, 6))
    student[3] = 0
    _, grad, *_ = value_and_grads(
        losses(None, backend=backend)["dcd"], student, teacher, torch.tensor(5.0), upstream=65536.0
    )
    assert grad.isfinite().all()
    assert grad[3].abs().max() == 0
    assert grad[4].abs().max() > 0


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0, 1])
def test_non_finite_inputs_give_a_non_finite_loss(
    name: str, where: int, scale: float, bad: float, backend: str
) -> None:
    inputs = [*embeddings(600, 6, dtype=torch.float32), torch.tensor(scale)]
    inputs[where][550, 2] = bad
    assert not losses(None, backend=backend)[name](*inputs).isfinite()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("name", ["dcd", "info_nce"])
def test_non_finite_scale_gives_a_non_finite_loss(name: str, backend: str) -> None:
    student, teacher = embeddings(9, 6, dtype=torch.float32)
    for scale in (math.nan, math.inf):
        assert not losses(None, backend=backend)[name](student, teacher, torch.tensor(scale)).isfinite()


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_a_known_bound_of_the_scale_changes_nothing(consistency: str) -> None:
    student, teacher = embeddings(700, 16)
    scale, one = torch.tensor(9.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    shared = dual_softmax(student, teacher, scale, None, consistency, 10.0, "blocked")
    original, blocked_shared.MAX_SHARED_SCALE = blocked_shared.MAX_SHARED_SCALE, 0.0
    try:
        online = dual_softmax(student, teacher, scale, None, consistency, math.inf, "blocked")
        arguments = (student, teacher, scale, None, online[2], one, one, consistency, math.inf, True, True, "blocked")
        online_grads = dual_softmax_backward(*arguments)
    finally:
        blocked_shared.MAX_SHARED_SCALE = original
    for a, e in zip(shared, online, strict=True):
        assert_close(a, e, torch.float64)
    for a, e in zip(dual_softmax_backward(*arguments), online_grads, strict=True):
        assert_close(a, e, torch.float64)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_no_tensor_grows_with_the_square_of_the_rows(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, d = 4096, 16
    student, teacher = embeddings(n, d, dtype=torch.float32)
    c, one = torch.tensor(scale), torch.tensor(1.0)
    rows = max(block.stop - block.start for block in tiles.blocks(n, student.device))
    bound = max(6 * rows**2, n * d)
    assert bound < n * n / 2
    monkeypatch.setattr(tiles, "worker_count", lambda *_: 1)  # the recording sees the calling thread alone
    with LargestTensor() as largest:
        *_, stats = dual_softmax(student, teacher, c, None, "student||teacher", math.inf, "blocked")
        dual_softmax_backward(
            student, teacher, c, None, stats, one, one, "student||teacher", math.inf, True, True, "blocked"
        )
        _, lse = contrast(student, teacher, c, None, None, None, None, False, True, "blocked")
        contrast_backward(student, teacher, c, None, None, None, None, lse, one, False, True, True, True, "blocked")
    assert 0 < largest.elements <= bound
