"""``contrast`` across ranks: by index, by label, masked, of queries with themselves; several processes equal one."""

import importlib.util
from typing import Any

import pytest
import torch

from fastkd.distributed import pack
from tests.helpers.checks import assert_close
from tests.helpers.ranks import run_ranks, succeeded
from tests.ranks import contrast_rank_programs as programs

LABEL = {"positives": "label"}
# name, options, whether there are as many keys as queries
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("sup_con", {}),
    ("sup_con", {"normalize": True}),
    ("sup_con", {"exclude_self": False}),
    ("ckd", {}),
    ("masked", {}),
    ("masked", {"normalize": False}),
    ("masked", LABEL),
]
SIZES = [(4, 4), (5, 2), (0, 3), (2, 2, 2), (3, 0, 1), (1, 4, 2), (2, 2, 2, 2), (3, 1, 0, 2)]
KEY_SIZES = {2: (3, 5), 3: (2, 0, 6), 4: (1, 1, 3, 4)}


def cases_of(sizes: tuple[int, ...], **settings: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "sizes": sizes, "key_sizes": sizes, "options": options, **settings} for name, options in KINDS
    ]


def check(cases: list[dict[str, Any]], **settings: Any) -> list[list[dict[str, Any]]]:
    """Every case on as many ranks as it has sizes; returns the results of all ranks."""
    by_rank = succeeded(run_ranks(len(cases[0]["sizes"]), programs.on_rank, cases, **settings))
    for number, case in enumerate(cases):
        compare(case, [results[number] for results in by_rank])
    return by_rank


