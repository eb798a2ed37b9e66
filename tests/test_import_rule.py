"""Imports point one way: the rooms have an order, and no module reaches itself. Files and folders stay small."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastkd", "kernels", "bench", "tests")
# From the bottom to the top. A module may import its own room and the rooms of the lines above it.
ROOMS = [line.split() for line in """
    fastkd.numerics  fastkd.native
    fastkd.kernels  fastkd.backends.masks
    fastkd.validate  fastkd.backends.reference
    fastkd.backends
    fastkd.distributed
    fastkd.ops
    fastkd.functional
    fastkd.losses
    fastkd
    fastkd.trainer.extras
    fastkd.trainer.strict_json  fastkd.trainer.text
    fastkd.trainer.optim  fastkd.trainer.imports  fastkd.trainer.rng  fastkd.trainer.signals  fastkd.trainer.precision
    fastkd.trainer.pulse
    fastkd.trainer.ranks
    fastkd.trainer.callbacks
    fastkd.trainer.batches
    fastkd.trainer.data  fastkd.trainer.models
    fastkd.trainer.objective
    fastkd.trainer.config  fastkd.trainer.files
    fastkd.trainer.tasks
    fastkd.trainer.run  fastkd.trainer.recipes
    fastkd.trainer.commands
    fastkd.trainer.report
    fastkd.trainer
    fastkd.study
    fastkd.demo
    fastkd.cli
    fastkd.__main__
    bench
    tests
""".strip().splitlines()]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of this repository that it imports, in functions too."""
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")]
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}
    # kernels/ is installed as fastkd.kernels.
    files = {f"fastkd.{name}" if name.startswith("kernels") else name: path for name, path in files.items()}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {part if part in files else str(node.module) for part in parts}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= files.keys() - {name}
    return found


def room(module: str) -> str:
    """The room with the longest name that the module's name begins with."""
    parts = module.split(".")
    return next(name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOOR)


def test_no_module_imports_a_room_above_or_beside_its_own() -> None:
    arrows = [(module, other, room(module), room(other)) for module, others in imports().items() for other in others]
    assert [f"{a} -> {b}" for a, b, own, other in arrows if own != other and FLOOR[own] <= FLOOR[other]] == []


def test_every_module_of_fastkd_has_a_place_in_the_order() -> None:
    # These two rooms are an __init__.py alone. A module or folder beside it needs a place of its own in ROOMS.
    assert [name for name in imports() if name != room(name) and room(name) in ("fastkd", "fastkd.trainer")] == []


def test_no_module_reaches_itself() -> None:
    TopologicalSorter(imports()).prepare()  # CycleError names the circle


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_have_at_most_400_lines_and_folders_at_most_15_modules(folder: str) -> None:
    files = sorted((ROOT / folder).glob("**/*.py"))
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    modules = [path.parent.relative_to(ROOT) for path in files if path.name not in ("__init__.py", "__main__.py")]
    assert {str(parent): modules.count(parent) for parent in modules if modules.count(parent) > 15} == {}
