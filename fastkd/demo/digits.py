"""``fastkd demo``: trains one teacher on scikit-learn's handwritten digits, and small students by every method.

The settings were chosen as follows. Only teachers and students trained from scratch were looked at, on 300 validation
images taken out of the training split. (An earlier, coarse look at other networks used test images.) No student had
been distilled when everything below was fixed.

- Data: the 1,797 images are split once, stratified by class, into 1,197 for training and 600 for the test. The teacher
  sees all 1,197 with labels. A student sees 200 of them (20 per class), drawn with its seed. For one seed, every method
  gets the same images, labels, initial weights and order: the methods differ in nothing but their loss.
- Teacher: the wider of two tried (three blocks, from 16 or 32 channels: 99.2 % and 99.6 % of the validation images).
- Student: two blocks of 8 and 16 channels, 1,442 parameters, a 65th of the teacher's. Of the networks (438, 1,442
  and 1,702 parameters) and subsets (100, 200, 300 images) tried, it is a middle one. From scratch it fits its own
  200 images, but with 88.4 % it stays well below the teacher; at least 3 points were asked for.
- Schedule: SGD, 200 epochs of two steps. 400 epochs or twice the learning rate moved the student from scratch by half
  a point at most.
- Losses: the papers' defaults, untuned: CE + KD at temperature 4 + DCD with alpha 0.5 and tau starting at 1, each with
  weight 1. The three later methods were added with settings written down before the first of their students. CKD has
  the weight 100 of its authors' CIFAR-100 recipe, which is the one for small images (on ImageNet it is 10). PCKD, which
  contains KD, and MSDCRD have the modules' defaults, because their papers' code fixes no weight or does not exist. DCD
  and MSDCRD are run alone and with KD. Nothing was changed after a result was seen.
- Accuracy: it is measured after the last epoch, so the test images pick nothing. Every student of every method is
  reported.
"""

import os
import platform
import re
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fastkd.demo.costs import ROUNDS, Cost, measure_costs
from fastkd.demo.results import BASELINE, Results, Run, Teacher, console_table, display_name, verdicts, write_report
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig, parse_terms
from fastkd.trainer.objective.objective import needs
from fastkd.trainer.objective.terms import TERMS
from fastkd.trainer.optim import OptimConfig
from fastkd.trainer.run.describe import versions
from fastkd.trainer.run.loop import train
from fastkd.validate import check_int

TEST_IMAGES, TRAIN_IMAGES, LABELLED = 600, 1197, 200
NET = "fastkd.trainer.models.small:SmallConvNet"
TEACHER = ModelConfig(name=NET, options={"width": 32, "depth": 3})
STUDENT = ModelConfig(name=NET, options={"width": 8, "depth": 2})
DIGITS = {"train_size": TRAIN_IMAGES}


@dataclass(kw_only=True, frozen=True)
class DemoConfig:
    """Train a teacher and students on scikit-learn's digits; print a table and write a report."""

    seeds: int = 10
    """Students per method."""
    epochs: int = 200
    """Epochs per student."""
    teacher_epochs: int = 30
    """Epochs of the teacher."""
    methods: tuple[str, ...] = ("ce", "kd", "dcd", "dcd+kd", "100*ckd", "pckd", "msdcrd", "msdcrd+kd")
    """Objectives as the trainer writes them; "ce" is the student from scratch."""
    workers: int | None = None
    """Processes of one thread each. By default one per core, at most four."""
    out: Path = Path("runs/demo")
    """Folder in which every run of the demo makes a new folder."""

    def __post_init__(self) -> None:
        check_int("seeds", self.seeds, 1)
        check_int("epochs", self.epochs, 1)
        check_int("teacher_epochs", self.teacher_epochs, 1)
        if self.workers is not None:
            check_int("workers", self.workers, 1)
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods: got {self.methods}, expected at least one, each once")
        for method in self.methods:
            unknown = sorted(set(parse_terms(method)) - set(TERMS))
            if unknown:
                raise ValueError(f"methods: got {unknown} in {method!r}, expected terms among {sorted(TERMS)}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training process sends back: plain numbers on the test set."""

    accuracies: list[float]  # after every epoch, in percent
    scale: list[float]  # exp(tau) after every epoch, empty without DCD
    seconds: float
    parameters: int
    logits: np.ndarray  # [n, C]
    features: np.ndarray  # [n, D], what the classifier layer sees


def teacher_config(config: DemoConfig, folder: Path) -> TrainConfig:
    """The teacher, trained on all training images by cross-entropy."""
    return TrainConfig(
        student=TEACHER,
        data=DataConfig(name="digits", options=DIGITS, batch_size=128, eval_batch_size=TEST_IMAGES),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1),
        epochs=config.teacher_epochs,
        device="cpu",
        run_dir=str(folder / "teacher"),
        save_every_epochs=0,
        keep=1,
        tensorboard=False,
        quiet=True,
    )


