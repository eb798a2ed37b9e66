"""Negatives across ranks: several processes give what one process gives on the concatenated batch."""

import importlib.util
from typing import Any

import pytest
import torch

from tests.helpers.checks import CONSISTENCIES, assert_close, relative_error
from tests.helpers.ranks import run_ranks, succeeded
from tests.ranks import rank_programs as programs

SIZES = [(5,), (4, 4), (5, 2), (0, 3), (2, 2, 2), (1, 4, 2), (3, 0, 1), (2, 2, 2, 2), (3, 1, 0, 2)]
RING = {"max_gathered_bytes": 0}


def one_process(name: str, total: int, options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The definition, or the streaming backend, on the concatenated batch."""
    first, second, scale, weight = programs.case(total, **settings.get("case", {}))
    leaves = [x.requires_grad_() for x in (first, second, scale)]
    options = {**options, "backend": "reference"}
    loss = programs.LOSSES[name](*leaves, sample_weight=weight, **options)
    loss.backward(torch.tensor(settings.get("upstream", 1.0), dtype=loss.dtype))
    return {"loss": loss.detach(), **{key: x.grad for key, x in zip(("first", "second", "scale"), leaves, strict=True)}}


def check_against_one_process(
    name: str, sizes: tuple[int, ...], options: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    results = succeeded(run_ranks(len(sizes), programs.loss_and_gradients, name, sizes, options, settings))
    compare_with_one_process(results, name, sizes, options, settings)
    return results


def compare_with_one_process(
    results: list[dict[str, Any]], name: str, sizes: tuple[int, ...], options: dict[str, Any], settings: dict[str, Any]
) -> None:
    expected = one_process(name, sum(sizes), options, settings)
    world_size = len(sizes)
    actual = {
        "loss": torch.stack([result["loss"] for result in results]).mean(),
        # Rows are owned; averaging their owners' gradients over the ranks divides by W.
        **{
            key: torch.cat([result[key] for result in results]) / world_size
            for key in ("first", "second")
            if settings.get("frozen") != key
        },
    }
    if settings.get("frozen") != "scale":
        actual["scale"] = torch.stack([result["scale"] for result in results]).mean()
    for key, value in actual.items():
        assert_close(
            value, expected[key], settings.get("tolerance", settings.get("case", {}).get("dtype", torch.float64))
        )
    assert all(result["untouched"] for result in results)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_dcd_equals_one_process(sizes: tuple[int, ...], consistency: str) -> None:
    options = {"consistency": consistency, "alpha": 0.7}
    check_against_one_process("dcd", sizes, options, {"case": {"weighted": len(sizes) % 2 == 0}, "upstream": -1.7})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_info_nce_equals_one_process(sizes: tuple[int, ...]) -> None:
    check_against_one_process(
        "info_nce", sizes, {"normalize": sum(sizes) % 2 == 0}, {"case": {"weighted": len(sizes) > 2}}
    )


@pytest.mark.parametrize("name", ["dcd", "info_nce"])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 0, 2), (1, 2, 3, 1)], ids=str)
def test_a_ring_equals_one_process(name: str, sizes: tuple[int, ...]) -> None:
    results = check_against_one_process(name, sizes, {}, {"configure": RING, "case": {"weighted": True}})
    assert all("broadcast" not in result["forward_bytes"] or sizes != (4, 4) for result in results)
    assert all(result["bytes"].get("send", 0) > 0 for result in results)


@pytest.mark.parametrize("name", ["dcd", "info_nce"])
@pytest.mark.parametrize("frozen", ["first", "second", "scale"])
def test_frozen_inputs_leave_the_other_gradients_exact(name: str, frozen: str) -> None:
    check_against_one_process(name, (2, 3), {}, {"frozen": frozen})


@pytest.mark.parametrize("name", ["dcd", "info_nce"])
def test_an_input_frozen_on_one_rank_only_leaves_the_others_exact(name: str) -> None:
    settings = {"frozen": "first", "frozen_on": 1}
    results = succeeded(run_ranks(3, programs.loss_and_gradients, name, (2, 3, 2), {}, settings))
    expected = one_process(name, 7, {}, {})
    assert results[1]["first"] is None
    for rank in (0, 2):
        assert_close(results[rank]["first"] / 3, expected["first"].split((2, 3, 2))[rank], torch.float64)
    assert_close(torch.stack([result["scale"] for result in results]).mean(), expected["scale"], torch.float64)


@pytest.mark.parametrize("name", ["dcd", "info_nce"])
def test_a_rank_without_weights_counts_them_as_ones(name: str) -> None:
    results = succeeded(run_ranks(3, programs.weights_on_some_ranks, name))
    first, second, scale, weight = programs.case(7, weighted=True)
    assert weight is not None
    weight[2:5] = 1
    loss = programs.LOSSES[name](first.requires_grad_(), second, scale, sample_weight=weight)
    assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach(), torch.float64)
    (gradient,) = torch.autograd.grad(loss, first)
    assert_close(torch.cat([result[1] for result in results]) / 3, gradient, torch.float64)


def test_float32_rows_exchanged_in_bfloat16_halve_the_traffic() -> None:
    case = {"dtype": torch.float32, "d": 64}
    half = {"case": case, "configure": {"exchange_dtype": torch.bfloat16}, "tolerance": torch.bfloat16}
    full = check_against_one_process("dcd", (6, 6), {}, {"case": case})
    rounded = check_against_one_process("dcd", (6, 6), {}, half)
    for before, after in zip(full, rounded, strict=True):
        assert before["bytes"]["allgather_base"] - after["bytes"]["allgather_base"] == 6 * 2 * 64 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dcd", "info_nce"])
def test_lower_precision_keeps_its_tolerance(name: str, dtype: torch.dtype) -> None:
    check_against_one_process(name, (5, 8), {}, {"case": {"dtype": dtype, "d": 16}})


def test_many_columns_and_large_scales_are_streamed_in_tiles() -> None:
    """More rows than one tile holds, and a scale beyond the shared exponential."""
    check_against_one_process("dcd", (700, 530), {}, {"case": {"d": 4}})
    check_against_one_process("dcd", (700, 530), {}, {"case": {"d": 4, "scale": 90.0}})
    check_against_one_process("info_nce", (700, 530), {}, {"case": {"d": 4, "scale": 90.0}, "configure": RING})


INTERPRETED = [
    {"case": {"d": 20, "weighted": True}},  # padded
    {"case": {"d": 16, "scale": 60.0}, "configure": RING},
    {"case": {"d": 16}, "frozen": "second"},
    {"case": {"d": 16, "weighted": True}, "frozen": "scale", "bounded": True},
    {"case": {"d": 300}},  # wider than a tile
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_the_triton_kernels_equal_one_process() -> None:
    """In the interpreter, which computes float32: what one rank's block leaves is carried on to the next."""
    sizes = (5, 0, 18)
    cases = [
        ("dcd", sizes, {"consistency": consistency, "backend": "triton"}, {**settings, "case": case})
        for settings in INTERPRETED
        for consistency in CONSISTENCIES
        for case in [{**settings["case"], "dtype": torch.float32}]
    ]
    environment = {"TRITON_INTERPRET": "1"}
    by_rank = succeeded(run_ranks(3, programs.several_cases, cases, timeout=120, environment=environment))
    for case, *results in zip(cases, *by_rank, strict=True):
        compare_with_one_process(results, *case)


def test_sub_groups_and_the_rank_alone() -> None:
    results = succeeded(run_ranks(4, programs.sub_groups))
    first, second, scale, _ = programs.case(8)
    for rank, result in enumerate(results):
        members = [rank % 2, rank % 2 + 2]
        own = torch.cat([first.split(2)[r] for r in members]).requires_grad_()
        loss = programs.dcd_loss(own, torch.cat([second.split(2)[r] for r in members]), scale)
        (grad,) = torch.autograd.grad(loss, own)
        both = torch.stack([results[r]["loss"] for r in members]).mean()
        assert_close(both, loss.detach(), torch.float64)
        assert_close(result["grad"] / 2, grad.split(2)[members.index(rank)], torch.float64)
        alone = first.split(2)[rank].clone().requires_grad_()
        local = programs.dcd_loss(alone, second.split(2)[rank], scale)
        assert_close(result["local"], local.detach(), torch.float64)
        assert_close(result["local_grad"], torch.autograd.grad(local, alone)[0], torch.float64)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_on_the_wire(sizes: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    """(W - 1) n (2 D b + 20), 20 bytes being five numbers of the accumulation dtype, 8 bytes each in float64."""
    d = 16
    settings = {"case": {"dtype": dtype, "d": d, "weighted": weighted}}
    results = succeeded(run_ranks(len(sizes), programs.loss_and_gradients, "dcd", sizes, {}, settings))
    numbers = 5 * (8 if dtype == torch.float64 else 4)
    for n, result in zip(sizes, results, strict=True):
        allowed = (len(sizes) - 1) * n * (2 * d * dtype.itemsize + numbers)
        assert 0.9 * allowed < sum(result["bytes"].values()) <= allowed
        assert result["bytes"] == result["forward_bytes"], "the backward communicated"


def test_a_ring_sends_the_embeddings_twice() -> None:
    settings = {"case": {"dtype": torch.float32, "d": 16}, "configure": RING}
    results = succeeded(run_ranks(3, programs.loss_and_gradients, "dcd", (8, 8, 8), {}, settings))
    for result in results:
        assert result["forward_bytes"]["send"] == 2 * 8 * (2 * 16 * 4)
        assert result["bytes"]["send"] == 2 * result["forward_bytes"]["send"]
        assert result["bytes"]["allgather_base"] == result["forward_bytes"]["allgather_base"]


def test_nothing_but_embeddings_travels_without_gradients() -> None:
    for result in succeeded(run_ranks(2, programs.evaluated_without_gradient)):
        assert result["bytes"] == {"allgather_base": 32 + 3 * 2 * programs.D * 8}


def test_under_torch_compile() -> None:
    results = succeeded(run_ranks(2, programs.compiled))
    first, second, scale, _ = programs.case(6)
    loss = programs.dcd_loss(2 * first.requires_grad_(), second, scale)
    assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach(), torch.float64)
    actual = torch.cat([result[1] for result in results]) / 2
    assert_close(actual, torch.autograd.grad(loss, first)[0], torch.float64)


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
