"""``fastkd report``: writes one HTML page about a training run, or about several compared, from their run folders.

The page is one file that needs nothing else. Of a run that is still going on, it shows what is written so far.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastkd.trainer.config import FREE_TO_CHANGE
from fastkd.trainer.imports import current_name
from fastkd.trainer.objective.config import describe_terms
from fastkd.trainer.report.curves import MAX_POINTS, Panel, Quantity, draw, look
from fastkd.trainer.report.records import RecordedRun, read_runs
from fastkd.trainer.report.style import render_page, write_atomically

LOSS = Quantity("loss", "Training loss, weighted sum", mean=True)
ACCURACY = Quantity("accuracy", "Accuracy, top-1 (%)", percent=True)
TOP5 = Quantity("top5", "Accuracy, top-5 (%)", percent=True)
EVAL_LOSS = Quantity("eval_loss", "Evaluation loss (nats)", log=True)
SPEED = Quantity("images_per_second", "Images a second")
WAIT = Quantity("data_wait", "Time spent waiting for data (%)", percent=True)
RATE = Quantity("lr", "Learning rate")
NORM = Quantity("grad_norm", "Gradient norm before clipping", log=True)
KNOWN = {quantity.name: quantity for quantity in (LOSS, ACCURACY, TOP5, EVAL_LOSS, SPEED, WAIT, RATE, NORM)}


@dataclass(frozen=True)
class Cell:
    """A number in a table: its ``value`` in ``metrics.jsonl``, and the ``text`` that the page shows."""

    value: float | None
    text: str


def write_run_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about the run folders ``runs`` to ``out`` and return its path.

    ``out`` is by default ``report.html`` in the folder of a single run, and ``comparison.html`` here for several.

    Raises:
        ValueError: a file is missing or cannot be read, a run is given twice, or ``out`` is no ``.html`` file.
    """
    read = read_runs(runs)
    if out is None:
        out = read[0].folder / "report.html" if len(read) == 1 else "comparison.html"
    out = Path(out)
    # A slip such as `--out run.json` must not cost the run.
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, expected a file that ends in .html")
    page = render(read)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def report_command(runs: tyro.conf.Positional[tuple[str, ...]], out: str | None = None) -> None:
    """An HTML page about a training run, or about several compared: curves, results, settings.

    Args:
        runs: run folders. A run may still be going on.
        out: the .html file; by default report.html in the run folder, comparison.html here for several.
    """
    print(write_run_report(runs, out))


def render(runs: Sequence[RecordedRun]) -> str:
    """The page as HTML text."""
    settings = side_by_side([flatten(run.info["config"]) for run in runs])
    page = render_page(
        Path(__file__).parent,
        title=f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs compared",
        runs=runs,
        looks=[look(index) for index in range(len(runs))],
        comparison=comparison(runs),
        epochs={run.name: epoch_table(run) for run in runs},
        sections=draw_sections(runs),
        facts=side_by_side([facts(run) for run in runs]),
        settings=settings,
        # A resumed run may find its data in another folder. Two runs with different folders may have different data.
        differing={
            name: row
            for name, row in settings.items()
            if len(row) > 1 and (name not in FREE_TO_CHANGE or name == "data.options.root")
        },
        thinned=[run for run in runs if len(run.steps) > MAX_POINTS],
        max_points=MAX_POINTS,
    )
    # A user's names may contain what UTF-8 or HTML cannot hold.
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", page)


def sections_of(runs: Sequence[RecordedRun]) -> dict[str, list[Quantity]]:
    """The recorded quantities by heading. Headings without any are left out."""
    names = list(dict.fromkeys(name for run in runs for name in run.quantities))
    weighted = {name for run in runs for name in run.info["loss_weights"]}
    found: dict[str, list[Quantity]] = {
        "Accuracy": [ACCURACY, TOP5],
        "Loss": [LOSS, EVAL_LOSS],
        "Terms of the loss, before weights": [],
        "Temperature": [],
        "Optimisation": [RATE, NORM],
        "Throughput": [SPEED, WAIT],
        "Other values": [],
    }
    for name in names:
        if name in KNOWN:
            continue
        if name.endswith(("/tau", "/scale")):
            shown = "τ" if name.endswith("/tau") else "logit scale, exp(τ)"
            found["Temperature"].append(Quantity(name, f"{name}: {shown}"))
        elif name in weighted or name.partition("/")[0] in weighted:
            found["Terms of the loss, before weights"].append(Quantity(name, name, mean=True))
        else:
            found["Other values"].append(Quantity(name, name))
    present = {heading: [item for item in items if item.name in names] for heading, items in found.items()}
    return {heading: items for heading, items in present.items() if items}


def draw_sections(runs: Sequence[RecordedRun]) -> dict[str, list[Panel]]:
    """A panel for every quantity, by heading."""
    number = itertools.count()
    return {
        heading: [draw(runs, quantity, f"panel{next(number)}") for quantity in quantities]
        for heading, quantities in sections_of(runs).items()
    }


