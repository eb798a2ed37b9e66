"""Draws the curves of recorded runs as inline SVG: one panel per quantity, one colour per run or group of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastkd.trainer.report.records import Group, RecordedRun
from fastkd.trainer.report.style import INK, PALETTE, drawing, to_svg

COLOURS = (PALETTE[2], PALETTE[1], PALETTE[4], PALETTE[3], PALETTE[5], PALETTE[0])
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")  # after the last colour, the colours begin again with the next dashes
MAX_POINTS = 600  # per curve
MAX_HOVER = 400  # values that a panel shows on hovering
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
    """Colour and dash pattern of the run, or group of seeds, at ``index``."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def draw(groups: Sequence[Group], quantity: Quantity, key: str) -> Panel:
    """A panel of the quantity over epochs, one colour per group.

    Behind a mean over epochs, the values of single steps are drawn faint. Of the runs of ``--seeds`` the mean is drawn,
    and every run as a thin line behind it.
    """
    lost, total, drawn, hover = 0, 0, [], []
    curves = [curve for index, group in enumerate(groups) for curve in _lines(group, quantity, index, len(groups))]
    with drawing(2.9, style={"axes.formatter.useoffset": False}) as axis:
        for curve in curves:
            if not curve.mean:
                lost, total = lost + int((~np.isfinite(curve.y)).sum()), total + len(curve.y)
            if np.isfinite(curve.y).any():
                drawn.append(curve.y[np.isfinite(curve.y)])
                # At 100 % half of a line would be cut off.
                _plot(axis, *thin(curve.x, curve.y), curve.style | {"clip_on": not quantity.percent})
            if not curve.faint:
                points = zip(*thin(curve.x, curve.y, max(10, MAX_HOVER // len(curves))), strict=True)
                hover += [(x, y, f"{curve.name}, {_when(x, quantity)}: {y:.4g}") for x, y in points if np.isfinite(y)]
        if not drawn:
            return Panel(quantity.title, None, f"none of its {total:,} values is finite")
        _scale(axis, quantity, np.concatenate(drawn))
        # Every panel shows the same epochs.
        last = max(run.last_step / run.steps_per_epoch for group in groups for run in group.runs)
        axis.set_xlim(0, 1.02 * max(last, 1))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        axis.set_xlabel("epoch")
        teachers = _teachers(groups) if quantity.name == groups[0].runs[0].metric else {}
        for accuracy, colour in teachers.items():
            axis.axhline(accuracy, color=colour, linestyle=(0, (4, 3)), linewidth=1, clip_on=False)
        for line in axis.lines:
            line.set_in_layout(False)  # lines that are not clipped would make the margins wider
        if quantity.percent:
            low, high = axis.get_ylim()
            axis.set_ylim(max(low, 0), min(high, 100))
        ends = [f"{curve.name} {curve.y[-1]:.4g}" for curve in curves if not curve.faint and np.isfinite(curve.y[-1])]
        shown = f"dashed: teacher {', '.join(f'{accuracy:.2f}' for accuracy in teachers)}" if teachers else ""
        svg = to_svg(axis, key, f"{quantity.title} over epochs. Last value: {', '.join(ends)}. {shown}".rstrip(), hover)
    gaps = f"{lost:,} of {total:,} values are not finite: gaps" if lost else ""
    return Panel(quantity.title, svg, "; ".join(filter(None, (gaps, shown))))


@dataclass(frozen=True)
class _Line:
    """A drawn curve. ``faint``: it is background. ``mean``: it is that of several runs."""

    name: str
    x: np.ndarray
    y: np.ndarray
    faint: bool
    style: dict[str, Any]
    mean: bool = False


def _lines(group: Group, quantity: Quantity, index: int, groups: int) -> list[_Line]:
    """The curves of the group at ``index``."""
    colour, dash = look(index)
    # The first lines are the broadest, so that lines on top of one another can be told apart.
    width = 1.6 + 0.4 * min(groups - 1 - index, 5)
    style = {"color": colour, "linestyle": (0, tuple(map(float, dash.split()))) if dash else "-", "linewidth": width}
    behind = style | {"alpha": 0.35 if groups == 1 else 0.28, "linewidth": 0.9, "zorder": 1.5}
    if len(group.runs) == 1:
        (run,) = group.runs
        return [_Line(run.name, x, y, faint, behind if faint else style) for x, y, faint in _curves(run, quantity)]
    whole = [(run.name, *_curves(run, quantity)[-1][:2]) for run in group.runs if _curves(run, quantity)]
    found = [_Line(name, x, y, False, behind | {"alpha": 0.6}) for name, x, y in whole]
    common = sorted(set.intersection(*(set(x.tolist()) for _, x, _ in whole))) if whole else []
    if common and len(whole) > 1:
        values = np.mean([y[np.searchsorted(x, common)] for _, x, y in whole], axis=0)
        name = f"{group.name}, mean of {len(whole)} seeds"
        found.append(_Line(name, np.array(common), values, False, style, mean=True))
    return found


def _teachers(groups: Sequence[Group]) -> dict[float, str]:
    """The values of the teachers' metric in percent, with a colour: the group's, where teachers differ."""
    found = {
        100 * run.teacher_accuracy: look(index)[0]
        for index, group in enumerate(groups)
        for run in group.runs
        if run.teacher_accuracy is not None
    }
    return found if len(found) > 1 else dict.fromkeys(found, INK)


def _when(x: float, quantity: Quantity) -> str:
    """The place of a value as a text. A mean over an epoch stands in its middle."""
    return f"epoch {math.ceil(x)}" if quantity.mean else f"epoch {x:.4g}"


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
