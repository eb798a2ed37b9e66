"""Checks of arguments and settings. Every message names the argument, what came and what was expected."""

import math
import sys
from collections.abc import Collection
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.numerics import accumulation_dtype

Backend = Literal["reference", "blocked", "triton"]
Consistency = Literal["student||teacher", "teacher||student"]
Positives = Literal["index", "label"]
CONSISTENCIES, POSITIVES = get_args(Consistency), get_args(Positives)
NO_LABEL = -1  # the label of a row without one, where such rows are accepted
LARGEST = sys.float_info.max  # the largest finite float


def check_rows(name: str, x: Tensor, shape: str = "[n, D]", *, may_be_empty: bool = False) -> None:
    """A matrix with at least one column, and one row unless it may be empty."""
    check_floating(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected {shape}")
    if x.shape[1] == 0 or (x.shape[0] == 0 and not may_be_empty):
        rows = "" if may_be_empty else "one row and "
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected at least {rows}one column")


def check_pair(
    name: str,
    first: Tensor,
    other_name: str,
    second: Tensor,
    shape: str,
    *,
    may_be_empty: bool = False,
    may_differ_in_dtype: bool = False,
) -> None:
    """Two such matrices of one shape and device, and of one dtype unless that may differ."""
    # The shapes come first: of two unequal inputs, one of which is empty, they tell more.
    for argument, value in ((name, first), (other_name, second)):
        check_floating(argument, value)
        if value.ndim != 2:
            raise ValueError(f"{argument}: got shape {list(value.shape)}, expected {shape}")
    if first.shape != second.shape:
        raise ValueError(f"{other_name}: got shape {list(second.shape)}, expected that of {name}, {list(first.shape)}")
    check_rows(name, first, shape, may_be_empty=may_be_empty)
    _check_same_kind(name, first, other_name, second, may_differ_in_dtype=may_differ_in_dtype)


def check_student_and_teacher(
    name: str, student: Tensor, other_name: str, teacher: Tensor, shape: str, *, may_be_empty: bool = False
) -> Tensor:
    """Two such matrices of one shape and device. Returns the teacher's in the student's dtype."""
    options = {"may_be_empty": may_be_empty, "may_differ_in_dtype": True}
    check_pair(name, student, other_name, teacher, shape, **options)
    return teacher.to(student.dtype)


def check_vector(name: str, x: Tensor, *, may_be_empty: bool = False) -> None:
    """A number for every sample, at least one unless it may be empty."""
    check_floating(name, x)
    if x.ndim != 1 or (len(x) == 0 and not may_be_empty):
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected [B]{'' if may_be_empty else ', B >= 1'}")


def check_query_and_key(query: Tensor, key: Tensor, *, may_be_empty: bool = False) -> None:
    """Matrices of one width, dtype and device; their numbers of rows may differ."""
    check_rows("query", query, "[n, D]", may_be_empty=may_be_empty)
    check_rows("key", key, "[N, D]", may_be_empty=may_be_empty)
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key: got shape {list(key.shape)}, expected the width of query, {query.shape[1]}")
    _check_same_kind("query", query, "key", key)


def _check_same_kind(
    name: str, first: Tensor, other_name: str, second: Tensor, *, may_differ_in_dtype: bool = False
) -> None:
    if first.dtype != second.dtype and not may_differ_in_dtype:
        raise TypeError(f"{other_name}: got {second.dtype}, expected the dtype of {name}, {first.dtype}")
    if first.device != second.device:
        raise ValueError(f"{other_name}: got device {second.device}, expected that of {name}, {first.device}")


def check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    check_float_dtype(name, value.dtype)


def check_float_dtype(name: str, value: Any) -> torch.dtype:
    if value not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: got {value}, expected float64, float32, bfloat16 or float16")
    return value


def check_number(
    name: str, value: Any, minimum: float = -LARGEST, maximum: float = LARGEST, *, exclusive: bool = False
) -> None:
    """A finite number in [minimum, maximum]; ``exclusive``: above minimum."""
    expected = "a finite number"
    if minimum > -LARGEST:
        expected += f" {'>' if exclusive else '>='} {minimum}"
    if maximum < LARGEST:
        expected += f" and <= {maximum}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {expected}")
    # Comparisons alone, which torch.compile can trace for a float that it keeps symbolic. NaN fails them all.
    if not minimum <= value <= maximum or (exclusive and value == minimum):
        raise ValueError(f"{name}: got {value}, expected {expected}")


