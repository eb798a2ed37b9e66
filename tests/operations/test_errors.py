"""Every bad argument raises, and the message names the argument, what came and what was expected."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from fastkd import (
    CKDLoss,
    DCDLoss,
    InfoNCELoss,
    KDLoss,
    SupConLoss,
    ckd_loss,
    dcd_loss,
    info_nce_loss,
    kd_loss,
    masked_contrast_loss,
    multiscale_pool,
    preview_weight,
    sup_con_loss,
)
from fastkd.backends import BACKENDS
from fastkd.functional.kd import ce_kd_terms, soft_target_rows
from fastkd.validate import Backend

S, T = torch.randn(4, 3), torch.randn(4, 3)
K6, L4, L6 = torch.randn(6, 3), torch.tensor([0, 1, 0, 1]), torch.arange(6)
W = torch.ones(4)
MASKED = {"query_labels": L4, "key_labels": L6, "positive_index": L4}

# name -> a call, and arguments that it takes without an error
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dcd_loss": (dcd_loss, {"student": S, "teacher": T, "logit_scale": 2.0}),
    "info_nce_loss": (info_nce_loss, {"query": S, "key": T, "logit_scale": 2.0}),
    "kd_loss": (kd_loss, {"student_logits": S, "teacher_logits": T}),
    "ckd_loss": (ckd_loss, {"student_logits": S, "teacher_logits": T}),
    "ce_kd_terms": (ce_kd_terms, {"student_logits": S, "teacher_logits": T, "labels": L4}),
    "soft_target_rows": (soft_target_rows, {"student_logits": S, "teacher_logits": T, "labels": L4}),
    "masked_contrast_loss": (masked_contrast_loss, {"query": S, "key": K6, "logit_scale": 2.0, **MASKED}),
    "sup_con_loss": (sup_con_loss, {"features": S, "labels": L4, "logit_scale": 2.0}),
    "multiscale_pool": (
        multiscale_pool,
        {"features": torch.zeros(2, 3, 7, 5), "windows": [(7, 5), 2], "strides": [1, 1]},
    ),
    "preview_weight": (preview_weight, {"ce_per_sample": W, "threshold": 1.0}),
    "DCDLoss": (DCDLoss, {"student_dim": 3, "teacher_dim": 3}),
    "KDLoss": (KDLoss, {}),
    "CKDLoss": (CKDLoss, {}),
    "InfoNCELoss": (InfoNCELoss, {}),
    "SupConLoss": (SupConLoss, {}),
}
# Of two inputs of one shape: the names of both.
PAIRED = {
    name: tuple(CALLS[name][1])[:2] for name in ("dcd_loss", "info_nce_loss", "kd_loss", "ckd_loss", "ce_kd_terms")
}

Row = tuple[dict[str, Any], type[Exception], str]
ROWS: dict[str, list[Row]] = {
    "dcd_loss": [
        ({"alpha": "1"}, TypeError, "alpha: got '1' of type str"),
        ({"alpha": -0.5}, ValueError, "alpha: got -0.5, expected a finite number >= 0"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan"),
        ({"consistency": "both"}, ValueError, "consistency: got 'both', expected one of"),
        ({"logit_bias": "0"}, TypeError, "logit_bias: got '0' of type str"),
        ({"logit_bias": math.inf}, ValueError, "logit_bias: got inf"),
        ({"logit_bias": torch.zeros(2)}, ValueError, r"logit_bias: got shape \[2\]"),
    ],
    "info_nce_loss": [
        ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
    ],
    "ckd_loss": [],
    "ce_kd_terms": [
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels: got list, expected a torch.Tensor"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got torch.float32, expected int64"),
        ({"labels": L4[:, None]}, ValueError, r"labels: got shape \[4, 1\], expected \[4\]"),
        ({"labels": L4.to("meta")}, ValueError, "labels: got device meta"),
        ({"labels": L4 - 100}, ValueError, r"labels: got -100, expected class indices in \[0, 3\)"),
        ({"labels": L4 - 1}, ValueError, r"labels: got -1, expected class indices in \[0, 3\)"),
        ({"labels": L4 + 2}, ValueError, r"labels: got 3, expected class indices in \[0, 3\)"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing: got 1.1, expected a finite number >= 0 and <"),
        ({"label_smoothing": True}, TypeError, "label_smoothing: got True"),
        ({"kd_weight": W[:3]}, ValueError, r"kd_weight: got shape \[3\], expected \[4\]"),
        ({"kd_weight": W - 2}, ValueError, "kd_weight: got -1.0, expected weights >= 0"),
    ],
    "soft_target_rows": [
        ({"student_logits": [1.0]}, TypeError, "student_logits: got list, expected a torch.Tensor"),
        ({"teacher_logits": T[:3]}, ValueError, r"teacher_logits: got shape \[3, 3\], expected that of student_logits"),
        ({"student_logits": S[:0], "teacher_logits": T[:0]}, ValueError, r"student_logits: got shape \[0, 3\]"),
        ({"labels": L4 + 2}, ValueError, r"labels: got 3, expected class indices in \[0, 3\)"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number >= 0.0001 and <= 10000"),
        ({"temperature": []}, ValueError, "temperature: got no number, expected at least one"),
        ({"temperature": [1.0, "2"]}, TypeError, "temperature: got '2' of type str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: got shape \[3\], expected a 0-dim tensor or \[4\]"),
        ({"temperature": torch.ones(4).long()}, TypeError, "temperature: got torch.int64, expected float64"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature: got nan, expected a finite number"),
        ({"temperature": W.to("meta")}, ValueError, "temperature: got device meta, expected that of the logits, cpu"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature: got -1.0, expected a finite number"),
        ({"teacher_temperature": [1.0, 2.0]}, ValueError, "teacher_temperature: got 2, expected as many as of temp"),
        ({"exclude_label": 1}, TypeError, "exclude_label: got int, expected a bool"),
        ({"exclude_label": True, "labels": None}, TypeError, "labels: got None, expected a torch.Tensor for exclude"),
        (
            {"student_logits": S[:, :1], "teacher_logits": T[:, :1], "labels": None, "standardize": True},
            ValueError,
            r"student_logits: got shape \[4, 1\], expected at least 2 classes",
        ),
    ],
    "masked_contrast_loss": [
        ({"query": [1.0]}, TypeError, "query: got list"),
        ({"key": K6.double()}, TypeError, "key: got torch.float64"),
        ({"key": K6[:, :2]}, ValueError, r"key: got shape \[6, 2\]"),
        ({"key": K6[:0], "key_labels": L6[:0]}, ValueError, r"key: got shape \[0, 3\]"),
        ({"query": S[:0], "query_labels": L4[:0]}, ValueError, r"query: got shape \[0, 3\]"),
        ({"key": K6.to("meta")}, ValueError, "key: got device meta"),
        ({"query_labels": [0, 1, 0, 1]}, TypeError, "query_labels: got list"),
        ({"query_labels": L4.float()}, TypeError, "query_labels: got torch.float32, expected int64"),
        ({"query_labels": L6}, ValueError, r"query_labels: got shape \[6\], expected \[4\]"),
        ({"key_labels": L4}, ValueError, r"key_labels: got shape \[4\], expected \[6\]"),
        ({"key_labels": L6.to("meta")}, ValueError, "key_labels: got device meta"),
        ({"positive_index": None}, ValueError, "positive_index: got None with 4 queries and 6 keys"),
        ({"positive_index": L4 + 5}, ValueError, r"positive_index: got 6, expected rows of key, in \[0, 6\)"),
        ({"positive_index": L4 - 1}, ValueError, "positive_index: got -1, expected rows of key"),
        ({"positive_index": L4.int()}, TypeError, "positive_index: got torch.int32"),
        ({"positive_index": L6}, ValueError, r"positive_index: got shape \[6\], expected \[4\]"),
        ({"positives": "label"}, ValueError, "positive_index: got a tensor with positives='label'"),
        ({"positives": "class"}, ValueError, "positives: got 'class', expected one of"),
        ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
        ({"sample_weight": torch.ones(6)}, ValueError, r"sample_weight: got shape \[6\], expected \[4\]"),
    ],
    "sup_con_loss": [
        ({"features": [1.0]}, TypeError, "features: got list"),
        ({"features": S[:, 0]}, ValueError, r"features: got shape \[4\]"),
        ({"features": S[:0], "labels": L4[:0]}, ValueError, r"features: got shape \[0, 3\]"),
        ({"labels": [0, 1, 0, 1]}, TypeError, "labels: got list"),
        ({"labels": L4 > 0}, TypeError, "labels: got torch.bool"),
        ({"labels": L6}, ValueError, r"labels: got shape \[6\], expected \[4\]"),
        ({"exclude_self": None}, TypeError, "exclude_self: got NoneType, expected a bool"),
        ({"normalize": 0}, TypeError, "normalize: got int, expected a bool"),
        ({"sample_weight": -W}, ValueError, "sample_weight: got -1.0"),
    ],
    "multiscale_pool": [
        ({"features": [1.0]}, TypeError, "features: got list, expected a torch.Tensor"),
        ({"features": torch.zeros(2, 3, 7, 7).long()}, TypeError, "features: got torch.int64"),
        ({"features": torch.zeros(2, 3, 49)}, ValueError, r"features: got shape \[2, 3, 49\], expected \[B, C, H, W\]"),
        ({"features": torch.zeros(2, 0, 7, 5)}, ValueError, r"features: got shape \[2, 0, 7, 5\], expected at least"),
        ({"windows": 7}, TypeError, "windows: got 7 of type int, expected one int or pair per scale"),
        ({"windows": []}, ValueError, "windows: got no entry, expected one per scale"),
        ({"windows": [7, 0]}, ValueError, "windows: got 0, expected an int >= 1"),
        ({"windows": [7, 2.0]}, TypeError, "windows: got 2.0 of type float, expected an int >= 1"),
        ({"windows": [7, True]}, TypeError, "windows: got True of type bool"),
        ({"windows": [(7, 7, 7), 2]}, ValueError, r"windows: got the entry \(7, 7, 7\), expected an int or a pair"),
        ({"windows": [6, 2]}, ValueError, "windows: got 6 x 6, expected at most the map's 7 x 5"),
        ({"windows": [(8, 5), 2]}, ValueError, "windows: got 8 x 5, expected at most the map's 7 x 5"),
        ({"strides": [1]}, ValueError, "strides: got 1 entries, expected one per window, 2"),
        ({"strides": [1, 0]}, ValueError, "strides: got 0, expected an int >= 1"),
        ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
        ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8, expected float64"),
    ],
    "preview_weight": [
        ({"ce_per_sample": torch.ones(2, 2)}, ValueError, r"ce_per_sample: got shape \[2, 2\], expected \[B\]"),
        ({"ce_per_sample": W[:0]}, ValueError, r"ce_per_sample: got shape \[0\], expected \[B\], B >= 1"),
        ({"ce_per_sample": W - 3}, ValueError, "ce_per_sample: got -2.0, expected cross-entropies >= 0"),
        ({"threshold": -1.0}, ValueError, "threshold: got -1"),
    ],
    "DCDLoss": [
        ({"learnable": "no"}, TypeError, "learnable: got 'no' of type str"),
        ({"logit_bias": 3.0}, TypeError, "logit_bias: got 3.0 of type float"),
        ({"student_dim": 3.0}, TypeError, "student_dim: got 3.0 of type float"),
        ({"teacher_dim": 0}, ValueError, "teacher_dim: got 0"),
        ({"embed_dim": -1}, ValueError, "embed_dim: got -1"),
        ({"alpha": -1.0}, ValueError, "alpha: got -1"),
        ({"consistency": "p"}, ValueError, "consistency: got 'p'"),
        ({"max_scale": 0.0}, ValueError, "max_scale: got 0"),
        ({"min_scale": math.nan}, ValueError, "min_scale: got nan"),
        ({"min_scale": 20.0}, ValueError, "min_scale: got 20.0, expected at most max_scale"),
    ],
    "kd_loss": [
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: got -1.0, expected a finite number >= 0.0001"),
        ({"standardize": 1}, TypeError, "standardize: got int, expected a bool"),
    ],
    "KDLoss": [],
    "CKDLoss": [],
    "InfoNCELoss": [
        ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
    ],
    "SupConLoss": [
        ({"temperature": "1"}, TypeError, "temperature: got '1'"),
        ({"exclude_self": 1}, TypeError, "exclude_self: got int, expected a bool"),
    ],
}  # fmt: skip

ROWS["info_nce_loss"].append(({"key": T.double()}, TypeError, "key: got torch.float64"))
for name in ("dcd_loss", "info_nce_loss", "masked_contrast_loss", "sup_con_loss"):
    ROWS[name] += [
        ({"temperature": 0.5}, TypeError, "logit_scale, temperature: got both, expected one of them"),
        ({"logit_scale": None}, TypeError, "logit_scale, temperature: got neither, expected one of them"),
        ({"logit_scale": None, "temperature": -1.0}, ValueError, "temperature: got -1.0, expected a finite number >"),
        ({"logit_scale": None, "temperature": torch.tensor(-1.0)}, ValueError, "temperature: got -1.0, expected a"),
        ({"logit_scale": None, "temperature": torch.ones(2)}, ValueError, r"temperature: got shape \[2\]"),
    ]
for name, (first, second) in PAIRED.items():
    shape = f"{second}: got shape"
    ROWS[name] += [
        ({first: [1.0]}, TypeError, f"{first}: got list"),
        ({second: None}, TypeError, f"{second}: got NoneType"),
        ({first: S.long(), second: T.long()}, TypeError, f"{first}: got torch.int64"),
        ({first: S.to(torch.complex64)}, TypeError, f"{first}: got torch.complex64"),
        ({first: S[0], second: T[0]}, ValueError, rf"{first}: got shape \[3\]"),
        ({second: T.view(2, 2, 3)}, ValueError, rf"{shape} \[2, 2, 3\]"),
        ({second: T[:, :2]}, ValueError, rf"{shape} \[4, 2\], expected that of {first}, \[4, 3\]"),
        ({second: T[:3]}, ValueError, rf"{shape} \[3, 3\]"),
        ({first: S[:0], second: T[:0]}, ValueError, rf"{first}: got shape \[0, 3\], expected at least one row"),
        ({first: S[:, :0], second: T[:, :0]}, ValueError, rf"{first}: got shape \[4, 0\]"),
        ({second: T.to("meta")}, ValueError, f"{second}: got device meta"),
        ({"sample_weight": [1.0] * 4}, TypeError, "sample_weight: got list"),
        ({"sample_weight": W.long()}, TypeError, "sample_weight: got torch.int64"),
        ({"sample_weight": W[:3]}, ValueError, r"sample_weight: got shape \[3\], expected \[4\]"),
        ({"sample_weight": W[:, None]}, ValueError, r"sample_weight: got shape \[4, 1\]"),
        ({"sample_weight": W - 2}, ValueError, "sample_weight: got -1.0, expected weights >= 0"),
        ({"sample_weight": W.clone().requires_grad_()}, ValueError, "got a tensor that requires a gradient"),
        ({"sample_weight": W.to("meta")}, ValueError, "sample_weight: got device meta"),
    ]

for name in ("dcd_loss", "info_nce_loss", "masked_contrast_loss", "sup_con_loss"):
    ROWS[name] += [
        ({"logit_scale": "2"}, TypeError, "logit_scale: got '2' of type str"),
        ({"logit_scale": True}, TypeError, "logit_scale: got True of type bool"),
        ({"logit_scale": torch.tensor(2)}, TypeError, "logit_scale: got torch.int64"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: got 0.0"),
        ({"logit_scale": -1}, ValueError, "logit_scale: got -1"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale: got inf"),
        ({"logit_scale": 1e300}, ValueError, r"logit_scale: got 1e\+300, expected a finite number > 0 and <= 3.4"),
        ({"logit_scale": torch.tensor(-2.0)}, ValueError, "logit_scale: got -2.0, expected a positive"),
        ({"logit_scale": W[:1]}, ValueError, r"logit_scale: got shape \[1\], expected a float or a 0-dim tensor"),
        ({"logit_scale": torch.tensor(2.0, device="meta")}, ValueError, "logit_scale: got device meta"),
    ]

for name in CALLS:
    if name != "preview_weight":
        ROWS[name].append(({"backend": "fast"}, ValueError, "backend: got 'fast', expected None or one of"))
    if name not in ("kd_loss", "ce_kd_terms", "soft_target_rows", "multiscale_pool", "KDLoss"):
        ROWS[name].append(({"group": "global"}, ValueError, "group: got 'global'"))
        ROWS[name].append(({"group": 3}, TypeError, "group: got int"))


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [pytest.param(name, *row, id=f"{name}, {row[2][:40]}") for name in CALLS for row in ROWS[name]],
)
def test_a_bad_argument_is_named(name: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    function, arguments = CALLS[name]
    for backend in [{}] if name == "preview_weight" else [{"backend": "reference"}, {"backend": "blocked"}]:
        function(**arguments, **backend)
        with pytest.raises(error, match=message):
            function(**arguments | backend | changed)


@pytest.mark.parametrize("name", ["dcd_loss", "info_nce_loss", "ckd_loss", "masked_contrast_loss", "sup_con_loss"])
def test_the_local_group_is_one_process(name: str) -> None:
    function, arguments = CALLS[name]
    assert function(**arguments, group="local").item() == function(**arguments).item()


def test_the_types_of_the_options_name_what_there_is() -> None:
    assert set(get_args(Backend)) == set(BACKENDS)