def status(run: RecordedRun) -> str:
    """One line that says whether the run is finished, at which step it is, and whether it was resumed."""
    total = run.info["steps"]
    if run.finished:
        text = f"finished: all {counted(total, 'step')}, {counted(run.info['config']['epochs'], 'epoch')}"
    else:
        text = f"not finished: last record at step {run.last_step:,} of {total:,} (still running, or stopped)"
    if run.manifest is None:
        text += "; no checkpoint in its folder"
    elif run.manifest["step"] != total:
        text += f"; newest checkpoint at step {run.manifest['step']:,}"
    return text + ("; resumed at least once" if run.info["config"].get("resume") else "")


def facts(run: RecordedRun) -> dict[str, str]:
    """What the run was, as texts by their labels."""
    info, config = run.info, run.info["config"]
    given = info["given_as_objects"]
    data = "given as objects" if "data" in given else str(config["data"]["name"])
    return {
        "status": status(run),
        "records": f"{counted(len(run.steps), 'step')}, {counted(len(run.epochs), 'epoch')}"
        + ("; the last line of metrics.jsonl is incomplete and left out" if run.cut else ""),
        "student": _model(info["student"]),
        "teacher": "none" if info["teacher"] is None else _model(info["teacher"]),
        "teacher, sha256 of its weights": info["teacher_sha256"] or "none",
        "data": f"{data}: {info['train_samples']:,} training samples, {info['eval_samples']:,} evaluation samples",
        "labels, sha256": "unknown (no checkpoint)" if run.manifest is None else run.manifest["labels_sha256"],
        "loss": describe_terms(info["loss_weights"]),
        "global batch": f"{info['global_batch']:,}" + (f" on {info['ranks']} ranks" if info["ranks"] > 1 else ""),
        "length": f"{counted(config['epochs'], 'epoch')} of {run.steps_per_epoch:,g} steps",
        "optimiser": str(config["optim"]["name"]),
        "learning rate": info["learning_rate"],
        "precision": info["precision"],
        "device": info["device"],
        "seed": str(info["seed"]),
        "given as objects": ", ".join(given) or "nothing: the settings below describe the run",
        "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    }


def counted(number: int, thing: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _model(info: dict[str, Any]) -> str:
    classifier = f", classifier layer {info['classifier']!r}" if info["classifier"] else ""
    return f"{info['name']}: {info['parameters']:,} parameters{classifier}"


def side_by_side(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """For every label one text per run, or a single text where all runs agree."""
    rows = {}
    for name in dict.fromkeys(name for column in columns for name in column):
        texts = [column.get(name, "-") for column in columns]
        rows[name] = texts[:1] if len(set(texts)) == 1 else texts
    return rows


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"optim.lr": "0.05", ...}``: the names that are flags of ``fastkd train``."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = current_name(str(value))  # runs from before a module moved compare as equal
    return flat


def cell(quantity: Quantity, record: dict[str, Any] | None) -> Cell:
    """The quantity in ``record``, as a table shows it."""
    if record is None or quantity.name not in record:
        return Cell(None, "-")
    value = record[quantity.name]
    if not math.isfinite(value):
        return Cell(None, "not finite")
    if quantity.percent:
        return Cell(value, f"{100 * value:.2f}")
    return Cell(value, f"{value:,.1f}" if quantity is SPEED else f"{value:.5g}")


def epoch_table(run: RecordedRun) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Headings and rows: every quantity after the last epoch, the last evaluated epoch and the best epoch."""
    if not run.epochs:
        return [], []
    records = [("last epoch", run.epochs[-1])]
    if run.evaluated is not None and run.evaluated is not run.epochs[-1]:
        records.append(("last evaluated epoch", run.evaluated))
    if run.best is not None:
        records.append(("best epoch", run.best))
    headings = [f"{text} ({record['epoch'] + 1})" for text, record in records]
    quantities = [item for items in sections_of([run]).values() for item in items]
    recorded = [item for item in quantities if any(item.name in record for _, record in records)]
    return headings, [(item.title, [cell(item, record) for _, record in records]) for item in recorded]


def comparison(runs: Sequence[RecordedRun]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and one row per run: the values of its last evaluated epoch, and its best accuracy."""
    recorded = {name for run in runs for name in run.quantities}
    chosen = [item for item in (ACCURACY, TOP5, EVAL_LOSS, LOSS, SPEED) if item.name in recorded]
    sizes = [run.info["student"]["parameters"] for run in runs]
    rows = []
    for run, size in zip(runs, sizes, strict=True):
        last = run.evaluated or (run.epochs[-1] if run.epochs else None)
        row = [Cell(None, f"{run.last_step:,} of {run.info['steps']:,}"), _epoch(last)]
        row += [*(cell(item, last) for item in chosen), cell(ACCURACY, run.best), _epoch(run.best)]
        rows.append([Cell(size, f"{size:,}"), *row] if len(set(sizes)) > 1 else row)
    headings = ["Steps", "Epoch", *(item.title for item in chosen), "Best accuracy (%)", "In epoch"]
    return ["Student parameters", *headings] if len(set(sizes)) > 1 else headings, rows


def _epoch(record: dict[str, Any] | None) -> Cell:
    """The number of an epoch. Epochs are recorded from 0 and shown from 1."""
    return Cell(None, "-") if record is None else Cell(record["epoch"], str(record["epoch"] + 1))
