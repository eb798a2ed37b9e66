"""``soft_target`` on a GPU: cross-entropy and temperature-KL of the same logits, each read once per pass.

Bytes, for logits of e bytes per element: the forward reads both tensors once (2 e). The backward reads both and writes
the gradient (3 e). That is 5 e in all, and 56 bytes per row. Storing the gradient in the forward would not be less: the
upstream gradients of the two terms are known in the backward only, so that both terms' gradients would be stored
(2 e + 2 e) and combined there (2 e + 1 e), 7 e in all. With one term alone it would be 5 e as well, but the gradient
would be rounded twice, in fp16 before a loss scale lifts it from its underflow, and it would occupy memory for longer.
Eager code moves at least 5 e for the cross-entropy alone.

Legend. ``X``, ``Y``: logits [n, C] of student and teacher. ``mx``, ``my``: the largest logit per row so far.
``s1 = sum exp(x - mx)``, ``st = sum exp((x - mx) / temperature)``, ``sy = sum exp((y - my) / temperature)``,
``e = sum exp((y - my) / temperature) ((y - my) - (x - mx))``, ``z = sum (x - mx)``. Then

    CE = log s1 - (1 - smoothing) (x_label - mx) - smoothing z / C
    KD = temperature^2 (e / (sy temperature) + log st - log sy)

Everything is relative to the maxima, so that a common offset of the logits costs no digits. STATE [SPLITS, 7, n]: these
numbers for one split of the columns. STATS [5, n]: mx, log s1, log st, my, log sy. LOSS [2, n]: CE and KD per row,
times the row's weight and ``factor``. ALIGN divides C and the strides, so that loads are as wide as that allows. POWER:
the temperature if it is 1, 2 or 4, otherwise 0. ``exp(x - mx)`` is then that power of ``exp((x - mx) / temperature)``:
one or two multiplications instead of an exponential.
"""

import math
from typing import Any

import torch
from fastkd.kernels.launch import (
    LaunchConfig,
    cached,
    cdiv,
    column_splits,
    hardware_of,
    launch_config,
    multiprocessors,
)
from fastkd.kernels.plans import launch
from fastkd.kernels.soft_target.backward import backward_kernel
from fastkd.kernels.soft_target.forward import forward_kernel, merge_kernel
from torch import Tensor

ROWS = 128  # per program that merges splits


def _unit_columns(logits: Tensor | None) -> Tensor | None:
    """The logits, with the columns of a row next to each other. Only a transposed tensor is copied for that."""
    return logits if logits is None or logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _given(student: Tensor, teacher: Tensor | None) -> dict[str, Any]:
    """The arguments that say where the logits lie."""
    X, Y = _unit_columns(student), _unit_columns(teacher)
    assert X is not None
    n, C = X.shape
    return {"X": X, "Y": Y, "stride_xn": X.stride(0), "stride_yn": 0 if Y is None else Y.stride(0), "n": n, "C": C}


def _kind(given: dict[str, Any], labels: Tensor | None, weight: Tensor | None) -> tuple[Any, ...]:
    """What the constants of a launch depend on, apart from the numbers."""
    X, stride_yn, is_alone = given["X"], given["stride_yn"], given["Y"] is None
    has = labels is not None, not is_alone, weight is not None
    return given["n"], given["C"], X.element_size(), given["stride_xn"], stride_yn, has, hardware_of(X.device)


@cached
def _constants(
    n: int,
    C: int,
    element_size: int,
    stride_xn: int,
    stride_yn: int,
    has: tuple[bool, bool, bool],
    hardware: str,
    direction: str,
    temperature: float,
    smoothing: float,
) -> tuple[LaunchConfig, dict[str, Any]]:
    """The config of the forward or the backward, and what every kernel is compiled for.

    ALIGN: the largest power of two, up to 16 bytes of elements, that divides C and every row stride.
    """
    config = launch_config(f"soft_target_{direction}", width=C, hardware=hardware)
    flags = dict(zip(("HAS_LABELS", "HAS_TEACHER", "HAS_WEIGHT"), has, strict=True))
    return config, {
        "ALIGN": math.gcd(16 // element_size, C, stride_xn, stride_yn),
        "POWER": int(temperature) if temperature in (1.0, 2.0, 4.0) else 0,
        "HAS_SMOOTHING": has[0] and smoothing > 0,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **flags,
    }


def soft_target_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    *,
    temperature: float,
    smoothing: float,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """LOSS [2, n] and STATS [5, n]. The row of LOSS of an absent term is not written. ``weight``: contiguous."""
    # Without a teacher there is one softmax only, for the labels.
    temperature = 1.0 if teacher is None else temperature
    given = _given(student, teacher)
    n, C, device = given["n"], given["C"], student.device
    config, constants = _constants(*_kind(given, labels, weight), "forward", temperature, smoothing)
    tiles, row_blocks = cdiv(C, config.BLOCK_N), cdiv(n, config.BLOCK_M)
    splits = column_splits(row_blocks, tiles, config.ctas_per_sm * multiprocessors(device))
    tiles_per_split = cdiv(tiles, splits)
    given["LABELS"], given["WEIGHT"] = labels, weight
    given["LOSS"] = loss = torch.empty(2, n, dtype=torch.float32, device=device)
    given["STATS"] = stats = torch.empty(5, n, dtype=torch.float32, device=device)
    given["STATE"] = torch.empty(splits, 7, n, dtype=torch.float32, device=device) if splits > 1 else None
    given["temperature"], given["smoothing"], given["factor"] = temperature, smoothing, factor
    launch(
        forward_kernel,
        (row_blocks, splits),
        **given,
        **constants,
        tiles_per_split=tiles_per_split,
        IS_ONE_TILE=config.BLOCK_N >= C,
        IS_SPLIT=splits > 1,
    )
    if splits > 1:
        without = ("Y", "stride_yn", "ALIGN", "BLOCK_N")
        merged = {name: value for name, value in (given | constants).items() if name not in without}
        merged |= {"BLOCK_M": ROWS, "num_warps": 4, "num_stages": 3}
        columns_per_split = tiles_per_split * config.BLOCK_N
        launch(merge_kernel, (cdiv(n, ROWS),), **merged, columns_per_split=columns_per_split, splits=splits)
    return loss, stats


def soft_target_gradient(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    grad_ce: Tensor | None,
    grad_kd: Tensor | None,
    *,
    temperature: float,
    smoothing: float,
    factor: float = 1.0,
) -> Tensor:
    """GRAD [n, C], contiguous, in the student's dtype."""
    assert stats.is_contiguous()
    given = _given(student, teacher)
    n, C = given["n"], given["C"]
    config, constants = _constants(*_kind(given, labels, weight), "backward", temperature, smoothing)
    grad = torch.empty(n, C, dtype=student.dtype, device=student.device)
    launch(
        backward_kernel,
        (cdiv(n, config.BLOCK_M), cdiv(C, config.BLOCK_N)),
        **given,
        **constants,
        LABELS=labels,
        WEIGHT=weight,
        STATS=stats,
        GRAD_CE=grad_ce,
        GRAD_KD=grad_kd,
        GRAD=grad,
        temperature=temperature,
        smoothing=smoothing,
        factor=factor,
    )
    return grad
