"""Every example of a public docstring runs as it is written, in an empty folder and with a seeded torch.

Its namespace is fresh. It holds torch and the public names of the module that the example belongs to.
"""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

PUBLIC = ("fastkd", "fastkd.losses", "fastkd.trainer")
MUST_HAVE_ONE = ("fastkd", "fastkd.losses")


def examples_of(module_name: str) -> dict[str, doctest.DocTest]:
    """The doctests of a module's public names and of their methods, by qualified name."""
    module = importlib.import_module(module_name)
    finder = doctest.DocTestFinder()
    public = {name: getattr(module, name) for name in module.__all__}
    found = {}
    for name, value in public.items():
        for test in finder.find(value, f"{module_name}.{name}", module=False, globs={"torch": torch, **public}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = {name: test for module in PUBLIC for name, test in examples_of(module).items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(EXAMPLES[name])
    assert runner.failures == 0, capsys.readouterr().out


@pytest.mark.parametrize("module_name", MUST_HAVE_ONE)
def test_every_public_name_has_an_example(module_name: str) -> None:
    names = importlib.import_module(module_name).__all__
    assert {name for name in names if f"{module_name}.{name}" not in EXAMPLES} == set()


def test_every_docstring_of_the_trainer_has_an_example() -> None:
    trainer = importlib.import_module("fastkd.trainer")
    docs = {name: getattr(trainer, name).__doc__ for name in trainer.__all__ if callable(getattr(trainer, name))}
    shown = {name for name, text in docs.items() if f"fastkd.trainer.{name}" in EXAMPLES or "::\n" in text}
    assert docs.keys() - shown == set()
