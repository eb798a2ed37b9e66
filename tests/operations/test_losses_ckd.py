"""CKD's module: the functional loss, its options, its errors."""

import torch

from fastkd import CKDLoss, ckd_loss
from tests.helpers.checks import assert_close, logits, value_and_grads


def test_module_is_the_functional_loss() -> None:
    student, teacher, _ = logits(9, 5)
    weight = torch.rand(9, dtype=torch.float64)
    loss, grad = value_and_grads(lambda s: CKDLoss(0.5)(s, teacher, weight)["ckd"], student)
    expected = value_and_grads(lambda s: ckd_loss(s, teacher, 0.5, sample_weight=weight, backend="reference"), student)
    assert_close(loss, expected[0], torch.float64)
    assert_close(grad, expected[1], torch.float64)
    assert CKDLoss().temperature == 1.0
    assert not list(CKDLoss().parameters())


def test_backend_and_group_reach_the_function() -> None:
    student, teacher, _ = logits(9, 5)
    assert list(CKDLoss(backend="reference", group="local")(student, teacher)) == ["ckd"]


def test_compiles_without_a_graph_break() -> None:
    student, teacher, _ = logits(9, 5, dtype=torch.float32)
    module = CKDLoss(backend="blocked")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        value_and_grads(lambda s: compiled(s, teacher)["ckd"], student),
        value_and_grads(lambda s: module(s, teacher)["ckd"], student),
        strict=True,
    ):
        assert_close(actual, expected, torch.float32)
