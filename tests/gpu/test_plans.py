"""Launches through the extension on a GPU: the same bits as through Triton."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd import dcd_loss, native
from tests.helpers.gpu import assert_replays_from_a_cuda_graph, gpu, sanitizer

pytest.importorskip("triton")


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the launcher."""
    from fastkd.kernels import plans

    if native.extension() is None:
        pytest.skip("there is no extension")

    def choose(name: str) -> None:
        monkeypatch.setattr(plans, "is_native", lambda: name == "native")
        monkeypatch.setattr(plans, "_known", {})

    return choose


@gpu
@sanitizer
def test_a_kernel_with_every_kind_of_argument(through: Callable[[str], None]) -> None:
    from fastkd.kernels import plans

    from tests.host.kernels import arguments, every_kind_kernel

    rows = torch.randn(2, 64, 32, device="cuda").to(torch.bfloat16)
    for weight in (None, torch.rand(64, device="cuda")):
        results = {}
        for name in ("triton", "native"):
            through(name)
            out = torch.zeros(64, device="cuda")
            blocks = {side: plans.Blocks(x, [16, 32]) for side, x in zip(("ROWS", "COLS"), rows, strict=True)}
            for _ in range(2):
                out.zero_()
                plans.launch(every_kind_kernel, (4,), **arguments(OUT=out, WEIGHT=weight, offset=3, **blocks))
            results[name] = out
        assert plans._known[id(every_kind_kernel)].plans.launch(
            (0,), arguments(OUT=out, WEIGHT=weight, offset=3, **blocks)
        )
        assert results["triton"].count_nonzero() == 64
        assert torch.equal(results["native"], results["triton"])


@gpu
@pytest.mark.parametrize("n", [5, 300])
def test_a_loss_and_its_cuda_graph(n: int, through: Callable[[str], None]) -> None:
    student, teacher, fresh = (torch.randn(n, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    student.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = dcd_loss(student, teacher, 20.0, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, student)

    through("triton")
    expected = step()
    through("native")
    for _ in range(2):
        assert all(torch.equal(a, e) for a, e in zip(step(), expected, strict=True))
    assert_replays_from_a_cuda_graph(step, student, fresh)
