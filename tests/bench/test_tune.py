"""The tuner's search space and output."""

import dataclasses
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import measure

pytest.importorskip("triton")
from fastkd.kernels import launch
from fastkd.kernels.launch import LaunchConfig

from bench import tune
from bench.aot import compile as aot

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
