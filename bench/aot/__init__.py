"""Compiles every kernel at every entry of the launch table, without a GPU, and reads what the compiler made of it.

    python -m bench.aot [--hardware sm_90 ...] [--only 'dual_softmax_backward bf16 D=128']

Fails on a spill, on matrix instructions that ptxas serialises, on more shared memory than the hardware has, on an entry
whose ``ctas_per_sm`` cannot be resident, and on a 16-bit matrix kernel for sm_90 without warpgroup matrix instructions.
fp16, D = 16 and some rarer flags are compiled for sm_90 alone.

Prints a table. For sm_90 it also has what one tile costs in the main loop, in clocks of one multiprocessor, under this
model. Per clock, the matrix units do 4096 bf16 (2048 tf32) operations, MUFU serves 16 lanes, each of 4 schedulers
issues one warp instruction (fp32 included), shared memory moves 128 bytes, and the L2 cache 24.5 (5.5 TB/s in all, at
1.7 GHz). Shared memory is read by HGMMA for every operand that is not in registers, written by the copy engine, and
read and written by the other instructions, 4 bytes per lane and clock. ``bound`` is the largest of these: the time of a
tile if everything overlaps. ``limit`` is the matrix time over ``bound``. ``serial`` is matrix plus vector time, as if
these never overlapped, and what is exposed of the copy engine's latency, which is taken to be 1000 clocks. With two
stages a copy starts when the tile before it is done, and with every further stage a tile earlier. Other resident
programs compute while one waits for a copy.

The last lines are the times that follow for DCD and InfoNCE of N = 32768 rows, D = 128, bf16, where their kernels were
compiled for sm_90: by ``bound``, by ``serial``, and the mean of both, which is a guess.
"""

import os
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "aot"))
