"""DCD's tables 1 and 2 and its figures 2 and 3 (arXiv 2407.11802)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastkd.study.grid import Cell, Job, Study
from fastkd.study.jobs import Probing
from fastkd.study.studies.cifar import SAMPLES, SCRATCH, CifarOptions, cells_of, sources
from fastkd.study.studies.methods import display
from fastkd.study.studies.pictures import correlation_differences, embeddings_of_logits
from fastkd.study.studies.published import PAIRS, TABLE1, TABLE1_SOURCE, TABLE2, TABLE2_SOURCE
from fastkd.trainer.commands.linear_probe import SGDProbe
from fastkd.trainer.data.config import DataConfig

METHODS = (
    *("teacher", "ce", "kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "fsp", "crd", "crd+kd"),
    *("ofd", "wsld", "ipwd", "ctkd", "dcd", "dcd+kd"),
)
SETTINGS = "RepDistiller's settings: 240 epochs, batch 64, SGD with weight decay 5e-4 and steps after 150, 180 and 210."
NOTES = {
    "ipwd": "IPWD is our reading of a summary: no public code of it was found.",
    "fsp": "FSP needs networks of equal widths. The pairs that have none are left out.",
}


def table1(options: CifarOptions) -> Study:
    """Table 1 of DCD's paper: 13 pairs on CIFAR-100, DCD beside 17 other methods, 5 seeds.

    The accuracy is that after the last epoch. Students without a teacher are trained once for all pairs.
    """
    pairs, rows = options.choose_pairs(PAIRS), options.choose(METHODS)
    return _on_pairs(options, "dcd-table1", "DCD, table 1: CIFAR-100", pairs, rows)


def figure2(options: CifarOptions) -> Study:
    """Figure 2 of DCD's paper: |teacher - student| of the mean standardised logits of every class.

    The pair of the authors' script is the default. The accuracies are those of its column of table 1.
    """
    study = _figure(options, "dcd-figure2", "DCD, figure 2: how far the classes' mean logits are from the teacher's")
    return replace(study, pictures=correlation_differences)


def figure3(options: CifarOptions) -> Study:
    """Figure 3 of DCD's paper: t-SNE of the test images' logits, 20 classes.

    Perplexity 40, 300 iterations, and the pair of the authors' script. The accuracies are those of table 1.
    """
    study = _figure(options, "dcd-figure3", "DCD, figure 3: t-SNE of the logits")
    return replace(study, pictures=embeddings_of_logits)


def _figure(options: CifarOptions, name: str, title: str) -> Study:
    rows = ("ce", "kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "nst", "crd", "dcd", "dcd+kd")
    options = replace(options, seeds=1) if options.seeds == CifarOptions.seeds else options
    pairs = options.choose_pairs(("wrn_40_2-wrn_40_1",))
    return _on_pairs(options, name, title, pairs, options.choose(rows))


def _on_pairs(options: CifarOptions, name: str, title: str, pairs: list[str], rows: list[str]) -> Study:
    cells = [cell for cell in cells_of(options, pairs, rows) if not _is_impossible(cell)]
    return Study(
        name=name,
        title=title,
        about=f"CIFAR-100, test accuracy after the last epoch. {SETTINGS}",
        cells=tuple(cells),
        names={row: display(row) for row in rows},
        published=TABLE1,
        source=TABLE1_SOURCE,
        baseline="kd",
        vanilla=SCRATCH,
        sources=sources(options, pairs),
        samples=SAMPLES,
        notes=tuple(note for row, note in NOTES.items() if row in rows),
    )


def _is_impossible(cell: Cell) -> bool:
    """Whether this is FSP on a pair of table 1 whose networks have different widths."""
    return cell.row == "fsp" and cell.column in PAIRS and ("fsp", cell.column) not in TABLE1


@dataclass(kw_only=True, frozen=True)
class TransferOptions(CifarOptions):
    """Options of table 2.

    Attributes:
        stl10: the folder with STL-10 (stl10_binary).
        tiny_imagenet: the folder with Tiny-ImageNet, unpacked (tiny-imagenet-200).
        probe_epochs: epochs of the linear probe.
    """

    stl10: str = "stl10"
    tiny_imagenet: str = "tiny-imagenet"
    probe_epochs: int = 120


def table2(options: TransferOptions) -> Study:
    """Table 2 of DCD's paper: features of WRN-16-2 students from CIFAR-100, probed on STL-10 and Tiny-ImageNet.

    The students are those of table 1's first pair. The probe is that of DCD's authors: SGD,
    120 epochs, augmented images, batch norms in train mode.
    """
    rows = options.choose(("ce", "kd", "at", "fitnet", "crd", "crd+kd", "dcd", "dcd+kd"))
    (pair,) = options.choose_pairs(PAIRS[:1])[:1]
    students = cells_of(options, [pair], rows)
    probes = {
        "STL-10": DataConfig(name="stl10", options={"root": options.stl10, "augment": True}),
        "Tiny-ImageNet": DataConfig(name="tiny-imagenet", options={"root": options.tiny_imagenet, "augment": True}),
    }
    cells = [
        Cell(
            row=cell.row,
            column=column,
            seed=cell.seed,
            make=partial(
                _probe, cell.place, data, SGDProbe(epochs=options.probe_epochs, seed=cell.seed), options.device
            ),
            after=(cell.place,),
        )
        for cell in students
        if cell.row != "teacher"
        for column, data in probes.items()
    ]
    published = TABLE2 | {(row, pair): value for (row, of), value in TABLE1.items() if of == pair}
    brought = {
        options.stl10: "STL-10, stl10_binary.tar.gz of ai.stanford.edu/~acoates/stl10, unpacked; --stl10 DIR",
        options.tiny_imagenet: "cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked; --tiny-imagenet DIR",
    }
    return Study(
        name="dcd-table2",
        title="DCD, table 2: transfer of the features",
        about=f"Students of {pair} on CIFAR-100, then a linear probe of their frozen features at 32x32. {SETTINGS}",
        cells=(*students, *cells),
        names={row: display(row) for row in rows},
        published=published,
        source=f"{TABLE2_SOURCE} The column of CIFAR-100: {TABLE1_SOURCE}",
        baseline="kd",
        sources=sources(options, [pair]) | brought,
        samples=SAMPLES,
    )


def _probe(student: str, data: DataConfig, probe: SGDProbe, device: str, folder: Path) -> Job:
    return Probing(folder / student, data, probe, device)
