"""What the multi-process tests run on every rank: importable by name in a fresh process."""

import io
import itertools
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bench.traffic import CountedBytes
from fastkd import DCDLoss, dcd_loss, info_nce_loss
from fastkd.backends.blocked import dual_softmax as blocked
from fastkd.distributed import agree as agreement
from fastkd.distributed import exchange, pack
from fastkd.distributed import group as fastkd_distributed
from tests.helpers.checks import embeddings

D = 6
LOSSES = {"dcd": dcd_loss, "info_nce": info_nce_loss}


def case(
    total: int, dtype: torch.dtype = torch.float64, weighted: bool = False, d: int = D, scale: float = 2.5
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The global batch: two sets of rows, the scale, the weights."""
    first, second = embeddings(total, d, seed=total, dtype=dtype)
    weight = torch.arange(total, dtype=torch.float64) / 3 + 0.5 if weighted else None
    return first, second, torch.tensor(scale, dtype=torch.float64), weight


def use_extension(library: str | None) -> None:
    """Load the extension from ``library``; None: leave it out."""
    pack.LIBRARY = Path(library or "absent")
    pack.extension_covers.cache_clear()
    pack._extension_loads.cache_clear()
    assert pack.extension_covers("cpu") == (library is not None)


def cut_into(chunks: int) -> None:
    """Exchange even the smallest rows in this number of chunks, and join no blocks."""
    exchange.CHUNK_BYTES, exchange.MAX_CHUNKS, exchange.MERGED_COLUMNS = 1, chunks, 1


def weights_on_some_ranks(rank: int, name: str) -> list[Tensor]:
    """Loss and gradient of the first rows when rank 1 of three passes no weights, which counts as ones."""
    first, second, scale, weight = case(7, weighted=True)
    first, second, weight = (part(x, (2, 3, 2), rank) for x in (first, second, weight))
    assert first is not None
    loss = LOSSES[name](first.requires_grad_(), second, scale, sample_weight=None if rank == 1 else weight)
    return [loss.detach(), torch.autograd.grad(loss, first)[0]]


def part(x: Tensor | None, sizes: tuple[int, ...], rank: int) -> Tensor | None:
    return None if x is None else x.split(sizes)[rank].clone()


def loss_and_gradients(
    rank: int, name: str, sizes: tuple[int, ...], options: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """This rank's loss and gradients, and what it put on the wire; None outside of ``settings["members"]``."""
    fastkd_distributed.configure(**settings.get("configure", {}))
    if "extension" in settings:
        use_extension(settings["extension"])
    if "chunks" in settings:
        cut_into(settings["chunks"])
    if "members" in settings:
        group = dist.new_group(settings["members"])
        if rank not in settings["members"]:
            return None
        rank, options = settings["members"].index(rank), {**options, "group": group}
    first, second, scale, weight = case(sum(sizes), **settings.get("case", {}))
    first, second, weight = (part(x, sizes, rank) for x in (first, second, weight))
    assert first is not None
    assert second is not None
    frozen, on_rank = settings.get("frozen"), settings.get("frozen_on", rank)
    leaves = [first, second, scale]
    for key, leaf in zip(("first", "second", "scale"), leaves, strict=True):
        leaf.requires_grad_(key != frozen or rank != on_rank)
    copies = [x.detach().clone() for x in leaves]
    with CountedBytes() as counter:
        # A number is a known bound of the scale.
        scale_or_number = scale.item() if settings.get("bounded") else scale
        loss = LOSSES[name](first, second, scale_or_number, sample_weight=weight, **options)
        forward_bytes = dict(counter.sent)
        loss.backward(torch.tensor(settings.get("upstream", 1.0), dtype=loss.dtype))
    untouched = all(torch.equal(x.detach(), copy) for x, copy in zip(leaves, copies, strict=True))
    return {
        "loss": loss.detach(),
        "first": leaves[0].grad,
        "second": leaves[1].grad,
        "scale": scale.grad,
        "untouched": untouched,
        "forward_bytes": forward_bytes,
        "bytes": dict(counter.sent),
    }


def several_cases(rank: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any] | None]:
    """``loss_and_gradients`` of each case in turn: for processes that start slowly."""
    return [loss_and_gradients(rank, *arguments) for arguments in cases]


