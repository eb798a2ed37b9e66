"""Published numbers: top-1 accuracy in percent.

What could not be read in public material is not here, and its cells stay empty.
"""

from __future__ import annotations

# A pair is written TEACHER-STUDENT with the names of the networks.
PAIRS = (
    *("wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "resnet56-resnet20", "resnet110-resnet20", "resnet110-resnet32"),
    *("resnet32x4-resnet8x4", "vgg13-vgg8", "vgg13-MobileNetV2", "ResNet50-MobileNetV2", "ResNet50-vgg8"),
    *("resnet32x4-ShuffleV1", "resnet32x4-ShuffleV2", "wrn_40_2-ShuffleV1"),
)

TABLE1_SOURCE = (
    "RepDistiller's README (github.com/HobbitLong/RepDistiller) for the methods up to CRD, and an earlier README of "
    "DCD's authors (github.com/giakoumoglou/distillers) for CRD + KD, DCD and DCD + KD. They are those of table 1: "
    "from them follow the paper's relative improvements over KD, 20.31 % for DCD and 73.87 % for DCD + KD. The paper's "
    "FSP numbers for different architectures are left out, because they equal RepDistiller's NST numbers. OFD, WSLD, "
    "IPWD and CTKD are left empty, because the paper's numbers were not at hand."
)
_TABLE1 = """
teacher   75.61 75.61 72.34 74.31 74.31 79.42 74.64   74.64 79.34 79.34 79.42 79.42 75.61
ce        73.26 71.98 69.06 69.06 71.14 72.50 70.36   64.60 64.60 70.36 70.50 71.82 70.50
kd        74.92 73.54 70.66 70.67 73.08 73.33 72.98   67.37 67.35 73.81 74.07 74.45 74.83
fitnet    73.58 72.24 69.21 68.99 71.06 73.50 71.02   64.14 63.16 70.69 73.59 73.54 73.73
at        74.08 72.77 70.55 70.22 72.31 73.44 71.43   59.40 58.58 71.84 71.73 72.73 73.32
sp        73.83 72.43 69.67 70.04 72.69 72.94 72.68   66.30 68.08 73.34 73.48 74.56 74.52
cc        73.56 72.21 69.63 69.48 71.48 72.97 70.71   64.86 65.43 70.25 71.14 71.29 71.38
vid       74.11 73.30 70.38 70.16 72.61 73.09 71.23   65.56 67.57 70.30 73.38 73.40 73.61
rkd       73.35 72.22 69.61 69.25 71.82 71.90 71.48   64.52 64.43 71.50 72.28 73.21 72.21
pkt       74.54 73.45 70.34 70.25 72.61 73.64 72.88   67.13 66.52 73.01 74.10 74.69 73.89
ab        72.50 72.38 69.47 69.53 70.98 73.17 70.94   66.06 67.20 70.65 73.55 74.31 73.34
ft        73.25 71.59 69.84 70.22 72.37 72.86 70.58   61.78 60.99 70.29 71.75 72.50 72.03
fsp       72.91     - 69.95 70.11 71.89 72.62 70.23       -     -     -     -     -     -
nst       73.68 72.24 69.60 69.53 71.96 73.30 71.53   58.16 64.96 71.28 74.12 74.68 74.89
crd       75.48 74.14 71.16 71.46 73.48 75.51 73.94   69.73 69.11 74.30 75.11 75.65 76.05
crd+kd    75.64 74.38 71.63 71.56 73.75 75.46 74.29   69.94 69.54 74.58 75.12 76.05 76.27
dcd       74.99 73.69 71.18 71.00 73.12 74.23 73.22   68.35 67.39 73.85 74.26 75.26 74.98
dcd+kd    76.06 74.76 71.81 72.03 73.62 75.09 73.95   69.77 70.03 74.08 76.01 76.95 76.51
"""

TRANSFER = ("STL-10", "Tiny-ImageNet")
TABLE2_SOURCE = "an earlier README of DCD's authors (github.com/giakoumoglou/distillers), which has one decimal."
_TABLE2 = """
teacher   68.6 31.5
ce        69.7 33.7
kd        70.9 33.9
at        70.7 34.2
fitnet    70.3 33.5
crd       71.6 35.6
crd+kd    72.2 35.5
dcd       71.2 35.0
dcd+kd    72.5 36.2
"""


def _read(table: str, columns: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """The numbers by (row, column); ``-`` is none."""
    lines = [line.split() for line in table.strip().splitlines()]
    return {
        (row, column): float(value)
        for row, *values in lines
        for column, value in zip(columns, values, strict=True)
        if value != "-"
    }


TABLE1 = _read(_TABLE1, PAIRS)
TABLE2 = _read(_TABLE2, TRANSFER)
