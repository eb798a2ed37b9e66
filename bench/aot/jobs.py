"""All kernels that are compiled ahead of time, by hardware."""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import normalize

from bench.aot import contrast, dual_softmax, pool, soft_target, triplet_angles
from bench.aot.compile import Job


def jobs(hardware: str) -> Iterator[Job]:
    for operation in (dual_softmax, contrast, soft_target, pool, triplet_angles):
        yield from operation.jobs(hardware)
    yield from _normalize_jobs(hardware)


def _normalize_jobs(hardware: str) -> Iterator[Job]:
    """Rows of one piece and of several; bf16, since fp16 and fp32 need no more registers, and fp32 rounded to tf32."""

    def job(name: str, kernel: Any, dtype: str, width: int, **flags: bool) -> Job:
        return Job(
            name=f"{name} D={width}",
            hardware=hardware,
            kernel=kernel,
            constants={**normalize.tile(width), **flags},
            types=dict.fromkeys(("X0", "X1", "VECTORS", "GRAD0", "GRAD1"), f"*{dtype}"),
        )

    for width in (128, 2 * normalize.BLOCK_ELEMENTS):
        yield job("vectors", normalize.vectors_kernel, "bf16", width, NORMALIZE=True, TO_TF32=False)
        yield job("finish", normalize.finish_kernel, "bf16", width, NORMALIZE=True)
    yield job("vectors tf32", normalize.vectors_kernel, "fp32", 128, NORMALIZE=True, TO_TF32=True)