def sub_groups(rank: int) -> dict[str, Any]:
    """On 4 ranks: loss and gradient within {0, 2} and {1, 3}, and on this rank alone."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    first, second, scale, _ = case(8)
    own = first.split(2)[rank].clone().requires_grad_()
    other = second.split(2)[rank].clone()
    loss = dcd_loss(own, other, scale, group=groups[rank % 2])
    (grad,) = torch.autograd.grad(loss, own)
    local = dcd_loss(own, other, scale, group="local")
    (local_grad,) = torch.autograd.grad(local, own)
    foreign = groups[1 - rank % 2]
    message = ""
    try:
        dcd_loss(own, other, scale, group=foreign)
    except ValueError as error:
        message = str(error)
    return {"loss": loss.detach(), "grad": grad, "local": local.detach(), "local_grad": local_grad, "foreign": message}


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


def call_with(rank: int, by_rank: dict[int, dict[str, Any]], name: str = "dcd") -> str:
    """A loss on 3 rows a rank, with this rank's own deviations from the common arguments; ``done`` if it went well."""
    own = by_rank.get(rank, {})
    first, second = embeddings(own.pop("rows", 3), own.pop("d", D), dtype=own.pop("dtype", torch.float64))
    first, second = own.pop("student", first), own.pop("teacher", second)
    if "configure" in own:
        fastkd_distributed.configure(**own.pop("configure"))
    LOSSES[own.pop("loss", name)](first, second, own.pop("scale", 2.0), **own)
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
    add = blocked.Forward.add

    def computing(self: Any, block: Tensor, cols: slice) -> None:
        add(self, block, cols)
        if rank == 0 and not happened:
            store.set("computed", "")
            happened.append(True)

    def hold(call: int) -> None:
        if rank == len(sizes) - 1 and call == collective:
            store.wait(["computed"], timedelta(seconds=8))
            happened.append(True)

    blocked.Forward.add = computing
    first, second, scale, _ = case(sum(sizes))
    with AtCollective(hold):
        dcd_loss(part(first, sizes, rank), part(second, sizes, rank), scale)
    return bool(happened)


def exchanged(rank: int, library: str | None, chunks: int, ring: bool) -> dict[str, list[Tensor]]:
    """Stacks of one and two tensors, with more keys than queries, and labels: the columns of each, twice."""
    use_extension(library)
    cut_into(chunks)
    fastkd_distributed.configure(max_gathered_bytes=0 if ring else 1 << 30)
    result = {}
    for name, queries, keys in (("equal", (3, 3, 3), (5, 5, 5)), ("unequal", (2, 0, 3), (0, 4, 1))):
        call = agreement.Call(queries[rank], keys[rank], {"device": "cpu"})
        peers = agreement.agree(dist.group.WORLD, name, call)
        for kind, of, sizes in (("queries", peers, queries), ("keys", peers.keys, keys)):
            first, second = embeddings(sum(sizes), D)
            labels = torch.arange(sum(sizes)) + (1 << 60)
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
                    numbers.wait(started)[:, 0],
                    *(torch.cat([block for _, block in blocks], dim=1) for blocks in columns),
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
    loss = dcd_loss(first, second, scale)
    return [without.detach(), loss.detach(), torch.autograd.grad(loss, first)[0]]


def backward_late(rank: int) -> list[Tensor]:
    """Two losses alive at once, then both backwards, and one of them twice."""
    first, second, scale, _ = case(9)
    first, second = (part(x, (4, 2, 3), rank) for x in (first, second))
    assert first is not None
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

    loss = torch.compile(doubled, backend="eager")(first, second)
    return [loss.detach(), torch.autograd.grad(loss, first)[0]]


