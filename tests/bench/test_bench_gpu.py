"""The GPU benchmark's whole path on the CPU with tiny sizes, and the tuner's search space and output."""

import csv
import dataclasses
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_report, measure, providers, report
from tests.helpers.checks import TOLERANCES

pytest.importorskip("triton")
from fastkd.kernels import launch
from fastkd.kernels.launch import LaunchConfig

from bench import tune
from bench.aot import compile as aot


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with tiny sizes."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    try:
        assert gpu.main(["--device", "cpu", "--quick", "--output", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


CASE = gpu.Case("dcd_loss", torch.float32, 8, 4)


def a_run() -> gpu.Run:
    return gpu.Run(torch.device("cpu"), True, math.inf)


def rows_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("gpu-*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_provider_of_every_case_has_a_row_with_numbers_or_a_reason(quick: Path) -> None:
    rows = rows_of(quick)
    seen = {(row["case"], row["provider"]) for row in rows}
    assert seen == {(case, name) for case, names in providers.GPU_PROVIDERS.items() for name in names}
    reasons = ("not installed", "unsupported: backend: 'triton'", "skipped: torch.compile")
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith(reasons), row
        assert bool(row["median_ms"]) == (row["status"] == "ok")


@pytest.mark.slow
def test_every_provider_computes_the_same_loss(quick: Path) -> None:
    measured = [row for row in rows_of(quick) if row["status"] == "ok"]
    assert {row["provider"] for row in measured} >= {"eager fp32", "eager bf16 autocast", "fastkd blocked"}
    for row in measured:
        is_exact = row["dtype"] == "float32" and "bf16" not in row["provider"]
        tolerance = TOLERANCES[torch.float32 if is_exact else torch.bfloat16]
        assert float(row["loss_error"]) <= tolerance, row
        assert float(row["grad_error"]) <= tolerance, row


@pytest.mark.slow
def test_the_table_names_hardware_versions_command_ceilings_and_peers(quick: Path) -> None:
    (path,) = quick.glob("gpu-*.md")
    text = path.read_text()
    assert "--device cpu --quick" in text
    assert f"torch {torch.__version__}" in text
    assert "copy" in text
    assert "TFLOP/s" in text
    assert all(f"{peer} " in text for peer in providers.PEERS)
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--seconds", "0", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} == {"skipped: no time left"}
    assert {row["case"] for row in rows} == set(providers.GPU_PROVIDERS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_everything_measured_so_far(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, seen, median_ms, handler = [], [], measure.median_ms, signal.getsignal(number)

    def then_a_signal(*args: object) -> float:
        calls.append(1)
        if len(calls) == 8:  # of the second case: the ceilings are two, the first case has three providers on a CPU
            seen.extend(rows_of(tmp_path))
            os.kill(os.getpid(), number)
        return median_ms(*args)

    monkeypatch.setattr(measure, "median_ms", then_a_signal)
    arguments = ["--device", "cpu", "--quick", "--cases", "dcd_loss", "clip_loss", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 128 + number
    assert {row["n"] for row in seen} == {"16"}
    assert sum(row["status"] == "ok" for row in seen) == 3
    rows = rows_of(tmp_path)
    assert rows[: len(seen)] == seen
    assert {row["case"] for row in rows} == {"dcd_loss", "clip_loss"}
    assert sum(row["status"] == "ok" for row in rows) == 5
    assert rows[-1]["status"] == f"skipped: interrupted by {number.name}"
    assert all(list(tmp_path.glob(f"*.{suffix}")) for suffix in ("md", "png"))
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize("call", [1, 3])
def test_a_signal_before_the_first_number_leaves_earlier_results_alone(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def a_signal(*args: object) -> float:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    monkeypatch.setattr(measure, "median_ms", a_signal)
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert "interrupted before the first number" in capsys.readouterr().out


def test_after_a_failed_capture_nothing_is_captured_and_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def fail(*args: object) -> float:
        captured.append(1)
        raise measure.CaptureError("RuntimeError: not while capturing")

    monkeypatch.setattr(measure, "graph_ms", fail)
    run = a_run()
    rows = [
        gpu.measure_provider(CASE, name, run, None) for name in ("fastkd blocked", "eager fp32", "eager bf16 autocast")
    ]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [row["note"] for row in rows] == [
        "",
        "no graph: RuntimeError: not while capturing",
        "no graph after the failed one of eager fp32, dcd_loss float32 8 4",
    ]
    assert len(captured) == 1


def test_a_graph_is_captured_only_of_few_launches_and_of_work_that_they_count_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "graph_ms", lambda *args: 1.0)
    assert gpu.measure_provider(CASE, "eager fp32", a_run(), None)["graph_ms"] == 1.0
    monkeypatch.setattr(measure, "host_ms", lambda *args: 2 * gpu.GRAPH_HOST_MS)
    row = gpu.measure_provider(CASE, "eager fp32", a_run(), None)
    assert (row["host_ms"], row["graph_ms"]) == (2 * gpu.GRAPH_HOST_MS, None)
    names = [name for case in providers.GPU_PROVIDERS.values() for name in case if name.startswith(providers.CAPTURED)]
    assert not any(name.startswith(("fastkd blocked", *providers.PEERS)) for name in names)
    assert gpu.Case("ce_kd_terms", torch.bfloat16, 8192, 128 * 1024).elements > gpu.GRAPH_ELEMENTS
    assert gpu.Case("dcd_loss", torch.bfloat16, 8192, 128).elements <= gpu.GRAPH_ELEMENTS


def test_the_time_to_launch_and_the_time_in_a_graph_stand_beside_the_median() -> None:
    numbers = dict.fromkeys(gpu_report.NUMBERS) | {"median_ms": 0.5, "host_ms": 0.45, "graph_ms": 0.0625}
    row = {**CASE.key(), "provider": "eager fp32", "status": "ok", "note": "", **numbers}
    report.add_ratios([row], gpu_report.GROUP, "eager fp32")
    lines = gpu_report._table("dcd_loss", "float32", [row])
    assert "| median ms | host ms | graph ms |" in lines[2]
    assert "| 0.5 | 0.45 | 0.0625 |" in lines[4]


def test_releasing_memory_survives_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    measure.release(torch.device("cuda"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (ImportError("No module named 'inf_cl'"), "not installed: No module named 'inf_cl'"),
        (RuntimeError("first\nsecond"), "failed: RuntimeError: first"),
    ],
)
def test_a_provider_that_fails_is_a_row_and_not_the_end(
    error: Exception, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> providers.Loss:
        raise error

    monkeypatch.setitem(providers.GPU_PROVIDERS["dcd_loss"], "inf-cl", fail)
    row = gpu.measure_provider(CASE, "inf-cl", a_run(), None)
    assert row["status"] == status
    assert all(row[name] is None for name in gpu_report.NUMBERS)


def test_the_issues_sizes_are_all_in_the_plan_once() -> None:
    plan = list(gpu.cases(False))
    assert len(plan) == len({tuple(case.key().values()) for case in plan})
    for dtype, n, d in itertools.product(
        (torch.bfloat16, torch.float32), [2**k for k in range(8, 17)], (64, 128, 256, 512)
    ):
        assert any((x.name, x.dtype, x.n, x.d) == ("dcd_loss", dtype, n, d) for x in plan)
    assert any((x.name, x.d) == ("ce_kd_terms", 128 * 1024) for x in plan)
    for dtype, name, side in itertools.product((torch.bfloat16, torch.float32), providers.POOLS, (7, 56)):
        own = [x for x in plan if (x.dtype, x.name, x.side) == (dtype, name, side)]
        assert any(x.elements * dtype.itemsize > 50e6 for x in own)  # beyond an L2 cache
        assert side == 56 or any((x.n, x.d) == (256, 512) for x in own)


@pytest.mark.parametrize("name", providers.POOLS)
def test_pooling_reads_maps_in_their_format_and_moves_maps_and_rows(name: str) -> None:
    case = gpu.Case(name, torch.bfloat16, 2, 16, side=7)
    features, grad = case.inputs(torch.device("cpu"))
    assert features.is_contiguous(memory_format=torch.channels_last) == ("nhwc" in name)
    assert grad.shape == (2, 1 + 16 + 36, 16)
    out = providers.GPU_PROVIDERS[name]["eager"]()(features, grad)
    is_unit = torch.allclose(out.float().norm(dim=2), torch.ones(2, 53), atol=1e-2)
    assert is_unit == ("unit" in name)
    assert case.bytes_moved() == 2 * 2 * 16 * (2 * 49 + (3 if is_unit else 2) * 53)


@pytest.mark.slow
def test_the_share_of_the_copy_bandwidth_stands_in_the_table(quick: Path) -> None:
    measured = [row for row in rows_of(quick) if row["case"] in providers.MEMORY_BOUND and row["status"] == "ok"]
    assert {row["case"] for row in measured} == providers.MEMORY_BOUND
    for row in measured:
        assert float(row["gb_per_s"]) > 0
        assert float(row["of_copy"]) > 0
    (path,) = quick.glob("gpu-*.md")
    lines = path.read_text().splitlines()
    table = lines[lines.index("## multiscale_pool_nhwc_unit, bfloat16 inputs") :]
    assert table[2].startswith("| N | C x H x W | provider |")
    assert table[2].endswith("| GB/s | of copy |")
    assert table[4].startswith("| 2 | 20 x 7 x 7 | ")


def test_ratios_are_against_the_baseline_of_the_same_size() -> None:
    def row(provider: str, n: int, ms: float | None, mib: float | None) -> dict[str, object]:
        return {"provider": provider, "n": n, "median_ms": ms, "peak_extra_mib": mib}

    rows = [row("eager", 8, 6.0, 10.0), row("ours", 8, 2.0, 1.0), row("ours", 16, 3.0, 1.0), row("lost", 8, None, None)]
    report.add_ratios(rows, ("n",), "eager")
    assert [x["speedup"] for x in rows] == [1.0, 3.0, None, None]
    assert [x["memory_ratio"] for x in rows] == [1.0, 0.1, None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without a GPU")
@pytest.mark.parametrize("module", [gpu, tune])
def test_a_machine_without_a_gpu_gets_a_message(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main([]) == 2
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err


def test_medians_are_of_at_least_three_calls() -> None:
    calls = []
    assert measure.median_ms(lambda: calls.append(1), torch.device("cpu"), 0.0) >= 0
    assert len(calls) == 4


KERNELS = (*tune.DUAL, *tune.SOFT)


def entry_of(pattern: str) -> tune.Entry:
    ((entry, _),) = tune.plan("sm_90", [pattern])
    return entry


def test_the_search_space_starts_with_the_current_entry_and_has_no_repeats() -> None:
    found = dict(tune.entries("sm_90", KERNELS))
    assert {entry.key for entry in found} == {key for key in launch.TABLE["sm_90"] if key.kernel in KERNELS}
    for entry, current in found.items():
        space = tune.candidates(entry, current)
        assert space[0] == current
        assert len(space) > 5
        assert len({dataclasses.replace(x, ctas_per_sm=1) for x in space}) == len(space)
        if entry.kernel == "soft_target_forward" and current.BLOCK_N > 1024 and entry.key.width:
            assert {x.BLOCK_N for x in space} == {current.BLOCK_N}


def test_exchanging_an_entry_reaches_the_launcher_and_is_undone() -> None:
    config = LaunchConfig(16, 16, 4, 1)
    dual, soft = entry_of("dual_softmax_backward:2:128:online"), entry_of("soft_target_forward:2:1024:5")
    options = {"dtype": torch.bfloat16, "width": 128, "hardware": "sm_90"}
    before = launch.launch_config("dual_softmax_backward", bounded=False, **options)
    with tune.table_with("sm_90", dual, config), tune.table_with("sm_90", soft, LaunchConfig(2, 1024, 4, 1)):
        assert launch.launch_config("dual_softmax_backward", bounded=False, **options) == config
        assert launch.launch_config("dual_softmax_backward", bounded=True, **options) != config
        assert launch.launch_config("soft_target_forward", width=1000, hardware="sm_90").num_warps == 4
    assert launch.launch_config("dual_softmax_backward", bounded=False, **options) == before
    assert launch.launch_config("soft_target_forward", width=1000, hardware="sm_90").num_warps == 1


def test_printed_entries_are_the_tables_own_source() -> None:
    text = "{" + "\n".join(tune.lines_of(dict(tune.entries("sm_90", KERNELS)))) + "}"
    printed = launch.table_of(eval(text, {"LaunchConfig": LaunchConfig}))
    assert printed == {key: config for key, config in launch.TABLE["sm_90"].items() if key.kernel in KERNELS}


def test_only_a_candidate_that_is_two_percent_faster_replaces_the_entry() -> None:
    first, second = LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 32, 4, 2)
    assert tune.best_of([(first, 1.0), (second, 0.99)])[0] == first
    assert tune.best_of([(first, 1.0), (second, 0.97)])[0] == second


def test_a_candidate_is_compiled_for_its_registers_and_refused_if_it_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of("soft_target_backward:2:1024:5")
    config = tune.compiled("sm_90", entry, LaunchConfig(1, 2048, 4, 1))
    assert config is not None
    assert 4 <= config.ctas_per_sm <= 16
    monkeypatch.setattr(aot, "examine", lambda job: aot.Result(job=job, registers=255, spills=3))
    assert tune.compiled("sm_90", entry, LaunchConfig(1, 2048, 4, 1)) is None


def names_of(patterns: list[str] | None) -> list[str]:
    return [entry.name for entry, _ in tune.plan("sm_90", patterns)]


def test_entries_are_chosen_by_pattern_and_rows_of_128_come_first() -> None:
    assert names_of(["backward:2:128:bounded"]) == ["dual_softmax_backward:2:128:bounded"]
    assert names_of(["soft_target_forward:2:1024:5"]) == ["soft_target_forward:2:1024:5"]
    assert names_of(["dual_softmax::256:online"]) == [f"dual_softmax_{x}:2:256:online" for x in ("forward", "backward")]
    assert len(names_of(["forward", "backward"])) == len(names_of(None)) == len(dict(tune.entries("sm_90", KERNELS)))
    first = names_of(None)[:8]
    assert all(":128:" in name and "dual_softmax" in name for name in first)
    assert all(":2:" in name for name in first[:4])
    with pytest.raises(SystemExit):
        tune.main(["--list", "--entries", "sideways"])


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[tune.Search]:
    """Without compilers and without a GPU: smaller tiles are faster, and those of 32 rows fail."""

    def median_ms(config: LaunchConfig, *rest: object) -> float:
        if config.BLOCK_M == 32:
            raise RuntimeError("out of resources")
        return float(config.BLOCK_M * config.BLOCK_N)

    def current(entry: tune.Entry, *rest: object) -> LaunchConfig:
        return launch.TABLE["sm_90"][entry.key]

    monkeypatch.setattr(tune, "prepare", lambda hardware, entry, candidate, rows: candidate)
    monkeypatch.setattr(tune, "step_of", current)
    monkeypatch.setattr(measure, "median_ms", median_ms)
    with ThreadPoolExecutor(2) as pool:
        yield tune.Search("sm_90", torch.device("cpu"), pool, time.monotonic() + 1000)


def test_a_search_prints_the_best_after_each_entry_and_survives_candidates_that_fail(
    search: tune.Search, capsys: pytest.CaptureFixture[str]
) -> None:
    search.run(tune.plan("sm_90", ["backward:2:128:bounded"]))
    text = capsys.readouterr().out
    assert "failed: RuntimeError: out of resources" in text
    assert re.search(r"best of \d+: dual_softmax_backward:2:128:bounded 1024\.0000 ms LaunchConfig\(64, 16,", text)
    online = tune.line_of(launch.TABLE["sm_90"][entry_of("backward:2:128:online").key])
    assert re.search(r"\(2, 128, True\): LaunchConfig\(64, 16,", text)
    assert f"(2, 128, False): {online}," in text


def test_a_search_whose_time_is_over_or_that_is_interrupted_prints_what_it_found(
    search: tune.Search, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tune.plan("sm_90", ["dual_softmax::128"])[:4]
    dataclasses.replace(search, deadline=0.0).run(work)
    assert capsys.readouterr().out.count("not searched: no time left") == len(work) == 4
    best = tune.Search.best

    def then_interrupted(self: tune.Search, entry: tune.Entry, current: LaunchConfig) -> LaunchConfig | None:
        if entry is work[1][0]:
            raise KeyboardInterrupt
        return best(self, entry, current)

    monkeypatch.setattr(tune.Search, "best", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.run(work)
    assert re.search(r'"dual_softmax_forward": {\n    \(2, 128, True\): LaunchConfig\(64, 16,', capsys.readouterr().out)


ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands() -> str:
    """What make would run for gpu-test in an environment that is there already."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "-n", "gpu-test", f"PY={sys.executable}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_existing_environment_is_used_as_it_is(commands: str) -> None:
    assert "venv" not in commands.replace(sys.executable, "")
    assert "pip install --quiet" not in commands


def test_every_operation_has_cases_for_the_sanitizer(commands: str) -> None:
    named = re.findall(r"pytest -m sanitizer --timeout \d+ (.*)", commands)[0].split()
    names = ("hypothesis", "timm", "torchvision", "torchdata", "tyro", "rich", "safetensors", "sklearn", "jinja2")
    without = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-m", "sanitizer", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    collected = subprocess.run(
        [sys.executable, "-c", without, *arguments, *named],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-2000:]
    cases = Counter(Path(line.split("::")[0]).stem for line in collected.stdout.splitlines() if "::" in line)
    operations = ("dual_softmax", "contrast", "soft_target", "multiscale_pool", "pack")
    assert set(cases) == {f"test_{name}" for name in operations}
    assert all(3 <= count <= 40 for count in cases.values()), cases
    assert "131072_classes_split" in collected.stdout


def test_every_gpu_test_is_where_the_makefile_looks(commands: str) -> None:
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    marked = {path for path, text in tests.items() if "mark.gpu" in text or "@gpu" in text}
    assert len(marked) == 7
    named = [ROOT / name for name in re.findall(r"pytest -m gpu (.*)", commands)[0].split()]
    assert all(any(path.is_relative_to(name) for name in named) for path in marked)
