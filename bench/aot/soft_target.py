"""The compilations of ``soft_target`` and of ``soft_target_rows``, which has the same tiles.

Every entry has every flag set, so that each holds the most registers.
"""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch, soft_target, soft_target_rows

from bench.aot.compile import Job, launched

_TYPES = {"X": "*bf16", "LABELS": "*i64", "C": "i32", "temperature": "fp32", "smoothing": "fp32"}
_FLAGS = {"HAS_LABELS": True, "HAS_TEACHER": True, "HAS_WEIGHT": True, "HAS_SMOOTHING": True}
_ROWS_FLAGS = {"HAS_LABELS": True, "EXCLUDE_LABEL": True, "STANDARDIZE": True}
_KERNELS = {"soft_target_forward": soft_target.forward_kernel, "soft_target_backward": soft_target.backward_kernel}


def jobs(hardware: str) -> Iterator[Job]:
    """Rows of a multiple of 16 bytes; the last entry of a kernel on sm_90 also with other flags."""
    for entry, config in launch.TABLE[hardware].items():
        if entry.kernel not in _KERNELS:
            continue
        is_forward, is_last = entry.kernel == "soft_target_forward", entry.width == 0
        for dtype in ("bf16", "fp32"):
            yield _rows_job(hardware, config, dtype, is_forward=is_forward)
            constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, **_FLAGS}
            constants |= {"ALIGN": 8 if dtype == "bf16" else 4, "POWER": 4}
            variants: dict[str, dict[str, Any]] = {"": {}}
            if hardware == "sm_90" and is_last:
                variants |= {" unaligned": {"ALIGN": 1}, " any temperature": {"POWER": 0}}
            if is_forward:
                constants |= {"IS_ONE_TILE": not is_last}
                variants = {name: {"IS_SPLIT": False, "STATE": None, **changed} for name, changed in variants.items()}
                if hardware == "sm_90" and is_last:
                    variants[" split"] = {"IS_SPLIT": True}
            for variant, changed in variants.items():
                yield Job(
                    name=f"{entry.kernel} {dtype}{variant}",
                    hardware=hardware,
                    kernel=_KERNELS[entry.kernel],
                    constants=constants | changed,
                    types=_TYPES | dict.fromkeys(("X", "Y", "GRAD"), f"*{dtype}"),
                    **launched(config),
                )
    yield Job(
        name="soft_target_merge",
        hardware=hardware,
        kernel=soft_target.merge_kernel,
        constants={"BLOCK_M": soft_target.ROWS, "POWER": 4, **_FLAGS},
        types=_TYPES,
    )


def _rows_job(hardware: str, config: launch.LaunchConfig, dtype: str, *, is_forward: bool) -> Job:
    config = soft_target_rows.tile_of(config)
    return Job(
        name=f"soft_target_rows_{'forward' if is_forward else 'backward'} {dtype}",
        hardware=hardware,
        kernel=soft_target_rows.forward_kernel if is_forward else soft_target_rows.backward_kernel,
        constants={"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, **_ROWS_FLAGS}
        | ({"HAS_MOMENTS": True} if is_forward else {}),
        types={"LABELS": "*i64", "eps": "fp32"} | dict.fromkeys(("X", "Y", "GRAD"), f"*{dtype}"),
        **launched(config),
    )
