"""What the multi-process tests of ``contrast`` run on every rank."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.traffic import CountedBytes
from fastkd import ckd_loss, masked_contrast_loss, sup_con_loss
from fastkd.distributed import group as fastkd_distributed
from tests.ranks.rank_programs import cut_into, part, use_extension

D, CLASSES = 6, 3


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The global batch; some labels occur once."""
    generator = torch.Generator().manual_seed(queries + 100 * keys)
    key = torch.randn(keys, D, generator=generator, dtype=torch.float64)
    query = torch.randn(queries, D, generator=generator, dtype=torch.float64)
    return {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "query_labels": torch.randint(CLASSES, (queries,), generator=generator) * 1000 - 5,
        "key_labels": torch.randint(CLASSES, (keys,), generator=generator) * 1000 - 5,
        "weight": torch.rand(queries, generator=generator, dtype=torch.float64) + 0.5,
    }


def compute(name: str, x: dict[str, Tensor], index: Tensor | None, scale: Tensor, **options: Any) -> Tensor:
    """The loss ``name``; those of features take the queries' rows."""
    if name == "sup_con":
        return sup_con_loss(x["query"], x["query_labels"], scale, sample_weight=x["weight"], **options)
    if name == "ckd":
        return ckd_loss(x["query"], x["key"], 0.7, sample_weight=x["weight"], **options)
    labels = x["query_labels"], x["key_labels"]
    if options.get("positives") != "label":
        options["positive_index"] = index
    return masked_contrast_loss(x["query"], x["key"], scale, *labels, sample_weight=x["weight"], **options)


def local_index(sizes: tuple[int, ...], key_sizes: tuple[int, ...], rank: int) -> Tensor | None:
    """For every query one of the rank's keys; None where there are as many."""
    if sizes == key_sizes:
        return None
    return torch.arange(sizes[rank]) * 7 % key_sizes[rank] if key_sizes[rank] else torch.arange(0)


def global_index(sizes: tuple[int, ...], key_sizes: tuple[int, ...]) -> Tensor | None:
    indices = [local_index(sizes, key_sizes, rank) for rank in range(len(sizes))]
    if indices[0] is None:
        return None
    return torch.cat([index + sum(key_sizes[:rank]) for rank, index in enumerate(indices) if index is not None])


def on_rank(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, gradients and traffic of each case in turn."""
    return [_one(rank, **case) for case in cases]


def _one(
    rank: int,
    name: str,
    sizes: tuple[int, ...],
    key_sizes: tuple[int, ...],
    options: dict[str, Any],
    frozen: tuple[str, ...] = (),
    ring: bool = False,
    chunks: int | None = None,
    extension: str | None = "",
    dtype: torch.dtype = torch.float64,
    upstream: float = 1.0,
) -> dict[str, Any]:
    fastkd_distributed.configure(max_gathered_bytes=0 if ring else 1 << 30)
    if extension != "":
        use_extension(extension)
    if chunks is not None:
        cut_into(chunks)
    everything = inputs(sum(sizes), sum(key_sizes), dtype)
    x = {key: part(value, key_sizes if key.startswith("key") else sizes, rank) for key, value in everything.items()}
    scale = torch.tensor(2.5, dtype=torch.float64)
    leaves = {"query": x["query"], "key": x["key"], "scale": scale}
    for key, leaf in leaves.items():
        leaf.requires_grad_(key not in frozen)
    with CountedBytes() as counter:
        loss = compute(name, x, local_index(sizes, key_sizes, rank), scale, **options)
        forward_bytes = sum(counter.sent.values())
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return {
        "loss": loss.detach(),
        "bytes": sum(counter.sent.values()),
        "forward_bytes": forward_bytes,
        "kernels": "fastkd.backends.triton.contrast_rows" in sys.modules,
        **{key: leaf.grad for key, leaf in leaves.items()},
    }


def differing(rank: int) -> str:
    """The message when one rank passes labels as positives and the other an index."""
    x = inputs(4, 4)
    try:
        compute("masked", x, None, torch.tensor(1.0), positives="label" if rank else "index")
    except ValueError as error:
        return str(error)
    return ""


def excluding(rank: int) -> str:
    """The message when one rank alone counts a row among its own keys."""
    x = inputs(4, 4)
    try:
        sup_con_loss(x["query"], x["query_labels"], 1.0, exclude_self=rank == 0)
    except ValueError as error:
        return str(error)
    return ""


def failing(rank: int) -> str:
    """The message when rank 1 passes an index out of range."""
    x = inputs(4, 4)
    index = torch.tensor([0, 1, 2, 4 if rank == 1 else 3])
    try:
        compute("masked", x, index, torch.tensor(1.0))
    except ValueError as error:
        dist.barrier()
        return str(error)
    return ""


def without_interpreter(rank: int) -> str:
    """The message when the kernels are asked for on a CPU."""
    x = inputs(4, 4, torch.float32)
    try:
        compute("ckd", x, None, torch.tensor(1.0), backend="triton")
    except ValueError as error:
        dist.barrier()
        return str(error)
    return ""
