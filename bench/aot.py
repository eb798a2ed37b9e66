"""Compiles every kernel at every entry of the launch table, without a GPU, and reads what the compiler made of it.

    python -m bench.aot [--hardware sm_90 ...]

Fails on a spill, on matrix instructions that ptxas serialises, on more shared memory than the hardware has, on an entry
whose ``ctas_per_sm`` cannot be resident, and on a 16-bit matrix kernel for sm_90 without warpgroup matrix instructions.
fp16, D = 16 and some rarer flags are compiled for sm_90 alone. Prints a table; for sm_90 also what a tile costs
in the main loop, in clocks of one multiprocessor, under this model: matrix units 4096 bf16 (2048 tf32) operations a
clock; MUFU 16 lanes a clock; 4 schedulers that issue one warp instruction a clock each, fp32 included; shared memory
128 bytes a clock, read by HGMMA for every operand that is not in registers and written by the copy engine; L2 cache 32
bytes a clock a multiprocessor (7 TB/s in all). ``bound`` is the largest of these, the time of a tile if everything
overlaps, and ``limit`` the matrix time over it; ``serial`` is matrix plus vector time, as if nothing did.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "aot"))

import triton
from fastkd.kernels import dual_softmax, dual_softmax_rows, dual_softmax_wide, launch, normalize, soft_target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import aot_pool

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a program may use, and bytes and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_TOTAL = {"sm_80": 102400, "sm_90": 233472, "sm_100": 233472, "gfx942": 65536}
REGISTERS = 65536
SHARED_RESERVED = 1024  # a program, by the driver


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, its constants and argument types, and how it is launched."""

    name: str
    hardware: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    num_warps: int = 4
    num_stages: int = 3  # Triton's own default, for launches that do not say
    ctas_per_sm: int = 1
    matrix_dtype: str = ""  # of the kernels that multiply

    def compile(self) -> Any:
        names = self.kernel.arg_names
        signature = {name: self.types.get(name) or _type(name) for name in names}
        signature |= dict.fromkeys(self.constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=TARGETS[self.hardware], options=options)

    def compile_with_log(self) -> tuple[Any, str]:
        """Also what ptxas said of it, which Triton's cache does not keep."""
        if self.hardware == "gfx942":
            return self.compile(), ""
        text = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(text):
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = self.compile()
            log = Path(os.environ["TRITON_CACHE_DIR"]) / f"{compiled.hash}.log"
            if not text.getvalue() and not log.exists():
                with triton.knobs.compilation.scope():
                    triton.knobs.compilation.always_compile = True
                    compiled = self.compile()
        if text.getvalue():
            log.write_text(text.getvalue())
        return compiled, log.read_text()


_SOFT_TARGET_TYPES = {"X": "*bf16", "LABELS": "*i64", "C": "i32", "temperature": "fp32", "smoothing": "fp32"}


def _type(name: str) -> str:
    return "*fp32" if name.isupper() and len(name) > 1 else "i32"


