"""Negatives across ranks: several processes give what the definition gives on the concatenated batch."""

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch

from tests.helpers.checks import CONSISTENCIES, assert_close, relative_error
from tests.helpers.gpu import on_every_device
from tests.helpers.ranks import run_ranks, succeeded
from tests.ranks import rank_programs as programs
from tests.ranks.cases import KINDS, LABEL, Case, check_cases, one_process, run_cases

SIZES = [(5,), (4, 4), (5, 2), (0, 3), (2, 2, 2), (1, 4, 2), (3, 0, 1), (2, 2, 2, 2), (3, 1, 0, 2)]
KEY_SIZES = {2: (3, 5), 3: (2, 0, 6), 4: (1, 1, 3, 4)}
BOTH = ("dcd", "info_nce")  # of which every rank holds as many rows on either side
FROZEN = [("query",), ("key",), ("scale",), ("query", "scale"), ("key", "scale")]


def every_kind(sizes: tuple[int, ...], **settings: Any) -> list[Case]:
    return [Case(name, sizes, options, **settings) for name, options in KINDS]


@on_every_device
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_loss_equals_one_process(sizes: tuple[int, ...], device: str) -> None:
    check_cases(every_kind(sizes, weighted=len(sizes) % 2 == 0, device=device))


@on_every_device
@pytest.mark.parametrize("sizes", [(4, 4), (3, 0, 2), (1, 2, 3, 1)], ids=str)
def test_a_ring_equals_one_process(sizes: tuple[int, ...], device: str) -> None:
    for results in check_cases(every_kind(sizes, ring=True, device=device)):
        assert all("broadcast" not in result["forward_bytes"] or sizes != (4, 4) for result in results)
        assert all(result["bytes"].get("send", 0) > 0 for result in results)


@pytest.mark.parametrize("world_size", KEY_SIZES)
def test_ranks_may_hold_other_numbers_of_keys_than_of_queries(world_size: int) -> None:
    key_sizes = KEY_SIZES[world_size]
    # A rank without keys can have no query with a positive by index.
    sizes = tuple(4 - number if key_sizes[number] else 0 for number in range(world_size))
    cases = [Case("masked", sizes, options, key_sizes, ring=ring) for options in ({}, LABEL) for ring in (False, True)]
    check_cases([*cases, Case("masked", (2,) * world_size, LABEL, key_sizes)])


def test_frozen_inputs_leave_the_other_gradients_exact() -> None:
    cases = [Case(name, (2, 3), frozen=frozen) for name in BOTH for frozen in FROZEN]
    cases += [
        Case("masked", (3, 4), options, (5, 2), frozen=frozen, ring=ring)
        for options in ({}, {"normalize": False}, LABEL)
        for frozen in FROZEN
        for ring in (False, True)
    ]
    check_cases(cases)


def test_an_input_frozen_on_one_rank_only_leaves_the_others_exact() -> None:
    cases = [Case(name, (2, 3, 2), frozen=("query",), frozen_on=1) for name in BOTH]
    for case, results in zip(cases, run_cases(cases), strict=True):
        expected = one_process(case)
        assert results[1]["query"] is None
        for rank in (0, 2):
            assert_close(results[rank]["query"] / 3, expected["query"].split((2, 3, 2))[rank], torch.float64)
        assert_close(torch.stack([result["scale"] for result in results]).mean(), expected["scale"], torch.float64)


@pytest.mark.parametrize("name", BOTH)
def test_a_rank_without_weights_counts_them_as_ones(name: str) -> None:
    results = succeeded(run_ranks(3, programs.weights_on_some_ranks, name))
    first, second, scale, weight = programs.case(7, weighted=True)
    assert weight is not None
    weight[2:5] = 1
    loss = programs.PAIRED[name](first.requires_grad_(), second, scale, sample_weight=weight)
    programs.compare_rows(results, loss, first)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_keeps_its_tolerance(dtype: torch.dtype, device: str) -> None:
    check_cases(every_kind((5, 8), dtype=dtype, d=16, device=device))


