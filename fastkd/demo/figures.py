"""The figures of the demo's report as inline SVG. Text, axes and grid take the page's colours, in dark mode too."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patheffects import withStroke

from fastkd.demo.config import STEPS
from fastkd.trainer.report.style import INK, PALETTE, PAPER, drawing, to_svg

CLASS_COLOURS = tuple(to_hex(colour) for colour in matplotlib.colormaps["tab10"](range(10)))
EXTRA = {"dcd-e": "#16aeb8"}  # beyond the palette; drawn in dashes, as an ablation
DASHES = (0, (4, 1.5))
Curves = Mapping[str, Sequence[Sequence[float]]]  # method -> one curve per seed, one value per STEPS steps


def colour_of(methods: Sequence[str]) -> dict[str, str]:
    """One colour per method, the same in every figure. The usual methods keep theirs whichever subset is run."""
    order = ["ce", "kd", "dcd", "dcd+kd", "100*ckd", "pckd", "msdcrd", "msdcrd+kd"]
    order += [method for method in methods if method not in order and method not in EXTRA]
    return {method: EXTRA.get(method) or PALETTE[order.index(method) % len(PALETTE)] for method in methods}


def plain(text: str) -> str:
    """The text with matplotlib's mathematics switched off."""
    return text.replace("$", r"\$")


