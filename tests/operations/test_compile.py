"""torch.compile without graph breaks, torch.library.opcheck, autocast, importing."""

import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from fastkd import (
    DCDLoss,
    KDLoss,
    ckd_loss,
    dcd_loss,
    info_nce_loss,
    kd_loss,
    masked_contrast_loss,
    sup_con_loss,
)
from fastkd.backends.blocked import gemm
from fastkd.ops.contrast import contrast, contrast_backward
from fastkd.ops.dual_softmax import dual_softmax, dual_softmax_backward
from fastkd.ops.soft_target import soft_target, soft_target_backward
from tests.helpers.checks import assert_close, embeddings, relative_error, value_and_grads
from tests.operations.test_contrast import MODES, make_rows

LABELS = torch.arange(20) % 3
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dcd": lambda a, b, c, w, backend: dcd_loss(a, b, c, 0.5, sample_weight=w, backend=backend),
    "dcd_float_scale": lambda a, b, c, w, backend: dcd_loss(a, b, 5.0, sample_weight=w, backend=backend) + 0 * c,
    "info_nce": lambda a, b, c, w, backend: info_nce_loss(a, b, c, sample_weight=w, backend=backend),
    "kd": lambda a, b, c, w, backend: kd_loss(a, b, 4.0, sample_weight=w, backend=backend) + 0 * c,
    "ckd": lambda a, b, c, w, backend: ckd_loss(a, b, 0.5, sample_weight=w, backend=backend) + 0 * c,
    "sup_con": lambda a, b, c, w, backend: sup_con_loss(a, LABELS, c, sample_weight=w, backend=backend),
    "sup_con_with_self": lambda a, b, c, w, backend: sup_con_loss(
        a, LABELS, c, exclude_self=False, sample_weight=w, backend=backend
    ),
    "masked": lambda a, b, c, w, backend: masked_contrast_loss(
        a, b[:15], c, LABELS, LABELS[:15], LABELS, sample_weight=w, backend=backend
    ),
    "masked_by_label": lambda a, b, c, w, backend: masked_contrast_loss(
        a, b[:15], c, LABELS, LABELS[:15] + 1, positives="label", sample_weight=w, backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    torch.compiler.reset()
    student, teacher = embeddings(20, 6, dtype=torch.float32)
    weight = torch.rand(20)
    inputs = student, teacher, torch.tensor(5.0)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    expected = value_and_grads(lambda *x: LOSSES[name](*x, weight, backend), *inputs)
    for a, e in zip(value_and_grads(lambda *x: compiled(*x, weight, backend), *inputs), expected, strict=True):
        assert_close(a, e, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("dynamic", [True, None])
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


def samples(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = (x.requires_grad_() for x in embeddings(n, d, dtype=dtype))
    return student, teacher, torch.tensor(5.0, dtype=dtype, requires_grad=True), torch.rand(n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(dtype: torch.dtype, weighted: bool) -> None:
    a, b, c, weight = samples(7, 5, dtype)
    w = weight if weighted else None
    torch.library.opcheck(dual_softmax, (a, b, c, w, "student||teacher", 10.0, "blocked"))
    labels = torch.arange(7) % 5
    for teacher, classes in ((b.detach(), labels), (b.detach(), None), (None, labels)):
        torch.library.opcheck(soft_target, (a, teacher, classes, w, 4.0, 0.1, "blocked"))
    a, b, c = a.detach(), b.detach(), c.detach()
    *_, stats = dual_softmax(a, b, c, w, "student||teacher", 10.0, "blocked")
    one = torch.ones((), dtype=stats.dtype)
    for need in (True, False):
        torch.library.opcheck(
            dual_softmax_backward,
            (a, b, c, w, stats, one, one, "student||teacher", 10.0, need, True, "blocked"),
        )
    *_, stats = soft_target(a, b, labels, w, 4.0, 0.1, "blocked")
    torch.library.opcheck(soft_target_backward, (a, b, labels, w, stats, one, one, 4.0, 0.1, "blocked"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_contrast(mode: str, weighted: bool, dtype: torch.dtype) -> None:
    q, k, mask = make_rows(mode, 7, 5, 4)
    key = None if mask.exclude_self else k.to(dtype).requires_grad_()
    key_labels = None if mask.exclude_self else mask.key_labels
    scale = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    weight = torch.rand(len(q), dtype=dtype) if weighted else None
    inputs = q.to(dtype).requires_grad_(), key, scale, weight, mask.query_labels, key_labels, mask.positive_index
    torch.library.opcheck(contrast, (*inputs, mask.by_label, True, "blocked"))
    inputs = tuple(None if x is None else x.detach() for x in inputs)
    _, stats = contrast(*inputs, mask.by_label, True, "blocked")
    one = torch.ones((), dtype=stats.dtype)
    for need_query, need_key in ((True, True), (True, False), (False, True), (False, False)):
        needed = need_query, need_key and key is not None
        torch.library.opcheck(contrast_backward, (*inputs, stats, one, mask.by_label, True, *needed, "blocked"))


@pytest.mark.parametrize("name", ["info_nce", "ckd", "sup_con", "masked", "masked_by_label"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    inputs = *embeddings(20, 6, dtype=torch.float32), torch.tensor(5.0)
    expected = value_and_grads(lambda *x: LOSSES[name](*x, None, "blocked"), *inputs)
    with torch.autocast("cpu", dtype=dtype):
        actual = value_and_grads(lambda *x: LOSSES[name](*x, None, "blocked"), *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


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
        "import sys, fastkd, torch; assert not torch.cuda.is_initialized(); "
        "heavy = ('triton', 'torch._inductor', 'timm', 'fastkd.trainer'); "
        "assert not any(name.startswith(heavy) for name in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's time, which other processes on the machine do not change.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0
