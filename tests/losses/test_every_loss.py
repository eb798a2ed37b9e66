"""What holds for all classical losses: dtypes, few rows, no rows, rows of zeros, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd.losses import total_loss
from tests.helpers.checks import assert_close
from tests.losses.calls import CALLS, Inputs, inputs, module, students

every_loss = pytest.mark.parametrize("name", CALLS)
NO_SPREAD = ("dist", "lskd", "lskd of dkd")  # divide by the spread of a row's logits, as their docstrings say
NORMS_ONE_VALUE = ("reviewkd", "srrl")  # batch norms of pooled features


def run(loss: nn.Module, given: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients in the student's inputs."""
    total = total_loss(loss(**given))
    total.backward()
    return total.detach(), [x.grad if x.grad is not None else torch.zeros_like(x) for x in students(given)]


def assert_finite(total: Tensor, grads: list[Tensor]) -> None:
    assert total.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_the_table_of_calls_has_every_module() -> None:
    modules = {name for name in losses.__all__ if name.endswith("Loss")}
    other = {"CKDLoss", "DCDLoss", "InfoNCELoss", "KDLoss", "MSDCRDLoss", "PCKDLoss", "SupConLoss"}
    assert {type(module(name)).__name__ for name in CALLS} == modules - other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_loss
def test_narrow_dtypes_give_what_float64_gives_for_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    narrow = module(name).to(dtype)
    wide = module(name)
    wide.load_state_dict({key: x.double() for key, x in narrow.state_dict().items()})
    total, grads = run(narrow, inputs(name, 6, lambda x: x.to(dtype)))
    expected, expected_grads = run(wide, inputs(name, 6, lambda x: x.to(dtype).double()))
    assert total.dtype == torch.float32
    assert total.ndim == 0
    has_layers = any(x.ndim > 1 for x in narrow.parameters())
    assert_close(total, expected, dtype if has_layers else torch.float32)
    for grad, wide_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert grad.isfinite().all()
        if not has_layers:
            assert_close(grad, wide_grad, dtype)
    assert any(grad.any() for grad in grads)


