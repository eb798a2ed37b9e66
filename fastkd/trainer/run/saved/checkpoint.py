"""Checkpoints: written atomically, verified before use, never unpickled beyond plain types and tensors.

A checkpoint is a folder ``step-00000123`` of files whose sizes and hashes its manifest states. What is in the files is
said in ``fastkd.trainer.run.state``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastkd.trainer.files import FolderLock
from fastkd.trainer.models.weights import CheckpointError, WeightsFile, load_tensors, read_weights, save_tensors
from fastkd.trainer.strict_json import check_fields, read_json_object

STUDENT, LOSS, EMA = "student.safetensors", "loss.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.pt", "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of them in the folder of a run
STAGES = "stages.json"  # in a folder that holds runs one after the other: their names
_STAGE = re.compile(r"[A-Za-z]\w*", re.ASCII)
_FORMAT = 3
_NAME = re.compile(r"step-(\d{1,18})(-evaluated)?", re.ASCII)


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

    Opening it locks it and removes the leftovers of an interrupted write (``.tmp-*``). Raises CheckpointError when
    another process has it open. Closing it leaves nothing of a folder into which nothing was written.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        self._lock = FolderLock(path)
        for leftover in path.glob(".tmp-*"):
            _remove(leftover)

    def begin(self) -> None:
        """Say that something will be written: closing then leaves the folder where it is."""
        self._lock.keep()

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

        Raises CheckpointError when there is one already, when it cannot be written (a full disk), or when the folder is
        no longer this process's; the earlier ones stay.
        """
        self._lock.check()
        self.begin()
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
            write(name, partial(save_tensors, _plain_tensors(module)))
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
            _remove(doomed)
        return final

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for match, path in sorted(((int(m[1]), m[2] or ""), path) for m, path in found if m)]


