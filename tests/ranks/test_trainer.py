"""The trainer on several ranks takes the steps of one process, logs and saves once, and resumes on any number."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.demo import ddp as demo_ddp
from fastkd.trainer import CRDConfig, evaluate_checkpoint, load_weights
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.loader import EpochSampler, GlobalBatches
from tests.helpers.checks import relative_error
from tests.helpers.ranks import Failure, run_ranks, succeeded
from tests.helpers.trainer_runs import one_thread, write_teacher  # noqa: F401
from tests.ranks import trainer_programs as programs

pytestmark = pytest.mark.slow


def run(world_size: int, changes: dict[str, Any], **options: Any) -> list[Any]:
    return run_ranks(world_size, programs.trained, changes, *options.values(), timeout=60)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return succeeded(run(1, {"quiet": True}))[0]


def check_same_run(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        for name, value in expected["weights"].items():
            assert relative_error(result["weights"][name], value) < 1e-10, name
            assert torch.equal(result["weights"][name], results[0]["weights"][name])
        for record, other in zip(result["history"], expected["history"], strict=True):
            # The meter keeps float32.
            assert record == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_number_of_ranks_takes_the_same_steps(world_size: int, one_process: dict[str, Any]) -> None:
    """46 samples in batches of 8: the last batch is ragged, and 3 ranks never get equal parts."""
    check_same_run(succeeded(run(world_size, {"quiet": True})), one_process)


# Several at once, because most of the time goes to what a run begins and ends with.
SUMS = {
    "fused and maps": "10*ckd + pckd + msdcrd + kd + at + nst + vid + paraphraser",
    "logits": "dkd + 2*dist + lskd + wsld + 0.9*ctkd + 0.1*ce_strong + 0.9*mlkd",
    "relations": "0.02*cc + 0.1*rkd + 100*pkt + 10*sp + 0.8*crd + info_nce",
}


@pytest.mark.parametrize("family", SUMS)
def test_every_method_takes_the_same_steps_on_ranks(family: str) -> None:
    changes = {"quiet": True, "terms": SUMS[family], "epochs": 2, "options": {"crd": CRDConfig(negatives=12)}}
    expected = succeeded(run(1, changes))[0]
    for world_size in (2, 3):
        check_same_run(succeeded(run(world_size, changes)), expected)


@pytest.mark.parametrize(("terms", "epochs"), [(None, 3), ("pckd + dkd + wsld + ce_strong + 0.9*mlkd + 0.8*crd", 2)])
def test_few_labels_give_the_same_steps_on_ranks_and_chunks(terms: str | None, epochs: int) -> None:
    """8 of 46 samples have a label, so that some ranks, some chunks and some batches have none."""
    changes = {"quiet": True, "terms": terms, "epochs": epochs, "data": {"labelled": 8, "unlabelled": True}}
    changes["options"] = {"crd": CRDConfig(negatives=12)}
    expected = succeeded(run(1, changes))[0]
    check_same_run(succeeded(run(3, {**changes, "chunks": 2})), expected)


@pytest.mark.parametrize(("world_size", "chunks"), [(1, 3), (2, 2), (3, 8)])
def test_chunks_take_the_same_steps_with_negatives_of_the_whole_batch(
    world_size: int, chunks: int, one_process: dict[str, Any]
) -> None:
    """8 chunks of a rank's 2 or 3 images are as many as there are images."""
    check_same_run(succeeded(run(world_size, {"quiet": True, "chunks": chunks})), one_process)


def test_chunks_cost_one_all_reduce_a_step() -> None:
    results = succeeded(run_ranks(2, programs.reductions, {"quiet": True, "chunks": 4, "epochs": 1}))
    parameters, large, steps = results[0]
    assert steps == 6
    # Of gradients; what else is reduced are single numbers: metrics, a signal.
    assert large == [parameters] * steps


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(
    before: int, after: int, tmp_path: Path, one_process: dict[str, Any]
) -> None:
    changes = {"run_dir": str(tmp_path / "run"), "save_every_steps": 4, "quiet": True}
    assert set(run(before, changes, stop_at=11)) == {"stopped"}
    results = succeeded(run(after, {**changes, "resume": True}))
    assert {result["resumed_from"] for result in results} == {8}
    assert {result["path"] for result in results} == {str(tmp_path / "run" / "checkpoints" / "step-00000018")}
    check_same_run(results, one_process)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 19))


def test_rank_0_alone_prints_and_writes(tmp_path: Path) -> None:
    results = succeeded(run(2, {"run_dir": str(tmp_path / "run"), "epochs": 1}))
    printed, other = (result["printed"] for result in results)
    assert other == ""
    assert printed.count("global batch 8 on 2 ranks, 46 training samples") == 1
    assert printed.count("epoch 1/1") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ranks"] == 2
    assert len(list((tmp_path / "run").glob("metrics*"))) == 1
    counts = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert counts["samples"] == [6, 5, 5, 5]  # of both ranks
    assert sum(counts["right"]) / 21 == pytest.approx(results[0]["history"][-1]["accuracy"])


