"""A fixture for commands that a user called wrongly."""

from collections.abc import Callable

import pytest

from fastkd.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must end with status 1, and returns the one line that it tells."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run
