"""``soft_target_rows`` on a GPU: a row of both logits is read from memory once per pass, whatever the number of views.

A program owns whole rows and goes over them in tiles: for the maxima, for the mean and the squares of standardised
rows, and for the sums of each view. Only the first time does a row come from memory, because then it lies in a cache:
both rows of 131072 classes in bf16 are 512 KiB, of an L2 of tens of MiB. The backward visits each tile once. So the
forward reads 2 e bytes per logit of e bytes, the backward reads 2 e and writes e, and each has two exponentials per
logit and view.

Legend, beside that of the blocked backend. ``X``, ``Y``: logits [n, C] of student and teacher. SCALE_X, SCALE_Y
[views, n]. FOUND [4, views, n]: the results. KEPT [5 + 5 views, n]: what the backward needs. UPSTREAM [4, views, n].
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import LaunchConfig, cdiv, hardware_of, launch_config
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import LN2, LOG2E
from torch import Tensor

# Of a program; of a warp's part of a tile; of a tile, which has 8 warps then. More of any would spill registers.
MAX_ROWS, WARP_ELEMENTS, MAX_COLUMNS = 2, 256, 2048


@triton.jit
def _classes(start, in_rows, label, C, BLOCK_N: tl.constexpr, EXCLUDE_LABEL: tl.constexpr):
    """Which elements of a tile are in a row, [BLOCK_M, BLOCK_N]; EXCLUDE_LABEL: and are not the row's label."""
    offs_n = start + tl.arange(0, BLOCK_N)
    inside = in_rows[:, None] & (offs_n < C)[None, :]
    if EXCLUDE_LABEL:
        inside &= offs_n[None, :] != label[:, None]
    return inside


