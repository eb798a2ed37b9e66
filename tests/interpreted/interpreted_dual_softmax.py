"""The dual_softmax kernels in Triton's interpreter, against the float64 definition: every flag, small tiles.

Run by tests/test_triton_dual_softmax.py in its own process: TRITON_INTERPRET must be set before Triton is imported.
bfloat16 is left to the tests on a GPU, because the interpreter multiplies it wrongly.
"""

import math
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from fastkd.kernels.dual_softmax import streaming as dual_softmax
from fastkd.kernels.dual_softmax import wide as dual_softmax_wide
from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
from fastkd.kernels.normalize import padded_width, unit_rows
from torch import Tensor

from fastkd import dcd_loss
from fastkd.backends import reference, triton
from fastkd.functional.dcd import dcd_terms
from fastkd.ops import dual_softmax as op
from tests.helpers.checks import CONSISTENCIES, assert_close, embeddings, value_and_grads

LOW = (torch.float32, torch.float16)
BOUNDED, ONLINE = 40.0, math.inf
# One column, either side of a 16-row tile's edge, widths that are no multiple of 8 or 16.
SHAPES = [(2, 1), (3, 5), (15, 16), (17, 20), (35, 40)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_softmax_wide, "ROWS", 16)
    monkeypatch.setattr(dual_softmax_wide, "COLUMNS", 24)


