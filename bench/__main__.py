"""``make bench``: runs every case and writes JSON, CSV, Markdown and a plot to bench/results, named by hardware.

``python -m bench contrast`` runs the cases of bench_contrast.py alone.
"""

import sys
from pathlib import Path

import pytest

from bench import breakdown, report

# For the cases of bench_<name>.py: the title of their table, and the name of its first column.
TITLES = {
    "dcd": ("dcd_loss, forward + backward, float32, D = 128", "n"),
    "contrast": ("Losses over one softmax per row, forward + backward, float32", "case"),
    "pool": ("multiscale_pool with normalisation, forward + backward, float32", "case"),
}


def main() -> int:
    slug = report.slug(report.hardware())
    tables = []
    for name in sys.argv[1:] or TITLES:
        path = Path(__file__).parent / "results" / f"{name}-cpu-{slug}.json"
        path.parent.mkdir(exist_ok=True)
        cases = Path(__file__).parent / f"bench_{name}.py"
        code = pytest.main([str(cases), "--benchmark-only", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"])
        if code:
            return int(code)
        tables.append(report.write(path, "make bench", *TITLES[name]))
        if name == "dcd":
            tables[-1].write_text(f"{tables[-1].read_text()}\n{breakdown.markdown()}")
    for table in tables:
        print(table.read_text(), f"\nwritten to {table.parent}", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
