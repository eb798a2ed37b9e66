"""The losses of several ranks as one table: what each rank computes, and what one process computes instead."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.measuring.traffic import CountedBytes
from fastkd import ckd_loss, dcd_loss, info_nce_loss, masked_contrast_loss, native, sup_con_loss
from fastkd.distributed import exchange, pack
from fastkd.distributed import group as fastkd_distributed
from tests.helpers.checks import assert_close
from tests.helpers.ranks import patches, run_ranks, succeeded

CLASSES = 3
Inputs = dict[str, Tensor]


def _plain(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, index, scale, **options: loss(x["query"], x["key"], scale, **options)


def _masked(x: Inputs, index: Tensor | None, scale: Any, **options: Any) -> Tensor:
    if options.get("positives") != "label":
        options["positive_index"] = index
    return masked_contrast_loss(x["query"], x["key"], scale, x["query_labels"], x["key_labels"], **options)


# name -> the loss of the inputs, of an index of positives and of the scale
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dcd": _plain(dcd_loss),
    "info_nce": _plain(info_nce_loss),
    "ckd": lambda x, index, scale, **options: ckd_loss(x["query"], x["key"], 0.7, **options),
    "sup_con": lambda x, index, scale, **options: sup_con_loss(x["query"], x["query_labels"], scale, **options),
    "masked": _masked,
}
LABEL = {"positives": "label"}
# The forms of every loss: name, options.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("dcd", {"alpha": 0.7}),
    ("dcd", {"alpha": 0.7, "consistency": "teacher||student"}),
    ("info_nce", {}),
    ("info_nce", {"normalize": False}),
    ("sup_con", {}),
    ("sup_con", {"normalize": False}),
    ("sup_con", {"exclude_self": False}),
    ("ckd", {}),
    ("masked", {}),
    ("masked", {"normalize": False}),
    ("masked", LABEL),
]


@dataclass(frozen=True)
class Case:
    """A loss on ranks that hold ``sizes`` queries and ``key_sizes`` keys each; None: as many."""

    name: str
    sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    key_sizes: tuple[int, ...] | None = None
    d: int = 6
    dtype: torch.dtype = torch.float64
    device: str = "cpu"  # of the ranks' tensors; one process computes on the CPU
    scale: float = 2.5
    weighted: bool = True
    upstream: float = -1.7
    frozen: tuple[str, ...] = ()  # names of inputs that need no gradient
    frozen_on: int | None = None  # the rank on which they are; None: all
    bounded: bool = False  # the scale is a number, whose bound is known
    ring: bool = False
    exchange_dtype: torch.dtype | None = None
    chunks: int | None = None
    extension: str | None = ""  # path of the extension; None: without; "": as it is
    members: tuple[int, ...] | None = None  # the ranks of a sub-group
    tolerance: torch.dtype | None = None

    def inputs(self) -> Inputs:
        """The global batch; some labels occur once, and keys agree in part with the queries of their number."""
        queries, keys = sum(self.sizes), sum(self.key_sizes or self.sizes)
        generator = torch.Generator().manual_seed(queries + 100 * keys)
        common, query, key = (
            torch.randn(max(queries, keys), self.d, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        return {
            "query": (common + query)[:queries].to(self.dtype),
            "key": (common + key)[:keys].to(self.dtype),
            "query_labels": torch.randint(CLASSES, (queries,), generator=generator) * 1000 - 5,
            "key_labels": torch.randint(CLASSES, (keys,), generator=generator) * 1000 - 5,
            "weight": torch.rand(queries, generator=generator, dtype=torch.float64) + 0.5,
        }

    def inputs_of(self, rank: int) -> Inputs:
        keys = self.key_sizes or self.sizes
        return {
            name: x.split(keys if name.startswith("key") else self.sizes)[rank].clone()
            for name, x in self.inputs().items()
        }

    def index_of(self, rank: int) -> Tensor | None:
        """For every query one of the rank's keys; None where there are as many."""
        if self.key_sizes is None:
            return None
        keys = self.key_sizes[rank]
        return torch.arange(self.sizes[rank]) * 7 % keys if keys else torch.arange(0)

    def compute(self, x: Inputs, index: Tensor | None, scale: Tensor, **changes: Any) -> Tensor:
        weight = x["weight"] if self.weighted else None
        options = {"sample_weight": weight, **self.options, **changes}
        return LOSSES[self.name](x, index, scale.item() if self.bounded else scale, **options)

    def leaves(self, x: Inputs, rank: int | None) -> dict[str, Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float64, device=x["query"].device)
        leaves = {"query": x["query"], "key": x["key"], "scale": scale}
        is_frozen = self.frozen if self.frozen_on in (None, rank) else ()
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in is_frozen)
        return leaves


