"""All kernels that are compiled ahead of time, by hardware."""

from collections.abc import Iterator

from fastkd.kernels import launch
from fastkd.kernels.dual_softmax import streaming as dual_softmax

from bench.aot import pool as aot_pool
from bench.aot.compile import Job, _uses
from bench.aot.dual_softmax import _row_jobs, _soft_target_jobs, _variants


def jobs(hardware: str) -> Iterator[Job]:
    for kernel, itemsize, block_d, bounded, config in launch.entries(hardware):
        for dtype, width, is_extra in _uses(hardware, itemsize, block_d):
            types = dict.fromkeys(("A_rows", "B_rows"), f"tensordesc<{dtype}[{config.BLOCK_M}, {width}]>")
            types |= dict.fromkeys(("A_cols", "B_cols"), f"tensordesc<{dtype}[{config.BLOCK_N}, {width}]>")
            constants = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "PRECISION": "tf32", "BOUNDED": bounded}
            for variant, flags in _variants(kernel, width, config, is_extra=is_extra):
                yield Job(
                    name=f"{kernel} {dtype} D={width} {'bounded' if bounded else 'online'}{variant}",
                    hardware=hardware,
                    kernel=getattr(dual_softmax, f"_{kernel.removeprefix('dual_softmax_')}_kernel"),
                    constants=constants | flags,
                    types=types,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    ctas_per_sm=config.ctas_per_sm,
                    matrix_dtype=dtype,
                )
    yield from _row_jobs(hardware)
    yield from _soft_target_jobs(hardware)
    yield from (Job(hardware=hardware, **case) for case in aot_pool.cases(hardware))
    from bench.aot import contrast as aot_contrast  # which needs Job

    yield from aot_contrast.jobs(hardware)
