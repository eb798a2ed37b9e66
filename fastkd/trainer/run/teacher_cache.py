"""A teacher that was run once: what its classifier reads, for every training sample and epoch, in a folder on disk.

``fastkd cache-teacher`` writes the folder, and ``--teacher.cache`` reads it. What happens to a sample depends on the
seed, the epoch and its index alone, so that a run sees the images that the teacher saw. The teacher's logits follow
from what is kept: only its classifier is run.

    manifest.json   what the features were made of, their width and dtype, and the finished epochs
    epoch-0000.npy  the features of the first epoch, in the order of the samples; memory-mapped when they are read

The features [N, D] are of float16 or float32. With int8, the file holds N records of a ``scale``, float32, and of
``values``, int8 [D]; the features of a record are ``scale * values``.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.trainer.config import FREE_TO_CHANGE, TrainConfig
from fastkd.trainer.data.loader import collate, draws_nothing, fetch_seeded
from fastkd.trainer.data.options import options_class, with_defaults
from fastkd.trainer.files import replace_text
from fastkd.trainer.objective.objective import additions_of, needs
from fastkd.trainer.objective.terms.base import TermFunction
from fastkd.trainer.precision import autocast
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.rng import kept_generators, sample_seeds
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.saved.checkpoint import file_hash
from fastkd.trainer.run.state import Identity
from fastkd.trainer.strict_json import check_fields, read_json_object
from fastkd.validate import check_choice

MANIFEST = "manifest.json"
FORMAT = "fastkd teacher cache 1"
CACHE_DTYPES = ("float16", "float32", "int8")
_TOLERANCE = 0.05  # of a row that is computed anew, relative to its norm; int8 is the least exact
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("made_of", "written_with", "epochs"), dict),
    **dict.fromkeys(("format", "computed_in", "dtype"), str),
    "features": int,
    "every_epoch_alike": bool,
    "begun": (dict, type(None)),
}


class TeacherCache:
    """The folder of a cache, opened for reading::

        cache = TeacherCache("cache")
        cache.rows(epoch=0, indices=[3, 1])  # [2, D]

    Raises ValueError: there is no cache in ``folder``, or its manifest is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = read_json_object(self.folder / MANIFEST, _FIELDS)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"teacher.cache: {folder} has no {MANIFEST}, expected a folder that fastkd cache-teacher has written"
            ) from None
        except ValueError as error:
            raise ValueError(f"teacher.cache: {error}") from None
        known = {
            "format": (FORMAT,),
            "dtype": CACHE_DTYPES,
            "computed_in": ("float32", "bfloat16", "float16", "float64"),
        }
        for name, expected in known.items():
            check_choice(f"teacher.cache: {self.folder / MANIFEST}: {name}", self.manifest[name], expected)
        for epoch, entry in self.manifest["epochs"].items():
            name = f"{self.folder / MANIFEST}: epoch {epoch}"
            check_fields(entry if isinstance(entry, dict) else {}, {"bytes": int, "sha256": str}, name)
        self.dtype: str = self.manifest["dtype"]
        self._open: tuple[int, np.ndarray] | None = None
        self._verified: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None}  # a worker process maps the file by itself

    @property
    def samples(self) -> int:
        """The number N of training samples."""
        return self.manifest["made_of"]["samples"]

    def check(self, made_of: Mapping[str, Any], epochs: int) -> None:
        """ValueError, which names what differs, unless a run of these ``epochs`` can use the cache."""
        check_made_of(self.folder, self.manifest["made_of"], made_of)
        needed = 1 if self.manifest["every_epoch_alike"] else epochs
        finished = next(n for n in range(needed + 1) if n == needed or str(n) not in self.manifest["epochs"])
        if finished < needed:
            raise ValueError(
                f"teacher.cache: {self.folder} has {finished} epochs, expected the {needed} of the run; fastkd "
                f"cache-teacher with --epochs {needed} goes on with it"
            )
        for epoch in range(needed):
            self._file(epoch)

    def compare(self, distiller: Distiller, dataset: Any, config: TrainConfig) -> None:
        """ValueError unless the teacher gives what the cache has for some samples: images or code may have changed."""
        epoch, count = config.epochs - 1, len(dataset)
        indices = sorted({0, count // 3, 2 * count // 3, count - 1})
        with kept_generators():
            images, _ = collate(fetch_seeded(dataset, indices, sample_seeds(config.seed, epoch, indices)))
        device = next(distiller.parameters()).device
        with autocast(device, config.precision):
            output = distiller.teach(images.to(device))
        assert output is not None
        found, expected = self.rows(epoch, indices).float(), output.features.float().cpu()
        if found.shape != expected.shape:
            raise ValueError(
                f"teacher.cache: {self.folder} has features of {found.shape[1]} numbers, expected the teacher's "
                f"{expected.shape[1]}"
            )
        error = ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)).max().item()
        if not error <= _TOLERANCE:
            raise ValueError(
                f"teacher.cache: {self.folder} has other features than the teacher gives now, which differ by "
                f"{error:.0%}; expected the images and the models that it was written with"
            )

    def rows(self, epoch: int, indices: Sequence[int]) -> Tensor:
        """The features [B, D] of these samples in this epoch, in the dtype that the teacher has computed them in."""
        epoch = 0 if self.manifest["every_epoch_alike"] else epoch
        if self._open is None or self._open[0] != epoch:
            self._open = epoch, self._mapped(epoch)
        rows = self._open[1][np.asarray(indices)]
        if self.dtype == "int8":
            rows = rows["scale"][:, None] * rows["values"]
        kind = getattr(torch, self.manifest["computed_in"])
        return torch.from_numpy(rows).to(kind, copy=True)  # in memory of torch's, whose alignment kernels know

    def verifying(self, set_epoch: Callable[[int, int], None], ranks: Ranks) -> Callable[[int, int], None]:
        """``set_epoch`` of a loader, after a look at the bytes of the epoch's file: once for each file."""

        def verified(epoch: int, start: int = 0) -> None:
            place = 0 if self.manifest["every_epoch_alike"] else epoch
            if place not in self._verified:
                ranks.on_main(lambda: self._verify(place))
                self._verified.add(place)
            set_epoch(epoch, start)

        return verified

    @property
    def note(self) -> list[str]:
        """Lines for the user of a run."""
        written = ", ".join(f"{name} {value}" for name, value in self.manifest["written_with"].items())
        return [f"teacher: its features are read from {self.folder}, {self.dtype}, written with {written}"]

    def _verify(self, epoch: int) -> None:
        path = self._file(epoch)
        if file_hash(path) != self.manifest["epochs"][str(epoch)]["sha256"]:
            raise ValueError(
                f"teacher.cache: {path} is damaged: its bytes are not those that were written; remove it, and the same "
                "fastkd cache-teacher command writes it again"
            )

    def _file(self, epoch: int) -> Path:
        """The file of an epoch. ValueError unless it is there and as long as it was written."""
        path, size = self.folder / file_name(epoch), self.manifest["epochs"][str(epoch)]["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            got = "is missing" if found is None else f"has {found} bytes, expected {size}: it is truncated or damaged"
            raise ValueError(f"teacher.cache: {path} {got}; the same fastkd cache-teacher command writes it again")
        return path

    def _mapped(self, epoch: int) -> np.ndarray:
        path, (kind, shape) = self._file(epoch), layout(self.dtype, self.samples, self.manifest["features"])
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"teacher.cache: {path} is damaged ({error})") from None
        if array.dtype != kind or array.shape != shape:
            got = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"teacher.cache: {path} holds {got}, expected {kind} {list(shape)}")
        return array