def student_config(config: DemoConfig, folder: Path, method: str, seed: int) -> TrainConfig:
    """A student. For one seed, the students of all methods differ in nothing but the objective."""
    objective = ObjectiveConfig(terms=method)
    return replace(
        teacher_config(config, folder),
        student=STUDENT,
        teacher=replace(TEACHER, weights=str(folder / "teacher")) if needs("teacher", objective) else None,
        data=DataConfig(
            name="digits",
            options=DIGITS,
            labelled=LABELLED,
            subset_seed=seed,
            batch_size=100,
            eval_batch_size=TEST_IMAGES,
        ),
        objective=objective,
        epochs=config.epochs,
        seed=seed,
        run_dir=str(folder / f"{folder_name(method)}-seed{seed}"),
    )


def folder_name(method: str) -> str:
    """A method as part of a folder's name."""
    return re.sub(r"[^\w.+]+", "-", method)


def train_one(config: TrainConfig) -> Trained:
    """Train, then compute logits and features of the test images."""
    result = train(config)
    _, test = build_datasets(config.data)
    with torch.no_grad():
        output = result.distiller.student(test.images)
    return Trained(
        accuracies=[100 * epoch["accuracy"] for epoch in result.history],
        scale=[epoch["dcd/scale"] for epoch in result.history if "dcd/scale" in epoch],
        seconds=result.seconds,
        parameters=result.parameters,
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
    jobs = {
        (method, seed): student_config(config, folder, method, seed)
        for method in config.methods
        for seed in range(config.seeds)
    }
    workers = config.workers or min(4, usable_cores(), len(jobs))
    # The workers are spawned, because a fork of a process whose torch already runs threads may deadlock. They have one
    # thread, because a second one costs more than it gains on networks this small.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            console.print(f"teacher: {TRAIN_IMAGES:,} labelled images, {config.teacher_epochs} epochs")
            teacher = pool.submit(train_one, teacher_config(config, folder)).result()
            console.print(
                f"teacher: {teacher.accuracies[-1]:.2f} % of {TEST_IMAGES} test images in {teacher.seconds:.1f} s; now "
                f"{len(jobs)} students, {LABELLED} labelled images each, {config.epochs} epochs, {workers} at a time"
            )
            students = collect({key: pool.submit(train_one, job) for key, job in jobs.items()}, console)
            drawn = {"teacher": teacher} | {method: students[method, 0] for method in config.methods}
            points = {name: pool.submit(embed, trained.features) for name, trained in drawn.items()}
            embeddings = {name: future.result() for name, future in points.items()}
            # Costs are measured last, when nothing else of the demo runs.
            measured = dict.fromkeys((BASELINE, *config.methods))
            jobs_of_first_seed = {method: student_config(config, folder, method, 0) for method in measured}
            costs = pool.submit(measure_costs, jobs_of_first_seed).result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # otherwise the remaining students would be trained first
            raise
    results = gather(config, teacher, students, embeddings, costs, workers)
    page = write_report(results, folder)
    link_latest(config.out, folder)
    console.print(console_table(results))
    for sentence in verdicts(results):
        console.print(f"- {sentence}")
    console.print(f"{time.perf_counter() - begun:.0f} s in all. Report: {page}", soft_wrap=True)
    return page


def collect(futures: dict[tuple[str, int], Future[Trained]], console: Console) -> dict[tuple[str, int], Trained]:
    """The results of all students. A progress bar shows how many have come in."""
    for future in track(as_completed(futures.values()), "students", len(futures), console=console, transient=True):
        future.result()  # raises at once what a student raised
    return {key: future.result() for key, future in futures.items()}


def gather(
    config: DemoConfig,
    teacher: Trained,
    students: dict[tuple[str, int], Trained],
    embeddings: dict[str, np.ndarray],
    costs: dict[str, Cost],
    workers: int,
) -> Results:
    """What the report shows, made of what the processes returned."""
    first = student_config(config, Path(), config.methods[0], 0)
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


def describe_settings(config: DemoConfig, first: TrainConfig, teacher: int, student: int) -> dict[str, str]:
    """The settings in words, taken from the configs that were run."""
    optim, objective = first.optim, first.objective
    dcd, pckd, msdcrd = objective.dcd, objective.pckd, objective.msdcrd
    consistency = "KL(student || teacher)" if dcd.consistency == "student||teacher" else "KL(teacher || student)"
    return {
        "data": f"the handwritten digits of scikit-learn, 8x8 pixels: {TRAIN_IMAGES:,} for training, {TEST_IMAGES} for "
        "the test",
        "teacher": f"convolutional network, {teacher:,} parameters, {config.teacher_epochs} epochs on all "
        f"{TRAIN_IMAGES:,} training images with labels; one teacher for all students",
        "student": f"A convolutional network of {student:,} parameters",
        "labelled images": f"{LABELLED} of the training images, balanced over the digits; a method sees no others",
        "seed": "the initial weights, the order of the data and which images are labelled",
        "first seed": "0",
        "schedule": f"{config.epochs} epochs, batch {first.data.batch_size}, SGD with momentum {optim.momentum:g}, "
        f"learning rate {optim.lr:g} falling to zero as a cosine, weight decay {optim.weight_decay:g}",
        "objectives": ", ".join(f"{display_name(method)}: {method}" for method in config.methods)
        + "; CE is part of each, every term has weight 1 unless written",
        "KD": f"temperature {objective.kd.temperature:g}",
        "DCD": f"{dcd.embed_dim} dimensions, alpha {dcd.alpha:g}, consistency {consistency}, tau starts at 1"
        + ("" if dcd.max_scale is None else f", exp(tau) at most {dcd.max_scale:g}"),
        "CKD": f"temperature {objective.ckd.temperature:g}",
        "PCKD": f"weights of category contrast, centres, features and KD {pckd.category_weight:g}, "
        f"{pckd.center_weight:g}, {pckd.feature_weight:g} and {pckd.kd_weight:g} (centres only where both networks are "
        f"equally wide), relations times {pckd.relation_scale:g}, KD temperature {pckd.temperature:g}, preview "
        f"{pckd.preview_base:g}^epoch",
        "MSDCRD": ("three scales of the teacher's map" if msdcrd.windows is None else f"windows {msdcrd.windows}")
        + f", temperature {msdcrd.temperature:g}, positives by {msdcrd.positives}, samples and channels of weights "
        f"{msdcrd.sample_weight:g} and {msdcrd.feature_weight:g}",
        "accuracy": "on the test images after the last epoch",
        "cost of a step": "forward, backward and update of one batch, after the runs: one process, one thread, the "
        f"methods in turn, the median of {ROUNDS} steps. Memory: the most that torch's allocator holds at once during "
        "a step, without weights and optimiser state",
    }


def describe_environment(config: DemoConfig, workers: int) -> dict[str, str]:
    """The command, the machine and the versions."""
    found = versions() | {name: metadata.version(name) for name in ("scikit-learn", "matplotlib")}
    return {
        "command": command_line(config),
        "processor": f"{processor_name()}, {usable_cores()} cores",
        "workers": f"{workers} training process{'es' if workers > 1 else ''}, one thread each",
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


def command_line(config: DemoConfig) -> str:
    """The command that runs the demo with this config."""
    words = ["fastkd", "demo"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *(str(item) for item in values)]
    return shlex.join(words)


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's model name, as far as the system tells it."""
    try:
        listed = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        listed = None
    return listed.group(1) if listed else platform.processor() or platform.machine()


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
