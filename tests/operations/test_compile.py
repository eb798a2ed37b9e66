"""torch.compile without graph breaks, torch.library.opcheck, autocast, importing."""

import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastkd import DCDLoss, KDLoss, dcd_loss, kd_loss
from fastkd.backends.blocked import gemm
from fastkd.losses import CTKDLoss, DKDLoss, LSKDLoss, MLKDLoss, WSLDLoss
from tests.helpers.checks import assert_close, embeddings, relative_error, value_and_grads

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("backend", "dynamic"), [("reference", None), ("blocked", None), ("blocked", True)])
def test_compiles_as_one_graph_for_changing_shapes_and_floats(backend: str, dynamic: bool | None) -> None:
    torch.compiler.reset()

    def loss(a: Tensor, b: Tensor, scale: float, alpha: float, temperature: float) -> Tensor:
        return dcd_loss(a, b, scale, alpha=alpha, backend=backend) + kd_loss(a, b, temperature, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, scale, alpha, temperature in ((20, 5.0, 0.5, 4.0), (21, 6.0, 0.75, 3.0), (22, 7.0, 0.25, 2.0)):
        inputs = embeddings(n, 6, dtype=torch.float32)
        expected = value_and_grads(lambda *x: loss(*x, scale, alpha, temperature), *inputs)  # noqa: B023
        actual = value_and_grads(lambda *x: compiled(*x, scale, alpha, temperature), *inputs)  # noqa: B023
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, torch.float32)


def test_modules_with_different_settings_compile_in_one_process() -> None:
    torch.compiler.reset()
    logits = torch.randn(5, 7), torch.randn(5, 7)
    features = torch.randn(20, 6), torch.randn(20, 5)
    for temperature, alpha, max_scale in ((4.0, 0.5, 10.0), (3.0, 0.75, 20.0), (2.0, 0.25, None)):
        for module, inputs in (
            (KDLoss(temperature), logits),
            (DCDLoss(6, 5, 8, alpha=alpha, max_scale=max_scale), features),
        ):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            assert_close(sum(compiled(*inputs).values()), sum(module(*inputs).values()), torch.float32)


def test_module_compiles_with_inductor_and_still_clamps() -> None:
    torch.compiler.reset()
    module = DCDLoss(6, 5, 8)
    features = torch.randn(20, 6), torch.randn(20, 5)
    with torch.no_grad():
        module.tau.fill_(4.0)
    compiled = torch.compile(module, fullgraph=True)
    # A graph cached on disk by another version of the operators would be taken for this one's.
    with torch._inductor.config.patch(force_disable_caches=True):
        loss = sum(compiled(*features).values())
        loss.backward()
    assert module.tau.item() == pytest.approx(2.302585, rel=1e-5)
    grad = module.tau.grad.clone()
    module.tau.grad = None
    eager = sum(module(*features).values())
    eager.backward()
    assert_close(loss, eager, torch.float32)
    assert_close(grad, module.tau.grad, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_with_grad_scaler_accumulates_in_float32(
    dtype: torch.dtype, backend: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(gemm, "_LINEAR", None)  # torch.mm, which autocast would lower
    torch.manual_seed(0)
    module = DCDLoss(24, 40, 16, backend=backend)
    features = torch.randn(300, 24), torch.randn(300, 40)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=dtype):
        heads = module.student_head(features[0]), module.teacher_head(features[1])
        loss = sum(module(*features).values())
    assert heads[0].dtype == dtype
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    # The definition in float64 on the same rounded projections: nothing after them may be done in half precision.
    exact = dcd_loss(*(x.double() for x in heads), module.tau.double().exp(), backend="reference")
    assert relative_error(loss, exact) < 1e-6
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    before = module.tau.item()
    scaler.step(optimizer)
    assert module.tau.item() != before


def test_import_is_quick_compiles_nothing_and_leaves_cuda_alone() -> None:
    check = (
        "import sys, time, torch; before = time.process_time(); from fastkd import *; "
        "own = time.process_time() - before; "
        "assert own < before / 2, f'{own:.2f} s of the processor for fastkd, {before:.2f} s for Python and torch'; "
        "assert not torch.cuda.is_initialized(); "
        "heavy = ('triton', 'torch._inductor', 'timm', 'fastkd.trainer'); "
        "assert not any(name.startswith(heavy) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_fake_tensors_see_the_custom_op() -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in embeddings(5, 4)]
        assert dcd_loss(*fake, 3.0).shape == ()


def test_the_kd_family_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    logits = torch.randn(6, 7), torch.randn(6, 7)
    labels = torch.arange(6)
    for module, others in (
        (DKDLoss(), (labels,)),
        (LSKDLoss(), ()),
        (LSKDLoss(DKDLoss(2.0)), (labels,)),
        (WSLDLoss(), (labels,)),
        (CTKDLoss(), (3,)),
        (MLKDLoss([2.0, 3.0], "paper"), ()),
    ):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        expected, actual = (
            value_and_grads(lambda x, call=call: sum(call(x, logits[1], *others).values()), logits[0])  # noqa: B023
            for call in (module, compiled)
        )
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, torch.float32)
