"""Processes that tests start: setup.py of this repository, and programs that need not import torch and Triton again."""

import json
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


_SERVER = """
import importlib.util, json, os, sys, traceback
import torch
if importlib.util.find_spec("triton"):
    import triton
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT, 0o600), 2)
            os.environ.update(request["environment"])
            sys.argv = ["-c", *request["arguments"]]
            exec(request["program"], {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs programs in forks of a process that has imported torch and Triton; it ends where a ``with`` block ends."""

    def __enter__(self) -> "Forks":
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=60)

    def run(self, program: str, *arguments: str, errors: Path, **environment: str) -> None:
        """Runs the program; AssertionError with the end of its stderr, which goes to ``errors``, unless it succeeds."""
        request = {"program": program, "arguments": arguments, "errors": str(errors), "environment": environment}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        assert code == 0, errors.read_text()[-3000:]
