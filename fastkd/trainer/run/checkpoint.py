"""Checkpoints: written atomically, verified before use, never unpickled beyond plain types and tensors.

A checkpoint is a folder ``step-00000123`` of files whose sizes and hashes its manifest states. What is in the files is
said in ``fastkd.trainer.run.state``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STUDENT, LOSS, EMA = "student.safetensors", "loss.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.pt", "manifest.json"
_FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint is missing, truncated, corrupted, or belongs to something else; the message names the file.

    Example::

        try:
            weights = load_weights("runs/digits")
        except CheckpointError as error:
            print(error)  # runs/digits: no such weights file, checkpoint or run folder
    """


@dataclass
class Checkpoint:
    """A verified checkpoint in memory.

    ``weights`` are the state dicts of its safetensors files, by the file's name; ``state`` is plain types and tensors.
    """

    path: Path
    manifest: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def deployed(self) -> str:
        """The file with the weights that were evaluated: the moving average if there is one, else the student."""
        return EMA if EMA in self.weights else STUDENT


class CheckpointFolder:
    """The checkpoints of one run, for one process at a time.

    Opening it removes the leftovers of an interrupted write (``.tmp-*``). Raises CheckpointError when another process
    has it open. (The lock is a POSIX lock: there is none on Windows, and not every network file system has it.)
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        path.mkdir(parents=True, exist_ok=True)
        # lockf and not flock: data loader workers that outlive a killed run must not inherit the lock.
        self._lock = (path / ".lock").open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock.close()
            raise CheckpointError(f"{path}: another process is training in this run folder") from None
        for leftover in path.glob(".tmp-*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        *,
        state: dict[str, Any],
        manifest: dict[str, Any],
        again: bool = False,
    ) -> Path:
        """Write the checkpoint of ``step``, make it durable, and only then remove those beyond ``keep`` and the best.

        ``modules`` by the names of their files. The best has the highest ``accuracy`` in its manifest, the latest of
        equals. ``again``: one of this step may be there, and the new one is then named ``step-...-evaluated``.

        Raises CheckpointError when there is one already, or when it cannot be written (a full disk); the earlier ones
        stay.
        """
        final = self.path / f"step-{step:08d}"
        if again and final.exists():
            final = self.path / f"{final.name}-evaluated"
        if final.exists():
            raise CheckpointError(f"{final}: exists already; it is not overwritten")
        temporary = self.path / f".tmp-{final.name}-{os.getpid()}"
        files: dict[str, dict[str, Any]] = {}

        def write(name: str, to: Callable[[Path], Any]) -> None:
            try:
                to(temporary / name)
                _sync(temporary / name)
                files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": file_hash(temporary / name)}
            # On a full disk safetensors and torch raise their own exceptions.
            except (OSError, SafetensorError, RuntimeError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise CheckpointError(f"{final / name}: cannot be written ({error})") from error

        temporary.mkdir()
        for name, module in modules.items():
            write(name, partial(save_file, _plain_tensors(module)))
        write(STATE, lambda file: torch.save(state, file))
        body = {"format": _FORMAT, "step": step, "files": dict(files), **manifest}
        body["sha256"] = _manifest_hash(body)
        write(MANIFEST, lambda file: file.write_text(json.dumps(body, indent=1)))
        _sync(temporary)
        temporary.rename(final)
        _sync(self.path)
        everything = list_checkpoints(self.path)
        best = best_checkpoint(everything)
        for old in everything[: -self.keep]:
            if old == best:
                continue
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a valid name.
            doomed = old.rename(self.path / f".tmp-old-{old.name}")
            shutil.rmtree(doomed)
        return final

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first."""
    names = re.compile(r"step-(\d+)(-evaluated)?")
    found = [(names.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for match, path in sorted(((int(m[1]), m[2] or ""), path) for m, path in found if m)]


def best_checkpoint(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the highest accuracy in its manifest, the latest of equals; None if no manifest has one."""
    found: list[tuple[float, int, Path]] = []
    for path in checkpoints:
        try:
            accuracy = json.loads((path / MANIFEST).read_bytes())["accuracy"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(accuracy, float):
            found.append((accuracy, len(found), path))
    return max(found)[2] if found else None


def find_checkpoint(path: str | Path, *, best: bool = False) -> Path:
    """The checkpoint folder that ``path`` means: itself, or of a run folder the newest or the ``best`` one::

        find_checkpoint("runs/digits", best=True)  # runs/digits/checkpoints/step-00000160

    CheckpointError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint (no {MANIFEST} in it, no checkpoints/step-* below it)")
    chosen = best_checkpoint(found) if best else found[-1]
    if chosen is None:
        raise CheckpointError(f"{path}: none of its {len(found)} checkpoints was evaluated")
    return chosen


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint folder ``path``, after every file has been compared with it."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        stated = manifest.pop("sha256")
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: is truncated or corrupted ({error})") from error
    if stated != _manifest_hash(manifest):
        raise CheckpointError(f"{file}: is corrupted, its sha256 differs from the one it states")
    if version != _FORMAT:
        raise CheckpointError(f"{file}: has format {version}, expected {_FORMAT}")
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"{file}: has no step or no config")
    for name in (STUDENT, LOSS, STATE):
        if name not in files:
            raise CheckpointError(f"{file}: does not list {name}")
    for name in (STUDENT, LOSS, STATE, *([EMA] if EMA in files else [])):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: is missing")
        size = (path / name).stat().st_size
        if size != files[name]["bytes"]:
            raise CheckpointError(f"{path / name}: is truncated: {size} bytes, expected {files[name]['bytes']}")
        if file_hash(path / name) != files[name]["sha256"]:
            raise CheckpointError(f"{path / name}: is corrupted: its sha256 differs from the one in {MANIFEST}")
    return manifest


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and read the checkpoint folder ``path``. Raises CheckpointError naming the file and what is wrong."""
    manifest = read_manifest(path)
    state = _load_tensors(path / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: holds {type(state).__name__}, expected a dict")
    weights = {name: _load_tensors(path / name) for name in (STUDENT, LOSS, EMA) if name in manifest["files"]}
    return Checkpoint(path, manifest, weights, state)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A model's state dict from a ``.safetensors`` file, a ``.pt`` / ``.pth`` / ``.bin`` state dict (also under the key
    ``state_dict`` or ``model``), a fastkd checkpoint or a fastkd run folder (their student, as it was evaluated)::

        model.load_state_dict(load_weights("runs/digits"))

    Nothing is executed: pickles are read with ``weights_only=True``. Raises CheckpointError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        path = checkpoint / (EMA if EMA in read_manifest(checkpoint)["files"] else STUDENT)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file, checkpoint or run folder")
    state = _load_tensors(path)
    if isinstance(state, dict):
        for key in ("state_dict", "model"):
            if isinstance(state.get(key), dict):
                state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict (names to tensors)")
    return state


def load_into(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """``module.load_state_dict`` after a check of names and shapes; CheckpointError lists what differs."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: does not fit {type(module).__name__}: {'; '.join(problems[:8])}{more}")
    module.load_state_dict(state)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_tensors(path: Path) -> Any:
    """The content of a safetensors file or of a weights_only pickle; every failure becomes a CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or corrupted ({error})") from error
    except pickle.UnpicklingError as error:
        # Not torch's message, which advises to load the file in a way that executes what is in it.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {found[1]}" if found else "it is damaged or holds other objects"
        raise CheckpointError(f"{path}: cannot be read as tensors and plain types ({reason})") from None
    # torch.load raises half a dozen other kinds of exception on a damaged file.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as tensors and plain types ({reason})") from error


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies: safetensors refuses tensors that share memory (tied weights)."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _manifest_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
