"""What holds of the dual_softmax and contrast kernels alike on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.helpers.checks import assert_close, value_and_grads
from tests.helpers.contrast_cases import MODES
from tests.helpers.dual_cases import DUAL_MODES, any_problem
from tests.helpers.gpu import assert_replays_from_a_cuda_graph, gpu

pytest.importorskip("triton")


@gpu
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("mode", ["dcd bounded", "dcd swapped bounded", "masked, given index"])
def test_gpu_frozen_inputs(mode: str, wanted: tuple[int, ...]) -> None:
    is_dual = mode in DUAL_MODES
    weight = torch.rand(300, device="cuda") if is_dual else None
    p = any_problem(mode, 300, 128, torch.bfloat16, device="cuda", weight=weight)
    full = value_and_grads(p.kernel, *p.inputs)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(p.inputs)]
    p.kernel(*leaves).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted and (is_dual or i < 2):
            assert_close(leaf.grad, full[1 + i], torch.float32 if i == 2 else torch.bfloat16)
        elif i in wanted:  # a sum over the queries, which may cancel
            assert_close(leaf.grad, full[1 + i], torch.bfloat16, floor=30.0)


@gpu
@pytest.mark.parametrize("mode", ["dcd bounded", "index", "self label", "masked, given index"])
def test_gpu_large_batch_equals_float32_and_itself(mode: str) -> None:
    is_dual = mode in DUAL_MODES
    p = any_problem(mode, 20_000, 128, torch.bfloat16, device="cuda", **({} if is_dual else {"classes": 1000}))
    one, again = (value_and_grads(p.kernel, *p.inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    backend = "blocked" if is_dual else "triton"  # the kernels for fp32 multiply by torch.mm
    expected = value_and_grads(lambda *x: p.kernel(*x, backend=backend), *(x.float() for x in p.inputs))
    for a, e in zip(one, expected, strict=True):
        assert_close(a, e, torch.bfloat16, floor=2000.0 if a.ndim == 0 and not is_dual else 1e-5)


@gpu
@pytest.mark.parametrize(
    ("mode", "d", "mib"),  # N x N alone is 256 MiB
    [
        ("dcd bounded", 128, 64),
        ("dcd bounded", 512, 256),
        *((mode, *limit) for mode in ("index", "masked", "self label") for limit in ((128, 64), (1000, 240))),
    ],
)
def test_gpu_memory_is_linear_and_no_host_synchronisation(mode: str, d: int, mib: int) -> None:
    p = any_problem(mode, 8192, d, torch.bfloat16, device="cuda")
    value_and_grads(p.kernel, *p.inputs)
    leaves = [x.requires_grad_() for x in p.inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.kernel(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < mib * 2**20


@gpu
@pytest.mark.parametrize("mode", ["dcd bounded", "index", "self label"])
def test_gpu_replays_from_a_cuda_graph(mode: str) -> None:
    p = any_problem(mode, 1000, 128, torch.bfloat16, device="cuda")
    inputs = [x.requires_grad_() for x in p.inputs]
    fresh = p.inputs[0].detach().flip(0).clone()

    def step() -> tuple[Tensor, ...]:
        loss = p.kernel(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    assert_replays_from_a_cuda_graph(step, inputs[0], fresh)


@gpu
@pytest.mark.parametrize("mode", ["dcd bounded", *MODES])
def test_gpu_compiles_as_one_graph(mode: str) -> None:
    p = any_problem(mode, 300, 128, torch.bfloat16, device="cuda")
    chosen = {"backend": None} if mode in DUAL_MODES else {}  # the kernels, without being asked for
    compiled = torch.compile(lambda *x: p.kernel(*x, **chosen), fullgraph=True)
    for a, e in zip(value_and_grads(compiled, *p.inputs), value_and_grads(p.kernel, *p.inputs), strict=True):
        assert_close(a, e, a.dtype)
