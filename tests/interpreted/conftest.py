"""Runs the kernels in Triton's interpreter, on the CPU: against the float64 definition, with small tiles.

The interpreter is chosen when Triton is imported, so that these tests need a process with TRITON_INTERPRET=1 and are
left out of any other. bfloat16 is left to the tests on a GPU, because the interpreter multiplies it wrongly.
"""

import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    """A test may replace what the caches were filled from."""
    from fastkd.kernels import launch

    launch.clear_caches()
    yield
    launch.clear_caches()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of matrix products, where they are used."""
    from fastkd.kernels import products

    monkeypatch.setattr(products, "ROWS", 16)
    monkeypatch.setattr(products, "COLUMNS", 24)


@pytest.fixture(params=["streaming", "wide"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the streaming kernels multiply, or torch.mm."""
    from fastkd.backends.triton import rows

    if request.param == "wide":
        monkeypatch.setattr(rows, "fits", lambda *_: False)
    return request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of empty tensors that nothing writes show as NaN. Gives a list with the size of every tensor made."""
    made: list[int] = []

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **options: object) -> Tensor:
            found = make(*args, **options)
            made.append(found.numel())
            return found.fill_(math.nan) if found.is_floating_point() else found

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    return made
