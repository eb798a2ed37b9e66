"""Compiles one kernel ahead of time and reads its registers, spills and instructions."""

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from fastkd.kernels.launch import Entry, LaunchConfig, column_splits
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that a program may use, then bytes and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_TOTAL = {"sm_80": 102400, "sm_90": 233472, "sm_100": 233472, "gfx942": 65536}
REGISTERS = 65536
SHARED_RESERVED = 1024  # by the driver, per program
# The model of an H100 or H200, see the docstring of bench.aot.
MULTIPROCESSORS, GIGAHERTZ = 132, 1.7
L2_BYTES = 5.5e12 / MULTIPROCESSORS / (GIGAHERTZ * 1e9)  # per clock and multiprocessor
COPY_LATENCY = 1000  # clocks until what the copy engine was asked for lies in shared memory


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
    maxnreg: int | None = None
    ctas_per_sm: int = 1
    matrix_dtype: str = ""  # of the kernels that multiply

    def compile(self) -> Any:
        names = self.kernel.arg_names
        signature = {name: self.types.get(name) or _type(name) for name in names}
        signature |= dict.fromkeys(self.constants, "constexpr")
        aligned = {
            (parameter.num,): [["tt.divisibility", 16]]
            for parameter in self.kernel.params
            if signature[parameter.name][0] == "*" and not parameter.do_not_specialize_on_alignment
        }
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        source = ASTSource(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options |= {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return triton.compile(source, target=TARGETS[self.hardware], options=options)

    def compile_with_log(self) -> tuple[Any, str]:
        """The compiled kernel, and what ptxas said of it, which Triton's cache does not keep."""
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


def _type(name: str) -> str:
    return "*fp32" if name.isupper() and len(name) > 1 else "i32"


def launched(config: LaunchConfig) -> dict[str, Any]:
    """An entry's config as the fields of a Job."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "ctas_per_sm": config.ctas_per_sm}


def streamed(config: LaunchConfig) -> dict[str, Any]:
    """The same for the streaming kernels, whose registers the launch limits."""
    return launched(config) | {"maxnreg": config.maxnreg}


def dtypes_and_widths(hardware: str, entry: Entry) -> Iterator[tuple[str, int, bool]]:
    """(dtype, padded D, whether only the commonest flags are compiled) of the rows that get a streaming entry."""
    dtype = "bf16" if entry.itemsize == 2 else "fp32"
    yield dtype, entry.width, False
    if hardware == "sm_90" and entry.itemsize == 2:
        yield "fp16", entry.width, True
    if hardware == "sm_90" and entry.width == 64:
        yield dtype, 16, True


@dataclass
class Result:
    job: Job
    registers: int = 0
    spills: int = 0  # registers that are stored in and loaded from local memory, and those that always lie there
    shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # instructions of the main loop, or of all if there is none
    hgmma_bytes: int = 0  # read from shared memory by a warpgroup's matrix instructions, in the main loop
    shared_clocks: int = 0  # of shared memory for the other loads and stores of a warp, in the main loop
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


def examine(job: Job, instructions: bool = True) -> Result:
    """What the compilers made of a job. Without ``instructions`` none are counted, and nothing is disassembled.

    What ``failures`` needs is in the log and in the PTX code too. To disassemble takes half as long as to compile.
    """
    compiled, log = job.compile_with_log()
    result = Result(job=job, shared=compiled.metadata.shared, log=log)
    if job.hardware == "gfx942":
        _read_gcn(compiled.asm["amdgcn"], result)
        return result
    result.registers, result.spills = _read_log(log)
    result.has_hgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    if instructions:
        _read_sass(compiled.asm["cubin"], result)
    return result


def _read_log(log: str) -> tuple[int, int]:
    """Registers of a thread, and how many of them it keeps in local memory, from what ptxas said."""
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert used, log
    assert stack, log
    return int(used[1]), -(-sum(map(int, stack.groups())) // 4)


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
        command = [str(BINARIES / "cuobjdump"), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text)
    code = [(int(address, 16), operation, operands) for address, operation, operands in lines]
    loop = _main_loop(code)
    result.counts = Counter({"all": len(loop)})
    for operation, operands in loop:
        result.counts[_kind(operation)] += 1
        if operation.split(".")[0] in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            result.shared_clocks += 4 if ".128" in operation or ".4" in operation else 2 if ".64" in operation else 1
        shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", operation)
        if shape:
            n, k = int(shape[1]), int(shape[2])
            a_is_shared = re.match(r"\s*R\d+,\s*gdesc", operands) is not None
            result.hgmma_bytes += (n + 64 * a_is_shared) * k * (4 if "TF32" in operation else 2)


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
    """Clocks of one multiprocessor per tile, by unit (sm_90)."""
    job, counts, warps = result.job, result.counts, result.job.num_warps
    M, N = job.constants["BLOCK_M"], job.constants["BLOCK_N"]
    columns = [kind for name, kind in job.types.items() if name in ("A_cols", "B_cols", "COLS")]
    D = int(re.findall(r"\d+", columns[0])[-1])
    rate = 2048 if job.matrix_dtype == "fp32" else 4096
    # One product with every operand of the columns, and one more per gradient.
    gradients = sum(job.constants.get(name, 0) for name in ("NEED_A", "NEED_B"))
    products = len(columns) + (gradients or "BY_ROW" in job.constants)
    itemsize = 4 if job.matrix_dtype == "fp32" else 2
    loaded = len(columns) * N * D * itemsize
    if "NEED_A" in job.constants:
        loaded += N * (16 if job.constants["BOUNDED"] else 32)  # COEF
    units = {
        "matrix": products * 2 * M * N * D / rate,
        "exp": (counts["exp"] + counts["mufu"]) * warps * 32 / 16,
        "issue": counts["all"] * warps / 4,
        "shared": (result.hgmma_bytes * warps / 4 + loaded) / 128 + result.shared_clocks * warps,
        "L2": loaded / L2_BYTES,
    }
    bound = max(units.values())
    # With two stages the copy of the next tile starts when this one is done; another program may compute meanwhile.
    waits = max(0, COPY_LATENCY - (job.num_stages - 2) * bound)
    work = units["matrix"] + max(units["exp"], units["issue"])
    serial = max(work, (work + waits) / job.ctas_per_sm)
    return units | {"bound": bound, "serial": max(bound, serial)}


def milliseconds(result: Result, N: int) -> tuple[float, float]:
    """The predicted time of a streaming kernel over N rows and columns, by ``bound`` and by ``serial``."""
    job = result.job
    row_blocks, tiles = -(-N // job.constants["BLOCK_M"]), -(-N // job.constants["BLOCK_N"])
    slots = MULTIPROCESSORS * job.ctas_per_sm
    splits = column_splits(row_blocks, tiles, slots)
    visited = -(-row_blocks * splits // slots) * job.ctas_per_sm * -(-tiles // splits)  # by one multiprocessor
    found = clocks(result)
    return tuple(visited * found[name] / (GIGAHERTZ * 1e6) for name in ("bound", "serial"))