@pytest.fixture(params=["streaming", "wide"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(triton, "_is_wide", lambda rows: request.param == "wide")
    return request.param


def loss_of(
    backend: str,
    consistency: str = "student||teacher",
    weight: Tensor | None = None,
    max_scale: float = BOUNDED,
    alpha: float = 0.5,
) -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return sum(
            dcd_terms(
                student, teacher, scale, alpha=alpha, consistency=consistency, sample_weight=weight,
                max_scale=max_scale, backend=backend,
            )
        )  # fmt: skip

    return loss


def eager(
    consistency: str = "student||teacher", weight: Tensor | None = None, alpha: float = 0.5, **_: object
) -> Callable[..., Tensor]:
    """What a careful user writes in low precision: unit rows and product in the inputs' dtype, softmax in float32."""

    def loss(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        s, t = (F.normalize(x.float()).to(x.dtype) for x in (student, teacher))
        A = scale * (s @ t.T).float()
        log_p, log_q = A.log_softmax(1), A.T.log_softmax(1)
        first, second = (log_p, log_q) if consistency == "student||teacher" else (log_q, log_p)
        rows = -log_p.diagonal() + alpha * (first.exp() * (first - second)).sum(1)
        return (rows if weight is None else weight * rows).mean()

    return loss


def check_against_definition(
    student: Tensor, teacher: Tensor, scale: float, upstream: float = 1.0, **options: object
) -> None:
    dtype = student.dtype
    inputs = student, teacher, torch.tensor(scale)
    exact = value_and_grads(loss_of("reference", **options), *(x.double() for x in inputs), upstream=upstream)
    low = value_and_grads(eager(**options), *inputs, upstream=upstream)
    actual = value_and_grads(loss_of("triton", **options), *inputs, upstream=upstream)
    assert actual[0].dtype == torch.float32
    assert_close(actual[0], exact[0], dtype, low[0])
    for a, e, torch_result, given in zip(actual[1:], exact[1:], low[1:], inputs, strict=True):
        assert a.dtype == given.dtype
        # The scale's gradient is a mean of terms as large as the upstream gradient: where they cancel, so do they here.
        assert_close(a, e, dtype, torch_result, floor=0.1 * abs(upstream) if given.ndim == 0 else 1e-5)


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_value_and_gradients(n: int, d: int, consistency: str, dtype: torch.dtype, max_scale: float) -> None:
    check_against_definition(*embeddings(n, d, dtype=dtype), 10.0, consistency=consistency, max_scale=max_scale)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_a_scale_that_needs_the_running_maximum(consistency: str, dtype: torch.dtype, route: str) -> None:
    # exp(120) overflows float32. Few dimensions, so that the softmax does not saturate.
    check_against_definition(*embeddings(50, 6, dtype=dtype), 120.0, consistency=consistency, max_scale=ONLINE)


def test_wide_rows_go_through_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_softmax, "running_statistics", None)
    monkeypatch.setattr(dual_softmax, "gradient_sums", None)
    check_against_definition(*embeddings(35, 300, dtype=torch.float16), 10.0)


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
@pytest.mark.parametrize("d", [1, 20])
def test_one_row_has_no_negatives(d: int, max_scale: float, route: str) -> None:
    results = value_and_grads(
        loss_of("triton", max_scale=max_scale), *embeddings(1, d, dtype=torch.float32), torch.tensor(10.0)
    )
    assert all(x.abs().max() <= 1e-5 for x in results)  # zero but for the rounding of numbers near 10


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_weights_and_upstream(consistency: str, dtype: torch.dtype, max_scale: float, route: str) -> None:
    weight = torch.tensor([0.0, 5.0, 1.0]).repeat(12)[:35]
    check_against_definition(
        *embeddings(35, 20, dtype=dtype), 8.0, upstream=-37.0, consistency=consistency, weight=weight,
        max_scale=max_scale, alpha=2.0,
    )  # fmt: skip


def test_weights_far_above_one_do_not_overflow_half_precision() -> None:
    weight = torch.tensor([0.0, 1e4, 1.0]).repeat(12)[:35]
    check_against_definition(*embeddings(35, 20, dtype=torch.float16), 8.0, weight=weight)


def test_unit_rows_are_rounded_to_tf32_and_not_truncated() -> None:
    x, y = embeddings(40, 100, dtype=torch.float32)
    y[3, 7] = math.nan
    exact, _ = unit_rows(x, y, 128)
    rounded, _ = unit_rows(x, y, 128, to_tf32=True)
    bits = rounded.view(torch.int32)
    valid = ~exact.isnan()
    assert torch.equal(valid, ~rounded.isnan())  # a NaN stays one
    assert (bits[valid] & 0x1FFF).abs().max() == 0
    error = ((rounded - exact) * exact.sign())[valid].double()
    assert (error.abs() <= 2**-11 * exact[valid].abs()).all()
    assert error.mean().abs() <= 0.05 * error.abs().mean()


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
def test_gradients_of_rows_rounded_to_tf32(max_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_rounds_to_tf32", lambda rows: True)
    inputs = *embeddings(35, 20, dtype=torch.float32), torch.tensor(10.0)
    exact = value_and_grads(loss_of("reference"), *(x.double() for x in inputs))
    actual = value_and_grads(loss_of("triton", max_scale=max_scale), *inputs)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, torch.float16, floor=0.1 if a.ndim == 0 else 1e-5)  # the mantissa of fp16


@pytest.mark.parametrize("upstream", [1e-6, 1e4])
def test_small_and_large_upstream_gradients_survive_half_precision(upstream: float) -> None:
    student, teacher = embeddings(40, 16, dtype=torch.float16)
    inputs = student, teacher, torch.tensor(10.0)
    one = value_and_grads(loss_of("triton"), *inputs)
    other = value_and_grads(loss_of("triton"), *inputs, upstream=upstream)
    assert other[3].item() == pytest.approx(upstream * one[3].item(), rel=1e-4)
    # fp16 gradients of 1e-8 are subnormal: compare where the output format can hold them.
    if upstream > 1:
        assert_close(other[1], upstream * one[1].double(), torch.float16)
    else:
        assert (other[1].double() - upstream * one[1].double()).abs().max() <= 2**-25


@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_inputs_change_nothing_for_the_others(wanted: int, consistency: str, route: str) -> None:
    student, teacher = embeddings(20, 10, dtype=torch.float32)
    loss = loss_of("triton", consistency)
    full = value_and_grads(loss, student, teacher, torch.tensor(4.0))
    inputs = [student.clone(), teacher.clone(), torch.tensor(4.0)]
    inputs[wanted].requires_grad_()
    loss(*inputs).backward()
    if wanted == 2:  # either side's dot products add up to it
        assert_close(inputs[2].grad, full[3], torch.float32)
    else:
        assert torch.equal(inputs[wanted].grad, full[1 + wanted])
    assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
def test_columns_split_over_programs(splits: int, max_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # 35 columns are three tiles: with seven splits some are empty.
    asked = []
    monkeypatch.setattr(dual_softmax, "column_splits", lambda *args: asked.append(args) or splits)
    check_against_definition(*embeddings(35, 20, dtype=torch.float32), 9.0, max_scale=max_scale)
    assert len(asked) == 2


def test_one_launch_a_side_equals_one_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = *embeddings(33, 20, dtype=torch.float32), torch.tensor(9.0)
    together = value_and_grads(loss_of("triton"), *inputs)
    config = dual_softmax.launch_config(
        "dual_softmax_backward", dtype=torch.float32, block_d=32, bounded=True, hardware="interpreter"
    )
    apart = type(config)(**{**vars(config), "apart": True})
    monkeypatch.setattr(dual_softmax, "launch_config", lambda *args, **kwargs: apart)
    for a, b in zip(value_and_grads(loss_of("triton"), *inputs), together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kernels", "splits"),
    [(dual_softmax, 1), (dual_softmax, 3), (dual_softmax_wide, 1)],
    ids=["streaming", "split", "wide"],
)
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "online"])
@pytest.mark.parametrize(
    ("start", "stop", "cuts"),
    # The last: a row-block's last positive is the first column of a whole tile.
    [(13, 37, (19, 20)), (36, 37, (19, 20)), (1, 37, (33, 34))],
)
def test_own_rows_against_columns_that_arrive_in_chunks(
    kernels: ModuleType, bounded: bool, start: int, stop: int, cuts: tuple[int, int], splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dual_softmax, "column_splits", lambda *_: splits)
    N, D = 37, 20
    chunks = [slice(0, cuts[0]), slice(*cuts), slice(cuts[1], N)]
    student, teacher = embeddings(N, D, dtype=torch.float32)
    weight = torch.linspace(0, 2, N)
    scale, w, k = torch.tensor(6.0), torch.tensor(0.3), torch.tensor(0.7)

    leaves = [x.double().requires_grad_() for x in (student, teacher)]
    contrast, consistency = reference.dual_softmax(*leaves, scale.double())
    (weight * (w * contrast + k * consistency)).sum().backward()

    units, inverse_norm = unit_rows(student, teacher, padded_width(D))
    own = slice(start, stop)
    rows, options = units[:, own].contiguous(), {"bounded": bounded}
    state = None
    for chunk in chunks:
        columns = units[:, chunk].contiguous()
        state = kernels.running_statistics(
            rows, columns, scale, offset=start - chunk.start, state=state, **options
        )  # fmt: skip
    loss, own_stats = statistics(state, scale, weight[own].contiguous(), swapped=False)
    assert_close(loss[0], (weight * contrast)[own], torch.float32)
    assert_close(loss[1], (weight * consistency)[own], torch.float32)

    whole_state = kernels.running_statistics(units, units, scale, offset=0, **options)
    _, stats = statistics(whole_state, scale, None, swapped=False)
    assert_close(own_stats, stats[:, own].double(), torch.float32)
    coef, unscale = coefficients(stats, weight, w, k, scale, swapped=False, bounded=bounded)
    partial = None
    for chunk in chunks:
        columns = units[:, chunk].contiguous()
        partial = kernels.gradient_sums(
            rows, columns, coef[:, own], coef[:, chunk], scale, offset=start - chunk.start, need_a=True, need_b=True,
            partial=partial, **options,
        )  # fmt: skip
    grads = gradients(
        partial, rows, inverse_norm[:, own].contiguous(), scale, unscale, D=D, dtype=torch.float32, need_a=True,
        need_b=True,
    )  # fmt: skip
    assert_close(grads[0], leaves[0].grad[own], torch.float32)
    assert_close(grads[1], leaves[1].grad[own], torch.float32)


def test_sliced_and_transposed_inputs(route: str) -> None:
    student, teacher = embeddings(40, 24, dtype=torch.float32)
    exact = value_and_grads(
        loss_of("reference"), student[::2, 3:].double(), teacher[::2, 3:].double(), torch.tensor(4.0).double()
    )
    leaves = [x.T.contiguous().requires_grad_() for x in (student, teacher)]
    value = loss_of("triton")(*(leaf.T[::2, 3:] for leaf in leaves), torch.tensor(4.0))
    value.backward()
    assert_close(value, exact[0], torch.float32)
    for leaf, expected in zip(leaves, exact[1:], strict=False):
        assert_close(leaf.grad.T[::2, 3:], expected, torch.float32)


def hard_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    student, teacher = embeddings(18, 6, dtype=torch.float32)
    zero_rows = student.clone()
    zero_rows[[0, 4, 17]] = 0
    return {
        "zero_rows": (zero_rows, teacher),
        "all_zero": (torch.zeros_like(student), torch.zeros_like(teacher)),
        "huge": (student * 1e30, teacher * 1e30),
        "tiny": (student * 1e-10, teacher * 1e-10),
        "identical": (student[:1].expand(18, 6).contiguous(), teacher[:1].expand(18, 6).contiguous()),
        "equal": (student, student.clone()),
        "opposite": (student, -student),
    }


@pytest.mark.parametrize("case", hard_inputs())
@pytest.mark.parametrize(("scale", "max_scale"), [(1e-9, BOUNDED), (39.9, BOUNDED), (0.5, ONLINE), (3000.0, ONLINE)])
def test_hard_inputs_give_finite_results(case: str, scale: float, max_scale: float, route: str) -> None:
    student, teacher = hard_inputs()[case]
    results = value_and_grads(loss_of("triton", max_scale=max_scale), student, teacher, torch.tensor(scale))
    assert all(x.isfinite().all() for x in results)
    if case == "zero_rows":
        assert results[1][[0, 4, 17]].abs().max() == 0
        assert results[1][1].abs().max() > 0


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize(
    ("dtype", "scale", "max_scale"),
    [(torch.float16, 10.0, BOUNDED), (torch.float16, 40.0, BOUNDED), (torch.float32, 200.0, ONLINE)],
)
def test_collapsed_and_opposite_rows(dtype: torch.dtype, scale: float, max_scale: float, n: int, route: str) -> None:
    """Every similarity is near -scale: a padded column, at similarity 0, would outweigh them all."""
    student, other = torch.eye(20, dtype=dtype)[:2]
    teacher = -0.9 * student + 0.4 * other
    results = value_and_grads(
        loss_of("triton", max_scale=max_scale), student.repeat(n, 1), teacher.repeat(n, 1), torch.tensor(scale)
    )
    assert results[0] == pytest.approx(math.log(n), abs=1e-4)
    # A row's G adds up to nothing, but for its rounding.
    assert all(x.abs().max() <= 1e-3 * scale for x in results[1:])


@pytest.mark.parametrize("case", ["zero_rows", "huge", "tiny", "opposite"])
@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
def test_hard_inputs_have_the_definition_s_gradients(case: str, max_scale: float) -> None:
    inputs = *hard_inputs()[case], torch.tensor(5.0)
    exact = value_and_grads(loss_of("reference"), *(x.double() for x in inputs))
    for a, e in zip(value_and_grads(loss_of("triton", max_scale=max_scale), *inputs), exact, strict=True):
        assert_close(a, e, torch.float32, floor=1e-40)


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_bad_element_makes_the_loss_bad(side: int, bad: float, max_scale: float, route: str) -> None:
    inputs = list(embeddings(20, 6, dtype=torch.float32))
    inputs[side][3, :2] = torch.tensor([0.0, bad])
    assert not loss_of("triton", max_scale=max_scale)(*inputs, torch.tensor(3.0)).isfinite()


def test_a_row_of_zeros_and_one_nan_is_no_zero_row() -> None:
    student, teacher = embeddings(5, 4, dtype=torch.float32)
    student[2] = torch.tensor([0.0, math.nan, 0.0, 0.0])
    assert not loss_of("triton")(student, teacher, torch.tensor(3.0)).isfinite()


@pytest.mark.parametrize("max_scale", [BOUNDED, ONLINE], ids=["bounded", "online"])
def test_every_element_of_an_empty_tensor_is_written(
    max_scale: float, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = *embeddings(37, 7, dtype=torch.float32), torch.tensor(5.0)
    expected = value_and_grads(loss_of("triton", max_scale=max_scale), *inputs)
    poisoned = 0

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            nonlocal poisoned
            poisoned += 1
            return make(*args, **kwargs).fill_(math.nan)

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    actual = value_and_grads(loss_of("triton", max_scale=max_scale), *inputs)
    monkeypatch.undo()
    assert poisoned >= 8
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_inputs_are_left_bitwise_unchanged() -> None:
    inputs = [x.requires_grad_() for x in (*embeddings(20, 8, dtype=torch.float32), torch.tensor(4.0))]
    weight = torch.rand(20)
    before = [x.detach().clone() for x in (*inputs, weight)]
    loss_of("triton", weight=weight)(*inputs).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip((*inputs, weight), before, strict=True))


def test_compiles_as_one_graph() -> None:
    inputs = *embeddings(20, 6, dtype=torch.float32), torch.tensor(5.0)
    compiled = torch.compile(loss_of("triton"), fullgraph=True, backend="aot_eager")
    for a, e in zip(value_and_grads(compiled, *inputs), value_and_grads(loss_of("triton"), *inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_operators_keep_their_schema_and_shapes(needed: tuple[bool, bool]) -> None:
    student, teacher = embeddings(6, 5, dtype=torch.float16)
    common = student, teacher, torch.tensor(5.0), torch.rand(6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.dual_softmax, (*common, "student||teacher", 40.0, "triton"), test_utils=checks)
    stats = op.dual_softmax(*common, "student||teacher", 40.0, "triton")[2]
    grads = torch.tensor(0.5), torch.tensor(2.0)
    arguments = *common, stats, *grads, "student||teacher", 40.0, *needed, "triton"
    torch.library.opcheck(op.dual_softmax_backward, arguments, test_utils=checks)


def test_what_the_interpreter_cannot_compute_raises() -> None:
    student, teacher = embeddings(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        dcd_loss(student, teacher, 3.0, backend="triton")


def test_the_kernels_have_run() -> None:
    """The parity above would also hold for a backend that fell back to another: the kernels must have run."""
    assert "fastkd.backends.triton.dual_softmax" in sys.modules
    assert type(dual_softmax._forward_kernel).__name__ == "InterpretedFunction"