def compare(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    sizes, key_sizes, frozen = case["sizes"], case["key_sizes"], case.get("frozen", ())
    x = programs.inputs(sum(sizes), sum(key_sizes))
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    x["query"].requires_grad_()
    x["key"].requires_grad_()
    index = programs.global_index(sizes, key_sizes)
    expected = programs.compute(case["name"], x, index, scale, **{**case["options"], "backend": "reference"})
    expected.backward(torch.tensor(case.get("upstream", 1.0), dtype=torch.float64))
    dtype = case.get("dtype", torch.float64)
    assert_close(torch.stack([result["loss"] for result in results]).mean(), expected.detach(), dtype)
    for key, leaf in (("query", x["query"]), ("key", x["key"]), ("scale", scale)):
        found = [result[key] for result in results]
        if key in frozen or leaf.grad is None:
            assert all(grad is None for grad in found), (case, key)
        elif key == "scale":
            assert_close(torch.stack(found).mean(), leaf.grad, dtype)
        else:
            assert_close(torch.cat(found) / len(sizes), leaf.grad, dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_kind_equals_one_process(sizes: tuple[int, ...]) -> None:
    check(cases_of(sizes, upstream=-1.7))


@pytest.mark.parametrize("world_size", KEY_SIZES)
def test_ranks_may_hold_other_numbers_of_keys_than_of_queries(world_size: int) -> None:
    key_sizes = KEY_SIZES[world_size]
    # A rank without keys can have no query with a positive by index.
    sizes = tuple(4 - number if key_sizes[number] else 0 for number in range(world_size))
    check(
        [
            {"name": "masked", "sizes": sizes, "key_sizes": key_sizes, "options": options, "ring": ring}
            for options in ({}, LABEL)
            for ring in (False, True)
        ]
    )
    check([{"name": "masked", "sizes": (2,) * world_size, "key_sizes": key_sizes, "options": LABEL}])


@pytest.mark.parametrize("sizes", [(4, 4), (3, 0, 2), (1, 2, 3, 1)], ids=str)
def test_a_ring_equals_one_process(sizes: tuple[int, ...]) -> None:
    check(cases_of(sizes, ring=True))


@pytest.mark.parametrize("sizes", [(5, 5), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("extension", [False, True])
def test_chunks_equal_one_process(sizes: tuple[int, ...], extension: bool) -> None:
    if extension and not pack.LIBRARY.exists():
        pytest.skip("the extension is not built")
    library = str(pack.LIBRARY) if extension else None
    check([case for chunks in (2, 4) for case in cases_of(sizes, chunks=chunks, extension=library)])


@pytest.mark.parametrize("frozen", [("query",), ("key",), ("scale",), ("query", "scale"), ("key", "scale")], ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_frozen_inputs_leave_the_other_gradients_exact(frozen: tuple[str, ...], ring: bool) -> None:
    kinds = [(name, options) for name, options in KINDS if name == "masked"]
    sizes, key_sizes = (3, 4), (5, 2)
    settings = {"sizes": sizes, "key_sizes": key_sizes, "frozen": frozen, "ring": ring}
    check([{"name": name, "options": options, **settings} for name, options in kinds])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_keeps_its_tolerance(dtype: torch.dtype) -> None:
    check(cases_of((5, 8), dtype=dtype))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_the_triton_kernels_equal_one_process() -> None:
    """In the interpreter, which computes float32; ranks without queries, without keys, and in a ring."""
    one, other = {"sizes": (5, 0, 3), "key_sizes": (5, 0, 3)}, {"sizes": (4, 0, 2), "key_sizes": (1, 3, 19)}
    settings = [("sup_con", {}, {**one, "ring": True}), ("masked", {"normalize": False}, {**other, "ring": True})]
    settings += [(name, options, {**one, "upstream": -1.7}) for name, options in KINDS]
    settings += [("masked", {}, {**other, "frozen": frozen}) for frozen in ((), ("query",), ("key", "scale"))]
    settings += [("masked", LABEL, {**other, "frozen": frozen}) for frozen in ((), ("key",))]
    cases = [
        {"name": name, "options": {**options, "backend": "triton"}, "dtype": torch.float32, **case}
        for name, options, case in settings
    ]
    by_rank = check(cases, timeout=120, environment={"TRITON_INTERPRET": "1"})
    assert all(result["kernels"] for results in by_rank for result in results)


def test_triton_refuses_tensors_on_a_cpu_on_every_rank() -> None:
    for message in succeeded(run_ranks(2, programs.without_interpreter)):
        assert "backend: 'triton' needs CUDA tensors, got cpu" in message


def test_frozen_keys_keep_the_queries_at_home() -> None:
    """What travels is then the keys and their labels; what the ranks agree on is 32 bytes."""
    n, N = 64, 32
    case = {"name": "masked", "sizes": (n, n), "key_sizes": (N, N), "options": {}}
    both, frozen = (results[0] for results in zip(*check([case, {**case, "frozen": ("key",)}]), strict=True))
    assert frozen["bytes"] == frozen["forward_bytes"] == N * (programs.D * 8 + 8) + 32
    # Queries, two numbers and a weight each, and their labels.
    assert both["bytes"] == frozen["bytes"] + n * (programs.D * 8 + 3 * 8 + 8)


def test_queries_that_are_contrasted_with_each_other_travel_once() -> None:
    n = 64
    (results, _) = check([{"name": "sup_con", "sizes": (n, n), "key_sizes": (n, n), "options": {}}])
    # The count of anchors is reduced by an all-reduce of one number.
    assert results[0]["bytes"] <= n * (programs.D * 8 + 8 + 3 * 8) + 32 + 16


def test_ranks_that_mean_different_positives_all_raise() -> None:
    for message in succeeded(run_ranks(2, programs.differing)):
        assert "positives by label: got False on rank 0, True on rank 1" in message


def test_ranks_that_disagree_on_a_row_itself_all_raise() -> None:
    for message in succeeded(run_ranks(2, programs.excluding)):
        assert "exclude_self: got True on rank 0, False on rank 1" in message


def test_a_bad_index_on_one_rank_is_an_error_on_all() -> None:
    for message in succeeded(run_ranks(2, programs.failing)):
        assert "positive_index: got 4, expected rows of key, in [0, 4) (on rank 1 of 2)" in message
