"""Ahead-of-time jobs of ``contrast`` for bench/aot.py: every entry with every mask, fewer beyond sm_90."""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch
from fastkd.kernels.contrast import per_row as contrast_rows
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.contrast import wide as contrast_wide

from bench.aot.compile import Job

_INDEX = {"HAS_LABELS": False, "BY_LABEL": False, "HAS_INDEX": False, "EXCLUDE_SELF": False}
MASKS: dict[str, dict[str, bool]] = {
    "index": _INDEX,
    "masked": _INDEX | {"HAS_LABELS": True, "HAS_INDEX": True},
    "label": _INDEX | {"HAS_LABELS": True, "BY_LABEL": True},
    "self label": _INDEX | {"HAS_LABELS": True, "BY_LABEL": True, "EXCLUDE_SELF": True},
    "self index": _INDEX | {"HAS_INDEX": True, "EXCLUDE_SELF": True},
    "self masked": _INDEX | {"HAS_LABELS": True, "HAS_INDEX": True, "EXCLUDE_SELF": True},
}
_LARGEST = {name: MASKS[name] for name in ("index", "masked", "label", "self masked")}  # hold the most registers
_INTEGERS = dict.fromkeys(("ROW_LABELS", "COL_LABELS", "COUNT"), "*i32")
_INTEGERS |= dict.fromkeys(("POSITIVE", "ROW_POSITIVE", "COL_POSITIVE"), "*i64")


def jobs(hardware: str) -> Iterator[Job]:
    for kernel, itemsize, block_d, config in launch.contrast_entries(hardware):
        dtype = "bf16" if itemsize == 2 else "fp32"
        uses = [(dtype, block_d, MASKS if hardware == "sm_90" else _LARGEST)]
        if hardware == "sm_90" and itemsize == 2:
            uses.append(("fp16", block_d, {"index": _INDEX}))
        if hardware == "sm_90" and block_d == 64:
            uses.append((dtype, 16, {"index": _INDEX}))
        for dtype, width, masks in uses:
            types = _INTEGERS | {
                "ROWS": f"tensordesc<{dtype}[{config.BLOCK_M}, {width}]>",
                "COLS": f"tensordesc<{dtype}[{config.BLOCK_N}, {width}]>",
            }
            for mask, flags in masks.items():
                for role, sides in _roles(kernel, flags).items():
                    constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "PRECISION": "tf32"}
                    if kernel != "contrast_forward":
                        constants["BLOCK_D"] = width
                    yield Job(
                        name=f"{kernel} {dtype} D={width} {mask}{role}",
                        hardware=hardware,
                        kernel=contrast._forward_kernel if kernel == "contrast_forward" else contrast._backward_kernel,
                        constants=constants | flags | sides | _absent(kernel, flags, sides),
                        types=types,
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                        ctas_per_sm=config.ctas_per_sm,
                        matrix_dtype=dtype,
                    )
    yield from _row_jobs(hardware)


def _roles(kernel: str, flags: dict[str, bool]) -> dict[str, dict[str, bool]]:
    """The gradient of queries, of keys, or on one rank, of queries among themselves, of both."""
    if kernel == "contrast_forward":
        return (
            {"": {"HAS_CARRY": False}, " carry": {"HAS_CARRY": True}} if flags is _INDEX else {"": {"HAS_CARRY": False}}
        )
    if kernel == "contrast_self":
        return {"": {"BY_ROW": True, "BY_COLUMN": True}} if flags["EXCLUDE_SELF"] else {}
    if flags["EXCLUDE_SELF"] and not flags["BY_LABEL"]:  # across ranks only features by label meet themselves
        return {}
    return {" q": {"BY_ROW": True, "BY_COLUMN": False}, " k": {"BY_ROW": False, "BY_COLUMN": True}}


def _absent(kernel: str, flags: dict[str, bool], sides: dict[str, bool]) -> dict[str, None]:
    """Arguments that are None."""
    names = [] if flags["HAS_LABELS"] else ["ROW_LABELS", "COL_LABELS"]
    if kernel == "contrast_forward":
        return dict.fromkeys(names + ([] if flags["HAS_INDEX"] else ["POSITIVE"]))
    for side, prefix in (("BY_ROW", "ROW"), ("BY_COLUMN", "COL")):
        names += [] if sides[side] else [f"{prefix}_COEF"]
        names += [] if sides[side] and flags["HAS_INDEX"] else [f"{prefix}_POSITIVE"]
    return dict.fromkeys(names)


def _row_jobs(hardware: str) -> Iterator[Job]:
    """The kernels that visit a row once or read dot products from memory."""
    types = _INTEGERS | dict.fromkeys(("VECTORS", "GRAD", "G"), "*bf16")
    masked = MASKS["self masked"]

    def job(name: str, kernel: Any, types: dict[str, str], **constants: Any) -> Job:
        return Job(name=f"contrast {name}", hardware=hardware, kernel=kernel, constants=constants, types=types)

    for width in (128, contrast_rows.BLOCK_ELEMENTS):
        BLOCK_M, BLOCK_D = contrast_rows._tile(width)
        tile: dict[str, Any] = {"BLOCK_M": BLOCK_M, "BLOCK_D": BLOCK_D, "NORMALIZE": True}
        yield job(f"vectors D={width}", contrast_rows._vectors_kernel, types | {"X": "*bf16"}, **tile, TO_TF32=False)
        yield job(f"finish D={width}", contrast_rows._finish_kernel, types, **tile)
    rows: dict[str, Any] = {"BLOCK_M": contrast_rows.BLOCK_ROWS, "HAS_WEIGHT": True}
    single = types | {"X": "*fp32"}
    for by_label in (False, True):
        name = " label" if by_label else ""
        yield job(f"statistics{name}", contrast_rows._statistics_kernel, types, **rows, BY_LABEL=by_label)
        yield job(
            f"coefficients{name}", contrast_rows._coefficients_kernel, types | {"GRAD": "*fp32"}, **rows,
            BY_LABEL=by_label,
        )  # fmt: skip
    yield job(
        "wide accumulate", contrast_wide._accumulate_kernel, single, BLOCK_M=4, BLOCK_N=256, HAS_CARRY=True, **masked
    )
    yield job(
        "wide gradient", contrast_wide._gradient_kernel, single, BLOCK_M=16, BLOCK_N=128, BY_ROW=True, BY_COLUMN=True,
        **masked,
    )  # fmt: skip
