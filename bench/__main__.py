"""``make bench``: runs every case and writes JSON, CSV, Markdown and a plot to bench/results, named by hardware.

``python -m bench contrast`` runs the cases of bench_contrast.py alone. The exit status is 1 where fastkd is slower, or
takes more memory, than ``PROMISES`` of the cases say. With ``--cpu-time`` the processor time of the process takes the
place of the clock, which on a machine with other work says little. It suits one thread.
"""

import argparse
import shlex
import sys
from pathlib import Path

import pytest

from bench import bench_kd, bench_relations, report
from bench.measuring import breakdown

# For the cases of bench_<name>.py: the title of their table, and the name of its first column.
TITLES = {
    "dcd": ("dcd_loss, forward + backward, float32, D = 128", "n"),
    "contrast": ("Losses over one softmax per row, forward + backward, float32", "case"),
    "pool": ("multiscale_pool with normalisation, forward + backward, float32", "case"),
    "kd": ("The KD family on logits [4096, 1000], forward + backward, float32", "case"),
    "relations": ("Losses that relate samples, forward + backward, float32", "case"),
}
PROMISES = {"kd": bench_kd.PROMISES, "relations": bench_relations.PROMISES}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *TITLES])
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    slug = report.slug(report.hardware())
    command = f"python -m bench {shlex.join(sys.argv[1:])}" if sys.argv[1:] else "make bench"
    tables, broken = [], []
    for name in options.names or TITLES:
        path = Path(__file__).parent / "results" / f"{name}-cpu-{slug}.json"
        path.parent.mkdir(exist_ok=True)
        cases = Path(__file__).parent / f"bench_{name}.py"
        arguments = [str(cases), "--benchmark-only", f"--benchmark-json={path}", "-q", "-p", "no:cacheprovider"]
        arguments += ["--benchmark-timer=time.process_time"] if options.cpu_time else []
        code = pytest.main(arguments)
        if code:
            return int(code)
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