@dataclass
class Result:
    job: Job
    registers: int = 0
    spills: int = 0
    shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # instructions of the main loop, or of all if there is none
    hgmma_bytes: int = 0  # read from shared memory by a warpgroup's matrix instructions, in the main loop
    has_hgmma: bool = False
    log: str = ""  # of ptxas

    def failures(self) -> list[str]:
        hardware, wanted = self.job.hardware, self.job.ctas_per_sm
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if "serialized" in self.log:
            found.append("matrix instructions are serialized")
        if self.shared > SHARED_LIMIT[hardware]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[hardware]}")
        if hardware != "gfx942":
            granted = -(-self.registers // 8) * 8 * self.job.num_warps * 32
            resident = min(REGISTERS // granted, SHARED_TOTAL[hardware] // (self.shared + SHARED_RESERVED))
            if resident < wanted:
                found.append(f"{resident} programs resident, the table says {wanted}")
        if hardware == "sm_90" and self.job.matrix_dtype in ("bf16", "fp16") and not self.has_hgmma:
            found.append("no HGMMA")
        return found


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
    from bench import aot_contrast  # which needs Job

    yield from aot_contrast.jobs(hardware)


def _uses(hardware: str, itemsize: int, block_d: int) -> Iterator[tuple[str, int, bool]]:
    """(dtype, padded D, whether only the commonest flags are compiled) that get an entry of the launch table."""
    dtype = "bf16" if itemsize == 2 else "fp32"
    yield dtype, block_d, False
    if hardware == "sm_90" and itemsize == 2:
        yield "fp16", block_d, True
    if hardware == "sm_90" and block_d == 64:
        yield dtype, 16, True


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


def examine(job: Job) -> Result:
    compiled, log = job.compile_with_log()
    result = Result(job=job, shared=compiled.metadata.shared, log=log)
    if job.hardware == "gfx942":
        _read_gcn(compiled.asm["amdgcn"], result)
    else:
        _read_sass(compiled.asm["cubin"], result)
    return result


def _read_gcn(text: str, result: Result) -> None:
    keys = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {key: int(value) for key, value in re.findall(rf"\.({keys}):\s+(\d+)", text)}
    result.registers = numbers.pop("vgpr_count")
    result.spills = sum(numbers.values())
    operations = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    result.counts = Counter(
        {
            "matrix": sum(x.startswith("v_mfma") for x in operations),
            "exp": sum(x.startswith("v_exp_f32") for x in operations),
            "fp32": sum(re.match(r"v_(pk_)?(add|sub|mul|fma|fmac)_f32", x) is not None for x in operations),
            "all": len(operations),
        }
    )


def _read_sass(cubin: bytes, result: Result) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        text = _cuobjdump("-sass", file.name)
    match = re.search(r"REG:(\d+)", usage)
    assert match, usage
    result.registers = int(match[1])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text)
    code = [(int(address, 16), operation, operands) for address, operation, operands in lines]
    result.spills = sum(operation.split(".")[0] in ("LDL", "STL") for _, operation, _ in code)
    result.has_hgmma = any(operation.startswith("HGMMA") for _, operation, _ in code)
    loop = _main_loop(code)
    result.counts = Counter({"all": len(loop)})
    for operation, operands in loop:
        result.counts[_kind(operation)] += 1
        shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", operation)
        if shape:
            n, k = int(shape[1]), int(shape[2])
            a_is_shared = re.match(r"\s*R\d+,\s*gdesc", operands) is not None
            result.hgmma_bytes += (n + 64 * a_is_shared) * k * (4 if "TF32" in operation else 2)


def _cuobjdump(option: str, path: str) -> str:
    command = [str(BINARIES / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _kind(operation: str) -> str:
    base = operation.split(".")[0]
    if "MMA" in base:
        return "matrix"
    if base == "MUFU":
        return "exp" if operation == "MUFU.EX2" else "mufu"
    if base in ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"):
        return "fp32"
    return base


def _main_loop(code: list[tuple[int, str, str]]) -> list[tuple[str, str]]:
    """The shortest loop that holds matrix and exponential instructions: the edge loop, which compares, is longer."""
    everything = [(operation, operands) for _, operation, operands in code]
    best = everything
    for address, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [(x, y) for at, x, y in code if int(target[1], 16) <= at <= address]
        kinds = {_kind(x) for x, _ in body}
        if {"matrix", "exp"} <= kinds and len(body) < len(best):
            best = body
    return best


def clocks(result: Result) -> dict[str, float]:
    """Clocks of one multiprocessor a tile, by unit (sm_90)."""
    job, counts, warps = result.job, result.counts, result.job.num_warps
    M, N = job.constants["BLOCK_M"], job.constants["BLOCK_N"]
    columns = [kind for name, kind in job.types.items() if name in ("A_cols", "B_cols", "COLS")]
    D = int(re.findall(r"\d+", columns[0])[-1])
    rate = 2048 if job.matrix_dtype == "fp32" else 4096
    # One with every operand of the columns, and one more a gradient.
    gradients = sum(job.constants.get(name, 0) for name in ("NEED_A", "NEED_B"))
    products = len(columns) + (gradients or "BY_ROW" in job.constants)
    itemsize = 4 if job.matrix_dtype == "fp32" else 2
    loaded = len(columns) * N * D * itemsize
    units = {
        "matrix": products * 2 * M * N * D / rate,
        "exp": (counts["exp"] + counts["mufu"]) * warps * 32 / 16,
        "issue": counts["all"] * warps / 4,
        "shared": (result.hgmma_bytes * warps / 4 + loaded) / 128,
        "L2": loaded / 32,
    }
    bound = max(units.values())
    return units | {"bound": bound, "serial": units["matrix"] + max(units["exp"], units["issue"])}


def row(result: Result) -> str:
    job, counts = result.job, result.counts
    tile = "x".join(str(job.constants[x]) for x in ("BLOCK_M", "BLOCK_N") if x in job.constants)
    line = (
        f"{job.hardware:7}{job.name:50}{tile:>9}{job.num_warps:>3}w{job.num_stages:>2}s{result.registers:>5}"
        f"{result.spills:>5}{result.shared:>8}{counts['matrix']:>5}{counts['exp']:>5}{counts['fp32']:>6}{counts['all']:>6}"
    )
    if job.hardware == "sm_90" and job.matrix_dtype:
        c = clocks(result)
        line += "".join(f"{c[x]:>7.0f}" for x in ("matrix", "exp", "issue", "shared", "L2", "bound", "serial"))
        line += f"{c['matrix'] / c['bound']:>6.0%}"
    return line


HEADER = (
    f"{'target':7}{'kernel':50}{'tile':>9}{'warps':>4}{'st':>3}{'regs':>5}{'spill':>5}{'shared':>8}{'mma':>5}{'ex2':>5}"
    f"{'fp32':>6}{'all':>6}{'matrix':>7}{'exp':>7}{'issue':>7}{'shared':>7}{'L2':>7}{'bound':>7}{'serial':>7}{'limit':>6}"
)


def run(hardware: list[str], workers: int, select: Callable[[list[Job]], list[int]] | None = None) -> int:
    """Compiles all jobs, or those of the numbers that ``select`` names; prints the table, returns how many failed."""
    everything = [job for name in hardware for job in jobs(name)]
    chosen = range(len(everything)) if select is None else select(everything)
    work = [everything[index] for index in chosen]
    print(HEADER)
    failed = []
    with ProcessPoolExecutor(workers) as pool:
        tasks = ((hardware, index) for index in chosen)
        for job, measured in zip(work, pool.map(_measure, tasks), strict=True):
            result = Result(job=job, **measured)
            print(row(result), flush=True)
            failed += [f"{job.hardware} {job.name}: {failure}" for failure in result.failures()]
    for line in failed:
        print("FAILED", line)
    print(f"{len(work)} kernels compiled, {len(failed)} failures")
    return len(failed)


def _measure(task: tuple[list[str], int]) -> dict[str, Any]:
    """What :func:`examine` found, by the job's number: kernels do not travel between processes."""
    hardware, index = task
    fields = vars(examine([job for name in hardware for job in jobs(name)][index]))
    del fields["job"]
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    sys.exit(run(options.hardware, options.workers) > 0)


if __name__ == "__main__":
    main()
