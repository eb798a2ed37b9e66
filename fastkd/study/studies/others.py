"""The CIFAR-100 tables of CKD (arXiv 2404.14109), PCKD (arXiv 2410.14143) and MSDCRD (arXiv 2502.05835)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastkd.study.grid import Study
from fastkd.study.studies.cifar import SAMPLES, SCRATCH, CifarOptions, Configure, benchmark, cells_of, sources
from fastkd.study.studies.methods import display, objective
from fastkd.study.studies.published import PAIRS
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.recipes import RECIPES

# The pair: weight of CKD, temperature, batch, learning rate. From the configs of the authors' code (ZhouXinzzzzz/CKD).
CKD: dict[str, tuple[float, float, int, float]] = {
    "resnet110-resnet32": (10, 1, 64, 0.05),
    "resnet56-resnet20": (10, 1, 64, 0.05),
    "vgg13-vgg8": (100, 1, 64, 0.05),
    "wrn_40_2-wrn_16_2": (100, 1, 64, 0.05),
    "resnet32x4-resnet8x4": (100, 1, 64, 0.05),
    "wrn_40_2-wrn_40_1": (50, 2, 32, 0.05),
    "resnet32x4-ShuffleV1": (100, 1, 32, 0.01),
    "wrn_40_2-ShuffleV1": (100, 1, 32, 0.01),
    "ResNet50-MobileNetV2": (100, 1, 32, 0.01),
    "resnet32x4-ShuffleV2": (100, 1, 64, 0.01),
    "vgg13-MobileNetV2": (50, 2, 32, 0.01),
}
NO_NUMBERS = "The paper's numbers were not at hand, and are left empty."


def ckd_pairs(options: CifarOptions) -> Study:
    """CKD's 11 pairs on CIFAR-100, each with the authors' weight, temperature, batch and learning rate.

    480 epochs, a cosine, weight decay 5e-4; the best epoch counts, as in the authors' code. "kd" has the same settings.
    """

    def configure(pair: str, row: str) -> TrainConfig:
        weight, temperature, batch, lr = CKD.get(pair, CKD["resnet32x4-resnet8x4"])
        config = RECIPES["cifar100-ckd"]()
        terms = config.objective
        terms = replace(terms, terms=f"{weight:g}*ckd", ckd=replace(terms.ckd, temperature=float(temperature)))
        return replace(
            config,
            objective=terms if row == "ckd" else objective(row),
            data=replace(config.data, batch_size=batch),
            optim=replace(config.optim, lr=lr),
        )

    study = _study(options, "ckd-pairs", "CKD: CIFAR-100", tuple(CKD), ("ce", "kd", "ckd"), configure)
    about = "CIFAR-100, the best of 480 epochs, with the settings of CKD's authors."
    return replace(study, measure="best", about=about)


def pckd(options: CifarOptions) -> Study:
    """PCKD on the benchmark's pairs of CIFAR-100, with the weights of its authors' command.

    The authors' command is for WRN-40-2 to WRN-16-2 alone. The other pairs have its weights.
    """
    return _study(options, "pckd", "PCKD: CIFAR-100", PAIRS, ("ce", "kd", "pckd"), _pckd)


def _pckd(pair: str, row: str) -> TrainConfig:
    config = benchmark(pair, SCRATCH)
    return replace(config, objective=RECIPES["cifar100-pckd"]().objective if row == "pckd" else objective(row))


def msdcrd(options: CifarOptions) -> Study:
    """MSDCRD and MSDCRD + KD on the benchmark's pairs of CIFAR-100, beside KD.

    The weights are the defaults of the module: no public code of the authors was found.
    """
    return _study(options, "msdcrd", "MSDCRD: CIFAR-100", PAIRS, ("ce", "kd", "msdcrd", "msdcrd+kd"), benchmark)


def _study(
    options: CifarOptions, name: str, title: str, pairs: Sequence[str], methods: Sequence[str], configure: Configure
) -> Study:
    chosen, rows = options.choose_pairs(pairs), options.choose(methods)
    return Study(
        name=name,
        title=title,
        about="CIFAR-100, test accuracy after the last of 240 epochs, with RepDistiller's settings.",
        cells=tuple(cells_of(options, chosen, rows, configure)),
        names={row: display(row) for row in rows},
        baseline="kd",
        vanilla=SCRATCH,
        sources=sources(options, chosen),
        samples=SAMPLES,
        notes=(NO_NUMBERS,),
    )
