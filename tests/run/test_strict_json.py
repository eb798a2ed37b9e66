"""JSON that may come from a stranger: every refusal is a line that names the file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.trainer import strict_json
from fastkd.trainer.report.records import read_metrics, read_run
from fastkd.trainer.strict_json import check_fields, parse_json, read_json_object


def deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def test_what_json_holds_is_read() -> None:
    values = {"a": [1, 2.5, None, True, "x"], "b": {"c": -(2**63) + 1}}
    assert parse_json(json.dumps(values)) == values
    assert parse_json(deep(strict_json.MAX_DEPTH - 1)) is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (deep(40), "nested more than 32 deep"),
        (deep(sys.getrecursionlimit() * 2), "nested more than 32 deep"),
        (deep(100_000), "nested more than 32 deep"),
        ("9" * 400, r"the integer 9{20}\.\.\. has more than 64 bits"),
        (str(2**63), "has more than 64 bits"),
        ("{", "Expecting"),
        (b"\xff\xfe\xfa", "codec"),
    ],
)
def test_what_is_no_json_or_too_much_of_it_is_refused(tmp_path: Path, text: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_json(text)
    file = tmp_path / "run.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"run\.json: is not JSON: truncated or corrupted \(.*{told}") as caught:
        read_json_object(file)
    assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_bytes(file.read_bytes() + b"\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_file_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
    (tmp_path / "run.json").write_text(json.dumps({"a": "0123456789"}))
    with pytest.raises(ValueError, match=r"run\.json: has 19 bytes, expected at most 10 of JSON"):
        read_json_object(tmp_path / "run.json")


def test_fields_have_their_types_and_a_bool_is_no_number() -> None:
    check_fields({"a": 1, "b": None}, {"a": int, "b": (str, type(None))}, "f.json")
    for values, told in (
        ({}, "f.json: lacks a"),
        ({"a": True}, "f.json: a is of type bool, expected int"),
        ({"a": "1"}, "f.json: a is of type str, expected int"),
    ):
        with pytest.raises(ValueError, match=told):
            check_fields(values, {"a": int}, "f.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "run.json: steps: got 0"),
        ({"steps": True}, "run.json: steps is of type bool"),
        ({"config": 3}, "run.json: config is of type int"),
        ({"config": {"epochs": 0, "data": {}, "optim": {}}}, r"run\.json: config\.epochs: got 0"),
        ({"config": {"epochs": 1, "data": [], "optim": {}}}, r"run\.json: its config: data is of type list"),
        ({"versions": None}, "run.json: versions is of type NoneType, expected dict"),
        ({"student": "x"}, "run.json: student is of type str"),
    ],
)
def test_a_forged_run_json_is_refused_by_the_report(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    info: dict[str, Any] = {
        **{name: {} for name in ("student", "loss_weights", "versions")},
        **dict.fromkeys(("train_samples", "eval_samples", "global_batch", "ranks", "steps", "seed"), 1),
        **dict.fromkeys(("learning_rate", "precision", "device"), "x"),
        "teacher": None,
        "teacher_sha256": None,
        "given_as_objects": [],
        "config": {"epochs": 1, "data": {}, "optim": {}},
    }
    (tmp_path / "run.json").write_text(json.dumps(info | changes))
    with pytest.raises(ValueError, match=told):
        read_run(tmp_path, "run")
    (tmp_path / "run.json").write_text(json.dumps(info))
    assert read_run(tmp_path, "run").steps == []  # a run that has just begun