def test_float32_rows_exchanged_in_bfloat16_halve_the_traffic() -> None:
    full = Case("dcd", (6, 6), dtype=torch.float32, d=64)
    half = dataclasses.replace(full, exchange_dtype=torch.bfloat16, tolerance=torch.bfloat16)
    for before, after in zip(*check_cases([full, half]), strict=True):
        assert before["bytes"]["allgather_base"] - after["bytes"]["allgather_base"] == 6 * 2 * 64 * 2


def test_many_columns_and_large_scales_are_streamed_in_tiles() -> None:
    """More rows than one tile holds, and a scale beyond the shared exponential."""
    case = Case("dcd", (700, 530), d=4)
    large = dataclasses.replace(case, scale=90.0)
    check_cases([case, large, dataclasses.replace(large, name="info_nce", ring=True)])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_the_triton_kernels_equal_one_process() -> None:
    """In the interpreter, which computes float32: what one rank's block leaves is carried on to the next."""
    cases = [
        Case("dcd", (5, 0, 18), {"consistency": consistency}, **settings)
        for consistency, settings in zip(
            itertools.cycle(CONSISTENCIES),  # tests/interpreted/test_ranks.py has both everywhere
            (
                {"d": 20},  # padded
                {"d": 16, "scale": 60.0, "ring": True, "weighted": False},
                {"d": 16, "frozen": ("key",), "weighted": False},
                {"d": 16, "frozen": ("scale",), "bounded": True},
                {"d": 300, "weighted": False},  # wider than a tile
            ),
        )
    ]
    # Ranks without queries, without keys, and in a ring.
    sizes, other = (5, 0, 3), {"sizes": (4, 0, 2), "key_sizes": (1, 3, 19)}
    cases += [case for case in every_kind(sizes) if case.name != "dcd"]
    cases += [Case("sup_con", sizes, ring=True), Case("masked", options={"normalize": False}, ring=True, **other)]
    cases += [Case("masked", frozen=frozen, **other) for frozen in ((), ("query",), ("key", "scale"))]
    cases += [Case("masked", options=LABEL, frozen=frozen, **other) for frozen in ((), ("key",))]
    cases = [
        dataclasses.replace(case, dtype=torch.float32, options={**case.options, "backend": "triton"}) for case in cases
    ]
    by_case = check_cases(cases, timeout=240, environment={"TRITON_INTERPRET": "1"})
    assert all(result["kernels"] for results in by_case for result in results)


def test_sub_groups_and_the_rank_alone() -> None:
    results = succeeded(run_ranks(4, programs.sub_groups))
    first, second, scale, _ = programs.case(8)
    for rank, result in enumerate(results):
        members = [rank % 2, rank % 2 + 2]
        own = torch.cat([first.split(2)[r] for r in members]).requires_grad_()
        loss = programs.dcd_loss(own, torch.cat([second.split(2)[r] for r in members]), scale)
        programs.compare_rows([results[r]["group"] for r in members], loss, own)
        alone = first.split(2)[rank].clone().requires_grad_()
        programs.compare_rows([result["local"]], programs.dcd_loss(alone, second.split(2)[rank], scale), alone)
        assert "not a member" in result["foreign"]


@pytest.mark.parametrize("sizes", [(4,), (3, 3), (2, 3, 1), (2, 2, 0, 2)], ids=str)
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_ten_ddp_steps_equal_one_process_and_leave_all_ranks_with_the_same_bits(
    sizes: tuple[int, ...], consistency: str
) -> None:
    options = {"consistency": consistency, "max_scale": 3.0}
    results = succeeded(run_ranks(len(sizes), programs.ddp_steps, sizes, 10, options))
    expected = programs.train(programs.Model(**options), 10, lambda x: x, sum(sizes))
    losses = torch.stack([result["losses"] for result in results]).mean(dim=0)
    assert_close(losses, expected["losses"], torch.float64)
    for name, gradient in expected["gradients"].items():
        assert_close(results[0]["gradients"][name], gradient, torch.float64)
    untrained = programs.Model(**options).state_dict()
    for name, value in expected["state"].items():
        assert not torch.equal(value, untrained[name]), f"{name} did not train"
        assert_close(results[0]["state"][name], value, torch.float64)
        for result in results[1:]:
            assert torch.equal(result["state"][name], results[0]["state"][name]), name


