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

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import cdiv, column_splits, hardware_of, launch_config, multiprocessors
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import LOG2E, store_numbers
from torch import Tensor

ROWS = 128  # per program that merges splits


@triton.jit
def _to_power(u, z, POWER: tl.constexpr):
    """``exp(z)``, from ``u = exp(z / temperature)`` where that is cheaper."""
    if POWER == 0:
        u = tl.exp2(z * LOG2E)
    if POWER == 2:
        u = u * u
    if POWER == 4:
        u = u * u
        u = u * u
    return u


@triton.jit
def _accumulate(
    x, y, inside, state, seen, c,
    POWER: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """``state`` (mx, s1, st, my, sy, e, z) after one more tile. All but the maxima are per lane, [BLOCK_M, BLOCK_N].

    ``seen``: how many tiles are in ``state``; there are none if IS_FIRST. ``c``: log2(e) / temperature.
    """
    mx, s1, st, my, sy, e, z_sum = state
    largest = tl.max(x, 1)
    if not IS_FIRST:
        largest = tl.maximum(mx, largest)
    # A row that holds only -inf so far has no finite maximum: subtracting 0 keeps exp(-inf) = 0.
    base = tl.where(largest == -float("inf"), 0.0, largest)
    z = x - base[:, None]
    u = tl.exp2(z * c)
    if IS_FIRST:
        st = u
        if HAS_LABELS:
            s1 = _to_power(u, z, POWER)
        if HAS_SMOOTHING:
            z_sum = tl.where(inside, z, 0.0)
    else:
        shift_x = tl.where(mx == -float("inf"), 0.0, mx - base)
        decay = tl.exp2((mx - base) * c)
        if HAS_TEACHER:
            st = st * decay[:, None] + u
        if HAS_LABELS:
            s1 = s1 * _to_power(decay, mx - base, POWER)[:, None] + _to_power(u, z, POWER)
        if HAS_SMOOTHING:
            z_sum += tl.where(inside, z, 0.0) + (seen * shift_x)[:, None]
    mx = largest
    if HAS_TEACHER:
        largest = tl.max(y, 1)
        if not IS_FIRST:
            largest = tl.maximum(my, largest)
        base = tl.where(largest == -float("inf"), 0.0, largest)
        zy = y - base[:, None]
        v = tl.exp2(zy * c)
        new_e = v * tl.where(inside, zy - z, 0.0)
        if IS_FIRST:
            sy, e = v, new_e
        else:
            shift_y = tl.where(my == -float("inf"), 0.0, my - base)
            decay = tl.exp2((my - base) * c)[:, None]
            e = (e + sy * (shift_y - shift_x)[:, None]) * decay + new_e
            sy = sy * decay + v
        my = largest
    return mx, s1, st, my, sy, e, z_sum


@triton.jit
def _finish(
    state, X, LABELS, WEIGHT, LOSS, STATS, rows, in_rows, stride_xn, n, C, temperature, smoothing, factor,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """LOSS and STATS of rows whose sums over all columns are ``state``."""
    mx, s1, st, my, sy, e, z_sum = state
    stride_k = n.to(tl.int64)
    weight = tl.full(mx.shape, 1.0, tl.float32) * factor
    if HAS_WEIGHT:
        weight *= tl.load(WEIGHT + rows, mask=in_rows, other=0.0).to(tl.float32)
    none = tl.zeros_like(mx)
    log_s1, log_st, log_sy = none, none, none
    if HAS_LABELS:
        log_s1 = tl.log(s1)
        label = tl.load(LABELS + rows, mask=in_rows, other=0)
        is_label = (label >= 0) & (label < C)
        z = tl.load(X + rows * stride_xn + label, mask=in_rows & is_label, other=0.0).to(tl.float32) - mx
        if HAS_SMOOTHING:
            z = (1 - smoothing) * z + smoothing * z_sum / C
        ce = tl.where(is_label, weight * (log_s1 - z), float("nan"))
        tl.store(LOSS + rows, ce, mask=in_rows)
    if HAS_TEACHER:
        log_st, log_sy = tl.log(st), tl.log(sy)
        kd = temperature * temperature * (e / (sy * temperature) + (log_st - log_sy))
        tl.store(LOSS + stride_k + rows, weight * kd, mask=in_rows)
    store_numbers(STATS + rows, n, in_rows, (mx, log_s1, log_st, my, log_sy))


@triton.jit(do_not_specialize=["stride_xn", "stride_yn", "n", "C", "tiles_per_split"])
def forward_kernel(
    X, Y, stride_xn, stride_yn, LABELS, WEIGHT, LOSS, STATS, STATE, n, C, temperature, smoothing, factor,
    tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    IS_ONE_TILE: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    in_rows = rows < n
    C = C // ALIGN * ALIGN
    stride_xn = stride_xn.to(tl.int64) // ALIGN * ALIGN
    stride_yn = stride_yn.to(tl.int64) // ALIGN * ALIGN
    c = LOG2E / temperature
    offs_n = tl.arange(0, BLOCK_N)
    x_rows = X + (rows * stride_xn)[:, None]
    y_rows = Y + (rows * stride_yn)[:, None] if HAS_TEACHER else None
    first = split * tiles_per_split * BLOCK_N
    inside = in_rows[:, None] & (first + offs_n < C)[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(x_rows + (first + offs_n)[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    y = x
    if HAS_TEACHER:
        y = tl.load(y_rows + (first + offs_n)[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    none = tl.zeros([BLOCK_M], tl.float32)
    state = none, x, x, none, x, x, x
    state = _accumulate(
        x, y, inside, state, 0.0, c, POWER=POWER, HAS_LABELS=HAS_LABELS, HAS_TEACHER=HAS_TEACHER,
        HAS_SMOOTHING=HAS_SMOOTHING, IS_FIRST=True,
    )  # fmt: skip
    if not IS_ONE_TILE:
        last = min(first + tiles_per_split * BLOCK_N, C)
        seen = 1.0
        for start in range(first + BLOCK_N, last, BLOCK_N):
            inside = in_rows[:, None] & (start + offs_n < C)[None, :]
            x = tl.load(x_rows + (start + offs_n)[None, :], mask=inside, other=-float("inf")).to(tl.float32)
            if HAS_TEACHER:
                y = tl.load(y_rows + (start + offs_n)[None, :], mask=inside, other=-float("inf")).to(tl.float32)
            state = _accumulate(
                x, y, inside, state, seen, c, POWER=POWER, HAS_LABELS=HAS_LABELS, HAS_TEACHER=HAS_TEACHER,
                HAS_SMOOTHING=HAS_SMOOTHING, IS_FIRST=False,
            )  # fmt: skip
            seen += 1.0
    mx, s1, st, my, sy, e, z_sum = state
    state = mx, tl.sum(s1, 1), tl.sum(st, 1), my, tl.sum(sy, 1), tl.sum(e, 1), tl.sum(z_sum, 1)
    if IS_SPLIT:
        store_numbers(STATE + split.to(tl.int64) * 7 * n + rows, n, in_rows, state)
    else:
        _finish(
            state, X, LABELS, WEIGHT, LOSS, STATS, rows, in_rows, stride_xn, n, C, temperature, smoothing, factor,
            HAS_LABELS=HAS_LABELS, HAS_TEACHER=HAS_TEACHER, HAS_WEIGHT=HAS_WEIGHT, HAS_SMOOTHING=HAS_SMOOTHING,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_xn", "n", "C", "columns_per_split", "splits"])
def merge_kernel(
    X, stride_xn, LABELS, WEIGHT, LOSS, STATS, STATE, n, C, temperature, smoothing, factor, columns_per_split, splits,
    BLOCK_M: tl.constexpr, POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n
    stride_k = n.to(tl.int64)
    c = LOG2E / temperature
    STATE += rows
    mx = tl.load(STATE, mask=in_rows, other=0.0)
    my = tl.load(STATE + 3 * stride_k, mask=in_rows, other=0.0)
    for split in range(1, splits):
        mx = tl.maximum(mx, tl.load(STATE + split * 7 * stride_k, mask=in_rows, other=0.0))
        my = tl.maximum(my, tl.load(STATE + (split * 7 + 3) * stride_k, mask=in_rows, other=0.0))
    base_x, base_y = tl.where(mx == -float("inf"), 0.0, mx), tl.where(my == -float("inf"), 0.0, my)
    none = tl.zeros([BLOCK_M], tl.float32)
    s1, st, sy, e, z_sum = none, none, none, none, none
    for split in range(splits):
        part = STATE + split * 7 * stride_k
        old_x = tl.load(part, mask=in_rows, other=0.0)
        shift_x = tl.where(old_x == -float("inf"), 0.0, old_x - base_x)
        decay = tl.exp2((old_x - base_x) * c)
        if HAS_LABELS:
            s1 += tl.load(part + stride_k, mask=in_rows, other=0.0) * _to_power(decay, old_x - base_x, POWER)
        if HAS_SMOOTHING:
            columns = min(max(C - split * columns_per_split, 0), columns_per_split)
            z_sum += tl.load(part + 6 * stride_k, mask=in_rows, other=0.0) + columns * shift_x
        if HAS_TEACHER:
            st += tl.load(part + 2 * stride_k, mask=in_rows, other=0.0) * decay
            old_y = tl.load(part + 3 * stride_k, mask=in_rows, other=0.0)
            shift_y = tl.where(old_y == -float("inf"), 0.0, old_y - base_y)
            decay = tl.exp2((old_y - base_y) * c)
            old_sy = tl.load(part + 4 * stride_k, mask=in_rows, other=1.0)
            sy += old_sy * decay
            e += (tl.load(part + 5 * stride_k, mask=in_rows, other=0.0) + old_sy * (shift_y - shift_x)) * decay
    _finish(
        (mx, s1, st, my, sy, e, z_sum), X, LABELS, WEIGHT, LOSS, STATS, rows, in_rows, stride_xn.to(tl.int64), n, C,
        temperature, smoothing, factor,
        HAS_LABELS=HAS_LABELS, HAS_TEACHER=HAS_TEACHER, HAS_WEIGHT=HAS_WEIGHT, HAS_SMOOTHING=HAS_SMOOTHING,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_xn", "stride_yn", "n", "C"])
def backward_kernel(
    X, Y, stride_xn, stride_yn, LABELS, WEIGHT, STATS, GRAD_CE, GRAD_KD, GRAD, n, C, temperature, smoothing, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """``GRAD_ic = w_i (p_ic - target_ic) + k_i (p'_ic - q'_ic)``; p' and q' are at the temperature, a factor of k."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n
    C = C // ALIGN * ALIGN
    stride_xn = stride_xn.to(tl.int64) // ALIGN * ALIGN
    stride_yn = stride_yn.to(tl.int64) // ALIGN * ALIGN
    inside = in_rows[:, None] & (offs_n < C)[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(X + (rows * stride_xn)[:, None] + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    stride_k = n.to(tl.int64)
    STATS += rows
    z = x - tl.load(STATS, mask=in_rows, other=0.0)[:, None]
    log_s1 = tl.load(STATS + stride_k, mask=in_rows, other=0.0)
    c = LOG2E / temperature
    weight = tl.full([BLOCK_M], 1.0, tl.float32) * factor
    if HAS_WEIGHT:
        weight *= tl.load(WEIGHT + rows, mask=in_rows, other=0.0).to(tl.float32)
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_TEACHER:
        y = tl.load(Y + (rows * stride_yn)[:, None] + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        log_st = tl.load(STATS + 2 * stride_k, mask=in_rows, other=0.0)
        my = tl.load(STATS + 3 * stride_k, mask=in_rows, other=0.0)
        log_sy = tl.load(STATS + 4 * stride_k, mask=in_rows, other=0.0)
        p = tl.exp2(z * c - (log_st * LOG2E)[:, None])
        q = tl.exp2((y - my[:, None]) * c - (log_sy * LOG2E)[:, None])
        k = weight * tl.load(GRAD_KD).to(tl.float32) * temperature
        grad = k[:, None] * (p - q)
    if HAS_LABELS:
        if HAS_TEACHER and POWER > 0:
            p = _to_power(p, z, POWER) * tl.exp2((temperature * log_st - log_s1) * LOG2E)[:, None]
        else:
            p = tl.exp2((z - log_s1[:, None]) * LOG2E)
        label = tl.load(LABELS + rows, mask=in_rows, other=0)
        is_label = (label >= 0) & (label < C)
        w = tl.where(is_label, weight * tl.load(GRAD_CE).to(tl.float32), float("nan"))
        if HAS_SMOOTHING:
            p -= smoothing / C
        grad += w[:, None] * (p - tl.where(offs_n[None, :] == label[:, None], 1 - smoothing, 0.0))
    offsets = (rows * C)[:, None] + offs_n[None, :]
    tl.store(GRAD + offsets, grad.to(GRAD.dtype.element_ty), mask=inside)


def _unit_columns(logits: Tensor | None) -> Tensor | None:
    """The logits, with the columns of a row next to each other. Only a transposed tensor is copied for that."""
    return logits if logits is None or logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _alignment(*tensors: Tensor | None) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides C and every row stride."""
    given = [x for x in tensors if x is not None]
    return math.gcd(16 // given[0].element_size(), given[0].shape[1], *(x.stride(0) for x in given))


def _flags(
    teacher: Tensor | None, labels: Tensor | None, weight: Tensor | None, temperature: float, smoothing: float
) -> dict[str, int | bool]:
    return {
        "POWER": int(temperature) if temperature in (1.0, 2.0, 4.0) else 0,
        "HAS_LABELS": labels is not None,
        "HAS_TEACHER": teacher is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_SMOOTHING": labels is not None and smoothing > 0,
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
    X, Y = _unit_columns(student), _unit_columns(teacher)
    assert X is not None
    n, C = X.shape
    # Without a teacher there is one softmax only, for the labels.
    temperature = 1.0 if Y is None else temperature
    config = launch_config("soft_target_forward", width=C, hardware=hardware_of(X.device))
    tiles = cdiv(C, config.BLOCK_N)
    splits = column_splits(cdiv(n, config.BLOCK_M), tiles, config.ctas_per_sm * multiprocessors(X.device))
    tiles_per_split = cdiv(tiles, splits)
    loss = torch.empty(2, n, dtype=torch.float32, device=X.device)
    stats = torch.empty(5, n, dtype=torch.float32, device=X.device)
    state = torch.empty(splits, 7, n, dtype=torch.float32, device=X.device) if splits > 1 else None
    shared = {
        "X": X, "stride_xn": X.stride(0), "LABELS": labels, "WEIGHT": weight, "LOSS": loss, "STATS": stats,
        "STATE": state, "n": n, "C": C, "temperature": temperature, "smoothing": smoothing,
        "factor": factor,
        **_flags(Y, labels, weight, temperature, smoothing),
    }  # fmt: skip
    launch(
        forward_kernel,
        (cdiv(n, config.BLOCK_M), splits),
        **shared,
        Y=Y,
        stride_yn=0 if Y is None else Y.stride(0),
        tiles_per_split=tiles_per_split,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        ALIGN=_alignment(X, Y),
        IS_ONE_TILE=config.BLOCK_N >= C,
        IS_SPLIT=splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        launch(
            merge_kernel,
            (cdiv(n, ROWS),),
            **shared,
            columns_per_split=tiles_per_split * config.BLOCK_N,
            splits=splits,
            BLOCK_M=ROWS,
            num_warps=4,
            num_stages=3,
        )
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
    X, Y = _unit_columns(student), _unit_columns(teacher)
    assert X is not None
    assert stats.is_contiguous()
    n, C = X.shape
    config = launch_config("soft_target_backward", width=C, hardware=hardware_of(X.device))
    grad = torch.empty(n, C, dtype=X.dtype, device=X.device)
    launch(
        backward_kernel,
        (cdiv(n, config.BLOCK_M), cdiv(C, config.BLOCK_N)),
        X=X,
        Y=Y,
        stride_xn=X.stride(0),
        stride_yn=0 if Y is None else Y.stride(0),
        LABELS=labels,
        WEIGHT=weight,
        STATS=stats,
        GRAD_CE=grad_ce,
        GRAD_KD=grad_kd,
        GRAD=grad,
        n=n,
        C=C,
        temperature=temperature,
        smoothing=smoothing,
        factor=factor,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        ALIGN=_alignment(X, Y),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **_flags(Y, labels, weight, temperature, smoothing),
    )
    return grad
