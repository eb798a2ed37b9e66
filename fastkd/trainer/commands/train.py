"""``fastkd train`` and ``fastkd recipes``: a recipe's settings as flags."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tyro

from fastkd.trainer.commands.dry_run import plan
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.imports import import_object
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.recipes import RECIPES, summary
from fastkd.trainer.run.loop import train

PARTS = ("student", "teacher", "data")
_NOTE = """

Beside the flags below: --student.options '{"width": 8}' (teacher, data too) replaces all options, as JSON;
--teacher.name NAME gives a teacher to a recipe that has none; --dry-run [--ranks N] prints what the settings come to
and stops."""


def recipes_command() -> None:
    """The recipes there are; ``fastkd train NAME --help`` says all of one, ``--dry-run`` what it comes to."""
    width = max(map(len, RECIPES))
    for name in RECIPES:
        print(f"{name:<{width}}  {summary(name)}")


def train_command(arguments: list[str]) -> int:
    """Run ``fastkd train`` with these arguments and return the exit status."""
    # The user's own recipes, models and datasets usually lie in the current folder, which a console script lacks.
    sys.path.insert(0, os.getcwd())
    given, arguments = _flags_of_ours(arguments)
    name = arguments[0] if arguments else ""
    if ":" in name or name in RECIPES:  # parsers for the other recipes would take seconds
        recipe = RECIPES.get(name) or import_object(name, "recipe")
        configs = {name: _with_models(_call(name, recipe), given)}
        descriptions = {name: inspect.cleandoc(recipe.__doc__ or "") + _NOTE}
    else:
        configs = {name: recipe() for name, recipe in RECIPES.items()}
        descriptions = {name: summary(name) for name in RECIPES}
    # AvoidSubcommands: an optional teacher is --teacher.name ..., not a further subcommand.
    config = tyro.cli(
        tyro.extras.subcommand_type_from_defaults(configs, descriptions=descriptions),
        prog="fastkd train",
        description="Run a recipe. `fastkd train RECIPE --help` describes it and its flags.",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if given["dry_run"]:
        ranks = given["ranks"] or os.environ.get("WORLD_SIZE", "1")
        if not ranks.isdecimal() or int(ranks) == 0:
            raise ValueError(f"--ranks: got {ranks!r}, expected a number of ranks")
        print("\n".join(plan(config, int(ranks))))
        return 0
    result = train(config)
    if result.stopped_by is not None:
        return 128 + result.stopped_by  # what a shell reports for a process that a signal ended
    if not config.quiet and not result.already_finished and os.environ.get("RANK", "0") == "0":
        print(f"last accuracy {result.accuracy:.4f} in {result.seconds:.1f} s; checkpoint {result.path}")
        if result.best is not None:
            print(
                f"best accuracy {result.best[0]:.4f}; checkpoint {result.best[1]} (--best for eval, export and probe)"
            )
    return 0


def parse_json(flag: str, text: str) -> dict[str, Any]:
    """The JSON object in ``text``. ValueError that names ``flag`` for anything else."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object")
    return values


def _flags_of_ours(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags that are no setting of a recipe's config, and the arguments for tyro."""
    parser = argparse.ArgumentParser(prog="fastkd train", add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    if "--dry-run" in arguments:
        parser.add_argument("--ranks")
    for part in PARTS:
        parser.add_argument(f"--{part}.name")
        parser.add_argument(f"--{part}.options")
    known, rest = parser.parse_known_args(arguments)
    given = vars(known)
    # tyro reads the names too, where the recipe has such a part.
    return given, rest + [f"--{part}.name={given[f'{part}.name']}" for part in PARTS if given[f"{part}.name"]]


def _call(name: str, recipe: Callable[[], Any]) -> TrainConfig:
    """The recipe's TrainConfig. TypeError when it gives something else."""
    if not callable(recipe):
        raise TypeError(f"recipe: {name!r} is of type {type(recipe).__name__}, expected a function")
    config = recipe()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"recipe: {name!r} returned {type(config).__name__}, expected a TrainConfig")
    return config


def _with_models(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The config with the options given as JSON, and with a model that the recipe lacks and a name was given for."""
    for part in PARTS:
        name, options = given[f"{part}.name"], given[f"{part}.options"]
        current = getattr(config, part)
        if current is None and name is not None:
            current = ModelConfig(name=name)
        if options is not None:
            flag = f"--{part}.options"
            if current is None:
                raise ValueError(f"{flag}: got {options!r}, expected --{part}.name too: the recipe has no {part}")
            current = replace(current, options=parse_json(flag, options))
        config = replace(config, **{part: current})
    return config
