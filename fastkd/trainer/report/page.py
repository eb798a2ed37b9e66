"""``fastkd report``: writes one HTML page about a training run, or about several compared, from their run folders.

The page is one file that needs nothing else. Of a run that is still going on, it shows what is written so far.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from fastkd.trainer.config import FREE_TO_CHANGE
from fastkd.trainer.imports import current_name
from fastkd.trainer.objective.config import describe_terms
from fastkd.trainer.report.curves import MAX_POINTS, Panel, Quantity, draw, look
from fastkd.trainer.report.pictures import SCORE, Pictures, pictures_of
from fastkd.trainer.report.records import Group, RecordedRun, read_groups
from fastkd.trainer.report.style import render_page, write_atomically
from fastkd.trainer.report.tables import (
    METRICS,
    Cell,
    class_table,
    comparison_table,
    epoch_rows,
    short_name,
    with_teacher,
)
from fastkd.trainer.text import flatten, printable

LOSS = Quantity("loss", "Training loss, weighted sum", mean=True)
TOP5 = Quantity("top5", "Accuracy, top-5 (%)", percent=True)
FURTHER = (  # beside the metrics
    TOP5,
    Quantity("map_50", "mAP, IoU 0.5 (%)", percent=True),
    Quantity("map_75", "mAP, IoU 0.75 (%)", percent=True),
    Quantity("map_small", "mAP of small objects (%)", percent=True),
    Quantity("map_medium", "mAP of medium objects (%)", percent=True),
    Quantity("map_large", "mAP of large objects (%)", percent=True),
    Quantity("recall_5", "Recall@5 (%)", percent=True),
)
EVAL_LOSS = Quantity("eval_loss", "Evaluation loss (nats)", log=True)
SPEED = Quantity("images_per_second", "Images a second")
WAIT = Quantity("data_wait", "Time spent waiting for data (%)", percent=True)
RATE = Quantity("lr", "Learning rate")
NORM = Quantity("grad_norm", "Gradient norm before clipping", log=True)
EVALUATED = [*(quantity for quantity, _ in METRICS.values()), *FURTHER]
KNOWN = {quantity.name: quantity for quantity in (*EVALUATED, LOSS, EVAL_LOSS, SPEED, WAIT, RATE, NORM)}


def write_run_report(
    runs: Sequence[str | Path], out: str | Path | None = None, *, pictures: bool = True, trust_code: bool = False
) -> Path:
    """Write the page about the run folders ``runs`` to ``out`` and return its path.

    A folder may also be that of ``fastkd train --seeds``, which holds a run per seed. ``out`` is by default
    ``report.html`` in the folder if it is one, and ``comparison.html`` here for several. What cannot be read of several
    is left out with a warning, and named on the page.

    The page of a detector has ``pictures`` of what it finds in some evaluation images. For these the models of its
    newest checkpoint are rebuilt. ``trust_code`` allows their config to import and call any
    ``package.module:callable``.

    Raises:
        ValueError: no run can be read, a folder is given twice, or ``out`` is no ``.html`` file.
    """
    groups, problems = read_groups(runs)
    for problem in problems:
        warnings.warn(f"{problem}; left out", RuntimeWarning, stacklevel=2)
    if out is None:
        out = groups[0].folder / "report.html" if len(runs) == 1 else "comparison.html"
    out = Path(out)
    # A slip such as `--out run.json` must not cost the run.
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, expected a file that ends in .html")
    page = render(groups, problems, pictures_of(groups, trust_code) if pictures else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def report_command(
    runs: tyro.conf.Positional[tuple[str, ...]],
    out: str | None = None,
    pictures: bool = True,
    trust_code: bool = False,
) -> None:
    """An HTML page about a training run, or about several compared: curves, results, settings.

    Args:
        runs: run folders, or those of `train --seeds`. A run may still be going on.
        out: the .html file; by default report.html in the run folder, comparison.html here for several.
        pictures: of a detector, show some evaluation images with the boxes of the annotations, the student and the
            teacher.
        trust_code: allow the configs of detectors to import and call package.module:callable, for these pictures.
    """
    with warnings.catch_warnings(record=True, action="always", category=RuntimeWarning) as caught:
        written = write_run_report(runs, out, pictures=pictures, trust_code=trust_code)
    for warning in caught:
        print(f"fastkd report: {printable(str(warning.message))}", file=sys.stderr)
    print(written)


def render(groups: Sequence[Group], problems: Sequence[str] = (), pictures: Pictures | None = None) -> str:
    """The page as HTML text; ``problems`` are lines about folders that are left out."""
    settings = side_by_side([merged([shown_settings(run) for run in group.runs]) for group in groups])
    runs = [run for group in groups for run in group.runs]
    title = f"{len(groups)} training runs compared"
    if len(groups) == 1:
        title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{groups[0].name}: {len(runs)} seeds"
    return render_page(
        Path(__file__).parent,
        title=title,
        groups=groups,
        runs=runs,
        problems=problems,
        looks=[look(index) for index in range(len(groups))],
        comparison=comparison(groups),
        epochs={run.name: epoch_table(run) for run in runs},
        classes=class_table(groups),
        metric=short_name(runs[0].metric),
        pictures=pictures,
        least_score=SCORE,
        sections=draw_sections(groups),
        facts=side_by_side([merged([facts(run) for run in group.runs]) for group in groups]),
        settings=settings,
        # A resumed run may find its data in another folder. Two runs with different folders may have different data.
        differing={
            name: row
            for name, row in settings.items()
            if len(row) > 1 and (name not in FREE_TO_CHANGE or name in ("data.options.root", "epochs"))
        },
        thinned=[run for run in runs if len(run.steps) > MAX_POINTS],
        max_points=MAX_POINTS,
    )


def sections_of(runs: Sequence[RecordedRun]) -> dict[str, list[Quantity]]:
    """The recorded quantities by heading. Headings without any are left out."""
    names = list(dict.fromkeys(name for run in runs for name in run.quantities))
    if all(isinstance(run.info.get("classes"), int) and 0 < run.info["classes"] <= 5 for run in runs):
        names = [name for name in names if name != TOP5.name]  # it is always 100 %
    weighted = {name for run in runs for name in run.info["loss_weights"]}
    found: dict[str, list[Quantity]] = {
        short_name(runs[0].metric): EVALUATED,
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


def draw_sections(groups: Sequence[Group]) -> dict[str, list[Panel]]:
    """A panel for every quantity, by heading."""
    number = itertools.count()
    return {
        heading: [draw(groups, quantity, f"panel{next(number)}") for quantity in quantities]
        for heading, quantities in sections_of([run for group in groups for run in group.runs]).items()
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
        f"teacher's {'accuracy' if run.metric == 'accuracy' else short_name(run.metric)}": with_teacher(run),
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
        "command": info.get("command", "unknown"),
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
    return {name: texts[:1] if len(set(texts)) == 1 else texts for name, texts in _by_name(columns).items()}


def _by_name(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "-") for column in columns] for name in names}


def merged(columns: Sequence[dict[str, str]]) -> dict[str, str]:
    """One text per label for several runs: all different ones."""
    return {name: "; ".join(dict.fromkeys(texts)) for name, texts in _by_name(columns).items()}


def shown_settings(run: RecordedRun) -> dict[str, str]:
    """The settings by the names of their flags. Runs from before a module moved compare as equal."""
    return {name: current_name(value) for name, value in flatten(run.info["config"]).items()}


def epoch_table(run: RecordedRun) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Headings and rows: every quantity after the last epoch, the last evaluated epoch and the best epoch."""
    return epoch_rows(run, [item for items in sections_of([run]).values() for item in items])


def comparison(groups: Sequence[Group]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and one row per run or group of seeds; the metric comes first, as narrow screens show the first."""
    present = [
        item for items in sections_of([run for group in groups for run in group.runs]).values() for item in items
    ]
    return comparison_table(groups, [item for item in (TOP5, EVAL_LOSS, LOSS, SPEED) if item in present])
