"""Files of tensors: written with the umask's mode, read without running code, checked before a model gets them."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastkd.trainer.models.features import find_classifier

# Where training scripts keep the weights in what they save, the averaged weights first. They may be nested.
KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model_state", "net_state_dict", "model", "params", "module", "net"),
    *("network", "student", "backbone", "encoder", "weights"),
)
# What DistributedDataParallel, torch.compile, FSDP, Lightning modules, averaged models and Hugging Face's wrapper of
# timm put before the names.
WRAPPERS = {
    *("module", "_orig_mod", "_fsdp_wrapped_module", "model", "student", "net", "network", "backbone", "encoder"),
    "timm_model",
}
# Beside the weights lie the arguments of the training, and numbers such as the best accuracy as NumPy computed it.
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, np.float64, np.float32, np.int64]
_PLAIN += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # numpy._core.multiarray.scalar, which older files call numpy.core...
_PLAIN += [(_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 4  # names of each kind that a message lists


class CheckpointError(RuntimeError):
    """A checkpoint is missing, truncated, corrupted, or belongs to something else; the message names the file.

    Example::

        try:
            weights = load_weights("runs/digits")
        except CheckpointError as error:
            print(error)  # runs/digits: no such weights file, checkpoint or run folder
    """


@dataclass(frozen=True)
class WeightsFile:
    """The state dict ``state`` that was found in the file ``path``, under ``key`` ("" if it is the whole file)."""

    path: Path
    key: str
    state: dict[str, Tensor]

    def load_into(self, module: nn.Module, role: str = "model") -> str:
        """Give ``module`` the weights, their names without the prefix that wrappers gave them; returns a line about it.

        The prefix is the one with which most names are the module's. With a prefix, entries without it (a teacher, a
        counter) are left out. Counters of batch norm that the file lacks start at zero.

        Raises CheckpointError: see ``load_into``.
        """
        own = module.state_dict()
        prefix = _find_prefix(self.state, own)
        state = {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}
        left_out = len(self.state) - len(state)
        if not any("_orig_mod." in name for name in own):  # parts of the model were compiled
            state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
        state = {name: value for name, value in own.items() if _is_counter(name)} | state
        load_into(module, state, self.path, role)
        told = [f"{role} weights: {self.path}", self.key and f"key {self.key}", prefix and f"prefix {prefix}"]
        told.append(f"{left_out} entries without the prefix left out" if left_out else "")
        return ", ".join(filter(None, told))


@dataclass(frozen=True)
class Origin:
    """What weights were trained with, as far as they say.

    Attributes:
        classes: the names of the model's outputs, in their order.
        input: how images were made for the model: ``mean``, ``std``, ``image_size`` and ``crop``, the options of the
            data set ``images``.
    """

    classes: list[str] | None = None
    input: dict[str, Any] = field(default_factory=dict)


def origin_of_file(path: Path) -> Origin:
    """What ``fastkd export`` wrote into a safetensors file; nothing for other files and malformed values."""
    if path.suffix != ".safetensors" or not path.is_file():
        return Origin()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        names = ("classes", "mean", "std", "image_size", "crop")
        found = {name: json.loads(metadata[name]) for name in names if name in metadata}
    except (SafetensorError, ValueError, RecursionError):
        return Origin()
    classes = found.pop("classes", None)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        classes = None
    return Origin(classes, {name: value for name, value in found.items() if _is_input(name, value)})


def _is_input(name: str, value: Any) -> bool:
    """Whether this can be a value of ``Origin.input``."""
    numbers = value if isinstance(value, list) and name in ("mean", "std") else [value]
    fine = (
        math.isfinite(number) and (number > 0 or name == "mean") for number in numbers if type(number) in (int, float)
    )
    return sum(fine) == (3 if name in ("mean", "std") else 1) == len(numbers)


def read_weights(path: Path) -> WeightsFile:
    """The state dict in a ``.safetensors`` file or in what ``torch.save`` wrote. CheckpointError names the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file, checkpoint or run folder")
    content = load_tensors(path)
    found = _find_state_dict(content)
    if found is None:
        held = (
            f"a dict of {_listed('entries', list(map(str, content))) or 'no entries'}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: holds no state dict (names to tensors), but {held}")
    keys, state = found
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: holds no state dict, its names are of type {type(name).__name__}")
        if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
            raise CheckpointError(f"{path}: {name} is sparse, quantised or without values, expected a plain tensor")
    return WeightsFile(path, ".".join(keys), dict(state))


