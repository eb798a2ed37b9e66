"""The dual_softmax kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import check_against_definition
from tests.helpers.dual_cases import DualProblem, dual_problem
from tests.helpers.gpu import (
    PRECISIONS,
    assert_linear_memory_without_synchronisation,
    assert_replays_from_a_cuda_graph,
    gpu,
    matmul_precision,
    sanitizer,
)

pytest.importorskip("triton")


def on_gpu(
    n: int, d: int, dtype: torch.dtype = torch.bfloat16, mode: str = "dcd bounded", **options: object
) -> DualProblem:
    return dual_problem(mode, n, d, dtype, device="cuda", **options)


@gpu
@pytest.mark.parametrize("mode", ["dcd bounded", "dcd online"])
@pytest.mark.parametrize(
    ("n", "d"),
    [
        (3, 5), pytest.param(63, 16, marks=sanitizer), pytest.param(129, 128, marks=sanitizer), (1000, 100),
        (513, 256), (700, 512),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
def test_gpu_equals_the_definition(dtype: torch.dtype, precision: str, n: int, d: int, mode: str) -> None:
    with matmul_precision(precision) as tolerance:
        check_against_definition(on_gpu(n, d, dtype, mode), tolerance=tolerance)


@gpu
def test_gpu_one_row_has_no_negatives() -> None:
    p = on_gpu(1, 1)
    assert all(x.abs().max() <= 1e-4 for x in value_and_grads(p.kernel, *p.inputs))


@gpu
@pytest.mark.parametrize("n", [1, 17, 1000])
@pytest.mark.parametrize(
    ("dtype", "scale", "mode"),
    [(torch.float16, 10.0, "dcd bounded"), (torch.float16, 40.0, "dcd bounded"), (torch.float32, 200.0, "dcd online")],
)
def test_gpu_collapsed_and_opposite_rows(dtype: torch.dtype, scale: float, mode: str, n: int) -> None:
    student, other = torch.eye(20, dtype=dtype, device="cuda")[:2]
    teacher = -0.9 * student + 0.4 * other
    inputs = student.repeat(n, 1), teacher.repeat(n, 1), torch.tensor(scale, device="cuda")
    with matmul_precision("high"):  # fp32, too, through the streaming kernels
        results = value_and_grads(on_gpu(n, 20, dtype, mode).kernel, *inputs)
    assert all(x.isfinite().all() for x in results)


@gpu
@pytest.mark.parametrize("mode", ["dcd bounded", "dcd swapped bounded"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gpu_frozen_inputs_and_weights(wanted: tuple[int, ...], mode: str) -> None:
    p = on_gpu(300, 128, mode=mode, weight=torch.rand(300, device="cuda"))
    full = value_and_grads(p.kernel, *p.inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(p.inputs)]
    p.kernel(*leaves).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            assert_close(leaf.grad, full[1 + i], torch.float32 if i == 2 else torch.bfloat16)


@gpu
def test_gpu_large_batch_equals_streaming_torch_and_itself() -> None:
    p = on_gpu(20_000, 128)
    one, again = (value_and_grads(p.kernel, *p.inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    expected = value_and_grads(lambda *x: p.kernel(*x, backend="blocked"), *(x.float() for x in p.inputs))
    for a, e in zip(one, expected, strict=True):
        assert_close(a, e, torch.bfloat16)


@gpu
@pytest.mark.parametrize("d", [128, 512])
def test_gpu_memory_is_linear_and_no_host_synchronisation(d: int) -> None:
    p = on_gpu(8192, d)
    mib = 64 if d == 128 else 256  # N x N alone is 256 MiB
    assert_linear_memory_without_synchronisation(p.kernel, p.inputs, mib)


@gpu
def test_gpu_element_offsets_beyond_two_to_the_31() -> None:
    """2^24 + 3 rows of 128: the last rows lie beyond 2^31 elements. Few columns keep the work small."""
    from fastkd.kernels.dual_softmax import streaming as dual_softmax
    from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
    from fastkd.kernels.normalize import unit_rows

    n, columns, tail = 2**24 + 3, 64, 50
    raw = torch.randn(2, n, 128, device="cuda", dtype=torch.bfloat16)
    scale, one = torch.tensor(10.0, device="cuda"), torch.tensor(1.0, device="cuda")

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        units, inverse_norm = unit_rows(rows[0], rows[1], 128)
        own = raw[:, :columns]
        column_units = unit_rows(own[0], own[1], 128)[0]
        far = 2**30  # no row's positive is among the columns
        state = dual_softmax.running_statistics(units, column_units, scale, offset=far, bounded=True)
        stats = statistics(state, scale, None, swapped=False)[1]
        coef, unscale = coefficients(stats, None, one, one, scale, swapped=False, bounded=True)
        partial = dual_softmax.gradient_sums(
            units, column_units, coef, coef[:, :columns].contiguous(), scale, offset=far, bounded=True, need_a=True,
            need_b=False,
        )  # fmt: skip
        return stats, gradients(
            partial, units, inverse_norm, scale, unscale, D=128, dtype=torch.bfloat16, need_a=True, need_b=False
        )[0]

    # The first rows are the columns, so that both runs see the same ones.
    few = torch.cat([raw[:, :columns], raw[:, -tail:]], dim=1)
    stats, grad = run(raw)
    few_stats, few_grad = run(few)
    assert_close(stats[:, -tail:], few_stats[:, -tail:], torch.float32)
    assert_close(grad[-tail:], few_grad[-tail:], torch.bfloat16)


@gpu
def test_gpu_replays_from_a_cuda_graph() -> None:
    p = on_gpu(1000, 128)
    inputs = [x.requires_grad_() for x in p.inputs]
    fresh = p.inputs[0].detach().flip(0).clone()

    def step() -> tuple[Tensor, ...]:
        loss = p.kernel(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    assert_replays_from_a_cuda_graph(step, inputs[0], fresh)


@gpu
def test_gpu_compiles_as_one_graph_and_picks_the_kernels() -> None:
    p = on_gpu(300, 128)
    compiled = torch.compile(lambda *x: p.kernel(*x, backend=None), fullgraph=True)
    for a, e in zip(value_and_grads(compiled, *p.inputs), value_and_grads(p.kernel, *p.inputs), strict=True):
        assert_close(a, e, a.dtype)