def check_int(name: str, value: Any, minimum: int) -> None:
    """An int, not a bool, >= minimum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected an int >= {minimum}")


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """One of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {sorted(allowed)}")


def check_type(name: str, value: Any, expected: type | tuple[type, ...]) -> None:
    """An instance of ``expected``."""
    if not isinstance(value, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {names}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


def check_no_tangent(*inputs: Tensor) -> None:
    """The streaming operations have no forward-mode derivative; without this, the tangent would silently be zero.

    Nor can torch.func's transforms look into them.
    """
    if torch.compiler.is_compiling():
        return
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
    is_dual = forward_ad._current_level >= 0
    if is_transformed or (is_dual and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)):
        raise NotImplementedError("torch.func and forward-mode differentiation: use backend='reference'")


def check_scale(logit_scale: Tensor | float, like: Tensor) -> Tensor:
    """The scale as a 0-dim tensor on the inputs' device, made without waiting for the device."""
    if not isinstance(logit_scale, Tensor):
        dtype = accumulation_dtype(like.dtype)
        check_number("logit_scale", logit_scale, minimum=0, maximum=torch.finfo(dtype).max, exclusive=True)
        return torch.full((), float(logit_scale), dtype=dtype, device=like.device)
    _check_scalar_tensor("logit_scale", logit_scale, like)
    if _may_read(logit_scale) and logit_scale.item() <= 0:
        raise ValueError(f"logit_scale: got {logit_scale.item()}, expected a positive multiplier, exp(tau)")
    return logit_scale


def one_scale(logit_scale: Tensor | float | None, temperature: Tensor | float | None, like: Tensor) -> Tensor | float:
    """The multiplier of the similarities, of which either itself or its inverse is given; not yet checked by itself."""
    if (logit_scale is None) == (temperature is None):
        got = "neither" if temperature is None else "both"
        raise TypeError(f"logit_scale, temperature: got {got}, expected one of them (logit_scale = 1 / temperature)")
    if temperature is None:
        assert logit_scale is not None
        return logit_scale
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return 1 / temperature
    _check_scalar_tensor("temperature", temperature, like)
    if _may_read(temperature):
        check_temperature(temperature.item())
    return temperature.reciprocal()


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """In [1e-4, 1e4]. Beyond it logits overflow, or squares of temperatures do, or nothing is left of the logits."""
    check_number(name, temperature, 1e-4, 1e4)


def check_row_temperature(name: str, temperature: Tensor, like: Tensor) -> Tensor:
    """A tensor of temperatures, 0-dim or one per row, on the logits' device; with their range where it can be read.

    Returns it as [B], in the dtype that the logits are computed in.
    """
    check_floating(name, temperature)
    n = like.shape[0]
    if temperature.shape not in ((), (n,)):
        raise ValueError(f"{name}: got shape {list(temperature.shape)}, expected a 0-dim tensor or [{n}], one per row")
    if temperature.device != like.device:
        raise ValueError(f"{name}: got device {temperature.device}, expected that of the logits, {like.device}")
    if _may_read(temperature):
        for value in temperature.detach().aminmax():
            check_temperature(value.item(), name)
    return temperature.to(accumulation_dtype(like.dtype)).expand(n)


def scale_bound(logit_scale: Tensor | float, max_scale: float) -> float:
    """What is known about the scale without reading it from its device."""
    return max_scale if isinstance(logit_scale, Tensor) else min(float(logit_scale), max_scale)


