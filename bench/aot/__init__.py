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

import os
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "aot"))
