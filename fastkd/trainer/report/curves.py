"""Draws the curves of recorded runs as inline SVG: one panel per quantity, one colour per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastkd.trainer.report.records import RecordedRun
from fastkd.trainer.report.style import PALETTE, drawing, to_svg

COLOURS = (PALETTE[2], PALETTE[1], PALETTE[4], PALETTE[3], PALETTE[5], PALETTE[0])
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")  # after the last colour, the colours begin again with the next dashes
MAX_POINTS = 600  # per curve
LOG_FROM = 100.0  # an axis may be logarithmic if the largest value is more than this many times the smallest


@dataclass(frozen=True)
class Quantity:
    """A recorded value. With ``mean``, its epoch records are means over the epoch. With ``log``, its axis may be
    logarithmic.
    """

    name: str
    title: str
    mean: bool = False
    percent: bool = False
    log: bool = False


@dataclass(frozen=True)
class Panel:
    """A drawn quantity. ``svg`` is None when no value is finite. ``note`` says what the picture does not show."""

    title: str
    svg: str | None
    note: str


def look(index: int) -> tuple[str, str]:
    """Colour and dash pattern of the run at ``index``."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def draw(runs: Sequence[RecordedRun], quantity: Quantity, key: str) -> Panel:
    """A panel of the quantity over epochs, one colour per run.

    Behind a mean over epochs, the values of single steps are drawn faint.
    """
    lost, total, drawn = 0, 0, []
    with drawing(2.9, style={"axes.formatter.useoffset": False}) as axis:
        for index, run in enumerate(runs):
            colour, dash = look(index)
            # The first lines are the broadest, so that lines on top of one another can be told apart.
            width = 1.6 + 0.4 * min(len(runs) - 1 - index, 5)
            pattern = (0, tuple(map(float, dash.split()))) if dash else "-"
            style: dict[str, Any] = {"color": colour, "linestyle": pattern, "linewidth": width}
            for x, y, faint in _curves(run, quantity):
                lost, total = lost + int((~np.isfinite(y)).sum()), total + len(y)
                if np.isfinite(y).any():
                    drawn.append(y[np.isfinite(y)])
                    behind = {"alpha": 0.35 if len(runs) == 1 else 0.28, "linewidth": 0.9, "zorder": 1.5}
                    _plot(axis, *thin(x, y), style | (behind if faint else {}))
        if not drawn:
            return Panel(quantity.title, None, f"none of its {total:,} values is finite")
        _scale(axis, quantity, np.concatenate(drawn))
        # Every panel shows the same epochs.
        axis.set_xlim(0, 1.02 * max(run.last_step / run.steps_per_epoch for run in runs))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axis.set_xlabel("epoch")
        ends = [f"{run.name} {last:.4g}" for run in runs if (last := _last(run, quantity)) is not None]
        svg = to_svg(axis, key, f"{quantity.title} over epochs. Last value: {', '.join(ends)}.")
    note = f"{lost:,} of {total:,} values are not finite: gaps" if lost else ""
    return Panel(quantity.title, svg, note)


def _curves(run: RecordedRun, quantity: Quantity) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """The curves of one run: (epochs, values, whether it is background)."""
    steps, epochs = _points(run, run.steps, quantity), _points(run, run.epochs, quantity)
    if quantity.mean:
        # A mean over an epoch belongs to its middle.
        means = (epochs[0] - 0.5, epochs[1])
        return [(*curve, faint) for curve, faint in ((steps, len(means[0]) > 1), (means, False)) if len(curve[0])]
    x, y = np.concatenate([steps[0], epochs[0]]), np.concatenate([steps[1], epochs[1]])
    order = np.argsort(x, kind="stable")
    return [(x[order], y[order], False)] if len(x) else []


def _points(run: RecordedRun, records: Sequence[dict[str, Any]], quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    """The epochs, as fractions, and the values of the records that have the quantity."""
    found = [(record["step"], record[quantity.name]) for record in records if quantity.name in record]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps / run.steps_per_epoch, values * (100 if quantity.percent else 1)


def thin(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` of a curve: the smallest and the largest value per group of neighbours, so that peaks stay."""
    if len(x) <= points:
        return x, y
    kept = [0, len(x) - 1]
    for group in np.array_split(np.arange(1, len(x) - 1), points // 2 - 1):
        finite = group[np.isfinite(y[group])]
        kept += [finite[y[finite].argmin()], finite[y[finite].argmax()]] if len(finite) else [group[0]]
    chosen = np.unique(kept)
    return x[chosen], y[chosen]


def _plot(axis: Any, x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """Draw a line, broken at values that are not finite. A value without neighbours becomes a dot, which shows."""
    axis.plot(x, y, **style)
    finite = np.pad(np.isfinite(y), 1)
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    axis.plot(x[alone], y[alone], marker="o", markersize=5, **(style | {"linestyle": "none", "zorder": 3}))


def _scale(axis: Any, quantity: Quantity, values: np.ndarray) -> None:
    """Make the axis logarithmic where a few large values would flatten all others."""
    positive = bool((values > 0).all())
    if (quantity.log or quantity.mean) and positive and values.max() > LOG_FROM * values.min():
        axis.set_yscale("log")
        axis.set_ylabel("logarithmic")


def _last(run: RecordedRun, quantity: Quantity) -> float | None:
    """The last value of an epoch, or of a step where no epoch has one."""
    found = (_points(run, records, quantity)[1] for records in (run.epochs, run.steps))
    return next((float(values[-1]) for values in found if len(values)), None)
