"""What tests on a GPU share: markers, the precision of fp32 products, CUDA graphs, what a lost device looks like."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

sanitizer = pytest.mark.sanitizer
large = pytest.mark.large
bandwidth = pytest.mark.bandwidth
# (dtype, what torch.set_float32_matmul_precision is given): the setting concerns float32 alone.
PRECISIONS = [
    (torch.bfloat16, "highest"), (torch.float16, "highest"), (torch.float32, "highest"), (torch.float32, "high"),
]  # fmt: skip
LOW_PRECISIONS = [PRECISIONS[0], *PRECISIONS[2:]]

# A test that takes ``device`` runs on gloo ranks, and on NCCL ranks where there are devices for them.
_SEVERAL = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_SEVERAL)])


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a CUDA device, and skips it where there is none."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def is_lost() -> bool:
    """Whether an error of the device has made all further CUDA calls of this process fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[torch.dtype | None]:
    """fp32 products at this precision. Gives the dtype that has the mantissa of tf32 where they are tf32."""
    torch.set_float32_matmul_precision(precision)
    try:
        yield torch.float16 if precision == "high" else None
    finally:
        torch.set_float32_matmul_precision("highest")


def assert_replays_from_a_cuda_graph(step: Callable[[], tuple[Tensor, ...]], leaf: Tensor, fresh: Tensor) -> None:
    """A captured ``step`` gives, after ``leaf`` got the values of ``fresh``, what running it again gives."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        leaf.copy_(fresh)
    graph.replay()
    for a, e in zip(results, step(), strict=True):
        assert torch.equal(a, e)