@triton.jit
def _tile(X, rows, stride, start, inside, BLOCK_N: tl.constexpr):
    offs_n = start + tl.arange(0, BLOCK_N)
    return tl.load(X + (rows * stride)[:, None] + offs_n[None, :], mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _maximum(
    X, rows, stride, in_rows, label, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXCLUDE_LABEL: tl.constexpr
):  # fmt: skip
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(0, C, BLOCK_N):
        counted = _classes(start, in_rows, label, C, BLOCK_N, EXCLUDE_LABEL)
        largest = tl.maximum(largest, tl.max(_tile(X, rows, stride, start, counted, BLOCK_N), 1))
    # A row of -inf has no finite maximum: subtracting a finite number keeps exp(-inf) = 0. Triton 3.6 cannot compile a
    # maximum that is read twice, as by tl.where.
    return tl.maximum(largest, -3.4e38)


@triton.jit
def _mean(X, rows, stride, largest, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mean of a row less its maximum."""
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_N):
        inside = _classes(start, in_rows, rows, C, BLOCK_N, False)
        x = _tile(X, rows, stride, start, inside, BLOCK_N)
        total += tl.sum(tl.where(inside, x - largest[:, None], 0.0), 1)
    return total / C


@triton.jit
def _std(X, rows, stride, mean, in_rows, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The standard deviation of a row, a sample, around its mean."""
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_N):
        inside = _classes(start, in_rows, rows, C, BLOCK_N, False)
        z = tl.where(inside, _tile(X, rows, stride, start, inside, BLOCK_N) - mean[:, None], 0.0)
        squares += tl.sum(z * z, 1)
    return tl.sqrt(squares / (C - 1))


@triton.jit(do_not_specialize=["stride_xn", "stride_yn", "n", "C", "views"])
def forward_kernel(
    X, Y, stride_xn, stride_yn, LABELS, SCALE_X, SCALE_Y, FOUND, KEPT, n, C, views, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LABELS: tl.constexpr, EXCLUDE_LABEL: tl.constexpr,
    STANDARDIZE: tl.constexpr, HAS_MOMENTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n
    stride_xn, stride_yn, stride_k = stride_xn.to(tl.int64), stride_yn.to(tl.int64), n.to(tl.int64)
    plane = views * stride_k
    label = rows
    if HAS_LABELS:
        label = tl.load(LABELS + rows, mask=in_rows, other=0)
    mx = _maximum(X, rows, stride_xn, in_rows, label, C, BLOCK_M, BLOCK_N, EXCLUDE_LABEL)
    my = _maximum(Y, rows, stride_yn, in_rows, label, C, BLOCK_M, BLOCK_N, EXCLUDE_LABEL)
    none = tl.zeros([BLOCK_M], tl.float32)
    mean, spread_x, spread_y, own_x, own_y = none, none + 1, none + 1, none, none
    if STANDARDIZE:
        mean = _mean(X, rows, stride_xn, mx, in_rows, C, BLOCK_M, BLOCK_N)
        mean_y = _mean(Y, rows, stride_yn, my, in_rows, C, BLOCK_M, BLOCK_N)
        spread_x = _std(X, rows, stride_xn, mx + mean, in_rows, C, BLOCK_M, BLOCK_N) + eps
        spread_y = _std(Y, rows, stride_yn, my + mean_y, in_rows, C, BLOCK_M, BLOCK_N) + eps
    if HAS_LABELS:
        is_label = (label >= 0) & (label < C)
        own_x = tl.load(X + rows * stride_xn + label, mask=in_rows & is_label, other=0.0).to(tl.float32) - mx
        own_y = tl.load(Y + rows * stride_yn + label, mask=in_rows & is_label, other=0.0).to(tl.float32) - my
        own_x = tl.where(is_label, own_x, float("nan"))
        own_y = tl.where(is_label, own_y, float("nan"))
    KEPT += rows
    tl.store(KEPT, mx, mask=in_rows)
    tl.store(KEPT + stride_k, my, mask=in_rows)
    tl.store(KEPT + 2 * stride_k, mean, mask=in_rows)
    tl.store(KEPT + 3 * stride_k, spread_x, mask=in_rows)
    tl.store(KEPT + 4 * stride_k, spread_y, mask=in_rows)
    KEPT += 5 * stride_k
    FOUND += rows
    for k in range(views):
        at = k * stride_k
        a = tl.load(SCALE_X + at + rows, mask=in_rows, other=0.0) / spread_x
        b = tl.load(SCALE_Y + at + rows, mask=in_rows, other=0.0) / spread_y
        su = tl.where(in_rows, none, 1.0)  # beyond the rows nothing is added to these, and nothing is divided by 0
        sv, v_d, v_zy, u_zx, v_zx, v_zy_d = su, none, none, none, none, none
        for start in range(0, C, BLOCK_N):
            counted = _classes(start, in_rows, label, C, BLOCK_N, EXCLUDE_LABEL)
            zx = tl.where(counted, _tile(X, rows, stride_xn, start, counted, BLOCK_N) - mx[:, None], 0.0)
            zy = tl.where(counted, _tile(Y, rows, stride_yn, start, counted, BLOCK_N) - my[:, None], 0.0)
            u = tl.where(counted, tl.exp2(zx * (a * LOG2E)[:, None]), 0.0)
            v = tl.where(counted, tl.exp2(zy * (b * LOG2E)[:, None]), 0.0)
            d = zy * b[:, None] - zx * a[:, None]
            su += tl.sum(u, 1)
            sv += tl.sum(v, 1)
            v_d += tl.sum(v * d, 1)
            v_zy += tl.sum(v * zy, 1)
            if HAS_MOMENTS:
                u_zx += tl.sum(u * zx, 1)
                v_zx += tl.sum(v * zx, 1)
                v_zy_d += tl.sum(v * zy * d, 1)
        log_u, log_v, mean_d, mean_zy = tl.log2(su) * LN2, tl.log2(sv) * LN2, v_d / sv, v_zy / sv
        tl.store(FOUND + at, mean_d + (log_u - log_v), mask=in_rows)
        tl.store(FOUND + plane + at, log_v - b * mean_zy, mask=in_rows)
        tl.store(FOUND + 2 * plane + at, a * own_x - log_u if HAS_LABELS else none, mask=in_rows)
        tl.store(FOUND + 3 * plane + at, b * own_y - log_v if HAS_LABELS else none, mask=in_rows)
        tl.store(KEPT + at, su, mask=in_rows)
        tl.store(KEPT + plane + at, sv, mask=in_rows)
        tl.store(KEPT + 2 * plane + at, (u_zx / su) - v_zx / sv, mask=in_rows)
        tl.store(KEPT + 3 * plane + at, v_zy_d / sv - mean_zy * mean_d, mask=in_rows)
        tl.store(KEPT + 4 * plane + at, own_x - u_zx / su, mask=in_rows)


@triton.jit(do_not_specialize=["stride_xn", "stride_yn", "n", "C", "views"])
def backward_kernel(
    X, Y, stride_xn, stride_yn, LABELS, SCALE_X, SCALE_Y, KEPT, UPSTREAM, GRAD, n, C, views, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LABELS: tl.constexpr, EXCLUDE_LABEL: tl.constexpr,
    STANDARDIZE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)
    in_rows = rows < n
    stride_k = n.to(tl.int64)
    plane = views * stride_k
    label = rows
    if HAS_LABELS:
        label = tl.load(LABELS + rows, mask=in_rows, other=0)
    inside = _classes(start, in_rows, label, C, BLOCK_N, False)
    KEPT += rows
    mx, my = tl.load(KEPT, mask=in_rows, other=0.0), tl.load(KEPT + stride_k, mask=in_rows, other=0.0)
    zx = _tile(X, rows, stride_xn.to(tl.int64), start, inside, BLOCK_N) - mx[:, None]
    zy = _tile(Y, rows, stride_yn.to(tl.int64), start, inside, BLOCK_N) - my[:, None]
    spread_x = tl.load(KEPT + 3 * stride_k, mask=in_rows, other=1.0)
    spread_y = tl.load(KEPT + 4 * stride_k, mask=in_rows, other=1.0)
    BY_VIEW = KEPT + 5 * stride_k
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    at_label = tl.zeros([BLOCK_M], tl.float32)
    of_std = at_label
    for k in range(views):
        at = k * stride_k
        a = tl.load(SCALE_X + at + rows, mask=in_rows, other=0.0) / spread_x
        b = tl.load(SCALE_Y + at + rows, mask=in_rows, other=0.0) / spread_y
        g = tl.load(UPSTREAM + at + rows, mask=in_rows, other=0.0)
        h = tl.load(UPSTREAM + 2 * plane + at + rows, mask=in_rows, other=0.0)
        of_u = a * (g - h) / tl.load(BY_VIEW + at, mask=in_rows, other=1.0)
        of_v = a * g / tl.load(BY_VIEW + plane + at, mask=in_rows, other=1.0)
        grad += of_u[:, None] * tl.exp2(zx * (a * LOG2E)[:, None]) - of_v[:, None] * tl.exp2(zy * (b * LOG2E)[:, None])
        at_label += a * h
        if STANDARDIZE:
            moment = g * tl.load(BY_VIEW + 2 * plane + at, mask=in_rows, other=0.0)
            moment += h * tl.load(BY_VIEW + 4 * plane + at, mask=in_rows, other=0.0)
            of_std += a * moment
    grad = tl.where(_classes(start, in_rows, label, C, BLOCK_N, EXCLUDE_LABEL), grad, 0.0)
    if HAS_LABELS:
        grad += tl.where(offs_n[None, :] == label[:, None], at_label[:, None], 0.0)
        grad = tl.where(((label >= 0) & (label < C))[:, None], grad, float("nan"))
    if STANDARDIZE:
        mean = tl.load(KEPT + 2 * stride_k, mask=in_rows, other=0.0)
        std = spread_x - eps
        of_logit = tl.where(std > 0, -of_std / (spread_x * tl.where(std > 0, std, 1.0) * (C - 1)), 0.0)
        grad += of_logit[:, None] * (zx - mean[:, None])
    tl.store(GRAD + (rows * C)[:, None] + offs_n[None, :], grad.to(GRAD.dtype.element_ty), mask=inside)


def tile_of(config: LaunchConfig) -> LaunchConfig:
    """The tile for rows that ``soft_target`` goes over in ``config``: fewer elements per thread, for more sums."""
    columns = min(config.BLOCK_N, MAX_COLUMNS)
    rows = min(config.BLOCK_M, MAX_ROWS, max(1, WARP_ELEMENTS // columns))
    warps = max(1, columns // WARP_ELEMENTS)
    return dataclasses.replace(config, BLOCK_M=rows, BLOCK_N=columns, num_warps=warps)


def _unit_columns(logits: Tensor) -> Tensor:
    """The logits, with the columns of a row next to each other. Only a transposed tensor is copied for that."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _given(
    direction: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    exclude_label: bool,
    eps: float | None,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the arguments that both kernels take."""
    X, Y = _unit_columns(student), _unit_columns(teacher)
    n, C = X.shape
    config = tile_of(launch_config(f"soft_target_{direction}", width=C, hardware=hardware_of(X.device)))
    return (cdiv(n, config.BLOCK_M), cdiv(C, config.BLOCK_N)), {
        "X": X,
        "Y": Y,
        "stride_xn": X.stride(0),
        "stride_yn": Y.stride(0),
        "LABELS": labels,
        "SCALE_X": student_scale.contiguous(),
        "SCALE_Y": teacher_scale.contiguous(),
        "n": n,
        "C": C,
        "views": len(student_scale),
        "eps": 0.0 if eps is None else eps,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "HAS_LABELS": labels is not None,
        "EXCLUDE_LABEL": exclude_label,
        "STANDARDIZE": eps is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def soft_target_rows(*inputs: Any, moments: bool) -> tuple[Tensor, Tensor]:
    """FOUND and KEPT. ``inputs``: those of :func:`_given` after the direction; ``eps``: None for rows as they are."""
    (blocks, _), given = _given("forward", *inputs)
    views, n = given["views"], given["n"]
    found = torch.empty(4, views, n, dtype=torch.float32, device=given["X"].device)
    kept = torch.empty(5 + 5 * views, n, dtype=torch.float32, device=found.device)
    launch(forward_kernel, (blocks,), **given, FOUND=found, KEPT=kept, HAS_MOMENTS=moments)
    return found, kept


def soft_target_rows_gradient(*inputs: Any, kept: Tensor, upstream: Tensor) -> Tensor:
    """GRAD [n, C], contiguous, in the student's dtype."""
    assert kept.is_contiguous()
    assert upstream.is_contiguous()
    grid, given = _given("backward", *inputs)
    grad = torch.empty(given["n"], given["C"], dtype=given["X"].dtype, device=kept.device)
    launch(backward_kernel, grid, **given, KEPT=kept, UPSTREAM=upstream, GRAD=grad)
    return grad