def use_extension(library: str | None) -> None:
    """Load the extension from ``library``; None: leave it out."""
    patches.setattr(native, "LIBRARY", Path(library or "absent"))
    pack.extension_covers.cache_clear()
    native.extension.cache_clear()
    assert pack.extension_covers("cpu") == (library is not None)


def cut_into(chunks: int) -> None:
    """Exchange even the smallest rows in this number of chunks, and join no blocks."""
    for name, value in (("CHUNK_BYTES", 1), ("MAX_CHUNKS", chunks), ("MERGED_COLUMNS", 1)):
        patches.setattr(exchange, name, value)


def on_rank(rank: int, cases: list[Case]) -> list[dict[str, Any] | None]:
    """This rank's loss, gradients and traffic, case after case; None outside of a sub-group."""
    members = {case.members for case in cases if case.members is not None}
    groups = {of: dist.new_group(of) for of in sorted(members)}
    return [_one(rank, case, groups) for case in cases]


def _one(rank: int, case: Case, groups: dict[tuple[int, ...], Any]) -> dict[str, Any] | None:
    patches.undo()
    fastkd_distributed.configure(max_gathered_bytes=0 if case.ring else 1 << 30, exchange_dtype=case.exchange_dtype)
    if case.extension != "":
        use_extension(case.extension)
    if case.chunks is not None:
        cut_into(case.chunks)
    changes: dict[str, Any] = {}
    if case.members is not None:
        changes["group"] = groups[case.members]
        if rank not in case.members:
            return None
        rank = case.members.index(rank)
    x = {name: tensor.to(case.device) for name, tensor in case.inputs_of(rank).items()}
    index = case.index_of(rank)
    before = {name: tensor.clone() for name, tensor in x.items()}
    leaves = case.leaves(x, rank)
    with CountedBytes() as counter:
        loss = case.compute(x, None if index is None else index.to(case.device), leaves["scale"], **changes)
        forward_bytes = dict(counter.sent)
        if loss.requires_grad:
            loss.backward(loss.new_tensor(case.upstream))
    assert all(torch.equal(x[name].detach(), tensor) for name, tensor in before.items()), "an input was changed"
    return {
        "loss": loss.detach().cpu(),
        "bytes": dict(counter.sent),
        "forward_bytes": forward_bytes,
        "kernels": any(name.startswith("fastkd.backends.triton.") for name in sys.modules),
        **{name: None if leaf.grad is None else leaf.grad.cpu() for name, leaf in leaves.items()},
    }


def one_process(case: Case) -> dict[str, Tensor | None]:
    """The definition of the concatenated batch, and its gradients."""
    x = case.inputs()
    leaves = case.leaves(x, None)
    indices = [case.index_of(rank) for rank in range(len(case.sizes))]
    starts = [sum((case.key_sizes or ())[:rank]) for rank in range(len(case.sizes))]
    index = None
    if case.key_sizes is not None:
        index = torch.cat([i + start for i, start in zip(indices, starts, strict=True) if i is not None])
    loss = case.compute(x, index, leaves["scale"], backend="reference")
    loss.backward(torch.tensor(case.upstream, dtype=loss.dtype))
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def compare(case: Case, results: list[dict[str, Any]]) -> None:
    """The mean of the ranks' losses and gradients is what one process computes."""
    expected, tolerance = one_process(case), case.tolerance or case.dtype
    floor = 1e-3  # of what cancels, rounding is left
    assert_close(torch.stack([result["loss"] for result in results]).mean(), expected["loss"], tolerance, floor=floor)
    for name in ("query", "key", "scale"):
        found, value = [result[name] for result in results], expected[name]
        if value is None:
            assert found == [None] * len(found), (case, name)
        elif name == "scale":
            assert_close(torch.stack(found).mean(), value, tolerance, floor=floor)
        else:
            # Rows are owned; averaging their owners' gradients over the ranks divides by W.
            assert_close(torch.cat(found) / len(found), value, tolerance, floor=floor)


def run_cases(cases: list[Case], **settings: Any) -> list[list[dict[str, Any]]]:
    """The results of the ranks, for every case."""
    world_size = 1 + max(cases[0].members or [len(cases[0].sizes) - 1])
    by_rank = succeeded(run_ranks(world_size, on_rank, cases, device=cases[0].device, **settings))
    return [[result for result in results if result is not None] for results in zip(*by_rank, strict=True)]


def check_cases(cases: list[Case], **settings: Any) -> list[list[dict[str, Any]]]:
    """The results, after a comparison with one process."""
    by_case = run_cases(cases, **settings)
    for case, results in zip(cases, by_case, strict=True):
        compare(case, results)
    return by_case
