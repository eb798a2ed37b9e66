"""The demo's results: their statistics, and the console table, results.json and HTML page that show them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from fastkd.demo import figures
from fastkd.study import aggregate
from fastkd.study.aggregate import paired, signed, spread, with_spread
from fastkd.study.costs import Cost
from fastkd.study.figures import CLASS_COLOURS, accuracy_dots, heat_map, scatter_map
from fastkd.study.studies.digits import BASELINE
from fastkd.study.studies.methods import display as display_name
from fastkd.trainer.report.style import render_page, write_atomically

TITLE = "A student distilled on handwritten digits"
COLUMNS = {
    "method": "Method",
    "accuracy": "Accuracy, %",
    "scratch": "To scratch",
    "kd": "To KD",
    "time": "Step, ms",
    "memory": "Memory, KiB",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: one method, one seed."""

    method: str  # objective as the trainer names it: "ce", "dcd+kd", "100*ckd"
    seed: int
    seconds: float  # wall clock of the training, its evaluations included
    curve: list[float]  # test accuracy after every STEPS steps, in percent
    scale: list[float]  # logit scale exp(tau) after every STEPS steps; empty where the method has none
    correlation_gap: list[list[float]]  # [C, C] |teacher's - student's| correlation of the class logits, test images

    @property
    def accuracy(self) -> float:
        """The test accuracy after the last step, in percent. No step is picked by its accuracy."""
        return self.curve[-1]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The one teacher of all students."""

    accuracy: float  # on the test set, in percent
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the report shows."""

    teacher: Teacher
    student_parameters: int
    runs: list[Run]
    costs: dict[str, Cost]  # of a training step, for every method and for training from scratch
    embeddings: dict[str, np.ndarray]  # "teacher" or a method -> t-SNE of the test-set features [n, 2]
    labels: np.ndarray  # [n] class of every embedded test image
    test_images: int
    max_scale: float | None  # cap on exp(tau)
    settings: dict[str, str]
    environment: dict[str, str]

    @property
    def methods(self) -> list[str]:
        """The methods in the order in which they were asked for."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, method: str) -> list[Run]:
        """The runs of ``method``, ordered by seed."""
        return sorted((run for run in self.runs if run.method == method), key=lambda run: run.seed)

    def extra_kib(self, method: str) -> float:
        """The peak memory of a step of ``method`` beyond a step from scratch, in KiB."""
        return (self.costs[method].peak_bytes - self.costs[BASELINE].peak_bytes) / 1024

    def accuracies(self, method: str) -> list[float]:
        """The test accuracy of every seed after the last step, in percent."""
        return [run.accuracy for run in self.of(method)]


@dataclass(frozen=True, kw_only=True)
class Difference(aggregate.Difference):
    """The paired difference in accuracy of two methods over the seeds that both ran, in points."""

    method: str
    reference: str


def paired_difference(results: Results, method: str, reference: str) -> Difference | None:
    """The accuracy of ``method`` minus the accuracy of ``reference``, seed by seed. None without a common seed."""
    first = {run.seed: run.accuracy for run in results.of(method)}
    second = {run.seed: run.accuracy for run in results.of(reference)}
    found = paired(first, second)
    return None if found is None else Difference(**vars(found), method=method, reference=reference)


def differences(results: Results) -> list[Difference]:
    """The difference of every method to training from scratch, then of the other methods to KD."""
    methods = results.methods
    pairs = [(method, BASELINE) for method in methods if method != BASELINE and BASELINE in methods]
    pairs += [(method, "kd") for method in methods if method not in (BASELINE, "kd") and "kd" in methods]
    return [found for pair in pairs if (found := paired_difference(results, *pair))]


def verdicts(results: Results) -> list[str]:
    """A sentence for every difference that exceeds the noise, and one per reference for all that do not."""
    sentences = []
    for reference in (BASELINE, "kd"):
        found = [item for item in differences(results) if item.reference == reference]
        within = [item for item in found if item.error is not None and not item.exceeds_noise]
        sentences += [verdict(item) for item in found if item not in within]
        if len(within) == 1:
            sentences += [verdict(within[0])]
        elif within:
            listed = ", ".join(f"{display_name(item.method)} ({signed(item.mean)})" for item in within)
            sentences.append(
                f"Not different from {reference_name(reference)} by more than the noise, in points: {listed}."
            )
    return sentences


def reference_name(method: str) -> str:
    """The name of a reference within a sentence."""
    return "training from scratch" if method == BASELINE else display_name(method)


def verdict(difference: Difference) -> str:
    """One sentence about what the data say about a difference."""
    name, reference = display_name(difference.method), reference_name(difference.reference)
    size = f"{abs(difference.mean):.2f} points"
    if difference.error is None:
        return (
            f"{name} against {reference}: {signed(difference.mean)} points on one seed, which says nothing about noise."
        )
    interval = (
        f"95 % interval {signed(difference.low or 0)} to {signed(difference.high or 0)}, {difference.seeds} seeds"
    )
    if difference.exceeds_noise:
        return f"{name} is {size} {'better' if difference.mean > 0 else 'worse'} than {reference} ({interval})."
    change = f"{signed(difference.mean)} points; {interval}"
    return f"{name} does not differ from {reference} by more than the noise ({change})."


def mean_gap(run: Run) -> float:
    """The mean absolute difference of the class-logit correlations, without the diagonal, which is always zero."""
    gap = np.array(run.correlation_gap)
    return float(gap[~np.eye(len(gap), dtype=bool)].mean())


def summary(results: Results) -> list[dict[str, str]]:
    """The rows of the table, as the console and the page show them."""
    rows = [dict.fromkeys(COLUMNS, "") | {"method": "Teacher", "accuracy": f"{results.teacher.accuracy:.2f}"}]
    for method in results.methods:
        rows.append(
            {
                "method": display_name(method),
                "accuracy": with_spread(results.accuracies(method)),
                "scratch": in_points(results, method, BASELINE),
                "kd": "" if method == BASELINE else in_points(results, method, "kd"),
                "time": f"{results.costs[method].milliseconds:.1f}",
                "memory": "" if method == BASELINE else f"{results.extra_kib(method):.0f}",
            }
        )
    return rows


def in_points(results: Results, method: str, reference: str) -> str:
    """The paired difference of ``method`` to ``reference`` and its standard error. Empty if there is none."""
    delta = None if method == reference else paired_difference(results, method, reference)
    if delta is None:
        return ""
    return signed(delta.mean) + ("" if delta.error is None else f" ± {delta.error:.2f}")


def console_table(results: Results) -> Table:
    """The summary for a terminal, 80 columns wide."""
    caption = (
        f"{seed_count(results)} per method; accuracy on test images: mean ± standard deviation; differences in points: "
        "mean ± standard error, paired by seed; memory: of a step, beyond that from scratch"
    )
    table = Table(title=TITLE, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for key, header in COLUMNS.items():
        table.add_column(header, justify="left" if key == "method" else "right")
    for row in summary(results):
        table.add_row(*row.values())
    return table


def seed_count(results: Results) -> str:
    """The number of seeds per method, in words."""
    counts = sorted({len(results.of(method)) for method in results.methods})
    number = "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return f"{number} seed{'' if number == '1' else 's'}"


def as_json(results: Results) -> dict[str, Any]:
    """Plain data: every run, the statistics and the settings."""
    return {
        "teacher": dataclasses.asdict(results.teacher),
        "student_parameters": results.student_parameters,
        "scratch_step_peak_bytes": results.costs[BASELINE].peak_bytes,
        "summary": [
            {
                "method": method,
                "accuracy_mean": float(np.mean(results.accuracies(method))),
                "accuracy_std": spread(results.accuracies(method)),
                "step_milliseconds": results.costs[method].milliseconds,
                "step_peak_bytes": results.costs[method].peak_bytes,
                "seconds_mean": float(np.mean([run.seconds for run in results.of(method)])),
                "correlation_gap_mean": float(np.mean([mean_gap(run) for run in results.of(method)])),
            }
            for method in results.methods
        ],
        "differences": [
            dataclasses.asdict(item) | {"exceeds_noise": item.exceeds_noise} for item in differences(results)
        ],
        "runs": [dataclasses.asdict(run) | {"accuracy": run.accuracy} for run in results.runs],
        "test_images": results.test_images,
        "settings": results.settings,
        "environment": results.environment,
    }


def draw_figures(results: Results) -> dict[str, Any]:
    """Every figure as SVG text. Panels of small figures are lists of (name, caption, SVG)."""
    methods = results.methods
    names = {method: display_name(method) for method in methods}
    colours = figures.colour_of(methods)
    gaps = {method: np.mean([run.correlation_gap for run in results.of(method)], axis=0) for method in methods}
    limit = max(float(gap.max()) for gap in gaps.values()) or 1.0
    scales = {method: [run.scale for run in results.of(method)] for method in methods if results.of(method)[0].scale}
    maps = []
    for index, (method, gap) in enumerate(gaps.items()):
        number = with_spread([mean_gap(run) for run in results.of(method)], 3)
        alt = (
            f"Absolute difference of the teacher's and the {names[method]} student's class correlations: mean {number}."
        )
        maps.append((names[method], f"mean {number}", heat_map(gap, limit, f"gap{index}", alt)))
    embeddings = []
    for index, (method, points) in enumerate(results.embeddings.items()):
        name = names.get(method, "Teacher")
        alt = f"t-SNE of the {name} network's features of {len(points)} test images, coloured by digit."
        embeddings.append((name, "", scatter_map(points, results.labels, f"tsne{index}", alt)))
    return {
        "curves": figures.learning_curves(
            {method: [run.curve for run in results.of(method)] for method in methods}, names, results.teacher.accuracy
        ),
        "accuracy": accuracy_dots(
            {method: results.accuracies(method) for method in methods}, names, colours, results.teacher.accuracy
        ),
        "scale": figures.scale_curves(scales, names, colours, results.max_scale) if scales else None,
        "correlation": maps,
        "embeddings": embeddings,
    }


def render(results: Results) -> str:
    """The page as HTML text."""
    # The binomial standard error of an accuracy that is measured on this many test images.
    accuracy = float(np.mean([run.accuracy for run in results.runs])) / 100
    sampling_error = 100 * math.sqrt(accuracy * (1 - accuracy) / results.test_images)
    return render_page(
        Path(__file__).parent,
        title=TITLE,
        results=results,
        columns=COLUMNS,
        rows=summary(results),
        seeds=seed_count(results),
        teacher_parameters=f"{results.teacher.parameters:,}",
        student_parameters=f"{results.student_parameters:,}",
        verdicts=verdicts(results),
        figures=draw_figures(results),
        sampling_error=f"{sampling_error:.1f}",
        colours={display_name(method): colour for method, colour in figures.colour_of(results.methods).items()},
        digits=dict(enumerate(CLASS_COLOURS)),
    )


def write_report(results: Results, folder: Path) -> Path:
    """Write results.json and report.html into ``folder``, which is made if absent, and return the page's path.

    Raises:
        ValueError: a run holds a value that is not finite, which would make every mean meaningless.
    """
    for run in results.runs:
        if not np.isfinite([*run.curve, *run.scale, *np.ravel(run.correlation_gap)]).all():
            raise ValueError(f"the run of {run.method}, seed {run.seed}, holds a value that is not finite")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(as_json(results), indent=1, allow_nan=False))
    write_atomically(folder / "report.html", render(results))
    return folder / "report.html"
