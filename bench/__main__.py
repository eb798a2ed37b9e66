"""``make bench``: runs every case and writes JSON, CSV, Markdown and a plot to bench/results, named by hardware.

``python -m bench contrast`` runs the cases of bench_contrast.py alone. It exits with 1 where a case of LEAST is slower
than promised.
"""

import json
import sys
from pathlib import Path

import pytest

from bench import breakdown, report

# For the cases of bench_<name>.py: the title of their table, and the name of its first column.
TITLES = {
    "dcd": ("dcd_loss, forward + backward, float32, D = 128", "n"),
    "contrast": ("Losses over one softmax per row, forward + backward, float32", "case"),
    "pool": ("multiscale_pool with normalisation, forward + backward, float32", "case"),
    "kd": ("The KD family on logits [4096, 1000], forward + backward, float32", "case"),
}
# How many times as fast as eager code the cases are at least, by the shortest times, which a busy machine blurs least.
LEAST = {"kd": {"KD": 2.0, "DKD": 2.0, "LSKD": 2.0, "MLKD, five temperatures": 2.0}}


def main() -> int:
    slug = report.slug(report.hardware())
    tables, slow = [], []
    for name in sys.argv[1:] or TITLES:
        path = Path(__file__).parent / "results" / f"{name}-cpu-{slug}.json"
        path.parent.mkdir(exist_ok=True)
        cases = Path(__file__).parent / f"bench_{name}.py"
        code = pytest.main([str(cases), "--benchmark-only", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"])
        if code:
            return int(code)
        tables.append(report.write(path, "make bench", *TITLES[name]))
        slow += _too_slow(path, LEAST[name]) if name in LEAST else []
        if name == "dcd":
            tables[-1].write_text(f"{tables[-1].read_text()}\n{breakdown.markdown()}")
    for table in tables:
        print(table.read_text(), f"\nwritten to {table.parent}", sep="")
    for line in slow:
        print(line)
    return int(bool(slow))


def _too_slow(results: Path, least: dict[str, float]) -> list[str]:
    rows = report.rows_of(json.loads(results.read_text()), "case")
    times = {(row["case"], row["provider"]): row["min_ms"] for row in rows}
    ratios = {case: times[case, report.BASELINE] / times[case, "fastkd"] for case in least}
    return [
        f"{case}: {ratios[case]:.2f}x as fast as eager code, expected {bound}x"
        for case, bound in least.items()
        if ratios[case] < bound
    ]


if __name__ == "__main__":
    sys.exit(main())
