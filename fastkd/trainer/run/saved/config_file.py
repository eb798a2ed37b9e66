"""``config.yaml``: the settings of a run as a file that repeats it, read again with ``fastkd train --config``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.files import replace_text

CONFIG = "config.yaml"
# What belongs to one start of a run, and not to the run.
_OF_A_START = ("resume", "resume_or_start")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a string, because it has no point. Here it is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_config(path: str, base: TrainConfig) -> TrainConfig:
    """``base`` with the settings of the YAML file ``path`` in the place of its own.

    A section with another ``name`` (of a model, or of the data) takes the place of the whole section.

    Raises:
        ValueError: the file cannot be read, or holds something else than settings; the message names the file.
    """
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} holds {type(values).__name__}, expected settings such as 'epochs: 30'")
    try:
        return TrainConfig.from_dict(_merged(base.to_dict(), values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config: {path}: {str(error).removeprefix('config: ')}") from None


def write_config(path: Path, config: dict[str, Any], given_as_objects: list[str]) -> None:
    """Write the settings ``config`` to ``path``, whole or not at all."""
    head = f"# Repeats this run: fastkd train --config {path} --run-dir ANOTHER\n"
    if given_as_objects:
        head = f"# These were given to train() as objects, which a file cannot hold: {', '.join(given_as_objects)}.\n"
    body = yaml.safe_dump({name: value for name, value in config.items() if name not in _OF_A_START}, sort_keys=False)
    replace_text(path, head + body)


def _merged(base: Any, over: Any) -> Any:
    """``over``, with what it leaves out of a section taken from ``base``."""
    if (
        not isinstance(base, dict)
        or not isinstance(over, dict)
        or over.get("name", base.get("name")) != base.get("name")
    ):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}
