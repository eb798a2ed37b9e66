"""Random cases of every loss, module and backend against the float64 definition: ``make fuzz CASES=10000``.

A case that differs is shrunk and printed. The exit status is 1 if there was one. With ``--triton`` the kernels run too,
in Triton's interpreter, which needs TRITON_INTERPRET=1.
"""

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastkd.backends.blocked import gemm, sums, tiles
from fastkd.backends.blocked import multiscale_pool as pool
from fastkd.backends.blocked.dense import contrast as dense_contrast
from fastkd.backends.blocked.dense import dual_softmax as dense_dual_softmax
from fastkd.backends.blocked.dense import soft_target as dense_soft_target
from fastkd.numerics import accumulation_dtype
from tests.helpers.checks import TOLERANCES, assert_close, value_and_grads
from tests.robustness.cases import CASES, MODULES, ROWS, Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "every second")
# Limits by which the blocked backend chooses its ways, and what they may be in a case beside what they are.
LIMITS: dict[tuple[Any, str], tuple[float, ...]] = {
    (tiles, "MAX_ROWS"): (1, 3, 16),
    (tiles, "MIN_PARALLEL_ROWS"): (1, 9),
    (sums, "MAX_TRANSPOSED"): (2,),
    (sums, "BLOCK_ELEMENTS"): (1, 50),
    (sums, "MAX_PART"): (1, 5),
    (sums, "MAX_SHARED_SCALE"): (0.0,),
    (dense_dual_softmax, "MAX_SHARED_SCALE"): (0.0,),
    (dense_dual_softmax, "MAX_ROWS"): (0,),
    (dense_contrast, "MAX_ELEMENTS"): (0,),
    (dense_soft_target, "MAX_ELEMENTS"): (0,),
    (gemm, "MIN_LINEAR"): (0, 1 << 62),
    (pool, "BLOCK_ELEMENTS"): (1, 100),
    (pool, "MATRIX_ELEMENTS"): (0, 300),
    (pool, "LONG_SUM"): (1, 20),
}
ROUNDINGS = 8  # how many roundings of the largest intermediate value a result may keep where the terms cancel


@st.composite
def plans(draw: st.DrawFn, backends: Sequence[str]) -> Plan:
    backend = draw(st.sampled_from(backends))
    most = 40 if backend == "triton" else 150
    side = st.one_of(st.integers(1, 12), st.integers(1, most))
    # The kernels compute no float64, and the interpreter multiplies bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if backend == "triton" else DTYPES
    return Plan(
        n=draw(side), N=draw(side), D=draw(side), seed=draw(st.integers(0, 9999)), dtype=draw(st.sampled_from(dtypes)),
        backend=backend, scale=10 ** (draw(st.integers(-20, 30)) / 10), rows=draw(st.sampled_from(ROWS)),
        is_weighted=draw(st.booleans()), layout=draw(st.sampled_from(LAYOUTS)), threads=draw(st.integers(1, 4)),
        limits=tuple(draw(st.sampled_from((None, *values))) for values in LIMITS.values()),
        option=draw(st.integers(0, 99)),
    )  # fmt: skip


@contextlib.contextmanager
def limited(plan: Plan) -> Iterator[None]:
    """Within it the blocked backend has the threads and the limits of the plan."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patches:
        for (module, name), value in zip(LIMITS, plan.limits, strict=True):
            if value is not None:
                if name == "MAX_ROWS" and value:  # eight tiles a side say as much as a hundred
                    value = max(value, max(plan.n, plan.N) // 8)
                patches.setattr(module, name, value)
        torch.set_num_threads(plan.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides, differentiably."""
    if x.ndim == 4 and layout == "transposed":
        return x.contiguous(memory_format=torch.channels_last)
    if x.ndim < 2 or layout == "contiguous":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        return F.pad(x, (1, 2))[..., 1:-2]
    return torch.stack([x, x], dim=1).flatten(0, 1)[::2]


def check(name: str, plan: Plan) -> None:
    """The case of a plan against the definition, by the suite's one comparison."""
    case, natural = CASES[name](name, plan)
    dtype, accumulation = plan.dtype, accumulation_dtype(plan.dtype)
    exact, low = case.exact(), case.results("reference")
    is_rounded = case.is_unit and plan.backend == "triton"
    if is_rounded:  # the kernels multiply unit rows in the inputs' dtype
        units = [F.normalize(x.float(), dim=1).to(x.dtype) if x.ndim == 2 else x for x in case.inputs]
        low = case.results("reference", *units)
    given = [x.clone() for x in case.inputs]
    with limited(plan):
        actual = value_and_grads(
            lambda *x: case.compute(plan.backend, *(laid_out(part, plan.layout) for part in x)), *given
        )
    assert all(torch.equal(x, y) for x, y in zip(given, case.inputs, strict=True)), "an input was changed"
    is_module = name in MODULES
    of_loss = dtype if is_rounded or is_module else accumulation
    for place, (a, e, of_torch, size) in enumerate(zip(actual, exact, low, natural, strict=True)):
        judged = of_loss if place == 0 else dtype
        rounding = torch.finfo(dtype if is_rounded or is_module else accumulation).eps
        floor = max(1e-5, ROUNDINGS * rounding / TOLERANCES[judged] * size)
        try:
            assert_close(a, e, judged, of_torch, floor)
        except AssertionError as error:
            what = "the loss" if place == 0 else f"the gradient of input {place - 1}"
            raise AssertionError(f"{what}: {error} (floor {floor:.3g})") from None


def fuzz(name: str, cases: int, seed: int, backends: Sequence[str]) -> tuple[int, Plan | None, str]:
    """How many cases were tried, the smallest plan that differs, and how."""
    tried, found, how = 0, None, ""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    @hypothesis.given(plan=plans(backends))
    def run(plan: Plan) -> None:
        nonlocal tried, found, how
        tried += 1
        try:
            check(name, plan)
        except Exception as error:
            found, how = plan, f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                how += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
            raise

    with contextlib.suppress(Exception):
        run()
    return tried, found, how


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of all losses together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--triton", action="store_true", help="also run the kernels in Triton's interpreter")
    options = parser.parse_args(arguments)
    backends = ("blocked", "blocked", "blocked", "reference", *(("triton",) if options.triton else ()))
    total, failed = 0, 0
    for place, name in enumerate(options.losses):
        each = (options.cases + place) // len(options.losses)
        started = time.perf_counter()
        tried, found, how = fuzz(name, max(1, each), options.seed, backends) if each or place == 0 else (0, None, "")
        total, failed = total + tried, failed + (found is not None)
        state = "ok" if found is None else f"DIFFERS\n  {how}\n  {found}"
        print(f"{name:24} {tried:6} cases {time.perf_counter() - started:7.1f} s  {state}", flush=True)
    print(f"{total} cases of {len(options.losses)} losses, {failed} of which differ from the definition")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
