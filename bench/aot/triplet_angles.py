"""The compilations of ``triplet_angles``, which has one dtype and no flags."""

from collections.abc import Iterator

from fastkd.kernels import launch, triplet_angles

from bench.aot.compile import Job, launched

_KERNELS = {
    "triplet_angles_corners": triplet_angles.corners_kernel,
    "triplet_angles_ends": triplet_angles.ends_kernel,
}


def jobs(hardware: str) -> Iterator[Job]:
    for entry, config in launch.TABLE[hardware].items():
        if entry.kernel in _KERNELS:
            yield Job(
                name=f"{entry.kernel} fp32",
                hardware=hardware,
                kernel=_KERNELS[entry.kernel],
                constants={"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N},
                types={},
                **launched(config),
            )
