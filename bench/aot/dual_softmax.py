"""The kernels of ``dual_softmax`` and ``soft_target`` that are compiled ahead of time."""

import itertools
from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch, normalize, soft_target
from fastkd.kernels.dual_softmax import per_row as dual_softmax_rows
from fastkd.kernels.dual_softmax import wide as dual_softmax_wide

from bench.aot.compile import Job

_SOFT_TARGET_TYPES = {"X": "*bf16", "LABELS": "*i64", "C": "i32", "temperature": "fp32", "smoothing": "fp32"}


def _variants(
    kernel: str, block_d: int, config: launch.LaunchConfig, *, is_extra: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The flags a launcher may pass: columns that continue an earlier chunk; gradients of one side or of both."""
    if kernel == "dual_softmax_forward":
        yield "", {"HAS_CARRY": False}
        if not is_extra:
            yield " carry", {"HAS_CARRY": True}
        return
    sides = {"": (True, True), " a": (True, False), " b": (False, True)}
    if config.apart:
        del sides[""]
    elif is_extra:
        sides = {"": (True, True)}
    for name, (need_a, need_b) in sides.items():
        yield name, {"BLOCK_D": block_d, "NEED_A": need_a, "NEED_B": need_b}


def _row_jobs(hardware: str) -> Iterator[Job]:
    """The kernels that visit a row once or read cosines from memory; bf16, since fp16 and fp32 need no more."""
    rows = dual_softmax_rows
    half: dict[str, str] = dict.fromkeys(("X0", "X1", "UNITS", "GRAD_A", "GRAD_B", "G", "H"), "*bf16")
    both: dict[str, Any] = {"NEED_A": True, "NEED_B": True}

    def job(name: str, kernel: Any, num_warps: int = 4, types: dict[str, str] = half, **constants: Any) -> Job:
        return Job(name=name, hardware=hardware, kernel=kernel, constants=constants, types=types, num_warps=num_warps)

    for BLOCK_D, num_warps in ((128, 4), (2048, 4), (8192, 16)):
        BLOCK_M = max(1, normalize.BLOCK_ELEMENTS // BLOCK_D)
        tile: dict[str, Any] = {"BLOCK_M": BLOCK_M, "BLOCK_D": BLOCK_D}
        yield job(f"unit_rows D={BLOCK_D}", normalize._unit_rows_kernel, num_warps, **tile, TO_TF32=False)
        yield job(f"finish D={BLOCK_D}", rows._finish_kernel, num_warps, **tile, **both)
    single = dict.fromkeys(half, "*fp32")
    yield job("unit_rows tf32", normalize._unit_rows_kernel, types=single, BLOCK_M=16, BLOCK_D=128, TO_TF32=True)
    weighted: dict[str, Any] = {"HAS_WEIGHT": True, "IS_SWAPPED": True}
    yield job("statistics", rows._statistics_kernel, BLOCK_M=rows.BLOCK_ROWS, **weighted)
    yield job("coefficients", rows._coefficients_kernel, BLOCK_N=rows.BLOCK_ROWS, BOUNDED=True, **weighted)
    for bounded in (True, False):
        mode = "bounded" if bounded else "online"
        wide: dict[str, str] = {"X": "*fp32", "Y": "*fp32", **half}
        yield job(
            f"wide accumulate {mode}", dual_softmax_wide._accumulate_kernel, types=wide,
            BLOCK_M=8, BLOCK_N=256, BOUNDED=bounded, HAS_CARRY=True,
        )  # fmt: skip
        yield job(
            f"wide gradient {mode}", dual_softmax_wide._gradient_kernel, types=wide,
            BLOCK_M=16, BLOCK_N=128, BOUNDED=bounded, **both,
        )  # fmt: skip


def _soft_target_jobs(hardware: str) -> Iterator[Job]:
    """Every entry with every flag set, so that each holds the most registers; rows of a multiple of 16 bytes."""
    flags = {"HAS_LABELS": True, "HAS_TEACHER": True, "HAS_WEIGHT": True, "HAS_SMOOTHING": True}
    for direction in ("forward", "backward"):
        kernel = f"soft_target_{direction}"
        configs = launch.soft_target_entries(kernel, hardware)
        for config, dtype in itertools.product(configs, ("bf16", "fp32")):
            constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, **flags}
            constants |= {"ALIGN": 8 if dtype == "bf16" else 4, "POWER": 4}
            variants: dict[str, dict[str, Any]] = {"": {}}
            if hardware == "sm_90" and config is configs[-1]:
                variants |= {" unaligned": {"ALIGN": 1}, " any temperature": {"POWER": 0}}
            if direction == "forward":
                constants |= {"IS_ONE_TILE": config is not configs[-1]}
                variants = {name: {"IS_SPLIT": False, "STATE": None, **changed} for name, changed in variants.items()}
                if hardware == "sm_90" and config is configs[-1]:
                    variants[" split"] = {"IS_SPLIT": True}
            for variant, changed in variants.items():
                yield Job(
                    name=f"{kernel} {dtype}{variant}",
                    hardware=hardware,
                    kernel=getattr(soft_target, f"_{direction}_kernel"),
                    constants=constants | changed,
                    types=_SOFT_TARGET_TYPES | dict.fromkeys(("X", "Y", "GRAD"), f"*{dtype}"),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    ctas_per_sm=config.ctas_per_sm,
                )
    yield Job(
        name="soft_target_merge",
        hardware=hardware,
        kernel=soft_target._merge_kernel,
        constants={"BLOCK_M": soft_target.ROWS, "POWER": 4, **flags},
        types=_SOFT_TARGET_TYPES,
    )
