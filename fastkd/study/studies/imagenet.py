"""DCD's table 3 (arXiv 2407.11802): ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastkd.study.grid import Cell, Job, Options, Study
from fastkd.study.jobs import Training
from fastkd.study.studies.cifar import with_epochs
from fastkd.study.studies.methods import display, objective
from fastkd.trainer.recipes import RECIPES

AS_RUN = "dcd-as-run"
PAIRS = {
    "ResNet-34 to ResNet-18": "imagenet-r34-r18-dcd",
    "ResNet-50 to ResNet-18": "imagenet-r50-r18-dcd",
    "ResNet-50 to MobileNetV2": "imagenet-r50-mv2-dcd",
}
METHODS = ("ce", "kd", "at", "sp", "cc", "rkd", "crd", "dcd", "dcd+kd", AS_RUN)

SAMPLES = 1_281_167


@dataclass(kw_only=True, frozen=True)
class ImageNetOptions(Options):
    """Options of the study on ImageNet.

    Attributes:
        seeds: runs of every cell of the table, with the seeds 0, 1, ...
        pairs: r34-r18, r50-r18 or r50-mv2; by default all.
        data: the folder with ImageNet-1k: train and val, with a folder per class or shards.
    """

    seeds: int = 1
    pairs: tuple[str, ...] = ()
    data: str = "imagenet"


def table3(options: ImageNetOptions) -> Study:
    """Table 3 of DCD's paper: ImageNet, three pairs, DCD beside KD, AT, SP, CC, RKD and CRD, one seed.

    DCD is as in the recipes imagenet-*-dcd: learnt temperature, negatives of the global batch. "dcd-as-run" is as the
    authors' code runs it: exp(tau) stays at e, negatives of each GPU.
    """
    known = {name.split("-", 1)[1].removesuffix("-dcd"): pair for pair, name in PAIRS.items()}
    unknown = [pair for pair in options.pairs if pair not in known]
    if unknown:
        raise ValueError(f"pairs: got {unknown[0]!r}, expected pairs among {', '.join(known)}")
    rows, pairs = options.choose(METHODS), [known[pair] for pair in options.pairs or known]
    cells = [
        Cell(row=row, column=pair, seed=seed, make=_student(options, PAIRS[pair], row, seed))
        for pair in pairs
        for seed in range(options.seeds)
        for row in rows
    ]
    source = "ImageNet-1k (ILSVRC-2012) from image-net.org, with the folders train and val; --data DIR"
    return Study(
        name="dcd-table3",
        title="DCD, table 3: ImageNet",
        about="ImageNet-1k, top-1 accuracy after the last of 120 epochs. The teachers have torchvision's weights, "
        "which are downloaded.",
        cells=tuple(cells),
        names={row: display(row) for row in rows},
        baseline="kd",
        vanilla="ce",
        sources={options.data: source},
        samples=SAMPLES,
        notes=("The paper's numbers of this table were not at hand, and are left empty.",),
    )


def _student(options: ImageNetOptions, recipe: str, row: str, seed: int) -> Callable[[Path], Job]:
    def make(folder: Path) -> Job:
        config = with_epochs(RECIPES[recipe](), options.epochs)
        with_kd = replace(config.objective, terms="dcd + kd")
        if row != "dcd":
            as_run = RECIPES["imagenet-r34-r18-dcd-as-run"]().objective
            chosen = {"dcd+kd": with_kd, AS_RUN: as_run}
            config = replace(config, objective=chosen.get(row) or objective(row))
        data = replace(config.data, options=config.data.options | {"root": options.data})
        teacher = None if row == "ce" else config.teacher
        return Training(replace(config, teacher=teacher, seed=seed, data=data, device=options.device, run_dir=None))

    return make