def evaluated_without_gradient(rank: int) -> dict[str, Any]:
    """Under no_grad the numbers for a backward that never comes do not travel."""
    first, second, scale, _ = case(6)
    with CountedBytes() as counter, torch.no_grad():
        loss = dcd_loss(first.split(3)[rank], second.split(3)[rank], scale)
    return {"loss": loss, "bytes": dict(counter.sent)}


class StopTraining(Exception):
    """What interrupts a run in the tests."""


class _Convolutions(nn.Module):
    """A network with a map of 2x2 positions, without batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.Tanh())
        self.fc = nn.Linear(channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).mean((2, 3)))


def trained(rank: int, changes: dict[str, Any], stop_at: int | None = None, bad_on: int | None = None) -> Any:
    """A run of the trainer in float64 on networks without batch norm and dropout: history, weights, what it wrote."""
    from fastkd.trainer import DataConfig, ObjectiveConfig, OptimConfig, TensorImages, TrainConfig
    from fastkd.trainer.models.small import MLP
    from fastkd.trainer.run.loop import train as run

    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(46) % 4
    images = torch.randn(46, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    if rank == bad_on:
        images = images.clone()
        images[20] = float("nan")
    torch.manual_seed(1)
    student: nn.Module
    teacher: nn.Module
    terms = changes.pop("terms", None)
    if terms is None:
        student, teacher = (MLP(num_classes=4, in_features=16, hidden=(width,)) for width in (8, 12))
    else:
        student, teacher = _Convolutions(3), _Convolutions(5)
    calls = itertools.count(1)

    def stop(*_: Any) -> dict[str, Tensor]:
        if next(calls) == stop_at:
            raise StopTraining
        return {"stop": torch.zeros(())}

    config = TrainConfig(
        data=DataConfig(batch_size=8, drop_last=changes.pop("drop_last", False)),
        objective=ObjectiveConfig(terms=f"{terms or 'dcd+kd'}+stop"),
        optim=OptimConfig(lr=0.05, clip_norm=1.0),
        **{"epochs": 3, "device": "cpu", "log_every": 1, "tensorboard": False, "progress": False, **changes},
    )
    data = TensorImages(images, labels), TensorImages(images[:21], labels[:21])
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            result = run(
                config, student=student, teacher=teacher, train_data=data[0], eval_data=data[1], terms={"stop": stop}
            )
    except StopTraining:
        return "stopped"
    parameters = dict(result.distiller.named_parameters())
    return {
        "history": result.history,
        "weights": {name: value.detach() for name, value in parameters.items()},
        "path": str(result.path),
        "resumed_from": result.resumed_from,
        "printed": printed.getvalue(),
    }


def reductions(rank: int, changes: dict[str, Any]) -> tuple[int, list[int], int]:
    """The number of trained parameters, the sizes of all all-reduces of more than 64 numbers, and the steps."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from fastkd.trainer.run.ranks import Ranks

    sizes: list[int] = []
    all_reduce, wrap = dist.all_reduce, Ranks.wrap

    def recorded(x: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(x.numel())
        return all_reduce(x, *arguments, **options)

    def wrap_with_hook(self: Ranks, module: nn.Module) -> nn.Module:
        wrapped = wrap(self, module)
        wrapped.register_comm_hook(None, allreduce_hook)  # the gradients then go through dist.all_reduce
        return wrapped

    dist.all_reduce, Ranks.wrap = recorded, wrap_with_hook
    result = trained(rank, changes)
    parameters = sum(x.numel() for name, x in result["weights"].items() if not name.startswith("teacher."))
    return parameters, [size for size in sizes if size > 64], result["history"][-1]["step"]


def trained_with_batch_norm(rank: int, folder: str) -> tuple[dict[str, float], str, Tensor]:
    """A run with batch norm, dropout and drawn augmentations: last record, checkpoint, a layer's weights."""
    from fastkd.trainer.run.loop import train as run
    from tests.helpers.trainer_runs import tiny_config

    result = run(tiny_config(Path(folder), epochs=1, save_every_steps=4))
    return result.history[-1], str(result.path), result.distiller.student.model.fc.weight.detach()
