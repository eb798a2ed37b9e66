"""What the studies on CIFAR-100 share: networks, pairs, teachers, and the benchmark's training settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tyro

from fastkd.study.grid import TEACHER, Cell, Job, Options, place
from fastkd.study.jobs import Training, training
from fastkd.study.studies.methods import objective
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.models.cifar.teachers import PUBLISHED_ACCURACY, TEACHER_FILE, TEACHER_URL, published_teacher
from fastkd.trainer.recipes import RECIPES

LIGHT = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # whose learning rate is 0.01
SCRATCH = "ce"  # the student without a teacher
SAMPLES = 50_000


@dataclass(kw_only=True, frozen=True)
class CifarOptions(Options):
    """Options of the studies on CIFAR-100.

    Attributes:
        pairs: TEACHER-STUDENT, such as resnet32x4-resnet8x4; by default those of the paper.
        data: the folder with CIFAR-100, unpacked (cifar-100-binary or cifar-100-python).
        teachers: the folder with the published teachers, NAME_vanilla/ckpt_epoch_240.pth.
        train_teachers: train the teachers, as a part of the study, instead of reading published ones.
    """

    pairs: tuple[str, ...] = ()
    data: str = "cifar"
    teachers: str = "teachers"
    train_teachers: tyro.conf.FlagCreatePairsOff[bool] = False

    def choose_pairs(self, pairs: Sequence[str]) -> list[str]:
        """The pairs that were asked for; they may be others than the paper's. ValueError for what is no pair."""
        for pair in self.pairs:
            if pair.count("-") != 1:
                raise ValueError(f"pairs: got {pair!r}, expected TEACHER-STUDENT such as {pairs[0]}")
        return list(self.pairs or pairs)


Configure = Callable[[str, str], TrainConfig]  # (pair, row) -> the run of its student, without models and seed


def network(name: str) -> ModelConfig:
    """The network of the benchmarks with this name, such as resnet8x4 or wrn_40_2."""
    return ModelConfig(name=f"cifar:{name}")


def benchmark(pair: str, row: str) -> TrainConfig:
    """RepDistiller's settings for the student of ``pair``, and the objective of the method ``row``."""
    config = _benchmark(row)
    lr = 0.01 if pair.partition("-")[2] in LIGHT else config.optim.lr
    return replace(config, optim=replace(config.optim, lr=lr))


@cache  # an objective takes a while to be checked
def _benchmark(row: str) -> TrainConfig:
    return replace(RECIPES["cifar100-resnet32x4"](), objective=objective(row), teacher=None)


def cells_of(
    options: CifarOptions, pairs: Sequence[str], rows: Sequence[str], configure: Configure = benchmark
) -> list[Cell]:
    """A cell for every pair, row and seed; with ``train_teachers`` also for the teachers, of which there is one each.

    ``teacher`` among the rows is left out where the teachers are not trained. A student without a teacher is one run
    for all pairs with this student.
    """
    cells = []
    for pair in pairs:
        teacher, _, student = pair.partition("-")
        own = place("teachers", teacher, 0)
        if options.train_teachers:
            make, shown = _teacher(options, teacher), TEACHER in rows
            cells.append(Cell(row=TEACHER, column=pair, seed=0, make=make, place=own, shown=shown))
        for seed in range(options.seeds):
            for row in rows:
                if row == TEACHER:
                    continue
                make = _student(options, pair, row, seed, configure)
                if row == SCRATCH:
                    alone = place("without-teacher", student, seed)
                    cells.append(Cell(row=row, column=pair, seed=seed, make=make, place=alone))
                else:
                    after = (own,) if options.train_teachers else ()
                    cells.append(Cell(row=row, column=pair, seed=seed, make=make, after=after))
    return cells


def sources(options: CifarOptions, pairs: Sequence[str]) -> dict[str, str]:
    """Where the data and the teachers' files come from, by their paths."""
    teachers = dict.fromkeys(pair.partition("-")[0] for pair in pairs)
    otherwise = "--teachers DIR if it is elsewhere, --train-teachers to train it"
    data = "CIFAR-100, unpacked from www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz; --data DIR if it is elsewhere"
    return {options.data: data} | {
        str(teacher_file(options, name)): f"RepDistiller's, from {TEACHER_URL.format(name=name)}; {otherwise}"
        for name in teachers
    }


def teacher_file(options: CifarOptions, name: str) -> Path:
    """The file of a published teacher, where RepDistiller's script puts it."""
    return Path(options.teachers) / TEACHER_FILE.format(name=name)


def _teacher(options: CifarOptions, name: str) -> Callable[[Path], Job]:
    def make(folder: Path) -> Job:
        return Training(_finish(options, benchmark(f"-{name}", "ce"), name, 0))

    return make


def _student(options: CifarOptions, pair: str, row: str, seed: int, configure: Configure) -> Callable[[Path], Job]:
    teacher, _, student = pair.partition("-")

    def make(folder: Path) -> Job:
        config = _finish(options, configure(pair, row), student, seed)
        if row == SCRATCH:
            return Training(config)
        if options.train_teachers:
            model = replace(network(teacher), weights=str(folder / place("teachers", teacher, 0)))
        elif teacher in PUBLISHED_ACCURACY:
            model = published_teacher(teacher, options.teachers)
        else:
            model = replace(network(teacher), weights=str(teacher_file(options, teacher)))
        return training(replace(config, teacher=model), row)

    return make


def _finish(options: CifarOptions, config: TrainConfig, student: str, seed: int) -> TrainConfig:
    """The config with its student, seed, data and device, and with the epochs that were asked for."""
    config = with_epochs(config, options.epochs)
    data = replace(config.data, options=config.data.options | {"root": options.data})
    config = replace(config, student=network(student), teacher=None, seed=seed)
    return replace(config, data=data, device=options.device, run_dir=None)


def with_epochs(config: TrainConfig, epochs: int | None) -> TrainConfig:
    """The config with other epochs; the milestones of its learning rate keep their share of them."""
    if epochs is None or epochs == config.epochs:
        return config
    milestones = tuple(milestone * epochs / config.epochs for milestone in config.optim.milestones)
    return replace(config, epochs=epochs, optim=replace(config.optim, milestones=milestones))
