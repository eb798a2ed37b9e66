"""What the multi-process tests run on every rank: importable by name in a fresh process."""

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.traffic import CountedBytes
from fastkd import DCDLoss, ckd_loss, dcd_loss, info_nce_loss, sup_con_loss
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.distributed import agree as agreement
from fastkd.distributed import exchange, pack
from fastkd.distributed import group as fastkd_distributed
from fastkd.ops.contrast import Contrast
from tests.helpers.checks import assert_close, embeddings, relative_error
from tests.helpers.ranks import patches
from tests.ranks.cases import LOSSES, Case, cut_into, use_extension

D = 6
PAIRED = {"dcd": dcd_loss, "info_nce": info_nce_loss}


def case(total: int, weighted: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The global batch: two sets of rows, the scale, the weights."""
    first, second = embeddings(total, D, seed=total)
    weight = torch.arange(total, dtype=torch.float64) / 3 + 0.5 if weighted else None
    return first, second, torch.tensor(2.5, dtype=torch.float64), weight


def part(x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x.split(sizes)[rank].clone()


def loss_and_gradient(loss: Tensor, rows: Tensor) -> list[Tensor]:
    return [loss.detach(), torch.autograd.grad(loss, rows)[0]]


def compare_rows(results: list[list[Tensor]], loss: Tensor, rows: Tensor) -> None:
    """Every rank's loss and gradient of its rows against the ``loss`` of all ``rows``, which one process computes."""
    value, gradient = loss_and_gradient(loss, rows)
    assert_close(torch.stack([result[0] for result in results]).mean(), value, torch.float64)
    assert_close(torch.cat([result[1] for result in results]) / len(results), gradient, torch.float64)


def weights_on_some_ranks(rank: int, name: str) -> list[Tensor]:
    """Loss and gradient of the first rows when rank 1 of three passes no weights, which counts as ones."""
    first, second, scale, weight = case(7, weighted=True)
    first, second, weight = (part(x, (2, 3, 2), rank) for x in (first, second, weight))
    loss = PAIRED[name](first.requires_grad_(), second, scale, sample_weight=None if rank == 1 else weight)
    return loss_and_gradient(loss, first)


def sub_groups(rank: int) -> dict[str, Any]:
    """On 4 ranks: loss and gradient within {0, 2} and {1, 3}, and on this rank alone."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    first, second, scale, _ = case(8)
    own, other = first.split(2)[rank].clone().requires_grad_(), second.split(2)[rank].clone()
    message = ""
    try:
        dcd_loss(own, other, scale, group=groups[1 - rank % 2])
    except ValueError as error:
        message = str(error)
    return {
        "group": loss_and_gradient(dcd_loss(own, other, scale, group=groups[rank % 2]), own),
        "local": loss_and_gradient(dcd_loss(own, other, scale, group="local"), own),
        "foreign": message,
    }


class Model(nn.Module):
    """A student with its loss inside, so that DDP sees every parameter."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.dcd = DCDLoss(8, 7, 4, **options)
        self.double()

    def forward(self, inputs: Tensor, teacher_features: Tensor) -> Tensor:
        return sum(self.dcd(self.student(inputs), teacher_features).values())


def training_batch(step: int, total: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(total, 7, generator=generator, dtype=torch.float64) + inputs.sum(1, keepdim=True)


def ddp_steps(rank: int, sizes: tuple[int, ...], steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients of the first step and parameters after all steps of training under DDP."""
    model = DistributedDataParallel(Model(**options))
    return train(model, steps, lambda x: part(x, sizes, rank), sum(sizes))


def train(model: nn.Module, steps: int, own: Any, total: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses, first_gradients = [], {}
    for step in range(steps):
        loss = model(*(own(x) for x in training_batch(step, total)))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first_gradients = {
                name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()
            }
        optimizer.step()
        losses.append(loss.detach())
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {"losses": torch.stack(losses), "gradients": first_gradients, "state": state}


def call_with(rank: int, name: str, by_rank: dict[int, dict[str, Any]]) -> str:
    """A loss on 3 rows a rank, with this rank's own deviations from the common arguments; ``done`` if it went well."""
    own = by_rank.get(rank, {})
    fastkd_distributed.configure(**own.pop("configure", {}))
    x = Case(name, (own.pop("rows", 3),), d=own.pop("d", D), dtype=own.pop("dtype", torch.float64)).inputs()
    x.update({key: own.pop(key) for key in list(own) if key in x})
    try:
        LOSSES[own.pop("loss", name)](x, own.pop("index", None), own.pop("scale", 2.0), **own)
    except Exception:
        dist.barrier()  # the group is as good as before
        raise
    return "done"


class AtCollective(TorchDispatchMode):
    """Calls ``event(i)`` before this rank's i-th collective, counted from 0, whether Python or C++ starts it."""

    def __init__(self, event: Callable[[int], None]) -> None:
        super().__init__()
        self.event, self.calls = event, itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.event(next(self.calls))
        return func(*args, **(kwargs or {}))


def die_in_forward(rank: int, victim: int, collective: int, library: str | None) -> str:
    """One rank ends without a word before one of its collectives; the others must notice."""
    use_extension(library)
    cut_into(2)
    rows, other = embeddings(4, D)

    def die(call: int) -> None:
        if rank == victim and call == collective:
            os._exit(1)

    with AtCollective(die):
        loss = dcd_loss(rows.requires_grad_(), other, 2.0)
    loss.backward()
    return "finished"


def held_back(rank: int, sizes: tuple[int, ...], collective: int, library: str | None) -> bool:
    """The last rank starts the collective of its last rows once rank 0 has computed with other rows of another rank.

    Returns whether that happened on this rank.
    """
    use_extension(library)
    cut_into(2)
    store, happened = dist.distributed_c10d._get_default_store(), []
    add = blocked.TiledForward.add

    def computing(self: Any, *columns: Any) -> None:
        add(self, *columns)
        if rank == 0 and not happened:
            store.set("computed", "")
            happened.append(True)

    def hold(call: int) -> None:
        if rank == len(sizes) - 1 and call == collective:
            store.wait(["computed"], timedelta(seconds=8))
            happened.append(True)

    patches.setattr(blocked.TiledForward, "add", computing)
    first, second, scale, _ = case(sum(sizes))
    with AtCollective(hold):
        dcd_loss(part(first, sizes, rank), part(second, sizes, rank), scale)
    return bool(happened)


def exchanged(rank: int, library: str | None, chunks: int, ring: bool, device: str) -> dict[str, list[Tensor]]:
    """Stacks of one and two tensors, with more keys than queries, and labels: the columns of each, twice."""
    use_extension(library)
    cut_into(chunks)
    fastkd_distributed.configure(max_gathered_bytes=0 if ring else 1 << 30)
    result = {}
    for name, queries, keys in (("equal", (3, 3, 3), (5, 5, 5)), ("unequal", (2, 0, 3), (0, 4, 1))):
        call = agreement.Call(queries[rank], keys[rank], {"device": device})
        peers = agreement.agree(dist.group.WORLD, name, call)
        for kind, of, sizes in (("queries", peers, queries), ("keys", peers.keys, keys)):
            first, second = (x.to(device) for x in embeddings(sum(sizes), D))
            labels = torch.arange(sum(sizes), device=device) + (1 << 60)
            own = [part(x, sizes, rank) for x in (first, second)]
            for rows in (own[:1], own):
                started, units, _, gathered = exchange.start(of, rows, torch.float64, normalize=False)
                numbers = exchange.start_numbers(of, part(labels, sizes, rank)[:, None])
                for x in own:
                    x.neg_()  # what travels is a copy
                columns = [list(started.columns(units, gathered)) for _ in range(2)]
                for x in own:
                    x.neg_()
                result[f"{name} {kind} {len(rows)}"] = [
                    numbers.wait(started)[:, 0].cpu(),
                    *(torch.cat([block for _, block in blocks], dim=1).cpu() for blocks in columns),
                    torch.tensor([cols.stop for blocks in columns for cols, _ in blocks]),
                ]
    return result


def gathered_alone(rank: int, backend: str, device: str, library: str | None) -> Tensor | None:
    """On one rank, what a backend brings back of 7 rows in chunks; None where the extension lacks the device."""
    use_extension(library)
    if library is not None and not pack.extension_gathers(device):
        return None
    group = dist.new_group([0], backend=backend)
    peers = agreement.Peers(group, 0, (7,), (7,), has_weight=False, needs_grad=False, all_need_grad=False)
    rows = [x.to(device) for x in embeddings(7, D)]
    for bounds in ([0, 7], [0, 2, 4, 7], []):
        units, _, gathered, works = exchange.start_gather(peers, rows, torch.float64, True, bounds)
        for work in works:
            work.wait()
        sizes = [2 * D * (b - a) for a, b in itertools.pairwise(bounds)] or [2 * D * 7]
        assert torch.equal(torch.cat([chunk.view(2, -1, D) for chunk in gathered.split(sizes)], dim=1), units)
    return units.cpu()


def forwards_alone(rank: int, library: str | None) -> list[Tensor]:
    """Losses that no backward follows, one without gradients on rank 0 only; then one with its backward."""
    use_extension(library)
    cut_into(2)
    first, second, scale, _ = case(6)
    first, second = first.split(3)[rank].clone().requires_grad_(), second.split(3)[rank]
    for _ in range(20):
        dcd_loss(first, second, scale)
    with torch.set_grad_enabled(rank == 1):
        without = dcd_loss(first, second, scale)
    if rank == 1:
        without.backward()
    else:
        assert not without.requires_grad
    return [*loss_and_gradient(dcd_loss(first, second, scale), first), without.detach()]


def backward_late(rank: int) -> list[Tensor]:
    """Two losses alive at once, then both backwards, and one of them twice."""
    first, second, scale, _ = case(9)
    first, second = (part(x, (4, 2, 3), rank) for x in (first, second))
    first = first.requires_grad_()
    one = dcd_loss(first, second, scale)
    two = info_nce_loss(first, second, scale)
    grads = [torch.autograd.grad(one, first, retain_graph=True)[0], torch.autograd.grad(two, first)[0]]
    return [*grads, torch.autograd.grad(one, first)[0]]


def compiled(rank: int) -> list[Tensor]:
    """Loss and gradient under torch.compile, which leaves the exchange to eager code."""
    first, second, scale, _ = case(6)
    first, second = first.split(3)[rank].clone().requires_grad_(), second.split(3)[rank]

    def doubled(student: Tensor, teacher: Tensor) -> Tensor:
        return dcd_loss(2 * student, teacher, scale)

    return loss_and_gradient(torch.compile(doubled, backend="eager")(first, second), first)


def evaluated_without_gradient(rank: int) -> dict[str, Any]:
    """Under no_grad the numbers for a backward that never comes do not travel."""
    first, second, scale, _ = case(6)
    with CountedBytes() as counter, torch.no_grad():
        loss = dcd_loss(first.split(3)[rank], second.split(3)[rank], scale)
    return {"loss": loss, "bytes": dict(counter.sent)}


def without_host_tensors(rank: int) -> list[str]:
    """The losses that made a tensor out of a Python number after the ranks had agreed."""
    found, kept = [], torch.tensor

    def noted(*values: Any, **options: Any) -> Tensor:
        found.append(name)
        return kept(*values, **options)

    class Watched:
        @staticmethod
        def apply(*inputs: Any) -> Any:
            torch.tensor = noted
            try:
                return Contrast.apply(*inputs)
            finally:
                torch.tensor = kept

    patches.setattr("fastkd.ops.contrast.Contrast", Watched)
    first, second, scale, _ = case(8)
    for name, loss in (("info_nce", info_nce_loss), ("ckd", ckd_loss)):
        rows = [part(x, (4, 4), rank).clone().requires_grad_() for x in (first, second)]
        loss(*rows, scale if name == "info_nce" else 0.7).backward()
    return found


def converged_by_label(rank: int) -> float:
    """The relative error of a float32 gradient by label where the loss is 1e-9, on this rank's half of the rows."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, 128, generator=generator)
    rows = torch.stack([centres, centres + 0.01 * torch.randn(64, 128, generator=generator)], 1).flatten(0, 1)
    labels = torch.arange(64).repeat_interleave(2)
    whole, own = rows.double().requires_grad_(), part(rows, (64, 64), rank).requires_grad_()
    sup_con_loss(whole, labels, 30.0, normalize=True, backend="reference", group="local").backward()
    sup_con_loss(own, part(labels, (64, 64), rank), 30.0, normalize=True).backward()
    return relative_error(own.grad / 2, part(whole.grad, (64, 64), rank), floor=1e-30)
