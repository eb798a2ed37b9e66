"""Fixtures of several test files. Every process computes with one thread: there are as many of them as cores."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import torch

from fastkd.native import LIBRARY
from tests.helpers.gpu import is_lost
from tests.helpers.processes import run_setup


def pytest_report_header() -> str:
    """Says in which of the two ways the kernels are tested; tests/interpreted/conftest.py says why there are two."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels: in Triton's interpreter"
    return "kernels: tests/interpreted is left out; set TRITON_INTERPRET=1 to run it"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension as installed, or built for CPU where it is not."""
    if LIBRARY.exists():
        return LIBRARY
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("extension")
    arguments = ("build_ext", f"--build-lib={folder / 'lib'}", f"--build-temp={folder / 'temp'}")
    result = run_setup(*arguments, FASTKD_EXTENSION="1", FASTKD_CUDA="0")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "lib" / "fastkd" / LIBRARY.name


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """After an illegal access, say, every CUDA call of the process fails: the tests that follow get another process.

    A worker of pytest-xdist ends here, and counts as crashed in the test that lost the device; a new one takes its
    place. Without workers the session ends.
    """
    before = item.session.testsfailed
    result = yield
    if item.session.testsfailed > before and is_lost():
        if hasattr(item.config, "workerinput"):
            os._exit(1)
        item.session.shouldstop = "the CUDA device is lost to this process"
    return result
