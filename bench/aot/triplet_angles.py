"""The compilations of ``triplet_angles``, which has one dtype and no flags."""

from collections.abc import Iterator

from fastkd.kernels import triplet_angles

from bench.aot.compile import Job


def jobs(hardware: str) -> Iterator[Job]:
    for name, kernel, (BLOCK_M, BLOCK_N) in (
        ("corners", triplet_angles.corners_kernel, triplet_angles.CORNERS_TILE),
        ("ends", triplet_angles.ends_kernel, triplet_angles.ENDS_TILE),
    ):
        constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        yield Job(f"triplet_angles_{name} fp32", hardware, kernel, constants, types={}, ctas_per_sm=4)
