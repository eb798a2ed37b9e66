"""Case files of the classical losses against this package: ``python -m tests.helpers.zoo FOLDER``.

A file ``METHOD.npz`` holds cases in float64: ``case0.NAME`` for every input, ``case0.option.NAME``,
``case0.param.MODULE.KEY``, ``case0.loss`` and ``case0.grad.NAME`` for the gradients. Parameters have the names of the
methods' public code. A line per file has the worst relative error of the losses and of all gradients. The exit status
is 1 if one of them is above 1e-10, or if a file cannot be run.
"""

import sys
from pathlib import Path

from tests.helpers.zoo.case import cases_of
from tests.helpers.zoo.methods import METHODS

TOLERANCE = 1e-10


def errors_of(path: Path) -> tuple[float, float]:
    """The worst relative errors of the losses and of the gradients of a file."""
    if path.stem not in METHODS:
        raise ValueError(f"no method of this name, expected one of {', '.join(sorted(METHODS))}")
    cases = cases_of(path)
    for case in cases:
        METHODS[path.stem](case)
        assert case.compared > 0, "no loss was compared"
    assert cases, "the file has no case"
    return max(case.loss_error for case in cases), max(case.grad_error for case in cases)


def main(folder: str) -> int:
    """Prints a line per file. Returns the exit status."""
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        print(f"{folder}: has no .npz file", file=sys.stderr)
        return 1
    failed = False
    for path in paths:
        try:
            loss_error, grad_error = errors_of(path)
            passed = max(loss_error, grad_error) <= TOLERANCE
            line = f"loss {loss_error:.1e}   gradients {grad_error:.1e}   {'ok' if passed else 'FAILED'}"
        except Exception as error:
            passed, line = False, f"FAILED: {type(error).__name__}: {error}"
        failed |= not passed
        print(f"{path.stem:16} {line}")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.helpers.zoo FOLDER")
    sys.exit(main(sys.argv[1]))