def _find_state_dict(content: Any, keys: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Mapping[str, Tensor]] | None:
    """The keys that lead to the first state dict, and the state dict."""
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return keys, content
    inside = (_find_state_dict(content.get(key), (*keys, key)) for key in KEYS if len(keys) < 3)
    return next((found for found in inside if found is not None), None)


def load_tensors(path: Path) -> Any:
    """The content of a safetensors file or of a weights_only pickle; every failure becomes a CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error of ours says the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or corrupted ({error})") from error
    except pickle.UnpicklingError as error:
        # Not torch's message, which advises to load the file in a way that executes what is in it.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it needs {found[1]}; save the model's state_dict()" if found else "it is damaged or holds other objects"
        )
        raise CheckpointError(f"{path}: cannot be read as tensors and plain types ({reason})") from None
    # torch.load raises half a dozen other kinds of exception on a damaged file.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "TorchScript" in reason:
            reason = "it is a TorchScript archive; save the model's state_dict()"
        elif isinstance(error, (EOFError, KeyError, IndexError)):  # an empty file, a text
            reason = "it is empty" if path.stat().st_size == 0 else "it is no file of torch.save"
        raise CheckpointError(f"{path}: cannot be read as tensors and plain types ({reason})") from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable to others as far as the umask allows: by itself the library says 0600."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata)
    path.chmod(mode)


def load_into(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, role: str = "model", *, cast: bool = True
) -> None:
    """``module.load_state_dict`` after a check of names, shapes, dtypes and values.

    ``cast``: floating-point numbers may be of another precision than the module's.

    Raises CheckpointError: it lists what differs, or names a tensor that is NaN, or infinite where the module's is not.
    """
    own = module.state_dict()
    common = [name for name in own if name in state]
    shapes = [name for name in common if state[name].shape != own[name].shape]
    dtypes = [name for name in common if not _same_kind(state[name].dtype, own[name].dtype, cast)]
    problems = [
        _listed("missing", [name for name in own if name not in state]),
        # Counters last: in a safetensors file they come first, and they say nothing about the model.
        _listed("unexpected", sorted((name for name in state if name not in own), key=_is_counter)),
        _listed("of another shape", [_difference(name, state, own, "shape") for name in shapes]),
        _listed("of another dtype", [_difference(name, state, own, "dtype") for name in dtypes]),
    ]
    if any(problems):
        hint = _classes_hint(module, state, shapes, role)
        raise CheckpointError(
            f"{source}: does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}{hint}"
        )
    for name, value in state.items():
        # A buffer may hold infinities for good, such as an attention mask.
        if (
            value.is_floating_point()
            and not value.isfinite().all()
            and (value.isnan().any() or own[name].isfinite().all())
        ):
            raise CheckpointError(f"{source}: {name} has values that are not finite")
    module.load_state_dict(state)


def _find_prefix(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The prefix, made of ``WRAPPERS``, with which most names of ``own`` are in ``state``; the shortest of equals."""
    prefixes = {""}
    for name in state:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            prefixes.add(prefix)
    return max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in state for name in own))


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _same_kind(found: torch.dtype, wanted: torch.dtype, cast: bool) -> bool:
    return found == wanted or (cast and found in _FLOATS and wanted in _FLOATS)


def _difference(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> str:
    found, expected = (getattr(source[name], what) for source in (state, own))
    if what == "shape":
        found, expected = tuple(found), tuple(expected)
    return f"{name}: {found} in the file, {expected} in the model"


def _listed(what: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})" if names else ""


def _classes_hint(module: nn.Module, state: Mapping[str, Tensor], shapes: list[str], role: str) -> str:
    """What to do if the file's classifier has another number of classes."""
    try:
        name = find_classifier(module)
    except ValueError:
        return ""
    if not shapes or any(shape.rpartition(".")[0] != name for shape in shapes):
        return ""
    flag = "--num-classes" if role == "model" else f"--{role}.num-classes"
    return f"; the file has {len(state[shapes[0]])} classes: num_classes={len(state[shapes[0]])} ({flag})"
