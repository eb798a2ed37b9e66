"""``make bench``: runs every case and writes JSON, CSV, Markdown and a plot to bench/results, named by hardware.

``python -m bench contrast`` runs the cases of bench_contrast.py alone. The exit status is 1 where fastkd is slower, or
takes more memory, than ``PROMISES`` of the cases say.
"""

import sys
from pathlib import Path

import pytest

from bench import bench_relations, breakdown, report

# For the cases of bench_<name>.py: the title of their table, and the name of its first column.
TITLES = {
    "dcd": ("dcd_loss, forward + backward, float32, D = 128", "n"),
    "contrast": ("Losses over one softmax per row, forward + backward, float32", "case"),
    "pool": ("multiscale_pool with normalisation, forward + backward, float32", "case"),
    "relations": ("Losses that relate samples, forward + backward, float32", "case"),
}
PROMISES = {"relations": bench_relations.PROMISES}


def main() -> int:
    slug = report.slug(report.hardware())
    tables, broken = [], []
    for name in sys.argv[1:] or TITLES:
        path = Path(__file__).parent / "results" / f"{name}-cpu-{slug}.json"
        path.parent.mkdir(exist_ok=True)
        cases = Path(__file__).parent / f"bench_{name}.py"
        code = pytest.main([str(cases), "--benchmark-only", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"])
        if code:
            return int(code)
        command = "make bench" if len(sys.argv) == 1 else f"python -m bench {' '.join(sys.argv[1:])}"
        tables.append(report.write(path, command, *TITLES[name]))
        broken += report.broken(path, TITLES[name][1], PROMISES.get(name, {}))
        if name == "dcd":
            tables[-1].write_text(f"{tables[-1].read_text()}\n{breakdown.markdown()}")
    for table in tables:
        print(table.read_text(), f"\nwritten to {table.parent}", sep="")
    for line in broken:
        print(line, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