def open_cache(config: TrainConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> TeacherCache | None:
    """The cache that ``config`` names; None if it names none.

    Raises ValueError for a loss or data to which the features do not suffice, and what ``TeacherCache`` raises.
    """
    if config.teacher is None or config.teacher.cache is None:
        return None
    check_use(config, terms)
    return TeacherCache(config.teacher.cache)


def check_use(config: TrainConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> None:
    """ValueError for a loss or data to which the features of the cache that ``config`` names do not suffice."""
    assert config.teacher is not None
    check_data(config, "teacher.cache")
    if (reason := why_not_cached(config, terms)) is not None:
        raise ValueError(f"teacher.cache: got {config.teacher.cache!r} with {reason}, expected no cache")


def why_not_cached(config: TrainConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> str | None:
    """Which term reads more of the teacher than its features and logits of the training images; None if none does."""
    for name in config.objective.weights:
        alone = replace(config.objective, terms="ce" if name == "ce" else f"0*ce + {name}")
        for what in ("maps", "taps", "preactivations"):
            if needs(what, alone, terms):
                return f"the term {name!r}, which reads the teacher's {what.replace('taps', 'intermediate maps')}"
        if "strong_teacher" in additions_of(alone, terms):
            return f"the term {name!r}, which reads the teacher's output for a second view"
    return None


def check_data(config: TrainConfig, flag: str) -> None:
    """ValueError for batches that are mixed, because the teacher reads images of several samples, and other tasks."""
    if config.task != "classification":
        raise ValueError(f"task: got {config.task!r} with {flag}, expected 'classification'")
    for name in ("mixup", "cutmix"):
        if value := getattr(config.data, name):
            raise ValueError(f"data.{name}: got {value} with {flag}, expected 0: a cache has no mixed images")


def made_of(identity: Identity, distiller: Distiller, alike: bool) -> dict[str, Any]:
    """What the features depend on, by the names of settings. ``alike``: every epoch has the same images."""
    assert distiller.teacher is not None
    config, given = identity.config, identity.given_as_objects
    data, teacher = config["data"], config["teacher"] or {}
    named = ("dtype", "fold") if "teacher" in given else ("name", "options", "classifier", "dtype", "fold")
    found = {
        "teacher.weights (sha256)": identity.teacher_sha256,
        **{f"teacher.{name}": teacher.get(name) for name in named},
        "teacher.normalization": distiller.teacher.computing.conversion,
        "precision": config["precision"],
        "labels (sha256)": identity.labels_sha256,
        "samples": identity.train_samples,
        "data.normalization": identity.normalization,
        "augmentation (version)": identity.augmentation,
        "seed": None if alike else config["seed"],
    }
    if "data" not in given:
        found |= {f"data.{name}": data[name] for name in ("name", "labelled", "subset_seed", "unlabelled")}
        options = with_defaults(data["name"], data["options"])
        names = {name: f"data.options.{name}" for name in options}
        found |= {names[name]: options[name] for name in options if names[name] not in FREE_TO_CHANGE}
    return json.loads(json.dumps(found))


def every_epoch_alike(config: TrainConfig, train_set: Any, given: bool) -> bool:
    """Whether the images of an epoch are known to be those of every other. ``given``: the data are an argument."""
    ours = not given and options_class(config.data.name) is not None
    return draws_nothing(train_set) or (ours and config.data.options.get("augment") is False)


def check_made_of(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names the first setting that differs."""
    for name in [*now, *(name for name in saved if name not in now)]:
        if saved.get(name) != now.get(name):
            shown = [reprlib.repr(values.get(name)) for values in (saved, now)]
            raise ValueError(f"teacher.cache: {folder} was written with {name} {shown[0]}, this run has {shown[1]}")


def layout(dtype: str, samples: int, features: int) -> tuple[np.dtype, tuple[int, ...]]:
    """The numpy dtype and the shape of an epoch's array."""
    if dtype == "int8":
        return np.dtype([("scale", "<f4"), ("values", "i1", (features,))]), (samples,)
    return np.dtype(dtype).newbyteorder("<"), (samples, features)


def packed(features: Tensor, dtype: str) -> np.ndarray:
    """The features [B, D] as they are kept. ValueError for what the dtype cannot hold."""
    values = features.detach().float().cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "int8":
            rows = values.astype(dtype)
        else:
            rows = np.empty(len(values), layout(dtype, 0, values.shape[1])[0])
            rows["scale"] = np.abs(values).max(axis=1) / 127
            rows["values"] = np.rint(values / np.where(rows["scale"] > 0, rows["scale"], 1)[:, None])
    if not np.isfinite(rows["scale"] if dtype == "int8" else rows).all():
        largest = np.abs(values).max()
        raise ValueError(f"dtype: got {dtype!r}, expected one that holds the teacher's features, up to {largest:.3g}")
    return rows


def file_name(epoch: int) -> str:
    """The name of an epoch's file."""
    return f"epoch-{epoch:04d}.npy"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest as a whole."""
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
