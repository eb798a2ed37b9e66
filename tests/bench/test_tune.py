"""The tuner's search space and output."""

import csv
import dataclasses
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import measure

pytest.importorskip("triton")
from fastkd.kernels import launch
from fastkd.kernels.launch import LaunchConfig

from bench import tune
from bench.aot import compile as aot


def entry_of(pattern: str) -> tune.Entry:
    ((entry, _),) = tune.plan("sm_90", [pattern])
    return entry


def test_the_search_space_starts_with_the_current_entry_and_has_no_repeats() -> None:
    found = dict(tune.entries("sm_90"))
    assert {entry.key for entry in found} == set(launch.TABLE["sm_90"])
    for entry, current in found.items():
        space = tune.candidates(entry, current)
        assert space[0] == current
        assert len(space) > 5
        assert len({dataclasses.replace(x, ctas_per_sm=1) for x in space}) == len(space)
        if entry.kernel in (*tune.DUAL, *tune.CONTRAST):
            assert {x.num_stages for x in space[1:]} == {2, 3, 4}
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
    text = "{" + "\n".join(tune.lines_of(dict(tune.entries("sm_90")))) + "}"
    printed = launch.table_of(eval(text, {"LaunchConfig": LaunchConfig}))
    assert printed == launch.TABLE["sm_90"]


def test_only_a_candidate_that_is_two_percent_faster_replaces_the_entry() -> None:
    first, second = LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 32, 4, 2)
    assert tune.best_of([(first, 1.0), (second, 0.99)])[0] == first
    assert tune.best_of([(first, 1.0), (second, 0.97)])[0] == second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "config"),
    [
        ("soft_target_backward:2:1024:5", LaunchConfig(1, 2048, 4, 1)),
        ("contrast_self:2:64", LaunchConfig(64, 32, 4, 2)),
        ("multiscale_pool:2:49", LaunchConfig(64, 32, 4, 2)),
        ("dual_softmax_forward:2:64:online", LaunchConfig(64, 32, 4, 3)),
    ],
)
def test_a_candidate_of_every_operation_is_compiled_for_its_registers(pattern: str, config: LaunchConfig) -> None:
    found = tune.compiled("sm_90", entry_of(pattern), config)
    assert found is not None
    assert dataclasses.replace(found[0], ctas_per_sm=1) == config
    if pattern.startswith("multiscale_pool"):
        assert found[0].ctas_per_sm == 1
    assert found[1] == 0


def test_the_number_of_programs_that_an_entry_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "examine", lambda job, instructions: aot.Result(job=job, registers=64, has_hgmma=True))
    entry = entry_of("contrast_self:2:64")
    asked, unasked = (tune.compiled("sm_90", entry, LaunchConfig(64, 32, 4, 2, ctas_per_sm=n)) for n in (2, 1))
    assert asked == (LaunchConfig(64, 32, 4, 2, ctas_per_sm=2), 0)
    assert unasked == (LaunchConfig(64, 32, 4, 2, ctas_per_sm=8), 0)


@pytest.mark.parametrize(
    ("spills", "shared", "expected"), [(3, 0, 3), (tune.MOST_SPILLS + 1, 0, None), (0, 1 << 20, None)]
)
def test_a_candidate_may_spill_a_little_and_must_fit(
    spills: int, shared: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"registers": 255, "spills": spills, "shared": shared}
    monkeypatch.setattr(aot, "examine", lambda job, instructions: aot.Result(job=job, **result))
    found = tune.compiled("sm_90", entry_of("soft_target_backward:2:1024:5"), LaunchConfig(1, 2048, 4, 1))
    assert (found and found[1]) == expected


