"""``fastkd demo``: the study ``digits`` with few methods and many seeds, and a page that looks at it closely."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fastkd.demo.config import DemoConfig
from fastkd.demo.describe import describe_environment, describe_settings, usable_cores
from fastkd.demo.results import Results, Run, Teacher, console_table, verdicts, write_report
from fastkd.study.costs import Cost, measure_costs
from fastkd.study.grid import place
from fastkd.study.runner import failures, run_cells
from fastkd.study.studies.digits import BASELINE, COLUMN, LABELLED, STEPS, TEACHER_PLACE, digits, student_config
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.report.records import read_run


def demo_command(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train a teacher and students on scikit-learn's digits; print a table and write a report."""
    run_demo(config)


def run_demo(config: DemoConfig) -> Path:
    """Run the demo and return the path of the HTML report, with results.json beside it.

    Everything is written into a new folder in ``config.out``, to which ``config.out/latest`` links. Nothing is deleted.
    """
    console = Console(highlight=False)
    begun = time.perf_counter()
    folder = new_folder(config.out)
    options = config.options(folder)
    count = len(config.methods) * config.seeds
    workers = config.workers or min(4, usable_cores(), count)
    console.print(
        f"a teacher, then {count} students, {LABELLED} labels each, {STEPS * config.epochs} steps, {workers} at a time"
    )
    if run_cells(digits, options, tell=lambda line: None):
        raise KeyboardInterrupt
    for cell, error in failures(digits(options), folder).items():
        raise ValueError(f"{folder / cell}: {error}")
    teacher = read_trained(folder / TEACHER_PLACE)
    keys = [(method, seed) for method in config.methods for seed in range(config.seeds)]
    students = {(method, seed): read_trained(folder / place(COLUMN, method, seed)) for method, seed in keys}
    # The workers are spawned, because a fork of a process whose torch already runs threads may deadlock. They have one
    # thread, because a second one costs more than it gains on networks this small.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        drawn = {"teacher": teacher} | {method: students[method, 0] for method in config.methods}
        points = {name: pool.submit(embed, trained.features) for name, trained in drawn.items()}
        embeddings = {name: future.result() for name, future in points.items()}
        # Costs are measured last, when nothing else of the demo runs.
        measured = dict.fromkeys((BASELINE, *config.methods))
        jobs = {method: student_config(options, folder, method, 0) for method in measured}
        costs = pool.submit(measure_costs, jobs).result()
    results = gather(config, teacher, students, embeddings, costs, workers)
    page = write_report(results, folder)
    link_latest(config.out, folder)
    console.print(console_table(results))
    for sentence in verdicts(results):
        console.print(f"- {sentence}")
    console.print(f"{time.perf_counter() - begun:.0f} s in all. Report: {page}", soft_wrap=True)
    return page


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run of the demo as plain numbers, on the test set."""

    accuracies: list[float]  # of every evaluation, in percent
    scale: list[float]  # exp(tau) at every evaluation, empty without DCD
    seconds: float
    parameters: int
    logits: np.ndarray  # [n, C]
    features: np.ndarray  # [n, D], what the classifier layer sees


def read_trained(folder: Path) -> Trained:
    """The records of a run, and the logits and features of the test images by its student."""
    run, opened = read_run(folder, folder.name), reopen(folder, with_data=False)
    _, test = build_datasets(opened.config.data)
    with torch.no_grad():
        output = FeatureModel(opened.model).eval()(test.images)
    evaluated = [epoch for epoch in run.epochs if "accuracy" in epoch]
    return Trained(
        accuracies=[100 * epoch["accuracy"] for epoch in evaluated],
        scale=[epoch["dcd/scale"] for epoch in run.epochs if "dcd/scale" in epoch],
        seconds=opened.checkpoint.state["seconds"],
        parameters=run.info["student"]["parameters"],
        logits=output.logits.double().numpy(),
        features=output.features.double().numpy(),
    )


def class_correlation(logits: np.ndarray) -> np.ndarray:
    """The Pearson correlation [C, C] of class logits [n, C]. A logit that never changes correlates with nothing."""
    centred = logits - logits.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    return unit.T @ unit


def embed(features: np.ndarray) -> np.ndarray:
    """The t-SNE [n, 2] of features [n, D], always from the same start."""
    from sklearn.manifold import TSNE

    # With more threads than free cores, OpenMP waits by spinning, which is twenty times slower beside another process.
    with threadpool_limits(1):
        return TSNE(max_iter=500, init="pca", random_state=0).fit_transform(features)


def gather(
    config: DemoConfig,
    teacher: Trained,
    students: dict[tuple[str, int], Trained],
    embeddings: dict[str, np.ndarray],
    costs: dict[str, Cost],
    workers: int,
) -> Results:
    """What the report shows, made of what the processes returned."""
    # The first that is distilled, if any is: the student from scratch has other data.
    options = config.options(Path())
    configs = [student_config(options, Path(), method, 0) for method in config.methods]
    first = next((config for config in configs if config.data.unlabelled), configs[0])
    _, test = build_datasets(first.data)
    reference = class_correlation(teacher.logits)
    runs = [
        Run(
            method=method,
            seed=seed,
            seconds=student.seconds,
            curve=student.accuracies,
            scale=student.scale,
            correlation_gap=np.abs(reference - class_correlation(student.logits)).tolist(),
        )
        for (method, seed), student in students.items()
    ]
    parameters = next(iter(students.values())).parameters
    return Results(
        teacher=Teacher(accuracy=teacher.accuracies[-1], parameters=teacher.parameters, seconds=teacher.seconds),
        student_parameters=parameters,
        runs=runs,
        costs=costs,
        embeddings=embeddings,
        labels=test.labels.numpy(),
        test_images=len(test),
        max_scale=first.objective.dcd.max_scale,
        settings=describe_settings(config, first, teacher.parameters, parameters),
        environment=describe_environment(config, workers),
    )


def new_folder(parent: Path) -> Path:
    """A new folder in ``parent``, named after the time."""
    stem = time.strftime("%Y%m%d-%H%M%S")
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise FileExistsError(f"{parent}: found no free name for a new folder")


def link_latest(parent: Path, folder: Path) -> None:
    """Make ``parent/latest`` a link to ``folder``, unless something that is no link has that name."""
    link = parent / "latest"
    if link.exists() and not link.is_symlink():
        return
    temporary = parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(link)
    except OSError:
        pass  # the file system has no links, and the printed path is enough
