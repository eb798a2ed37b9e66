"""The compilations of ``contrast``: every entry with every mask on sm_90, and with fewer masks on other hardware."""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch
from fastkd.kernels.contrast import per_row, streaming, wide
from fastkd.kernels.tiles import BLOCK_ROWS

from bench.aot.compile import Job, dtypes_and_widths, streamed

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
    for entry, config in launch.TABLE[hardware].items():
        if not entry.kernel.startswith("contrast"):
            continue
        kernel, is_forward = entry.kernel, entry.kernel == "contrast_forward"
        for dtype, width, is_rare in dtypes_and_widths(hardware, entry):
            masks = {"index": _INDEX} if is_rare else MASKS if hardware == "sm_90" else _LARGEST
            types = _INTEGERS | {
                "ROWS": f"tensordesc<{dtype}[{config.BLOCK_M}, {width}]>",
                "COLS": f"tensordesc<{dtype}[{config.BLOCK_N}, {width}]>",
            }
            constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "PRECISION": "tf32"}
            constants |= {"IN_REGISTERS": config.rows_in_registers} if is_forward else {"BLOCK_D": width}
            for mask, flags in masks.items():
                for role, sides in _roles(kernel, flags).items():
                    yield Job(
                        name=f"{kernel} {dtype} D={width} {mask}{role}",
                        hardware=hardware,
                        kernel=streaming.forward_kernel if is_forward else streaming.backward_kernel,
                        constants=constants | flags | sides | _absent(kernel, flags, sides),
                        types=types,
                        matrix_dtype=dtype,
                        **streamed(config),
                    )
    yield from _row_jobs(hardware)


def _roles(kernel: str, flags: dict[str, bool]) -> dict[str, dict[str, bool]]:
    """The gradient of queries, of keys, or, for queries contrasted with themselves, of both at once."""
    if kernel == "contrast_forward":
        roles = {"": {"HAS_CARRY": False}}
        return roles | ({" carry": {"HAS_CARRY": True}} if flags is _INDEX else {})
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
    """The kernels that visit every row once or read dot products from memory."""
    masked = MASKS["self masked"]

    def job(name: str, kernel: Any, **constants: Any) -> Job:
        types = _INTEGERS | {"X": "*fp32", "G": "*bf16"}
        return Job(name=f"contrast {name}", hardware=hardware, kernel=kernel, constants=constants, types=types)

    for by_label in (False, True):
        options = {"BLOCK_M": BLOCK_ROWS, "HAS_WEIGHT": True, "BY_LABEL": by_label}
        yield job(f"statistics{' label' * by_label}", per_row.statistics_kernel, **options)
        yield job(f"coefficients{' label' * by_label}", per_row.coefficients_kernel, **options)
    yield job("wide accumulate", wide.accumulate_kernel, BLOCK_M=4, BLOCK_N=256, HAS_CARRY=True, **masked)
    yield job(
        "wide gradient", wide.gradient_kernel, BLOCK_M=16, BLOCK_N=128, BY_ROW=True, BY_COLUMN=True, **masked
    )  # fmt: skip