@pytest.mark.parametrize("sizes", [(64, 64), (64, 64, 64), (60, 70, 62)], ids=str)
def test_bytes_on_the_wire(sizes: tuple[int, ...]) -> None:
    """(W - 1) n (2 D b + 20), 20 bytes being five numbers of the accumulation dtype, 8 bytes each in float64."""
    d = 16
    cases = [
        Case("dcd", sizes, d=d, dtype=dtype, weighted=weighted)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for weighted in (False, True)
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        numbers = 5 * (8 if case.dtype == torch.float64 else 4)
        for n, result in zip(sizes, results, strict=True):
            allowed = (len(sizes) - 1) * n * (2 * d * case.dtype.itemsize + numbers)
            assert 0.9 * allowed < sum(result["bytes"].values()) <= allowed
            assert result["bytes"] == result["forward_bytes"], "the backward communicated"


def test_a_ring_sends_the_embeddings_twice() -> None:
    (results,) = run_cases([Case("dcd", (8, 8, 8), dtype=torch.float32, d=16, ring=True)])
    for result in results:
        assert result["forward_bytes"]["send"] == 2 * 8 * (2 * 16 * 4)
        assert result["bytes"]["send"] == 2 * result["forward_bytes"]["send"]
        assert result["bytes"]["allgather_base"] == result["forward_bytes"]["allgather_base"]


def test_frozen_keys_keep_the_queries_at_home() -> None:
    """What travels is then the keys and their labels; what the ranks agree on is 32 bytes."""
    n, N = 64, 32
    case = Case("masked", (n, n), key_sizes=(N, N))
    both, frozen = (results[0] for results in run_cases([case, dataclasses.replace(case, frozen=("key",))]))
    own_bytes = sum(frozen["bytes"].values())
    assert own_bytes == sum(frozen["forward_bytes"].values()) == N * (case.d * 8 + 8) + 32
    # Queries, two numbers and a weight each, and their labels.
    assert sum(both["bytes"].values()) == own_bytes + n * (case.d * 8 + 3 * 8 + 8)


def test_queries_that_are_contrasted_with_each_other_travel_once() -> None:
    case = Case("sup_con", (64, 64))
    (results,) = run_cases([case])
    # The count of anchors is reduced by an all-reduce of one number.
    assert sum(results[0]["bytes"].values()) <= 64 * (case.d * 8 + 8 + 3 * 8) + 32 + 16


def test_nothing_but_embeddings_travels_without_gradients() -> None:
    for result in succeeded(run_ranks(2, programs.evaluated_without_gradient)):
        assert result["bytes"] == {"allgather_base": 32 + 3 * 2 * programs.D * 8}


def test_under_torch_compile() -> None:
    results = succeeded(run_ranks(2, programs.compiled))
    first, second, scale, _ = programs.case(6)
    programs.compare_rows(results, programs.dcd_loss(2 * first.requires_grad_(), second, scale), first)


def test_two_losses_alive_at_once_and_a_repeated_backward() -> None:
    results = succeeded(run_ranks(3, programs.backward_late))
    first, second, scale, _ = programs.case(9)
    first = first.requires_grad_()
    expected = [
        torch.autograd.grad(programs.dcd_loss(first, second, scale), first)[0],
        torch.autograd.grad(programs.info_nce_loss(first, second, scale), first)[0],
    ]
    for index, gradient in enumerate([*expected, expected[0]]):
        actual = torch.cat([result[index] for result in results]) / 3
        assert relative_error(actual, gradient) < 1e-10


def test_contrast_by_index_makes_no_tensor_of_a_host_number() -> None:
    """On a GPU that would wait for the device in every forward."""
    assert succeeded(run_ranks(2, programs.without_host_tensors)) == [[], []]


def test_gradients_by_label_keep_their_digits_where_the_loss_has_almost_vanished() -> None:
    assert max(succeeded(run_ranks(2, programs.converged_by_label))) < 0.2
