"""The ahead-of-time gate: every kernel compiles without spilling, and the gate notices when one does not."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastkd.kernels import launch

from bench.aot import __main__ as command
from bench.aot import compile as aot
from bench.aot.jobs import jobs

MAIN = "sm_90"


def one_of_each(work: list[aot.Job]) -> list[int]:
    """The variant with the most flags: of every kernel; on sm_90 of each of its dtypes, widths and tiles.

    Other NVIDIA targets differ in how matrices are multiplied: there it is of the kernels that do. make aot has all.
    """
    chosen: dict[tuple[object, ...], tuple[int, int]] = {}
    for index, job in enumerate(work):
        words = job.name.split()
        dtype = next(iter({"bf16", "fp16", "fp32"}.intersection(words)), None)
        kernel, rest = words[:1] if dtype else words[:2], [word for word in words[1:] if word != dtype]
        flags = sum(value is True for value in job.constants.values())
        keys: list[tuple[object, ...]] = [(job.hardware, *kernel)]
        if job.hardware == MAIN:
            sizes = (job.constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "BOUNDED"))
            keys = [(*kernel, dtype), (*kernel, *rest[:1], *sizes)]
        elif job.hardware.startswith("sm") and not (job.matrix_dtype or kernel[0].startswith("pool")):
            continue
        for key in keys:
            chosen[key] = max(chosen.get(key, (-1, 0)), (flags, -index))
    return sorted({-index for _, index in chosen.values()})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_entry_of_the_launch_table_passes(capsys: pytest.CaptureFixture[str]) -> None:
    failures = command.run(list(aot.TARGETS), workers=2, select=one_of_each, instructions=False)
    output = capsys.readouterr().out
    assert failures == 0, output
    assert len(launch.TABLE[MAIN]) <= output.count(f"{MAIN:7}")
    assert all(f"{hardware:7}" in output for hardware in aot.TARGETS)


def backward_job(**config: object) -> aot.Job:
    """The sm_90 backward at D = 128, with another launch configuration."""
    job = next(job for job in jobs("sm_90") if job.name.startswith("dual_softmax_backward bf16 D=128 bounded"))
    return dataclasses.replace(job, **config)


@pytest.mark.slow
def test_a_spill_is_noticed() -> None:
    failures = aot.examine(backward_job(num_stages=3)).failures()
    assert any("spills" in failure for failure in failures), failures


def test_too_few_resident_programs_are_noticed() -> None:
    assert aot.examine(backward_job()).failures() == []
    failures = aot.examine(backward_job(ctas_per_sm=3)).failures()
    assert failures == ["2 programs resident, the table says 3"]


def test_serialized_matrix_instructions_are_noticed() -> None:
    result = aot.examine(backward_job())
    assert "ptxas info" in result.log
    assert result.failures() == []
    result.log += "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert result.failures() == ["matrix instructions are serialized"]


def test_too_much_shared_memory_is_noticed() -> None:
    result = aot.examine(backward_job())
    result.shared = aot.SHARED_LIMIT["sm_90"] + 1
    assert any("shared memory" in failure for failure in result.failures())


def test_a_kernel_without_warpgroup_instructions_is_noticed() -> None:
    """Tiles of 32 rows are too small for a warpgroup: Triton then falls back to the older matrix instructions."""
    job = backward_job(ctas_per_sm=1, num_warps=8)
    types = {name: kind.replace("[64,", "[32,") for name, kind in job.types.items()}
    small = dataclasses.replace(job, types=types, constants={**job.constants, "BLOCK_M": 32, "BLOCK_N": 32})
    assert "no HGMMA" in aot.examine(small).failures()


def test_the_main_loop_of_the_backward_is_counted() -> None:
    result = aot.examine(backward_job())
    elements = 64 * 64 // 128  # of a tile, a thread
    assert result.counts["exp"] == 2 * elements
    assert result.counts["matrix"] == 3 * 128 // 16
    clocks = aot.clocks(result)
    assert clocks["matrix"] == 1024
    assert clocks["exp"] == 512
    assert result.counts["all"] <= 730
    # The columns' factors: one copy per thread, and three numbers for each of 16 columns read in pairs.
    assert result.counts["LDGSTS"] == 1
    assert result.counts["LDS"] <= 24 + 3
    assert clocks["shared"] >= 1024 + (24 + 1) * 2 * 4


def test_the_forward_reads_its_rows_from_registers() -> None:
    job = next(job for job in jobs("sm_90") if job.name == "dual_softmax_forward bf16 D=128 bounded")
    rows, columns = (64 * 128 * 2, 64 * 128 * 2)  # bytes of one side, for a warpgroup
    assert aot.examine(job).hgmma_bytes == 2 * columns
    shared = dataclasses.replace(job, constants=job.constants | {"IN_REGISTERS": False})
    assert aot.examine(shared).hgmma_bytes == 2 * (rows + columns)


def test_the_model_adds_what_a_copy_is_waited_for() -> None:
    result = aot.examine(backward_job())
    two_programs = aot.clocks(result)
    assert two_programs["serial"] == two_programs["matrix"] + two_programs["issue"]  # one waits, the other computes
    result.job = backward_job(ctas_per_sm=1)
    alone = aot.clocks(result)
    assert alone["serial"] == two_programs["serial"] + aot.COPY_LATENCY
    result.job = backward_job(ctas_per_sm=1, num_stages=3)
    assert aot.clocks(result)["serial"] == two_programs["serial"]


def test_the_predicted_time_is_printed_and_at_most_3_2_ms(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = "^dual_softmax_(for|back)ward bf16 D=128 bounded$"
    assert command.run(["sm_90"], 1, lambda work: command.matching(pattern, work)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DCD, N = 32768")]
    assert len(lines) == 1
    assert float(lines[0].split()[-2]) <= 3.2


def test_no_kernel_is_compiled_again_for_a_scalar_or_a_slice_at_another_alignment() -> None:
    pointers = [p for job in jobs("sm_90") for p in getattr(job.kernel, "params", ()) if "soft" not in job.name]
    scalars = [p for p in pointers if p.name in ("SCALE", "UNSCALE", "GRAD_CONTRAST", "UPSTREAM", "LARGEST_WEIGHT")]
    assert len(scalars) > 100
    assert all(p.do_not_specialize_on_alignment for p in scalars)


@pytest.mark.parametrize("hardware", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_widths_that_fit_have_an_entry_for_every_streaming_kernel(hardware: str, dtype: torch.dtype) -> None:
    for width in (16, 32, 64, 128, 256):
        if launch.fits(dtype, width, hardware):
            for kernel in launch.STREAMING:
                for bounded in (True, False) if kernel.startswith("dual_softmax") else (None,):
                    launch.launch_config(kernel, dtype=dtype, width=width, bounded=bounded, hardware=hardware)
    assert launch.fits(dtype, 128, hardware)
    assert not launch.fits(dtype, 512, hardware)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rows_of_1000_classes_are_read_and_written_16_bytes_at_a_time(direction: str, tmp_path: Path) -> None:
    """Triton itself knows only of strides divisible by 16; ALIGN has to tell it that 1000 is divisible by 8."""
    names = {job.name: job for job in jobs("sm_90") if job.constants.get("BLOCK_N") == 1024}
    job = names[f"soft_target_{direction} bf16"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(job.compile().asm["cubin"])
    code = subprocess.run(
        [aot.BINARIES / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    per_thread = 1024 // 32 // job.num_warps  # elements, 8 of which make 16 bytes
    assert len(re.findall(r"LDG\.E\.128", code)) == 2 * per_thread // 8
    assert len(re.findall(r"STG\.E\.128", code)) == (per_thread // 8 if direction == "backward" else 0)


def test_columns_are_split_only_where_rows_do_not_fill_the_chip() -> None:
    assert launch.column_splits(1024, 1024, 264) == 1
    assert launch.column_splits(64, 64, 264) == 4
    assert launch.column_splits(1, 64, 264) == 64
    assert launch.column_splits(16, 16, 264) == 16  # 15 would take as long as 8
    for rows in (1, 3, 100, 263, 264, 300, 527):
        splits = launch.column_splits(rows, 64, 264)
        assert 1 <= splits <= 64
        assert rows * splits <= 16 * 264


@pytest.mark.parametrize("n", [256, 1000, 4096, 16384, 32768, 34000, 36000, 51000, 65536, 70000, 131072])
@pytest.mark.parametrize(("BLOCK_M", "slots"), [(128, 132), (64, 264)])
def test_splits_cost_little_more_than_the_best_number_of_them(n: int, BLOCK_M: int, slots: int) -> None:
    """The second of two rounds with few programs would take as long as the first: N = 34000 is just above one round."""
    row_blocks, tiles = -(-n // BLOCK_M), -(-n // 64)

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * -(-tiles // splits)

    assert time(launch.column_splits(row_blocks, tiles, slots)) <= 1.15 * min(map(time, range(1, tiles + 1)))
