"""Runs setup.py of this repository."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, **environment},
    )  # fmt: skip
