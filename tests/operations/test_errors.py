"""Every bad argument raises, and the message names the argument, what came and what was expected."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd import DCDLoss, ckd_loss, dcd_loss, info_nce_loss, kd_loss, masked_contrast_loss, sup_con_loss

S, T = torch.randn(4, 3), torch.randn(4, 3)
W = torch.ones(4)

PAIRED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "dcd": (lambda a, b, **options: dcd_loss(a, b, 2.0, **options), "student", "teacher"),
    "info_nce": (lambda a, b, **options: info_nce_loss(a, b, 2.0, **options), "query", "key"),
    "kd": (lambda a, b, **options: kd_loss(a, b, **options), "student_logits", "teacher_logits"),
    "ckd": (lambda a, b, **options: ckd_loss(a, b, **options), "student_logits", "teacher_logits"),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_bad_tensors(name: str, backend: str) -> None:
    loss, first, second = PAIRED[name]
    cases = [
        (TypeError, f"{first}: got list", [1.0], T),
        (TypeError, f"{second}: got NoneType", S, None),
        (TypeError, f"{first}: got torch.int64", S.long(), T.long()),
        (TypeError, f"{first}: got torch.complex64", S.to(torch.complex64), T.to(torch.complex64)),
        (TypeError, f"{second}: got torch.float64", S, T.double()),
        (ValueError, f"{first}: got shape \\[3\\]", S[0], T[0]),
        (ValueError, f"{second}: got shape \\[2, 2, 3\\]", S, T.view(2, 2, 3)),
        (ValueError, f"{second}: got shape \\[4, 2\\], expected that of {first}, \\[4, 3\\]", S, T[:, :2]),
        (ValueError, f"{second}: got shape \\[3, 3\\]", S, T[:3]),
        (ValueError, f"{first}: got shape \\[0, 3\\], expected at least one row", S[:0], T[:0]),
        (ValueError, f"{first}: got shape \\[4, 0\\]", S[:, :0], T[:, :0]),
        (ValueError, f"{second}: got device meta", S, T.to("meta")),
    ]
    for error, message, a, b in cases:
        with pytest.raises(error, match=message):
            loss(a, b, backend=backend)


@pytest.mark.parametrize("name", PAIRED)
def test_bad_sample_weights(name: str) -> None:
    loss = PAIRED[name][0]
    cases = [
        (TypeError, "sample_weight: got list", [1.0] * 4),
        (TypeError, "sample_weight: got torch.int64", W.long()),
        (ValueError, "sample_weight: got shape \\[3\\], expected \\[4\\]", W[:3]),
        (ValueError, "sample_weight: got shape \\[4, 1\\]", W[:, None]),
        (ValueError, "sample_weight: got -1.0, expected weights >= 0", torch.tensor([1.0, 2.0, -1.0, 0.0])),
        (ValueError, "sample_weight: got a tensor that requires a gradient", W.clone().requires_grad_()),
        (ValueError, "sample_weight: got device meta", W.to("meta")),
    ]
    for error, message, weight in cases:
        with pytest.raises(error, match=message):
            loss(S, T, sample_weight=weight)


@pytest.mark.parametrize("name", PAIRED)
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="backend: got 'fast', expected None or one of"):
        PAIRED[name][0](S, T, backend="fast")


@pytest.mark.parametrize("name", ["dcd", "info_nce", "ckd"])
def test_bad_groups(name: str) -> None:
    loss = PAIRED[name][0]
    with pytest.raises(ValueError, match="group: got 'global'"):
        loss(S, T, group="global")
    with pytest.raises(TypeError, match="group: got int"):
        loss(S, T, group=3)
    assert loss(S, T, group="local").item() == loss(S, T).item()


@pytest.mark.parametrize(
    ("error", "message", "scale"),
    [
        (TypeError, "logit_scale: got '2' of type str", "2"),
        (TypeError, "logit_scale: got True of type bool", True),
        (TypeError, "logit_scale: got torch.int64", torch.tensor(2)),
        (ValueError, "logit_scale: got 0.0", 0.0),
        (ValueError, "logit_scale: got -1", -1),
        (ValueError, "logit_scale: got inf", math.inf),
        (ValueError, r"logit_scale: got 1e\+300, expected a finite number > 0 and <= 3.4", 1e300),
        (ValueError, "logit_scale: got -2.0, expected a positive", torch.tensor(-2.0)),
        (ValueError, "logit_scale: got shape \\[1\\], expected a float or a 0-dim tensor", torch.ones(1)),
        (ValueError, "logit_scale: got device meta", torch.tensor(2.0, device="meta")),
    ],
)
def test_bad_logit_scales(error: type[Exception], message: str, scale: object) -> None:
    with pytest.raises(error, match=message):
        dcd_loss(S, T, scale)
    with pytest.raises(error, match=message):
        info_nce_loss(S, T, scale)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "alpha: got '1' of type str", {"alpha": "1"}),
        (ValueError, "alpha: got -0.5, expected a finite number >= 0", {"alpha": -0.5}),
        (ValueError, "alpha: got nan", {"alpha": math.nan}),
        (ValueError, "consistency: got 'both', expected one of", {"consistency": "both"}),
        (TypeError, "logit_bias: got '0' of type str", {"logit_bias": "0"}),
        (ValueError, "logit_bias: got inf", {"logit_bias": math.inf}),
        (ValueError, "logit_bias: got shape \\[2\\]", {"logit_bias": torch.zeros(2)}),
    ],
)
def test_bad_dcd_options(error: type[Exception], message: str, options: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        dcd_loss(S, T, 2.0, **options)


L4, L6, K6 = torch.tensor([0, 1, 0, 1]), torch.arange(6), torch.randn(6, 3)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "query: got list", {"query": [1.0]}),
        (TypeError, "key: got torch.float64", {"key": K6.double()}),
        (ValueError, r"key: got shape \[6, 2\]", {"key": K6[:, :2]}),
        (ValueError, r"key: got shape \[0, 3\]", {"key": K6[:0], "key_labels": L6[:0]}),
        (ValueError, r"query: got shape \[0, 3\]", {"query": S[:0], "query_labels": L4[:0]}),
        (ValueError, "key: got device meta", {"key": K6.to("meta")}),
        (TypeError, "query_labels: got list", {"query_labels": [0, 1, 0, 1]}),
        (TypeError, "query_labels: got torch.float32, expected int64", {"query_labels": L4.float()}),
        (ValueError, r"query_labels: got shape \[6\], expected \[4\]", {"query_labels": L6}),
        (ValueError, r"key_labels: got shape \[4\], expected \[6\]", {"key_labels": L4}),
        (ValueError, "key_labels: got device meta", {"key_labels": L6.to("meta")}),
        (ValueError, "positive_index: got None with 4 queries and 6 keys", {"positive_index": None}),
        (ValueError, r"positive_index: got 6, expected rows of key, in \[0, 6\)", {"positive_index": L4 + 5}),
        (ValueError, "positive_index: got -1, expected rows of key", {"positive_index": L4 - 1}),
        (TypeError, "positive_index: got torch.int32", {"positive_index": L4.int()}),
        (ValueError, r"positive_index: got shape \[6\], expected \[4\]", {"positive_index": L6}),
        (ValueError, "positive_index: got a tensor with positives='label'", {"positives": "label"}),
        (ValueError, "positives: got 'class', expected one of", {"positives": "class"}),
        (TypeError, "normalize: got int, expected a bool", {"normalize": 1}),
        (ValueError, r"sample_weight: got shape \[6\], expected \[4\]", {"sample_weight": torch.ones(6)}),
        (ValueError, "logit_scale: got 0.0", {"logit_scale": 0.0}),
        (ValueError, "group: got 'all'", {"group": "all"}),
        (ValueError, "backend: got 'fast'", {"backend": "fast"}),
    ],
)
def test_bad_masked_contrast_arguments(
    error: type[Exception], message: str, changed: dict[str, object], backend: str
) -> None:
    arguments = {
        "query": S, "key": K6, "logit_scale": 2.0, "query_labels": L4, "key_labels": L6, "positive_index": L4,
        "backend": backend,
    }  # fmt: skip
    assert masked_contrast_loss(**arguments).isfinite()
    with pytest.raises(error, match=message):
        masked_contrast_loss(**{**arguments, **changed})


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "features: got list", {"features": [1.0]}),
        (ValueError, r"features: got shape \[4\]", {"features": S[:, 0]}),
        (ValueError, r"features: got shape \[0, 3\]", {"features": S[:0], "labels": L4[:0]}),
        (TypeError, "labels: got list", {"labels": [0, 1, 0, 1]}),
        (TypeError, "labels: got torch.bool", {"labels": L4 > 0}),
        (ValueError, r"labels: got shape \[6\], expected \[4\]", {"labels": L6}),
        (TypeError, "exclude_self: got NoneType, expected a bool", {"exclude_self": None}),
        (TypeError, "normalize: got int, expected a bool", {"normalize": 0}),
        (ValueError, "logit_scale: got -1", {"logit_scale": -1}),
        (ValueError, "sample_weight: got -1.0", {"sample_weight": -torch.ones(4)}),
    ],
)
def test_bad_sup_con_arguments(error: type[Exception], message: str, changed: dict[str, object], backend: str) -> None:
    arguments = {"features": S, "labels": L4, "logit_scale": 2.0, "backend": backend}
    assert sup_con_loss(**arguments).isfinite()
    with pytest.raises(error, match=message):
        sup_con_loss(**{**arguments, **changed})


def test_bad_ckd_temperatures() -> None:
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=re.escape(f"temperature: got {value}")):
            ckd_loss(S, T, value)


def test_bad_info_nce_and_kd_options() -> None:
    with pytest.raises(TypeError, match="normalize: got int, expected a bool"):
        info_nce_loss(S, T, 2.0, normalize=1)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=re.escape(f"temperature: got {value}")):
            kd_loss(S, T, value)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "learnable: got 'no' of type str", {"learnable": "no"}),
        (TypeError, "logit_bias: got 3.0 of type float", {"logit_bias": 3.0}),
        (TypeError, "student_dim: got 3.0 of type float", {"student_dim": 3.0}),
        (ValueError, "teacher_dim: got 0", {"teacher_dim": 0}),
        (ValueError, "embed_dim: got -1", {"embed_dim": -1}),
        (ValueError, "alpha: got -1", {"alpha": -1.0}),
        (ValueError, "consistency: got 'p'", {"consistency": "p"}),
        (ValueError, "max_scale: got 0", {"max_scale": 0.0}),
        (ValueError, "min_scale: got nan", {"min_scale": math.nan}),
        (ValueError, "min_scale: got 20.0, expected at most max_scale", {"min_scale": 20.0}),
        (ValueError, "temperature: got 0", {"temperature": 0.0, "learnable": False}),
        (ValueError, "backend: got 'gpu'", {"backend": "gpu"}),
        (ValueError, "group: got 'all'", {"group": "all"}),
    ],
)
def test_bad_module_options_raise_when_the_module_is_made(
    error: type[Exception], message: str, options: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        DCDLoss(**{"student_dim": 3, "teacher_dim": 3, **options})


@pytest.mark.parametrize("name", PAIRED)
def test_forward_mode_raises_instead_of_giving_a_zero_tangent(name: str) -> None:
    tangent = torch.arange(12.0).view(4, 3).sin()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation: use backend='reference'"):
        torch.func.jvp(lambda s: PAIRED[name][0](s, T), (S,), (tangent,))
    _, derivative = torch.func.jvp(lambda s: PAIRED[name][0](s, T, backend="reference"), (S,), (tangent,))
    assert derivative.abs() > 0
