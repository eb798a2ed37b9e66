"""Runs one after the other, of which a later one begins with what an earlier one has trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.trainer.callbacks import Callback
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.files import replace_text
from fastkd.trainer.optim import Schedule
from fastkd.trainer.ranks import join_ranks
from fastkd.trainer.run.loop import TrainResult, train
from fastkd.trainer.run.saved.checkpoint import STAGES, CheckpointError, stage_folders
from fastkd.trainer.run.saved.log import RUN

LINK = "stage:"  # before the name of a stage, in the place of a path: the run folder of this stage


def train_stages(stages: Mapping[str, TrainConfig]) -> list[TrainResult]:
    """Train the ``stages`` in their order, in the folders ``1-NAME``, ``2-NAME``, ... of their ``run_dir``::

        first = replace(config, objective=ObjectiveConfig(terms="0*ce + fsp"), epochs=30)
        second = replace(config, student=replace(config.student, weights="stage:pretrain"), teacher=None)
        train_stages({"pretrain": first, "train": second})

    Every stage is a run of its own, with its own optimiser, checkpoints and records. Where a setting is a path,
    ``stage:NAME`` means the run folder of an earlier stage.

    With ``resume`` (or ``resume_or_start``) the last stage that has begun goes on where it stopped, and the others
    follow. The results are those of the stages that are trained now. After a signal the remaining stages are left out:
    the last result then has ``stopped_by``.

    Raises:
        ValueError: no stage; stages that differ in ``run_dir`` or ``resume``; a name or a link that is none; and what
            ``train`` raises.
        CheckpointError: there is a run already, or none to resume; and what ``train`` raises.
    """
    configs = linked(stages)
    for config in configs.values():  # a warm-up that is too long, before an earlier stage has taken its time
        Schedule(config.optim, steps_per_epoch=1000, epochs=config.epochs, global_batch=config.data.batch_size)
    first = next(iter(configs.values()))
    ranks = join_ranks(first.rank_timeout)  # once for all runs: torchrun's store serves one process group
    begun = ranks.on_main(lambda: _begun(configs, first))
    results: list[TrainResult] = []
    for number, (name, config) in enumerate(configs.items(), 1):
        if number < begun:
            continue
        if ranks.is_main and not config.quiet:
            print(f"stage {number} of {len(configs)}: {name}, in {config.run_dir}")
        config = replace(config, resume=False, resume_or_start=first.resume or first.resume_or_start)
        results.append(train(config, callbacks=[_WriteStages(list(configs))]))
        if results[-1].stopped_by is not None:
            break
    ranks.close()
    return results


def _begun(configs: Mapping[str, TrainConfig], first: TrainConfig) -> int:
    """The number of the last stage that has begun, counted from 1; 0 if none has. Raises if they may not go on."""
    folders = [Path(str(config.run_dir)) for config in configs.values()]
    root, begun = folders[0].parent, [place for place, folder in enumerate(folders, 1) if (folder / RUN).exists()]
    if (root / RUN).exists():
        raise ValueError(f"run_dir: got {str(root)!r}, which holds a run, expected a folder for those of the stages")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if begun and not (first.resume or first.resume_or_start or restarted):
        raise CheckpointError(f"{root}: already holds a run; resume it (--resume) or choose another --run-dir")
    if first.resume and not begun:
        raise CheckpointError(f"{root}: holds no run to resume")
    return begun[-1] if begun else 0


def linked(stages: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The stages with run folders of their own, and these in the place of the links to them. ValueError as above."""
    if not stages:
        raise ValueError("stages: got none, expected at least one")
    for name in ("run_dir", "resume", "resume_or_start"):
        given = {repr(getattr(config, name)) for config in stages.values()}
        if len(given) > 1 or given == {"None"}:
            raise ValueError(f"{name}: got {' and '.join(sorted(given))}, expected one value for all stages")
    root = Path(str(next(iter(stages.values())).run_dir))
    folders = dict(zip(stages, map(str, stage_folders(root, list(stages))), strict=True))
    found: dict[str, TrainConfig] = {}
    for name, config in stages.items():
        earlier = {f"{LINK}{other}": folders[other] for other in found}
        values = config.to_dict()
        for path, link in links_of(values).items():
            if link not in earlier:
                shown = ", ".join(earlier) or "a path: it is the first stage"
                raise ValueError(f"{'.'.join(path)}: got {link!r} in the stage {name!r}, expected {shown}")
            put(values, path, earlier[link])
        found[name] = replace(TrainConfig.from_dict(values), run_dir=folders[name])
    return found


def links_of(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """The links in nested settings, by the names that lead to them."""
    found: dict[tuple[str, ...], str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= links_of(value, (*path, name))
        elif isinstance(value, str) and value.startswith(LINK):
            found[*path, name] = value
    return found


def put(values: dict[str, Any], path: tuple[str, ...], value: str) -> None:
    """Set the value at the end of ``path`` in nested settings."""
    for name in path[:-1]:
        values = values[name]
    values[path[-1]] = value


class _WriteStages(Callback):
    """Says in the folder of the stages which there are, once a run has begun in it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_start(self, info: dict[str, Any], folder: Path | None, step: int) -> None:
        assert folder is not None
        replace_text(folder.parent / STAGES, json.dumps({"stages": self.names}) + "\n")
