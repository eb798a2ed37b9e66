"""Rows on their way to other ranks: in chunks and one by one, with and without the extension."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.distributed.agree import Peers
from fastkd.distributed.exchange import CHUNK_BYTES, MAX_CHUNKS, chunk_bounds
from fastkd.numerics import unit_rows
from tests.helpers.checks import assert_close, embeddings
from tests.helpers.gpu import on_every_device
from tests.helpers.processes import ROOT
from tests.helpers.ranks import run_ranks, succeeded
from tests.ranks import rank_programs as programs
from tests.ranks.cases import KINDS, Case, check_cases

pytestmark = pytest.mark.slow


@pytest.fixture(params=["extension", "python"])
def path(request: pytest.FixtureRequest) -> str | None:
    """The extension's file, and nothing."""
    return str(request.getfixturevalue("library")) if request.param == "extension" else None


def peers(*sizes: int) -> Peers:
    return Peers(None, 0, sizes, sizes, has_weight=False, needs_grad=True, all_need_grad=True)


def test_the_number_of_chunks_follows_the_bytes_received() -> None:
    row_bytes = 512
    enough = CHUNK_BYTES // row_bytes
    for others, chunks in ((1, 1), (enough - 1, 1), (2 * enough, 2), (4 * enough, 4), (100 * enough, MAX_CHUNKS)):
        assert len(chunk_bounds(peers(others, others), row_bytes)) - 1 == chunks
    # What counts is what all others send together.
    assert len(chunk_bounds(peers(*[enough] * 4), row_bytes)) - 1 == 3
    assert chunk_bounds(peers(3, 3), CHUNK_BYTES) == [0, 1, 2, 3]
    assert chunk_bounds(peers(10, 10), CHUNK_BYTES) == [0, 2, 5, 7, 10]
    assert chunk_bounds(peers(10, 9), CHUNK_BYTES) == []


SUB_GROUP = {"members": (0, 2, 3)}


@on_every_device
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((5, 5), {"d": 40}),
        ((4, 4, 4), {}),
        ((3, 3, 3, 3), {"d": 1}),
        ((5, 2), {}),
        ((4, 0, 3), {"weighted": False}),
        ((3, 1, 0, 2), {"weighted": False}),
        ((4, 4, 4), SUB_GROUP),
        ((4, 0, 3), SUB_GROUP),
        ((4, 1, 3), {**SUB_GROUP, "ring": True}),
    ],
    ids=str,
)
def test_chunks_equal_one_process_and_both_paths_give_the_same_bits(
    sizes: tuple[int, ...], settings: dict[str, Any], library: Path, device: str
) -> None:
    """On a CPU; a GPU sums a row's squares in another order."""
    ways = [(chunks, path) for chunks in (1, 3) for path in (str(library), None)]
    cases = [
        Case(name, sizes, options, chunks=chunks, extension=path, device=device, **settings)
        for name, options in KINDS
        for chunks, path in ways
    ]
    by_case = check_cases(cases, timeout=60)
    for fast, plain in zip(by_case[::2], by_case[1::2], strict=True) if device == "cpu" else ():
        for one, other in zip(fast, plain, strict=True):
            for key in ("loss", "query", "key", "scale"):
                assert (one[key] is None and other[key] is None) or torch.equal(one[key], other[key]), key
    sent = [[result["bytes"] for result in results] for results in by_case]
    for start in range(0, len(cases), len(ways)):
        assert all(own == sent[start] for own in sent[start : start + len(ways)])


@pytest.mark.parametrize(("sizes", "last"), [((4, 4), 2), ((4, 4, 4), 2), ((4, 3, 5), 3)], ids=str)
def test_the_first_remote_block_is_computed_before_the_last_has_been_sent(
    sizes: tuple[int, ...], last: int, path: str | None
) -> None:
    """The last rank holds back its last chunk, or its broadcast; rank 0 would otherwise wait for it in vain."""
    results = succeeded(run_ranks(len(sizes), programs.held_back, sizes, last, path))
    assert results[0] is True
    assert results[-1] is True


@on_every_device
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_stacks_of_one_and_two_keys_of_another_number_and_labels(
    chunks: int, ring: bool, path: str | None, device: str
) -> None:
    results = succeeded(run_ranks(3, programs.exchanged, path, chunks, ring, device, device=device))
    totals = {"equal queries": 9, "equal keys": 15, "unequal queries": 5, "unequal keys": 5}
    for result in results:
        for name, (labels, forward, backward, stops) in result.items():
            kind, stack = name.rsplit(" ", 1)
            rows = torch.stack(embeddings(totals[kind], programs.D)[: int(stack)])
            order = labels - (1 << 60)
            assert sorted(order.tolist()) == list(range(totals[kind]))
            assert torch.equal(forward, rows[:, order])
            assert torch.equal(backward, forward)
            assert stops[-1] == totals[kind]
            if not ring and "equal" in name.split():
                n = totals[kind] // 3
                assert len(stops) == 2 * (1 + 2 * min(chunks, n)), "blocks of a chunk were joined"


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=needs_gpu)])
def test_every_backend_brings_back_what_was_packed(backend: str, device: str, path: str | None) -> None:
    (units,) = succeeded(run_ranks(1, programs.gathered_alone, backend, device, path, timeout=120))
    if units is None:
        pytest.skip("the extension has no CUDA part here")
    for side, rows in enumerate(embeddings(7, programs.D)):
        assert_close(units[side], unit_rows(rows)[0], torch.float64)


def test_forwards_that_no_backward_follows(path: str | None) -> None:
    results = succeeded(run_ranks(2, programs.forwards_alone, path))
    first, second, scale, _ = programs.case(6)
    loss = programs.dcd_loss(first.requires_grad_(), second, scale)
    assert_close(torch.stack([result[2] for result in results]).mean(), loss.detach(), torch.float64)
    programs.compare_rows(results, loss, first)


def test_a_torch_without_distributed() -> None:
    """Nothing of torch.distributed but its name and a stub is there then."""
    program = """
import types, torch, torch._dynamo, torch.distributed as dist
for name in list(vars(dist)):
    if not name.startswith("__") and not isinstance(getattr(dist, name), types.ModuleType):
        delattr(dist, name)
dist.is_available, dist.ProcessGroup = lambda: False, type("ProcessGroup", (), {})
import fastkd
rows = torch.eye(3)
assert fastkd.dcd_loss(rows, rows, 2.0).isfinite()
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