@pytest.mark.parametrize(
    ("pattern", "backward"), [("soft_target_forward:2:1024:5", False), ("contrast_self:2:64", True)]
)
def test_a_step_is_the_loss_that_the_entry_is_for(
    pattern: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, through another backend."""
    entry, seen = entry_of(pattern), []
    ((case, provider),) = entry.cases(16)
    blocked = tune.providers.GPU_PROVIDERS[case.name]["fastkd blocked"]()

    def noted(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0])
        return blocked(*inputs)

    monkeypatch.setitem(tune.providers.GPU_PROVIDERS[case.name], provider, lambda: noted)
    monkeypatch.setattr(tune, "LOGITS", 4096)
    precision = torch.get_float32_matmul_precision()
    try:
        tune.step_of(entry, 16, torch.device("cpu"))()
    finally:
        torch.set_float32_matmul_precision(precision)
    (rows,) = seen
    assert rows.shape == ((16, 64) if backward else (4, 1024))
    assert (rows.grad is not None) == backward


def test_every_entry_is_measured_by_one_of_our_kernels() -> None:
    """Whether the entry's own kernel runs is tested in the interpreter."""
    for entry, _ in tune.entries("sm_90"):
        for case, provider in entry.cases(32768):
            assert provider in tune.providers.GPU_PROVIDERS[case.name]
            assert entry.kernel == "multiscale_pool" or case.d in (entry.width, tune.WIDEST_CLASSES)


def names_of(patterns: list[str] | None) -> list[str]:
    return [entry.name for entry, _ in tune.plan("sm_90", patterns)]


def test_entries_are_chosen_by_pattern_and_rows_of_128_come_first() -> None:
    assert names_of(["backward:2:128:bounded"]) == ["dual_softmax_backward:2:128:bounded"]
    assert names_of(["soft_target_forward:2:1024:5"]) == ["soft_target_forward:2:1024:5"]
    assert names_of(["dual_softmax::256:online"]) == [f"dual_softmax_{x}:2:256:online" for x in ("forward", "backward")]
    assert names_of(["self:2:128", "pool:2:49"]) == ["contrast_self:2:128", "multiscale_pool:2:49"]
    names = names_of(None)
    assert len(names) == len(dict(tune.entries("sm_90")))
    assert all(":128:" in name and "dual_softmax" in name for name in names[:8])
    assert all(":2:" in name for name in names[:4])
    assert all(name.startswith("contrast") and name.endswith(":128") for name in names[8:14])
    with pytest.raises(SystemExit):
        tune.main(["--list", "--entries", "sideways"])


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tune.Search]:
    """Without compilers and without a GPU: smaller tiles are faster, and those of 32 rows fail."""

    def median_ms(config: LaunchConfig, *rest: object) -> float:
        if config.BLOCK_M == 32:
            raise RuntimeError("out of resources")
        return float(config.BLOCK_M * config.BLOCK_N)

    def current(entry: tune.Entry, *rest: object) -> LaunchConfig:
        return launch.TABLE["sm_90"][entry.key]

    monkeypatch.setattr(tune, "prepare", lambda hardware, entry, candidate, rows: (candidate, candidate.num_stages))
    monkeypatch.setattr(tune, "step_of", current)
    monkeypatch.setattr(measure, "median_ms", median_ms)
    with ThreadPoolExecutor(2) as pool:
        yield tune.Search("sm_90", torch.device("cpu"), pool, time.monotonic() + 1000, tmp_path / "x" / "tune.csv")


def test_a_search_prints_the_best_after_each_entry_and_survives_candidates_that_fail(
    search: tune.Search, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tune.plan("sm_90", ["backward:2:128:bounded"])
    search.run(work)
    text = capsys.readouterr().out
    assert "failed: RuntimeError: out of resources" in text
    assert re.search(r"best of \d+: dual_softmax_backward:2:128:bounded 1024\.0000 ms LaunchConfig\(64, 16,", text)
    online = tune.line_of(launch.TABLE["sm_90"][entry_of("backward:2:128:online").key])
    assert re.search(r"\(2, 128, True\): LaunchConfig\(64, 16,", text)
    assert f"(2, 128, False): {online}," in text
    with search.table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tune.candidates(*work[0]))
    assert {row["entry"] for row in rows} == {"dual_softmax_backward:2:128:bounded"}
    assert {(row["ms"], row["note"]) for row in rows if "(32, " in row["config"]} == {
        ("", "failed: RuntimeError: out of resources")
    }
    assert {row["spills"] for row in rows} == {"2", "3", "4"}


def test_every_candidate_is_written_once_it_is_measured(search: tune.Search, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    median_ms = measure.median_ms

    def counted(*arguments: object) -> float:
        lines.append(len(search.table.read_text().splitlines()))
        return median_ms(*arguments)

    monkeypatch.setattr(measure, "median_ms", counted)
    search.run(tune.plan("sm_90", ["contrast_self:2:128"]))
    assert lines == list(range(1, 1 + len(lines)))
    assert len(lines) > 5


def test_a_table_that_is_best_needs_no_change(
    search: tune.Search, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "median_ms", lambda *arguments: 1.0)
    search.run(tune.plan("sm_90", ["contrast_self:2:128"]))
    assert capsys.readouterr().out.rstrip().endswith("# nothing to change")


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