@every_loss
def test_a_loss_under_autocast_is_that_of_the_inputs_dtype(name: str) -> None:
    loss = module(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        total, grads = run(loss, inputs(name, 6, Tensor.float))
    assert total.dtype == torch.float32
    assert_finite(total, grads)
    if not any(x.ndim > 1 for x in loss.parameters()):
        assert_close(total, run(loss, inputs(name, 6, Tensor.float))[0], torch.float32)


@every_loss
def test_no_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^student_\w+(\[0\])?: got shape \[0, .*expected at least one") as error:
        module(name)(**inputs(name, 0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [1, 2])
@every_loss
def test_one_row_and_two_are_enough_or_refused_by_name(name: str, rows: int) -> None:
    loss, given = module(name), inputs(name, rows)
    if rows == 1 and name == "cc":
        with pytest.raises(ValueError, match="student_features: got 1 row, expected at least 2"):
            loss(**given)
    elif rows == 1 and name in NORMS_ONE_VALUE:
        with pytest.raises(ValueError, match=r"student_\w+(\[2\])?: got .* expected two values per channel"):
            loss(**given)
    else:
        assert_finite(*run(loss, given))


@pytest.mark.parametrize("which", ["student", "both"])
@every_loss
def test_rows_of_zeros_have_finite_gradients(name: str, which: str) -> None:
    given = inputs(name, 6, lambda x: x.float())
    for key, value in given.items():
        if key.startswith("student") or which == "both":
            for x in value if isinstance(value, list) else [value]:
                if isinstance(x, Tensor) and x.is_floating_point():
                    x.data[:2] = 0
    total, grads = run(module(name).float(), given)
    assert_finite(total, grads)
    if name not in NO_SPREAD:
        assert max(grad.abs().max() for grad in grads) < 1e3


@every_loss
def test_equal_rows_have_finite_gradients(name: str) -> None:
    given = inputs(name, 6, lambda x: x.float())
    for x in students(given):
        x.data[1] = x.data[0]
    total, grads = run(module(name).float(), given)
    assert_finite(total, grads)
    assert max(grad.abs().max() for grad in grads) < 1e4


def test_lists_of_unequal_length_are_refused() -> None:
    for name in ("ab", "at", "fsp", "nst", "ofd", "reviewkd", "vid"):
        given = inputs(name, 3)
        given["teacher_maps"].pop()
        with pytest.raises(ValueError, match=r"^teacher_maps: got \d maps, expected "):
            module(name)(**given)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "ab: shapes": (lambda: losses.ABLoss([(4, 8, 8)], []), "teacher_shapes: got 0 shapes, expected the shape of"),
    "at: reading": (lambda: losses.ATLoss(reading="x"), "reading: got 'x', expected one of"),
    "cc: widths": (lambda: losses.CCLoss(3, 4, None), "teacher_dim: got 4 without embeddings, expected student_dim, 3"),
    "crd: momentum": (lambda: losses.CRDLoss(3, 4, 9, momentum=1.5), "momentum: got 1.5, expected .* <= 1"),
    "crd indices: class": (lambda: losses.CRDIndices(torch.zeros(3).long(), 2), "labels: got .* 1 classes, expected"),
    "ctkd: epochs": (lambda: losses.CTKDLoss(epochs=0), "epochs: got 0, expected an int >= 1"),
    "dkd: weights": (lambda: losses.DKDLoss(alpha=0, beta=0), "alpha, beta: got 0 for all"),
    "fitnet: height": (lambda: losses.FitNetLoss((4, 3, 3), (4, 8, 8)), "student_shape: got height 3, expected at"),
    "fitnet: shape": (lambda: losses.FitNetLoss((4, 3), (4, 8, 8)), r"student_shape: got \(4, 3\), expected \(chan"),
    "ft: paraphraser": (lambda: losses.FTLoss(3, nn.Linear(2, 2)), "paraphraser: got .* expected Paraphraser"),
    "lskd: loss": (lambda: losses.LSKDLoss(nn.Linear(2, 2)), "loss: got .* expected LossModule"),
    "mlkd: too few": (lambda: losses.MLKDLoss([4.0]), "temperatures: got 1, expected at least 4 for 'code'"),
    "mlkd: one view": (
        lambda: losses.MLKDLoss()(torch.randn(3, 4), torch.randn(3, 4)), "student_logits_strong: got None, expected"
    ),
    "simkd: factor": (lambda: losses.SimKDLoss(3, 4, 5), "factor: got 5, expected at most teacher_channels, 4"),
    "vid: variance": (lambda: losses.VIDLoss([3], [4], initial_variance=0), "initial_variance: got 0, expected a fin"),
    "dkd: labels": (
        lambda: losses.DKDLoss()(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 3])), "labels: got 3, expected"
    ),
    "dkd: one class": (
        lambda: losses.DKDLoss()(torch.randn(2, 1), torch.randn(2, 1), torch.tensor([0, 0])), "expected at least 2 cl"
    ),
    "rkd: samples": (
        lambda: losses.RKDLoss()(torch.randn(3, 4), torch.randn(2, 4)), "teacher_features: got 2 samples, expected"
    ),
    "fitnet: size": (
        lambda: losses.FitNetLoss((4, 8, 8), (4, 8, 8))(torch.randn(2, 4, 6, 6), torch.randn(2, 4, 8, 8)),
        r"student_map: got a size that the connector takes to \[6, 6\], expected the teacher's \[8, 8\]",
    ),
    "fitnet: dtype": (
        lambda: losses.FitNetLoss((4, 8, 8), (4, 8, 8))(torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8)),
        "student_map: got torch.float64, expected the dtype of the module's parameters",
    ),
    "fsp: channels": (
        lambda: losses.FSPLoss()([torch.randn(2, 3, 4, 4)] * 2, [torch.randn(2, 4, 4, 4)] * 2),
        r"teacher_maps\[0\]: got 4 channels, expected the channels of student_maps\[0\], 3",
    ),
    "crd: index": (
        lambda: losses.CRDLoss(3, 4, 9)(torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 9])),
        r"index: got 9, expected numbers of samples, in \[0, 9\)",
    ),
    "norm: channels": (
        lambda: losses.NORMLoss(3)(torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)), "expected 3 times the teacher's"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
