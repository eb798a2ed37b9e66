"""Launches through the extension: the driver receives what Triton's own launcher gives it, byte by byte."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastkd import native
from tests.helpers.processes import ROOT, Forks

pytestmark = pytest.mark.slow
pytest.importorskip("triton")

# Every test runs in a process of its own, because PyTorch must not find the stub of libcuda.
PREAMBLE = """
import sys
from pathlib import Path
from unittest import mock
import torch
from fastkd import native
native.LIBRARY = Path(sys.argv[1])
from tests.host import stub_driver
stub = stub_driver.Stub(stub_driver.built(Path(sys.argv[2])))
stub_driver.activate(int(sys.argv[3]))
from fastkd.kernels import plans
from tests.host.kernels import arguments, every_kind_kernel as kernel
def raised(error, function):
    try:
        function()
    except error as caught:
        return str(caught)
    raise AssertionError(f"{error.__name__} was not raised")
def remembered(of=kernel):
    return plans._known[id(of)].plans
"""


Run = Callable[..., None]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    with Forks() as started:
        yield started


@pytest.fixture
def run(forks: Forks, tmp_path: Path) -> Run:
    """Runs a program after the preamble."""

    def run(program: str, library: Path, capability: int = 90, launcher: str = "native") -> None:
        arguments = str(library), str(tmp_path), str(capability)
        forks.run(PREAMBLE + program, *arguments, errors=tmp_path / "errors", FASTKD_LAUNCHER=launcher)

    return run


@pytest.mark.parametrize("capability", [80, 90])
def test_the_driver_receives_what_triton_gives_it(capability: int, run: Run, library: Path) -> None:
    run(
        """
rows = torch.zeros(80, 96, dtype=torch.bfloat16)
changes = [
    {}, {"n": 1}, {"n": 7}, {"n": -16}, {"n": 0}, {"n": 1 << 31}, {"plain": 1 << 40}, {"plain": 16}, {"offset": 3},
    {"factor": -2.5e-3}, {"is_last": False}, {"OUT": torch.zeros(64, dtype=torch.float64)},
    {"OUT": torch.zeros(65)[1:]}, {"WEIGHT": torch.ones(64)}, {"WEIGHT": torch.ones(65)[1:]}, {"num_warps": 1},
    {"PRECISION": "ieee"},
    {"ROWS": plans.Blocks(rows[:64, 64:], [16, 32])}, {"ROWS": plans.Blocks(rows[8:, :32], [16, 32])},
    {name: plans.Blocks(torch.zeros(64, 32), [16, 32]) for name in ("ROWS", "COLS")},
    {"BLOCK": 32, **{name: plans.Blocks(rows, [32, 64]) for name in ("ROWS", "COLS")}},
]
cases = [(grid, arguments(**change)) for change, grid in zip(changes, [(3, 2), (5,), (1, 2, 3)] * 7)]
for grid, given in cases:
    plans.launch(kernel, grid, **given)
for grid, given in cases:  # in turn, so that a plan that fits another case would show
    compiled = kernel[grid](**given)
    stub.expect(compiled)
    kernel[grid](**given)
    expected = stub.received()
    assert len(expected) > 200
    assert expected[:4] == grid[0].to_bytes(4, "little")
    for is_native in (True, False):
        launches = stub.launches
        stub.expect(compiled)
        with mock.patch.object(plans, "is_native", lambda: is_native), mock.patch.object(kernel, "run", None):
            plans.launch(kernel, grid, **given)
        assert stub.launches == launches + 1
        assert stub.received() == expected, (is_native, given)
assert len(kernel.device_caches[0][0]) > 12
""",
        library,
        capability,
    )


def test_a_tensor_map_is_made_once_for_each_address_and_layout(run: Run, library: Path) -> None:
    run(
        """
rows = torch.zeros(2, 64, 32, dtype=torch.bfloat16)
def encodes(base, shape=(16, 32)):
    before = stub.encodes
    assert remembered().launch((1,), arguments(ROWS=plans.Blocks(base, [16, 32]), COLS=plans.Blocks(rows[0], [16, 32])))
    return stub.encodes - before
plans.launch(kernel, (1,), **arguments())
assert encodes(rows[0]) == 1
assert encodes(rows[0]) == 0
assert encodes(rows[1]) == 1
assert encodes(rows[1][:32]) == 1
assert encodes(rows[0]) + encodes(rows[1]) == 0
""",
        library,
    )


def test_errors_of_the_driver_are_raised_with_its_text(run: Run, library: Path) -> None:
    run(
        """
