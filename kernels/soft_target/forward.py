"""Losses and statistics of rows of logits. Legend: the package's docstring."""

import triton
import triton.language as tl
from fastkd.kernels.tiles import LOG2E, store_numbers


@triton.jit
def to_power(u, z, POWER: tl.constexpr):
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
            s1 = to_power(u, z, POWER)
        if HAS_SMOOTHING:
            z_sum = tl.where(inside, z, 0.0)
    else:
        shift_x = tl.where(mx == -float("inf"), 0.0, mx - base)
        decay = tl.exp2((mx - base) * c)
        if HAS_TEACHER:
            st = st * decay[:, None] + u
        if HAS_LABELS:
            s1 = s1 * to_power(decay, mx - base, POWER)[:, None] + to_power(u, z, POWER)
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
            s1 += tl.load(part + stride_k, mask=in_rows, other=0.0) * to_power(decay, old_x - base_x, POWER)
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
