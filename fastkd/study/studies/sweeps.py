"""DCD's ablations (figures 4 and 5 of arXiv 2407.11802), and its cost beside CRD's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastkd.study.aggregate import entries
from fastkd.study.figures import sweep_line
from fastkd.study.grid import Cell, Job, Picture, Study
from fastkd.study.jobs import Costing
from fastkd.study.studies.cifar import SAMPLES, SCRATCH, CifarOptions, benchmark, cells_of, network, sources
from fastkd.study.studies.methods import dcd, display, objective
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.objective.config import ObjectiveConfig

PAIR = ("wrn_40_2-wrn_16_2",)
PAIR_NOTE = "The pair is a choice of this study: the material at hand does not name the paper's."
# Fig. 5: the weight of the consistency inside DCD, of DCD, and of KD beside it.
SWEEPS: Mapping[str, tuple[float, ...]] = {
    "alpha": (0.01, 0.1, 0.3, 0.5, 0.7, 1, 2, 5),
    "beta": (0.1, 0.5, 1, 2, 5, 10, 50, 100),
    "lambda": (0.1, 0.5, 1, 2, 5, 10),
}
MEANING = {"alpha": "alpha, of the consistency", "beta": "beta, of DCD", "lambda": "lambda, of KD beside DCD"}


def figure4(options: CifarOptions) -> Study:
    """Figure 4 of DCD's paper: no consistency, a fixed temperature, a learnt one.

    The authors' code multiplies cosines by the fixed number 0.07, their equation divides by it. Both are here.
    """
    variants: dict[str, Callable[[], ObjectiveConfig]] = {
        "alpha = 0": partial(dcd, alpha=0.0),
        "tau fixed, cosines / 0.07": partial(dcd, learnable=False, temperature=0.07, max_scale=None),
        "tau fixed, cosines x 0.07": partial(dcd, learnable=False, temperature=1 / 0.07, max_scale=None),
        "tau learnt": dcd,
    }
    return _study(options, "dcd-figure4", "DCD, figure 4: temperature and consistency", variants, "tau learnt")


def figure5(options: CifarOptions) -> Study:
    """Figure 5 of DCD's paper: the weights alpha, beta and lambda.

    In the sweep of lambda, KD has that weight beside DCD; in the others there is no KD.
    """
    variants: dict[str, Callable[[], ObjectiveConfig]] = {}
    for value in SWEEPS["alpha"]:
        variants[f"alpha={value:g}"] = partial(dcd, alpha=float(value))
    for value in SWEEPS["beta"]:
        variants[f"beta={value:g}"] = partial(_terms, f"{value:g}*dcd")
    for value in SWEEPS["lambda"]:
        variants[f"lambda={value:g}"] = partial(_terms, f"dcd + {value:g}*kd")
    study = _study(options, "dcd-figure5", "DCD, figure 5: weights of the loss", variants, "alpha=0.5")
    return replace(study, pictures=draw_sweeps)


def _terms(terms: str) -> ObjectiveConfig:
    return replace(dcd(), terms=terms)


def _study(
    options: CifarOptions,
    name: str,
    title: str,
    variants: Mapping[str, Callable[[], ObjectiveConfig]],
    baseline: str,
) -> Study:
    rows, pairs = options.choose([SCRATCH, *variants]), options.choose_pairs(PAIR)

    def configure(pair: str, row: str) -> TrainConfig:
        config = benchmark(pair, SCRATCH)
        return config if row == SCRATCH else replace(config, objective=variants[row]())

    return Study(
        name=name,
        title=title,
        about=f"CIFAR-100, {', '.join(pairs)}, RepDistiller's settings, DCD as its authors' code runs it.",
        cells=tuple(cells_of(options, pairs, rows, configure)),
        names={SCRATCH: display(SCRATCH)},
        baseline=baseline,
        vanilla=SCRATCH,
        sources=sources(options, pairs),
        samples=SAMPLES,
        notes=() if options.pairs else (PAIR_NOTE,),
    )


def draw_sweeps(study: Study, folder: Path) -> list[Picture]:
    """A picture for each weight: the accuracy against it."""
    drawn: list[Picture] = []
    table = entries(study, folder)
    for column in study.columns:
        for name in SWEEPS:
            points = {
                float(row.partition("=")[2]): list(entry.values.values())
                for (row, of), entry in table.items()
                if of == column and row.startswith(f"{name}=") and entry.values
            }
            if points:
                svg = sweep_line(points, name, f"{name}{len(drawn)}")
                heading = f"{column}: accuracy (%) against the weights"
                text = "The mean over seeds, with one standard deviation either side."
                drawn.append(Picture(heading, MEANING[name], svg, text))
    return drawn


def cost(options: CifarOptions) -> Study:
    """What a step of DCD costs beside CRD with its memories of 16,384 negatives, on this machine.

    Time of a step, and the memory that it holds beyond a step without a teacher. Nothing is trained, and no data are
    needed.
    """
    rows = options.choose((SCRATCH, "kd", "crd", "crd+kd", "dcd", "dcd+kd"))
    pairs = options.choose_pairs(PAIR)
    columns = {"step, ms": "time", "memory, MiB": "memory"}
    cells = [
        Cell(
            row=row,
            column=column if len(pairs) == 1 else f"{pair}: {column}",
            seed=seed,
            make=partial(_cost, pair, row, measure, options.device),
        )
        for pair in pairs
        for seed in range(options.seeds)
        for row in rows
        for column, measure in columns.items()
    ]
    return Study(
        name="dcd-cost",
        title="DCD: cost of a training step beside CRD",
        about=f"{', '.join(pairs)}, 64 images of 32x32, float32. CRD keeps two memories of 50,000 x 128 numbers, which "
        "are not in the memory of a step, and compares every image with 16,384 entries of each.",
        cells=tuple(cells),
        names={row: display(row) for row in rows},
        baseline="crd",
        measure="cost",
        unit="ms or MiB",
        sequential=True,
    )


def _cost(pair: str, row: str, measure: str, device: str, folder: Path) -> Job:
    teacher, _, student = pair.partition("-")
    config = replace(benchmark(pair, SCRATCH), student=network(student), run_dir=None, device=device)
    taught = replace(config, teacher=network(teacher), objective=objective(row))
    assert measure in ("time", "memory")
    return Costing(config if row == SCRATCH else taught, config, "time" if measure == "time" else "memory")