given = arguments()
plans.launch(kernel, (1,), **given)
stub.answer(1)
assert "cuTensorMapEncodeTiled: invalid argument" in raised(RuntimeError, lambda: plans.launch(kernel, (1,), **given))
stub.answer(0)
plans.launch(kernel, (1,), **given)
stub.answer(2)
assert "cuLaunchKernelEx: another error" in raised(RuntimeError, lambda: plans.launch(kernel, (1,), **given))
""",
        library,
    )


def test_triton_launches_what_the_extension_does_not_cover(run: Run, library: Path) -> None:
    run(
        """
import triton
given = arguments()
plans.launch(kernel, (1,), **given)
assert remembered().launch((1,), given)
# What it has not met, or cannot tell apart.
for changes in ({"n": 1}, {"surplus": 1}, {"n": 1 << 70}, {"OUT": given["OUT"].to("meta")}, {"ROWS": given["OUT"]}):
    assert not remembered().launch((1,), {**given, **changes}), changes
misaligned = torch.zeros(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32)
assert not remembered().launch((1,), {**given, "ROWS": plans.Blocks(misaligned, [16, 32])})
assert not remembered().launch((1,), {key: value for key, value in given.items() if key != "n"})
# A profiler is told of every launch.
seen = []
triton.knobs.runtime.launch_enter_hook.add(seen.append)
plans.launch(kernel, (1,), **given)
triton.knobs.runtime.launch_enter_hook.remove(seen.append)
assert len(seen) == 1
plans.launch(kernel, (1,), **given)
assert len(seen) == 1
# Compiled code that needs more than its arguments.
for name, value in {"num_ctas": 2, "launch_pdl": True, "global_scratch_size": 128}.items():
    plans._known.clear()
    compiled = kernel[(1,)](**given)
    compiled.metadata, kept = compiled.metadata._replace(**{name: value}), compiled.metadata
    known = plans._first_met(kernel)
    plans._remember(known.plans, compiled, given)
    compiled.metadata = kept
    assert len(known.plans) == 0, name
    plans._remember(known.plans, compiled, given)
    assert len(known.plans) == 1
launches = stub.launches
assert known.plans.launch((4, 0), given)
assert stub.launches == launches, "an empty grid was launched"
# An argument that is not what was compiled.
slots = plans._slots({"n": "*fp32"}, None)
assert "n" in raised(TypeError, lambda: known.plans.add(given, None, 1, 4, 0, slots))
slots = plans._slots({"absent": "i32"}, None)
assert "absent" in raised(ValueError, lambda: known.plans.add(given, None, 1, 4, 0, slots))
assert plans._slots({"n": "fp16"}, None) is None
""",
        library,
    )


def test_a_thread_without_a_context_gets_one(run: Run, library: Path) -> None:
    run(
        """
import threading
given = arguments()
plans.launch(kernel, (1,), **given)
plans.launch(kernel, (1,), **given)
contexts = stub.contexts
thread = threading.Thread(target=remembered().launch, args=((1,), given))
thread.start()
thread.join()
assert stub.contexts == contexts + 1
assert remembered().launch((1,), given)
assert stub.contexts == contexts + 1
""",
        library,
    )


def test_statistics_are_launched_by_the_extension_the_second_time(run: Run, library: Path) -> None:
    run(
        """
from fastkd.kernels.dual_softmax import per_row
state, scale = torch.zeros(2, 6, 5), torch.tensor(1.0)
native.extension().use_stubs(True)
for weight in (None, torch.ones(5)):
    per_row.statistics(state, scale, weight, swapped=False, factors=(1.0, 0.5))
assert native.extension().counts() == (0, 0)
for weight in (None, torch.ones(5)):
    per_row.statistics(state, scale, weight, swapped=False, factors=(0.25, 2.0))
assert native.extension().counts() == (2, 0)
""",
        library,
    )


def test_triton_launches_unless_the_extension_is_asked_for(run: Run, library: Path) -> None:
    run(
        """
import os
assert "got 'fast'" in raised(ValueError, lambda: plans.launch(kernel, (1,), **arguments()))
del os.environ["FASTKD_LAUNCHER"]
native.extension().use_stubs(True)
for _ in range(2):
    plans.launch(kernel, (1,), **arguments())
assert native.extension().counts() == (0, 0)
assert stub.launches == 2
""",
        library,
        launcher="fast",
    )


def test_without_the_extension_triton_launches_after_a_warning(run: Run) -> None:
    run(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plans.launch(kernel, (1,), **arguments())
    plans.launch(kernel, (1,), **arguments())
assert ["make ext" in str(warning.message) for warning in caught] == [True]
assert stub.launches == 2
assert remembered() is None
""",
        native.LIBRARY.with_name("absent"),
    )


def test_the_ways_to_launch_can_be_measured() -> None:
    if shutil.which("cc") is None or native.extension() is None:
        pytest.skip("there is no C compiler, or no extension")
    command = [sys.executable, "-m", "tests.host.times", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(" us") == 12
