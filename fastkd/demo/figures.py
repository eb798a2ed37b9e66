"""The figures of the demo's report as inline SVG. Text, axes and grid take the page's colours, in dark mode too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.study.figures import plain
from fastkd.study.studies.digits import STEPS
from fastkd.trainer.report.style import INK, PALETTE, drawing, to_svg

EXTRA = {"dcd-e": "#16aeb8"}  # beyond the palette; drawn in dashes, as an ablation
DASHES = (0, (4, 1.5))
Curves = Mapping[str, Sequence[Sequence[float]]]  # method -> one curve per seed, one value per STEPS steps


def colour_of(methods: Sequence[str]) -> dict[str, str]:
    """One colour per method, the same in every figure. The usual methods keep theirs whichever subset is run."""
    order = ["ce", "kd", "dcd", "dcd+kd", "100*ckd", "pckd", "msdcrd", "msdcrd+kd"]
    order += [method for method in methods if method not in order and method not in EXTRA]
    return {method: EXTRA.get(method) or PALETTE[order.index(method) % len(PALETTE)] for method in methods}


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
