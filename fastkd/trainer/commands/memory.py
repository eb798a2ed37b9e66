"""Estimates the memory that a rank needs in training, from models on tensors without memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.features import ModelOutput
from fastkd.trainer.precision import autocast
from fastkd.trainer.run.distiller import Distiller


def memory_of(
    distiller: Distiller, config: TrainConfig, shape: tuple[int, ...], rows: int, chunks: int, world_size: int
) -> dict[str, int]:
    """The bytes of a rank that takes ``rows`` images of ``shape`` per step, by what the bytes hold.

    It must be called within FakeTensorMode, and ``distiller`` must hold fake tensors. Sizes and dtypes are then the
    same as in a real step under autocast.
    """
    student, objective, teacher = distiller.student, distiller.objective, distiller.teacher
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    weights = _bytes(trained)
    moments = {"sgd": int(config.optim.momentum > 0), "lars": 1, "adamw": 2, "lamb": 2}[config.optim.name]
    found = {
        "student and terms": weights + _bytes(student.buffers()) + _bytes(objective.buffers()),
        "gradients": weights,
        f"optimiser ({config.optim.name})": moments * weights,
    }
    if world_size > 1:
        found["buckets of the all-reduce"] = weights
    if config.ema is not None:
        found["moving average"] = _bytes(student.model.state_dict().values())
    if teacher is not None:
        copies = 2 if config.teacher is not None and config.teacher.fold else 1
        found["teacher"] = copies * _bytes(teacher.state_dict().values())
    part = -(-rows // chunks)
    views = 2 if "strong" in objective.additions else 1
    images = torch.empty(part, *shape, dtype=torch.uint8 if student.takes_bytes else None)
    found["images"] = views * rows * images[0].nbytes
    own = {tensor.untyped_storage()._cdata for tensor in (*student.parameters(), *student.buffers(), images)}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other tensor takes its place
        return tensor

    distiller.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(images.device, config.precision),
    ):
        output = student(images)
    activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    found["student's activations"] = activations if chunks > 1 else views * activations
    outputs = 2 * views * _bytes_of(output)  # with their gradients
    if teacher is not None:
        with LiveBytes() as live, autocast(images.device, config.precision):
            taught = teacher(images)
        found["teacher's forward pass"] = live.peak
        outputs += views * _bytes_of(taught)
    if chunks > 1:
        found["outputs of all chunks"] = outputs * rows // part
    if world_size > 1:
        columns = objective.columns_sent(output.logits.shape[1])
        found["embeddings of all ranks"] = config.data.batch_size * columns * output.logits.element_size()
    return found


class LiveBytes(TorchDispatchMode):
    """A context whose ``peak`` is the most bytes that were alive at once in tensors made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._views:
                    if key in given:
                        continue  # a view of a weight
                    self._views[key] = 0
                    self.live += size
                self._views[key] += 1
                weakref.finalize(tensor, self._gone, key, size)
        self.peak = max(self.peak, self.live)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._views[key] -= 1
        if self._views[key] == 0:
            del self._views[key]
            self.live -= size


def _bytes_of(output: ModelOutput) -> int:
    return _bytes(value for value in tree_leaves(list(vars(output).values())) if isinstance(value, Tensor))


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