def draw_bands(
    axis: Any,
    curves: Curves,
    names: Mapping[str, str],
    colours: Mapping[str, str],
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Draw the mean over seeds as a line and, for several seeds, one standard deviation on either side as a band.

    The band ends at ``low`` and ``high``, which the quantity cannot pass.
    """
    for index, (method, seeds) in enumerate(curves.items()):
        values = np.asarray(seeds, dtype=float)  # [seeds, evaluations]
        steps = STEPS * np.arange(1, values.shape[1] + 1)
        mean = values.mean(0)
        marker = "o" if len(steps) == 1 else None
        # The first lines are the broadest, so that lines on top of one another can be told apart.
        width = 1.3 + 1.6 * (1 - index / len(curves))
        style = {"color": colours[method], "linestyle": DASHES if method in EXTRA else "-"}
        axis.plot(steps, mean, linewidth=width, marker=marker, label=plain(names[method]), **style)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            below, above = np.clip(mean - spread, low, high), np.clip(mean + spread, low, high)
            axis.fill_between(steps, below, above, color=colours[method], alpha=0.9 / max(5, len(curves)), linewidth=0)
    axis.set_xlabel("step")


def legend_below(axis: Any) -> None:
    """A legend of three columns below the axes, where it hides no curve."""
    axis.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.6)


def learning_curves(curves: Curves, names: Mapping[str, str], teacher_accuracy: float) -> str:
    """The test accuracy (%) over steps."""
    with drawing(4.4) as axis:
        draw_bands(axis, curves, names, colour_of(list(curves)), low=0.0, high=100.0)
        axis.axhline(teacher_accuracy, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="teacher")
        lowest = min(np.asarray(seeds).mean(0)[-1] for seeds in curves.values())
        # The first steps are near chance. Shown whole, they would flatten everything that differs.
        axis.set_ylim(max(0.0, lowest - 22), min(101.0, max(teacher_accuracy, lowest) + 1.5))
        axis.set_ylabel("test accuracy (%)")
        legend_below(axis)
        ends = ", ".join(f"{names[method]} {np.asarray(seeds)[:, -1].mean():.1f} %" for method, seeds in curves.items())
        return to_svg(
            axis, "curves", f"Test accuracy over steps. At the end: {ends}; teacher {teacher_accuracy:.1f} %."
        )


def accuracy_dots(accuracy: Mapping[str, Sequence[float]], names: Mapping[str, str], teacher_accuracy: float) -> str:
    """The test accuracy (%) at the end: a dot per seed, and their mean with one standard deviation on either side."""
    colours = colour_of(list(accuracy))
    with drawing(0.9 + 0.55 * len(accuracy)) as axis:
        for row, (method, seeds) in enumerate(accuracy.items()):
            values = np.asarray(seeds, dtype=float)
            # The dots are set apart vertically in seed order, so that equal accuracies do not hide one another.
            offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
            axis.scatter(values, row + offsets, s=20, color=colours[method], alpha=0.65, linewidths=0)
            spread = values.std(ddof=1) if len(values) > 1 else None
            axis.errorbar(
                values.mean(), row, xerr=spread, color=INK, capsize=4, marker="|", markersize=15, linewidth=1.4
            )
        axis.axvline(teacher_accuracy, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        axis.annotate(
            "teacher", (teacher_accuracy, -0.62), xytext=(-6, 0), textcoords="offset points", ha="right", va="center"
        )
        axis.set_yticks(range(len(accuracy)), [plain(names[method]) for method in accuracy])
        axis.set_ylim(len(accuracy) - 0.5, -0.85)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("test accuracy after the last step (%)")
        means = ", ".join(f"{names[method]} {np.mean(seeds):.2f} %" for method, seeds in accuracy.items())
        return to_svg(axis, "accuracy", f"Accuracy of every seed. Means: {means}; teacher {teacher_accuracy:.2f} %.")


def scale_curves(curves: Curves, names: Mapping[str, str], colours: Mapping[str, str], max_scale: float | None) -> str:
    """The logit scale exp(tau) over steps, with tau on the right-hand axis. A dashed line is the cap on the scale."""
    with drawing(3.6) as axis:
        draw_bands(axis, curves, names, colours, low=1e-3, high=max_scale)
        values = np.concatenate([np.ravel(seeds) for seeds in curves.values()])
        if max_scale is not None:
            axis.axhline(max_scale, color=INK, linewidth=1, linestyle=(0, (5, 3)), label=f"cap ({max_scale:g})")
            values = np.append(values, max_scale)
        # The steps are logarithmic, because the scale often reaches its cap within the first tenth of them.
        steps = STEPS * max(2, *(len(seed) for seeds in curves.values() for seed in seeds))
        axis.set_xscale("log")
        axis.set_xlim(0.9 * STEPS, 1.08 * steps)
        axis.set_xticks(*labelled_ticks(STEPS, steps, (1, 2, 5)))
        axis.set_yscale("log")
        axis.set_ylim(values.min() / 1.25, values.max() * 1.25)
        axis.set_yticks(*labelled_ticks(*axis.get_ylim(), (1, 2, 3, 4, 6, 8)))
        axis.minorticks_off()
        axis.set_ylabel("logit scale, exp(τ)")
        right = axis.secondary_yaxis("right", functions=(np.log, np.exp))
        right.set_yscale("linear")
        right.set_ylabel("τ", rotation=0, labelpad=8)
        legend_below(axis)
        ends = ", ".join(f"{names[method]} {np.asarray(seeds)[:, -1].mean():.2f}" for method, seeds in curves.items())
        return to_svg(axis, "scale", f"Logit scale over steps. At the end: {ends}.")


def labelled_ticks(low: float, high: float, digits: Sequence[int]) -> tuple[list[float], list[str]]:
    """The ticks between ``low`` and ``high`` of a logarithmic axis, begun by one of ``digits``, and their labels."""
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks, [f"{tick:g}" for tick in ticks]


def heat_map(matrix: np.ndarray, limit: float, key: str, description: str) -> str:
    """A class-by-class matrix [C, C] with values from 0 to ``limit``."""
    classes = len(matrix)
    with drawing(2.6, width=2.8) as axis:
        mesh = axis.pcolormesh(matrix, cmap="viridis", vmin=0, vmax=limit)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(classes) + 0.5, [str(index) for index in range(classes)])
        axis.set_yticks(np.arange(classes) + 0.5, [str(index) for index in range(classes)])
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
