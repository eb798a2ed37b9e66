"""Figures of studies and of the demo as inline SVG. Text, axes and grid take the page's colours, in dark mode too."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patheffects import withStroke

from fastkd.trainer.report.style import INK, PALETTE, PAPER, drawing, to_svg

CLASS_COLOURS = tuple(to_hex(colour) for colour in matplotlib.colormaps["tab10"](range(10)))


def plain(text: str) -> str:
    """The text with matplotlib's mathematics switched off."""
    return text.replace("$", r"\$")


def accuracy_dots(
    accuracy: Mapping[str, Sequence[float]],
    names: Mapping[str, str],
    colours: Mapping[str, str],
    teacher_accuracy: float | None = None,
    published: Mapping[str, float] | None = None,
    key: str = "accuracy",
    label: str = "test accuracy after the last step (%)",
) -> str:
    """The accuracy at the end: a dot per seed, and their mean with one standard deviation on either side.

    A hollow diamond is the published number, a dashed line the teacher.
    """
    with drawing(0.9 + (0.55 if len(accuracy) < 15 else 0.36) * len(accuracy)) as axis:
        for row, (method, seeds) in enumerate(accuracy.items()):
            values = np.asarray(seeds, dtype=float)
            if published and method in published:
                axis.plot(published[method], row, "D", markersize=6, color=INK, fillstyle="none", linewidth=1.2)
            if not len(values):
                continue
            # The dots are set apart vertically in seed order, so that equal accuracies do not hide one another.
            offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
            axis.scatter(values, row + offsets, s=20, color=colours[method], alpha=0.65, linewidths=0)
            spread = values.std(ddof=1) if len(values) > 1 else None
            axis.errorbar(
                values.mean(), row, xerr=spread, color=INK, capsize=4, marker="|", markersize=15, linewidth=1.4
            )
        if teacher_accuracy is not None:
            axis.axvline(teacher_accuracy, color=INK, linewidth=1, linestyle=(0, (5, 3)))
            axis.text(teacher_accuracy, -0.62, "teacher ", ha="right", va="center")
        axis.set_yticks(range(len(accuracy)), [plain(names.get(method, method)) for method in accuracy])
        axis.set_ylim(len(accuracy) - 0.5, -0.85)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(label)
        means = ", ".join(f"{names.get(method, method)} {np.mean(s):.2f}" for method, s in accuracy.items() if len(s))
        teacher = "" if teacher_accuracy is None else f"; teacher {teacher_accuracy:.2f}"
        return to_svg(axis, key, f"Accuracy of every seed. Means in percent: {means}{teacher}.")


def sweep_line(points: Mapping[float, Sequence[float]], label: str, key: str) -> str:
    """The mean over seeds against a setting on a logarithmic axis, with one standard deviation as bars."""
    with drawing(2.6, width=2.8) as axis:
        x = sorted(points)
        means = [float(np.mean(points[value])) for value in x]
        spreads = [float(np.std(points[value], ddof=1)) if len(points[value]) > 1 else 0.0 for value in x]
        axis.errorbar(x, means, yerr=spreads, marker="o", markersize=4, capsize=3, color=PALETTE[2])
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{value:g}" for value in x], rotation=45)
        axis.minorticks_off()
        axis.set_xlabel(label)
        ends = ", ".join(f"{value:g}: {mean:.2f} %" for value, mean in zip(x, means, strict=True))
        return to_svg(axis, key, f"Accuracy against {label}. {ends}.")


def heat_map(matrix: np.ndarray, limit: float, key: str, description: str, most_ticks: int = 20) -> str:
    """A class-by-class matrix [C, C] with values from 0 to ``limit``."""
    classes = len(matrix)
    with drawing(2.6, width=2.8) as axis:
        mesh = axis.pcolormesh(matrix, cmap="viridis", vmin=0, vmax=limit, rasterized=classes > 20)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        every = -(-classes // most_ticks)
        shown = np.arange(0, classes, every)
        axis.set_xticks(shown + 0.5, [str(index) for index in shown])
        axis.set_yticks(shown + 0.5, [str(index) for index in shown])
        axis.tick_params(length=0, labelsize=9)
        bar = axis.figure.colorbar(mesh, ax=axis, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        return to_svg(axis, key, description)


def scatter_map(points: np.ndarray, labels: np.ndarray, key: str, description: str) -> str:
    """An embedding [n, 2] coloured by class [n], with the number of every class at its median."""
    with drawing(2.8, width=2.8) as axis:
        halo = [withStroke(linewidth=2.5, foreground=PAPER)]
        for label in np.unique(labels):
            members = points[labels == label]
            axis.scatter(
                members[:, 0], members[:, 1], s=5, color=CLASS_COLOURS[label % len(CLASS_COLOURS)], linewidths=0
            )
        for label in np.unique(labels):
            x, y = np.median(points[labels == label], axis=0)
            axis.text(x, y, str(label), ha="center", va="center", fontsize=11, fontweight="bold", path_effects=halo)
        axis.set_axis_off()
        return to_svg(axis, key, description)
