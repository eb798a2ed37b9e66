"""The contrast kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import MODES, NEEDS_PAIRS, Problem, check_against_definition, problem
from tests.helpers.gpu import LOW_PRECISIONS, gpu, large, matmul_precision, sanitizer

pytest.importorskip("triton")


def on_gpu(mode: str, n: int, N: int, D: int, dtype: torch.dtype, **options: object) -> Problem:
    return problem(mode, n, N, D, dtype, device="cuda", **options)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n", "d"), [(3, 5), (63, 16), pytest.param(129, 128, marks=sanitizer), (1000, 100), (513, 256), (700, 1000)]
)
def test_contrast_on_a_gpu_equals_the_definition(n: int, d: int, mode: str, dtype: torch.dtype) -> None:
    check_against_definition(on_gpu(mode, n, n, d, dtype))


@gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "d"), [(63, 16), pytest.param(129, 128, marks=sanitizer), (300, 64)])
def test_contrast_on_a_gpu_in_tf32(n: int, d: int, mode: str) -> None:
    with matmul_precision("high") as tolerance:
        check_against_definition(on_gpu(mode, n, n, d, torch.float32), tolerance=tolerance)


@gpu
@pytest.mark.parametrize(("dtype", "precision"), LOW_PRECISIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [100, 128, 1000])
def test_gpu_blocks_of_several_ranks(d: int, mode: str, dtype: torch.dtype, precision: str) -> None:
    from tests.helpers.blocks_of_ranks import contrast_over_ranks

    sizes = (130, 0, 500)
    key_sizes = sizes if MODES[mode][3] or mode in NEEDS_PAIRS else (1, 300, 70)
    weight = torch.tensor([0.0, 5.0, 1.0]).repeat(210)
    p, loss = contrast_over_ranks(mode, sizes, key_sizes, d, dtype=dtype, device="cuda", weight=weight)
    with matmul_precision(precision) as tolerance:
        check_against_definition(p, -37.0, tolerance, loss)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["given index", "masked, given index", "label"])
@pytest.mark.parametrize(("n", "N", "d"), [(1, 500, 128), (500, 2, 128), (130, 1000, 64), (70, 300, 9001)])
def test_gpu_other_numbers_of_queries_than_keys(n: int, N: int, d: int, mode: str, dtype: torch.dtype) -> None:
    check_against_definition(on_gpu(mode, n, N, d, dtype))


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_gpu_rows_as_they_are_weights_and_upstream(mode: str) -> None:
    weight = torch.tensor([0.0, 5.0, 1.0]).repeat(100)
    p = on_gpu(mode, 300, 300, 128, torch.bfloat16, normalize=False, scale=1.5, weight=weight)
    check_against_definition(p, upstream=-37.0)


@gpu
def test_gpu_a_scale_that_needs_the_running_maximum() -> None:
    check_against_definition(on_gpu("index", 300, 300, 6, torch.float32, scale=120.0))


@gpu
def test_gpu_losses_near_zero_keep_their_digits() -> None:
    """Every loss is about 63 exp(-50): 1 plus it is 1."""
    query = torch.eye(64, device="cuda", dtype=torch.bfloat16)
    p = Problem((query, query.clone(), torch.tensor(50.0, device="cuda")), None, None, None, False, True)
    loss, grad_query, _, grad_scale = value_and_grads(p.kernel, *p.inputs)
    expected = 63 * torch.tensor(-50.0, dtype=torch.float64).exp()
    assert_close(loss.cpu(), 64 * expected, torch.float32, floor=1e-30)
    assert_close(grad_scale.cpu(), -64 * expected, torch.bfloat16, floor=1e-30)
    assert grad_query.abs().max() > 0


@gpu
@large
def test_gpu_element_offsets_beyond_two_to_the_31() -> None:
    """2^24 + 3 rows of 128: the last rows lie beyond 2^31 elements. Few columns keep the work small."""
    n, columns, tail = 2**24 + 3, 64, 50
    query = torch.randn(n, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(columns, 128, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(columns, (n,), device="cuda")
    scale = torch.tensor(10.0, device="cuda")

    def run(rows: slice) -> Tensor:
        p = Problem((query[rows], key, scale), None, None, index[rows], False, True)
        leaf = p.inputs[0].detach().requires_grad_()
        p.kernel(leaf, key, scale).backward()
        assert leaf.grad is not None
        return leaf.grad[-tail:]

    assert_close(run(slice(None)), run(slice(n - tail, n)), torch.bfloat16)