def check_bias(logit_bias: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(logit_bias, Tensor):
        check_number("logit_bias", logit_bias)
        return torch.full((), float(logit_bias), device=like.device)
    _check_scalar_tensor("logit_bias", logit_bias, like)
    return logit_bias


def _check_scalar_tensor(name: str, value: Tensor, like: Tensor) -> None:
    check_floating(name, value)
    if value.ndim != 0:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected a float or a 0-dim tensor")
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected that of the embeddings, {like.device}")


def check_weight(weight: Tensor | None, like: Tensor, name: str = "sample_weight") -> Tensor | None:
    if weight is None:
        return None
    check_floating(name, weight)
    n = like.shape[0]
    if weight.shape != (n,):
        raise ValueError(f"{name}: got shape {list(weight.shape)}, expected [{n}], one weight per row")
    if weight.device != like.device:
        raise ValueError(f"{name}: got device {weight.device}, expected {like.device}")
    if weight.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, expected a constant; detach() it")
    return check_not_negative(name, weight, "weights")


def check_not_negative(name: str, x: Tensor, what: str) -> Tensor:
    """That all are >= 0. Returns them, NaN for those that are not where it cannot raise."""
    if not _may_read(x):
        return x.masked_fill(x < 0, math.nan)
    if bool((x < 0).any()):
        raise ValueError(f"{name}: got {x.min().item()}, expected {what} >= 0")
    return x


def check_row_labels(name: str, labels: Tensor | None, rows: Tensor) -> None:
    """An int64 for every row."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected a torch.Tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: got {labels.dtype}, expected int64 class indices")
    n = rows.shape[0]
    if labels.shape != (n,):
        raise ValueError(f"{name}: got shape {list(labels.shape)}, expected [{n}], one label per row")
    if labels.device != rows.device:
        raise ValueError(f"{name}: got device {labels.device}, expected {rows.device}")


def check_labels(labels: Tensor, logits: Tensor, *, unlabelled: bool = False) -> None:
    """Class indices: an int64 in [0, C) for every row of the logits; ``unlabelled``: or NO_LABEL."""
    check_row_labels("labels", labels, logits)
    if _may_read(labels) and labels.shape[0] > 0:
        classes = logits.shape[1]
        for label in labels.aminmax():
            if not (NO_LABEL if unlabelled else 0) <= label.item() < classes:
                expected = f"class indices in [0, {classes})" + (f", or {NO_LABEL} for none" if unlabelled else "")
                raise ValueError(f"labels: got {label.item()}, expected {expected}")


def check_positive_index(
    positive_index: Tensor | None, query: Tensor, key: Tensor, weight: Tensor | None
) -> Tensor | None:
    """A row of ``key`` for every query. Returns the weights, NaN where a bad index cannot raise."""
    n, N = query.shape[0], key.shape[0]
    if positive_index is None:
        if n != N:
            raise ValueError(f"positive_index: got None with {n} queries and {N} keys, expected as many, or a tensor")
        return weight
    check_row_labels("positive_index", positive_index, query)
    if not _may_read(positive_index):
        is_row = (positive_index >= 0) & (positive_index < N)
        weight = torch.ones_like(is_row, dtype=accumulation_dtype(query.dtype)) if weight is None else weight
        return weight.masked_fill(~is_row, math.nan)
    if n > 0:
        for index in positive_index.aminmax():
            if not 0 <= index.item() < N:
                raise ValueError(f"positive_index: got {index.item()}, expected rows of key, in [0, {N})")
    return weight


def check_feature_map(name: str, value: Tensor) -> None:
    """[B, C, H, W], of which B alone may be 0."""
    check_floating(name, value)
    if value.ndim != 4:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [B, C, H, W]")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected at least one channel, row and column")


def check_sides(name: str, values: Any) -> list[int]:
    """Height and width of every scale in turn; an entry is an int >= 1 for both, or a pair."""
    if isinstance(values, Tensor) or type(values).__module__ == "numpy":
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: got {values!r} of type {type(values).__name__}, expected one int or pair per scale")
    sides: list[int] = []
    for entry in values:
        pair = tuple(entry) if isinstance(entry, list | tuple) else (entry, entry)
        if len(pair) != 2:
            raise ValueError(f"{name}: got the entry {entry!r}, expected an int or a pair (height, width)")
        for side in pair:
            if isinstance(side, bool) or not isinstance(side, Integral):
                raise TypeError(f"{name}: got {side!r} of type {type(side).__name__}, expected an int >= 1")
            if side < 1:
                raise ValueError(f"{name}: got {side}, expected an int >= 1")
            sides.append(int(side))
    return sides


def check_windows(windows: list[int], strides: list[int], features: Tensor) -> None:
    """At least one scale, as many strides as windows, and every window inside the map."""
    if not windows:
        raise ValueError("windows: got no entry, expected one per scale")
    if len(strides) != len(windows):
        raise ValueError(f"strides: got {len(strides) // 2} entries, expected one per window, {len(windows) // 2}")
    height, width = features.shape[2:]
    for h, w in zip(windows[::2], windows[1::2], strict=True):
        if h > height or w > width:
            raise ValueError(f"windows: got {h} x {w}, expected at most the map's {height} x {width}")


def _may_read(value: Tensor) -> bool:
    """Whether a value check costs neither a device synchronisation nor a graph break."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
