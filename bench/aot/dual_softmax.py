"""The compilations of ``dual_softmax``."""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch
from fastkd.kernels.dual_softmax import per_row, streaming, wide
from fastkd.kernels.tiles import BLOCK_ROWS

from bench.aot.compile import Job, dtypes_and_widths, streamed


def _variants(kernel: str, config: launch.LaunchConfig, *, is_rare: bool) -> dict[str, dict[str, bool]]:
    """The flags a launcher may pass: columns that continue an earlier chunk; gradients of one side or of both."""
    if kernel == "dual_softmax_forward":
        common = {"IN_REGISTERS": config.rows_in_registers}
        return {"": common | {"HAS_CARRY": False}} | ({} if is_rare else {" carry": common | {"HAS_CARRY": True}})
    found = {} if config.apart else {"": {"NEED_A": True, "NEED_B": True}}
    if config.apart or not is_rare:
        found |= {" a": {"NEED_A": True, "NEED_B": False}, " b": {"NEED_A": False, "NEED_B": True}}
    return found


def jobs(hardware: str) -> Iterator[Job]:
    for entry, config in launch.TABLE[hardware].items():
        if not entry.kernel.startswith("dual_softmax"):
            continue
        is_forward = entry.kernel == "dual_softmax_forward"
        for dtype, width, is_rare in dtypes_and_widths(hardware, entry):
            types = dict.fromkeys(("A_rows", "B_rows"), f"tensordesc<{dtype}[{config.BLOCK_M}, {width}]>")
            types |= dict.fromkeys(("A_cols", "B_cols"), f"tensordesc<{dtype}[{config.BLOCK_N}, {width}]>")
            constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "PRECISION": "tf32"}
            constants |= {"BOUNDED": entry.bounded} | ({} if is_forward else {"BLOCK_D": width})
            for variant, flags in _variants(entry.kernel, config, is_rare=is_rare).items():
                yield Job(
                    name=f"{entry.kernel} {dtype} D={width} {'bounded' if entry.bounded else 'online'}{variant}",
                    hardware=hardware,
                    kernel=streaming.forward_kernel if is_forward else streaming.backward_kernel,
                    constants=constants | flags,
                    types=types,
                    matrix_dtype=dtype,
                    **streamed(config),
                )
    yield from _row_jobs(hardware)


def _row_jobs(hardware: str) -> Iterator[Job]:
    """The kernels that visit every row once or read cosines from memory; bf16, since fp16 and fp32 need no more."""

    def job(name: str, kernel: Any, types: dict[str, str] | None = None, warps: int = 4, **constants: Any) -> Job:
        return Job(name=name, hardware=hardware, kernel=kernel, constants=constants, types=types or {}, num_warps=warps)

    weighted: dict[str, Any] = {"HAS_WEIGHT": True, "IS_SWAPPED": True}
    yield job("statistics", per_row.statistics_kernel, BLOCK_M=BLOCK_ROWS, **weighted)
    yield job("coefficients", per_row.coefficients_kernel, warps=1, BLOCK_N=BLOCK_ROWS, BOUNDED=True, **weighted)
    types = {"X": "*fp32", "Y": "*fp32", "G": "*bf16", "H": "*bf16"}
    for bounded in (True, False):
        mode = "bounded" if bounded else "online"
        yield job(
            f"wide accumulate {mode}", wide.accumulate_kernel, types, BLOCK_M=8, BLOCK_N=256, BOUNDED=bounded,
            HAS_CARRY=True,
        )  # fmt: skip
        yield job(
            f"wide gradient {mode}", wide.gradient_kernel, types, BLOCK_M=16, BLOCK_N=128, BOUNDED=bounded,
            NEED_A=True, NEED_B=True,
        )  # fmt: skip
