"""``make bench``: runs every case and writes JSON, CSV, Markdown and a plot to bench/results, named by hardware."""

import re
import sys
from pathlib import Path

import pytest

from bench import breakdown, report


def main() -> int:
    slug = re.sub(r"[^a-z0-9]+", "-", report.hardware().lower()).strip("-")
    path = Path(__file__).parent / "results" / f"dcd-cpu-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    cases = Path(__file__).parent / "bench_dcd.py"
    code = pytest.main([str(cases), "--benchmark-only", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"])
    if code:
        return int(code)
    table = report.write(path, "make bench")
    table.write_text(f"{table.read_text()}\n{breakdown.markdown()}")
    print(table.read_text(), f"\nwritten to {table.parent}", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