def best_checkpoint(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the highest accuracy in its manifest, the latest of equals; None if no manifest has one."""
    found: list[tuple[float, int, Path]] = []
    for path in checkpoints:
        try:
            accuracy = read_json_object(path / MANIFEST).get("accuracy")
        except (OSError, ValueError):
            continue
        if isinstance(accuracy, float) and 0 <= accuracy <= 1:
            found.append((accuracy, len(found), path))
    return max(found)[2] if found else None


def find_checkpoint(path: str | Path, *, best: bool = False) -> Path:
    """The checkpoint folder that ``path`` means: itself, or of a run folder the newest or the ``best`` one.

    Of a folder of stages the run is the last of them::

        find_checkpoint("runs/digits", best=True)  # runs/digits/checkpoints/step-00000160

    CheckpointError if there is none.
    """
    path = last_stage(Path(path))
    if not path.is_dir():
        what = "is a file, expected a" if path.exists() else "no such"
        raise CheckpointError(f"{path}: {what} checkpoint or run folder")
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        seeds = sorted(path.glob("seed-*"))
        hint = f"; it holds the runs of several seeds, such as {seeds[0]}" if seeds else ""
        raise CheckpointError(
            f"{path}: holds no checkpoint (no {MANIFEST} in it, no checkpoints/step-* below it){hint}"
        )
    chosen = best_checkpoint(found) if best else found[-1]
    if chosen is None:
        raise CheckpointError(f"{path}: none of its {len(found)} checkpoints was evaluated")
    return chosen


def stage_folders(folder: Path, names: list[str]) -> list[Path]:
    """The run folders of stages of these names. ValueError for a name that is none."""
    for name in names:
        if not isinstance(name, str) or not _STAGE.fullmatch(name):
            raise ValueError(f"stages: got the name {name!r}, expected letters, digits and underscores")
    return [folder / f"{number}-{name}" for number, name in enumerate(names, 1)]


def last_stage(folder: Path) -> Path:
    """The run folder of the last stage if ``folder`` holds stages, else ``folder`` itself.

    CheckpointError if that stage has not begun, whose student is the one that is meant.
    """
    if not (folder / STAGES).is_file():
        return folder
    try:
        names = read_json_object(folder / STAGES, {"stages": list})["stages"]
        *_, last = stage_folders(folder, names)
    except ValueError as error:
        raise CheckpointError(f"{folder / STAGES}: names no stages ({error})") from error
    if not last.is_dir():
        begun = [path.name for path in stage_folders(folder, names) if path.is_dir()]
        raise CheckpointError(f"{folder}: its last stage, {last.name}, has not begun; there is {', '.join(begun)}")
    return last


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint folder ``path``, after every file has been compared with it."""
    file = path / MANIFEST
    try:
        manifest = read_json_object(file)
        stated = manifest.pop("sha256", None)
        if stated != _manifest_hash(manifest):
            raise ValueError(f"{file}: is corrupted, its sha256 differs from the one it states")
        if manifest.get("format") != _FORMAT:
            raise ValueError(f"{file}: has format {manifest.get('format')!r}, expected {_FORMAT}")
        check_fields(manifest, {"step": int, "config": dict, "files": dict}, str(file))
        _check_manifest(path, manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return manifest


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """ValueError when a field is not what we write, or a file is not the one that the manifest describes."""
    file, files = path / MANIFEST, manifest["files"]
    text_or_null, list_or_null = (str, type(None)), (list, type(None))
    optional: dict[str, type | tuple[type, ...]] = {
        "epoch": int,
        "train_samples": int,
        "versions": dict,
        "given_as_objects": list,
        "labels_sha256": text_or_null,
        "teacher_sha256": text_or_null,
        "accuracy": (float, type(None)),
        "classes": list_or_null,
        "normalization": list_or_null,
    }
    check_fields(manifest, {name: kind for name, kind in optional.items() if name in manifest}, str(file))
    for name in ("given_as_objects", "classes"):
        if not all(isinstance(item, str) for item in manifest.get(name) or []):
            raise ValueError(f"{file}: {name} is a list of something else than str")
    if not all(isinstance(version, str) for version in manifest.get("versions", {}).values()):
        raise ValueError(f"{file}: versions holds something else than str")
    for part in manifest.get("normalization") or []:
        if not isinstance(part, list) or not all(isinstance(value, float) for value in part):
            raise ValueError(f"{file}: normalization is something else than lists of float")
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise ValueError(f"{path}: is the checkpoint of step {manifest['step']} under another name; rename it")
    for name in (STUDENT, LOSS, STATE, *([EMA] if EMA in files else [])):
        if name not in files:
            raise ValueError(f"{file}: does not list {name}")
        if not isinstance(files[name], dict):
            raise ValueError(f"{file}: files.{name} is of type {type(files[name]).__name__}, expected dict")
        check_fields(files[name], {"bytes": int, "sha256": str}, f"{file}: files.{name}")
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: is missing")
        size = (path / name).stat().st_size
        if size != files[name]["bytes"]:
            raise ValueError(f"{path / name}: is truncated: {size} bytes, expected {files[name]['bytes']}")
        if file_hash(path / name) != files[name]["sha256"]:
            raise ValueError(f"{path / name}: is corrupted: its sha256 differs from the one in {MANIFEST}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and read the checkpoint folder ``path``. Raises CheckpointError naming the file and what is wrong."""
    manifest = read_manifest(path)
    state = load_tensors(path / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: holds {type(state).__name__}, expected a dict")
    weights = {name: load_tensors(path / name) for name in (STUDENT, LOSS, EMA) if name in manifest["files"]}
    return Checkpoint(path, manifest, weights, state)


def find_weights(path: str | Path) -> WeightsFile:
    """The state dict that ``path`` means: a weights file's, or a checkpoint's or run folder's student as evaluated."""
    path = Path(path)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        path = checkpoint / (EMA if EMA in read_manifest(checkpoint)["files"] else STUDENT)
    return read_weights(path)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A model's state dict from a ``.safetensors`` file, from what ``torch.save`` wrote (a state dict, or one under a
    usual key such as ``state_dict``, of which ``state_dict_ema`` goes first), from a fastkd checkpoint or from a fastkd
    run folder (their student, as it was evaluated)::

        model.load_state_dict(load_weights("runs/digits"))

    The prefixes of DistributedDataParallel and torch.compile are left out. Nothing is executed: pickles are read with
    ``weights_only=True``. Raises CheckpointError naming the file.
    """
    from timm.models import clean_state_dict

    state: dict[str, Tensor] = clean_state_dict(find_weights(path).state)
    return state


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies: safetensors refuses tensors that share memory (tied weights)."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def _manifest_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
