"""The dual_softmax kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import check_against_definition
from tests.helpers.dual_cases import DualProblem, dual_problem
from tests.helpers.gpu import PRECISIONS, gpu, large, matmul_precision, sanitizer

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
@large
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
        tile = dual_softmax.tile_columns(units, bounded=True)
        coef, unscale = coefficients(stats, None, None, one, one, scale, swapped=False, bounded=True, tile=tile)
        partial = dual_softmax.gradient_sums(
            units, column_units, coef, coef[: -(-columns // tile)], scale, offset=far, bounded=True, need_a=True,
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