def test_a_callback_that_raises_on_rank_0_saves_and_ends_all_ranks(tmp_path: Path, one_process: dict[str, Any]) -> None:
    changes = {"run_dir": str(tmp_path / "run"), "quiet": True}
    for result in run(2, {**changes, "callback_fails_at": 4}):
        assert isinstance(result, Failure)
        assert (result.kind, result.message) == ("LookupError", "no room for records")
    results = succeeded(run(2, {**changes, "resume": True}))
    assert {result["resumed_from"] for result in results} == {4}
    check_same_run(results, one_process)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    changes = {"run_dir": str(tmp_path / "run"), "quiet": True, "max_skipped": 0}
    results = run(2, changes, stop_at=None, bad_on=1)
    for result in results:
        assert isinstance(result, Failure)
        assert result.kind == "NonFiniteLossError"
        assert "the last good checkpoint is" in result.message


@pytest.mark.parametrize(
    ("world_size", "changes", "kind", "message"),
    [
        (2, {"resume": True}, "CheckpointError", "holds no run to resume"),
        (7, {}, "ValueError", "whose smallest batch has 6 rows, expected at least one row for each of the 7 ranks"),
    ],
)
def test_what_cannot_start_is_an_error_on_every_rank(
    world_size: int, changes: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    for result in run(world_size, {"run_dir": str(tmp_path), "quiet": True, **changes}):
        assert isinstance(result, Failure)
        assert result.kind == kind
        assert message in result.message


def test_with_batch_norm_what_is_reported_is_the_checkpoints(tmp_path: Path) -> None:
    write_teacher(tmp_path / "teacher.safetensors")
    results = succeeded(run_ranks(2, programs.trained_with_batch_norm, str(tmp_path), timeout=60))
    records, paths, weights = zip(*results, strict=True)
    assert records[0] == records[1]
    assert paths[0] == paths[1]
    assert torch.equal(*weights)
    checkpoint = evaluate_checkpoint(paths[0], trust_code=True, device="cpu")
    assert checkpoint.accuracy == records[0]["accuracy"]
    assert checkpoint.loss == pytest.approx(records[0]["eval_loss"], rel=1e-5)


def test_stages_on_ranks_begin_with_what_the_ones_before_have_trained(tmp_path: Path) -> None:
    write_teacher(tmp_path / "teacher.safetensors")
    first, second = (tmp_path / "both" / name / "checkpoints" for name in ("1-pretrain", "2-train"))
    results = succeeded(run_ranks(2, programs.staged, str(tmp_path), False, timeout=60))
    expected = [(str(folder / "step-00000013"), False) for folder in (first, second)]
    assert results == [expected, expected]
    trained, begun = (load_weights(step) for step in (first / "step-00000013", second / "step-00000000"))
    assert all(torch.equal(value, begun[name]) for name, value in trained.items())
    again = succeeded(run_ranks(2, programs.staged, str(tmp_path), True, timeout=60))
    assert again == [[(expected[1][0], True)]] * 2


def test_the_demo_under_torchrun_matches_one_process(tmp_path: Path) -> None:
    result = demo_ddp.compare(str(tmp_path))
    assert 0 < result["difference"] <= demo_ddp.TOLERANCE
    for one, other in zip(result["one"], result["ranks"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_parts_of_the_ranks_are_the_batches_of_one_process(drop_last: bool) -> None:
    config = DataConfig(batch_size=7, drop_last=drop_last)
    whole = list(GlobalBatches(EpochSampler(24, seed=3), 24, config, 0, 1))
    assert [len(batch) for batch in whole] == ([7, 7, 7] if drop_last else [7, 7, 7, 3])
    assert len(GlobalBatches(EpochSampler(24, seed=3), 24, config, 0, 1)) == len(whole)
    for world_size in (2, 3):
        parts = [
            list(GlobalBatches(EpochSampler(24, seed=3), 24, config, rank, world_size)) for rank in range(world_size)
        ]
        joined = [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
        assert joined == whole
        assert all(max(map(len, batch)) - min(map(len, batch)) <= 1 for batch in zip(*parts, strict=True))


def test_a_detector_is_evaluated_on_ranks_as_in_one_process() -> None:
    expected = succeeded(run_ranks(1, programs.evaluated_detector, 1))
    assert succeeded(run_ranks(2, programs.evaluated_detector, 2)) == expected * 2
    assert len(expected[0][0]) == 7
