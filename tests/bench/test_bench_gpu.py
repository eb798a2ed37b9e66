"""The GPU benchmark's whole path on the CPU with tiny sizes."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_report, measure, providers, report
from tests.helpers.checks import TOLERANCES

pytest.importorskip("triton")

from bench import tune

ROOT = Path(__file__).parents[2]


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
    return gpu.Run(torch.device("cpu"), True, 0.0, math.inf)


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
    calls, seen, tables, median_ms, handler = [], [], [], measure.median_ms, signal.getsignal(number)

    def then_a_signal(*args: object) -> float:
        calls.append(1)
        if len(calls) == 8:  # of the second case: the ceilings are two, the first case has three providers on a CPU
            seen.extend(rows_of(tmp_path))
            tables.extend(path.read_text() for path in tmp_path.glob("*.md"))
            os.kill(os.getpid(), number)
        return median_ms(*args)

    monkeypatch.setattr(measure, "median_ms", then_a_signal)
    arguments = ["--device", "cpu", "--quick", "--cases", "dcd_loss", "clip_loss", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 128 + number
    assert {row["n"] for row in seen} == {"16"}
    assert "| 16 | 16 | fastkd blocked |" in tables[0]  # written before the run ended
    assert "| 40 | 16 |" not in tables[0]
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


def test_time_counts_from_the_start_of_the_process(tmp_path: Path) -> None:
    """The imports alone take longer than a tenth of a second."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--cases", "clip_loss"]
    subprocess.run([*command, "--seconds", "0.1", "--output", str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    assert {row["status"] for row in rows_of(tmp_path)} == {"skipped: no time left"}


def test_the_plot_comes_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "PLOT_EVERY", 0)
    ceilings = {"copy_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0}
    results = gpu_report.Results(torch.device("cpu"), ceilings, "command", tmp_path, time.monotonic())
    results.append([gpu.measure_provider(CASE, "eager fp32", a_run(), None)])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md", ".png"]


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
    text = capsys.readouterr().err
    assert "torch.cuda.is_available() is False" in text
    assert text.count("\n") == 1


def test_medians_are_of_at_least_three_calls() -> None:
    calls = []
    assert measure.median_ms(lambda: calls.append(1), torch.device("cpu"), 0.0) >= 0
    assert len(calls) == 4
