"""``fastkd train`` and ``fastkd recipes``: a recipe's settings as flags, or those of a file."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import tyro

from fastkd.trainer.commands.dry_run import plan
from fastkd.trainer.commands.messages import errors_in_one_line
from fastkd.trainer.commands.seeds import train_seeds
from fastkd.trainer.commands.teacher import teacher_of_weights
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.options import options_class
from fastkd.trainer.imports import import_object
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.models.cifar.teachers import TEACHER_URL, published_teacher_in
from fastkd.trainer.objective.config import ObjectiveConfig, describe_terms
from fastkd.trainer.objective.objective import needs
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.trainer.recipes import RECIPES, STAGED_RECIPES, summary
from fastkd.trainer.recipes.methods import PRETRAINING, SUMS, objective_of
from fastkd.trainer.recipes.stages import pretrained
from fastkd.trainer.run.loop import train
from fastkd.trainer.run.saved.config_file import read_config
from fastkd.trainer.run.stages import linked, links_of, put, train_stages

PARTS = ("student", "teacher", "data")
_NOTE = """

Another --student.name (teacher, data too) drops the recipe's options, layers and weights of that model.
--student.options '{"width": 8}' (teacher, data too) replaces all options, as JSON. --teacher.name NAME gives a teacher
to a recipe that has none. Run `fastkd train RECIPE --help-verbose` for what each flag does, and for the options of
methods that are not in the loss."""
_USAGE = """\
usage: fastkd train RECIPE [flags]           every setting of the recipe is a flag
       fastkd train RECIPE --config FILE     settings of a YAML file on top of the recipe's, and flags on top of both
       fastkd train --config FILE            a file with all settings, such as RUN/config.yaml

`fastkd train RECIPE --help` lists the flags of a recipe. RECIPE is package.module:function, or one of
"""
Options = TypeVar("Options")


@dataclass(kw_only=True)
class Flags(Generic[Options]):
    """The flags of ``fastkd train``: all settings, and what is to be done with them.

    Attributes:
        settings: of the run.
        options: of the data set.
        config: take settings from this YAML file. Flags beside it have the last word.
        seeds: train with each of these seeds, in the folders seed-N of the run folder, and print mean and deviation.
        method: take the loss of this method, with its authors' weights, and add its name to the run folder.
        no_teacher: train without the recipe's teacher and without the terms that need one.
        dry_run: print what the settings come to, with a memory estimate, and stop.
        ranks: with --dry-run, the number of processes of the run.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="data.options")]
    config: str | None = None
    seeds: tuple[int, ...] = ()
    method: str | None = None
    no_teacher: tyro.conf.FlagCreatePairsOff[bool] = False
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    ranks: int | None = None


def recipes_command() -> None:
    """The recipes there are; ``fastkd train NAME --help`` says all of one, ``--dry-run`` what it comes to."""
    print("\n".join(_recipe_lines()))


def train_command(arguments: list[str]) -> int:
    """Run ``fastkd train`` with these arguments and return the exit status."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_USAGE + "\n".join(f"  {line}" for line in _recipe_lines()))
        print(textwrap.fill(f"--method NAME takes the loss of a method: {', '.join(SUMS)}", 120))
        return 0
    # The user's own recipes, models and datasets usually lie in the current folder, which a console script lacks.
    sys.path.insert(0, os.getcwd())
    parsed = parse_stages(arguments)
    flags, stages = next(iter(parsed.values())), {name: each.settings for name, each in parsed.items()}
    config = flags.settings
    if flags.dry_run:
        ranks = flags.ranks or int(os.environ.get("WORLD_SIZE", "1"))
        for name, stage in stages.items() if "" in stages else linked(stages).items():
            print("\n".join([*([f"stage {name}:"] if name else []), *plan(stage, ranks)]))
        return 0
    for stage in stages.values():
        _check_teacher_is_there(stage)
    speaks = not config.quiet and os.environ.get("RANK", "0") == "0"
    if flags.seeds:
        result = train_seeds(stages.get("", stages), flags.seeds)[-1]
    else:
        result = train(config) if "" in stages else train_stages(stages)[-1]
    if result.stopped_by is not None:
        if speaks and not flags.seeds and result.path is not None:
            again = [argument for argument in arguments if argument != "--resume"]
            print(f"go on with: {shlex.join(['fastkd', 'train', *again, '--resume'])}")
        return 128 + result.stopped_by  # what a shell reports for a process that a signal ended
    if speaks and not flags.seeds and not result.already_finished:
        print(f"last {result.metric} {result.accuracy:.4f} in {result.seconds:.1f} s; checkpoint {result.path}")
        if result.best is not None:
            best, path = result.best
            print(f"best {result.metric} {best:.4f}; checkpoint {path} (--best for eval, export and probe)")
    return 0


def parse_flags(arguments: list[str]) -> Flags[Any]:
    """What a command line for a single run says, after ``fastkd train``: see ``parse_stages``."""
    (flags,) = parse_stages(arguments).values()
    return flags


def parse_stages(arguments: list[str]) -> dict[str, Flags[Any]]:
    """What a command line says, after ``fastkd train``: a recipe or a file, and flags on top, for every stage.

    The only stage of a single run is ``""``. A flag is that of all stages; ``--STAGE.FLAG`` is that of one.

    Raises ValueError or TypeError for settings that are wrong; SystemExit for flags that cannot be read.
    """
    name = "" if arguments[0].startswith("-") else arguments[0]
    rest = arguments[1:] if name else arguments
    recipe, text = _recipe(name) if name else (TrainConfig(), "The settings of a file.")
    method = _flags_that_come_first(rest)[0]["method"]
    stages = {"": recipe} if isinstance(recipe, TrainConfig) else dict(recipe)
    if method is not None:
        if "" not in stages:
            raise ValueError(f"--method: got {method!r}, expected none with a recipe of stages, {', '.join(stages)}")
        stages = _by_method(stages[""], method)
    if "" not in stages:
        text += f"\n\nStages, one after the other: {', '.join(stages)}. --{next(iter(stages))}.FLAG is for one of them."
    found = {}
    for stage, config in stages.items():
        _check_links(stage, config, rest)
        no_teacher = config.teacher is None and not needs("teacher", config.objective)
        own = _flags_of(stage, list(stages), rest, drop="--teacher." if stage and no_teacher else None)
        found[stage] = _parse(name, text, config, own)
    for shared in ("seeds", "dry_run", "ranks"):
        if len({getattr(flags, shared) for flags in found.values()}) > 1:
            raise ValueError(f"--{shared.replace('_', '-')}: is for all stages, expected it without the name of one")
    return found


def _check_links(stage: str, config: TrainConfig, arguments: list[str]) -> None:
    """Refuse a flag for what an earlier stage trains. ``--student.weights`` of all stages is that of the first."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for path, link in links_of(config.to_dict()).items():
        flag = ".".join(path).replace("_", "-")
        for refused in (f"--{stage}.{flag}", *([f"--{flag}"] if path[0] == "objective" else [])):
            if refused in given:
                raise ValueError(f"{refused}: is given, expected it left out, because it is the run of {link!r}")


def _flags_of(stage: str, stages: list[str], arguments: list[str], drop: str | None) -> list[str]:
    """The flags of all stages, but for those that begin with ``drop``, and then those of ``stage``."""
    common: list[str] = []
    own: list[str] = []
    left_out: list[str] = []
    current = common
    for argument in arguments:
        if argument.startswith("--"):
            flag, dot, rest = argument[2:].partition(".")
            named = dot and flag in stages and flag
            current = common if not named else own if named == stage else left_out
            if drop is not None and argument.startswith(drop):
                current = left_out
            argument = f"--{rest}" if named else argument
        current.append(argument)
    return common + own


def _parse(name: str, text: str, config: TrainConfig, arguments: list[str]) -> Flags[Any]:
    """``config`` with the settings of a file and of flags on top. Its links to other stages stay."""
    given, rest = _flags_that_come_first(arguments)
    links = links_of(config.to_dict())
    if given["config"] is not None:
        config = read_config(given["config"], config)
    elif not name:
        raise ValueError(f"got {arguments[0]!r}, expected a recipe first (fastkd recipes lists them), or --config FILE")
    if given["no_teacher"]:
        config = _without_teacher(config)
        of_it = {flag: given[flag] for flag in given if flag.startswith("teacher.") and given[flag] is not None}
        rest = [argument for argument in rest if argument not in {f"--{flag}={of_it[flag]}" for flag in of_it}]
        given |= dict.fromkeys(of_it)
        if of_it and os.environ.get("RANK", "0") == "0":
            print(f"--no-teacher: leaves out {', '.join(f'--{flag} {of_it[flag]}' for flag in of_it)}")
    config = _with_parts(config, given)
    kind = options_class(config.data.name)
    given_options, options = config.data.options, config.data.options
    if kind is not None:
        required = [field.name for field in fields(kind) if field.name == "root" and "root" not in given_options]
        options = kind(**given_options | dict.fromkeys(required, ""))
        for field in required:
            object.__setattr__(options, field, tyro.MISSING)  # tyro asks for it
    without = replace(config, data=replace(config.data, options={}))  # they have flags of their own
    generic: Any = Flags
    hidden = set(TERMS) - set(config.objective.weights) if {"-h", "--help"} & set(rest) else set()
    with errors_in_one_line(rest, _names_of_flags(without, options)), _objective_flags(hidden):
        flags: Flags[Any] = tyro.cli(
            generic[kind or dict[str, Any]],
            prog=f"fastkd train {name}".strip(),
            description=text + _NOTE,
            args=rest,
            default=Flags(settings=without, options=options),
            compact_help=True,
            # AvoidSubcommands: an optional teacher is --teacher.name ..., not a further subcommand.
            config=(tyro.conf.AvoidSubcommands,),
        )
    chosen = flags.options
    if kind is not None:
        defaults = {field.name: field.default for field in fields(kind)}
        chosen = {
            name: getattr(flags.options, name)
            for name, default in defaults.items()
            if name in given_options or getattr(flags.options, name) != default
        }
    flags.settings = replace(flags.settings, data=replace(flags.settings.data, options=chosen))
    values = flags.settings.to_dict()
    for path, link in links.items():
        put(values, path, link)
    flags.settings = TrainConfig.from_dict(values) if links else flags.settings
    if flags.ranks is not None and (flags.ranks < 1 or not flags.dry_run):
        raise ValueError(f"--ranks: got {flags.ranks}, expected a number of ranks, with --dry-run")
    return flags


def _objective_flags(hidden: Set[str]) -> AbstractContextManager[Any]:
    """Within it, tyro does not know the flags of these terms: ``--help`` is short enough to be read."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def _rule(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if info.type is not ObjectiveConfig:
            return None
        hints = get_type_hints(ObjectiveConfig)
        parts = tuple(
            tyro.constructors.StructFieldSpec(
                name=part.name,
                type=Annotated[hints[part.name], tyro.conf.Suppress] if part.name in hidden else hints[part.name],  # type: ignore[arg-type]
                default=getattr(info.default, part.name),
                helptext=f"options of {part.name}." if part.name != "terms" else "the sum of terms and their weights.",
            )
            for part in fields(ObjectiveConfig)
        )
        return tyro.constructors.StructConstructorSpec(instantiate=ObjectiveConfig, fields=parts)

    return registry


def parse_json(flag: str, text: str) -> dict[str, Any]:
    """The JSON object in ``text``. ValueError that names ``flag`` for anything else."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object")
    return values


def _names_of_flags(config: TrainConfig, options: Any) -> list[str]:
    """The flags that a mistyped one may mean."""

    def flat(values: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for name, value in values.items():
            deeper = isinstance(value, dict)
            found += flat(value, f"{prefix}{name}.") if deeper else [prefix + name]
        return found

    model = {part.name: None for part in fields(ModelConfig)}
    options = options if isinstance(options, dict) else vars(options)
    known = {"student": model, "teacher": model, "data.options": options, "help": None}
    own = {part.name: None for part in fields(Flags)[2:]}
    names = flat(config.to_dict() | own, "") + flat(known, "")
    return sorted({f"--{name.replace('_', '-')}" for name in names})


def _recipe_lines() -> list[str]:
    names = [*RECIPES, *STAGED_RECIPES]
    width = max(map(len, names))
    return [f"{name:<{width}}  {summary(name)}" for name in names]


def _flags_that_come_first(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags that decide which others there are, and the arguments for tyro."""
    parser = argparse.ArgumentParser(prog="fastkd train", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--method")
    parser.add_argument("--no-teacher", dest="no_teacher", action="store_true")
    parser.add_argument("--teacher.weights")
    for part in PARTS:
        parser.add_argument(f"--{part}.name")
        parser.add_argument(f"--{part}.options")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: got none, {error.message}") from None
    given = vars(known)
    # tyro reads these too, where the recipe has such a part.
    again = [f"{part}.name" for part in PARTS] + ["teacher.weights"]
    return given, rest + [f"--{name}={given[name]}" for name in again if given[name]]


def _recipe(name: str) -> tuple[TrainConfig | Mapping[str, TrainConfig], str]:
    """The config of a recipe, or those of its stages by their names, and what it says of itself."""
    known: dict[str, Callable[[], Any]] = {**RECIPES, **STAGED_RECIPES}
    if ":" not in name and name not in known:
        near = difflib.get_close_matches(name, known, 3)
        meant = f"did you mean {' or '.join(near)}?" if near else "expected a recipe or package.module:function;"
        raise ValueError(f"got the recipe {name!r}, {meant} `fastkd recipes` lists them")
    recipe: Callable[[], Any] = known.get(name) or import_object(name, "recipe")
    if not callable(recipe):
        raise TypeError(f"recipe: {name!r} is of type {type(recipe).__name__}, expected a function")
    config = recipe()
    stages = list(config.values()) if isinstance(config, Mapping) and config else [config]
    if not all(isinstance(stage, TrainConfig) for stage in stages):
        kind = type(next(stage for stage in stages if not isinstance(stage, TrainConfig))).__name__
        raise TypeError(f"recipe: {name!r} returned {kind}, expected a TrainConfig, or a dict of stages")
    return config, inspect.cleandoc(recipe.__doc__ or "")


def _by_method(config: TrainConfig, method: str) -> dict[str, TrainConfig]:
    """The config with the loss of a method, and a run folder of its own; by its stages if the method has some."""
    objective = objective_of(method)
    folder = None if config.run_dir is None else f"{config.run_dir}-{method.replace('+', '-')}"
    config = replace(config, objective=objective, run_dir=folder)
    return pretrained(config, method) if method in PRETRAINING else {"": config}


def _without_teacher(config: TrainConfig) -> TrainConfig:
    """The config without its teacher and without the terms that need one. Says what is left of the loss."""
    left = {
        name: weight
        for name, weight in config.objective.weights.items()
        if not needs("teacher", replace(config.objective, terms=f"0*ce + {name}" if name != "ce" else "ce"))
    }
    left = left or {"ce": 1.0}
    dropped = [name for name in config.objective.weights if name not in left]
    if os.environ.get("RANK", "0") == "0":
        what = f"leaves out {', '.join(dropped)}; the loss is" if dropped else "the loss stays"
        print(f"--no-teacher: {what} {describe_terms(left)}")
    terms = " + ".join(f"{weight!r}*{name}" for name, weight in left.items())
    terms = terms if "ce" in left else f"0*ce + {terms}"
    return replace(config, teacher=None, objective=replace(config.objective, terms=terms))


def _with_parts(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The config with the names and the options that were given; another name drops the options of the old one."""
    for part in PARTS:
        name, options = given[f"{part}.name"], given[f"{part}.options"]
        current = getattr(config, part)
        if part == "teacher" and given["teacher.weights"] is not None:
            current = teacher_of_weights(given["teacher.weights"], name, current)
        if current is None and name is not None:
            current = ModelConfig(name=name)
        elif current is not None and name not in (None, current.name):
            of_the_old: dict[str, Any] = {"options": {}}
            if part != "data":
                of_the_old |= dict.fromkeys(("classifier", "feature_map", "taps", "weights", "normalization"))
            current = replace(current, name=name, **of_the_old)
        if options is not None:
            flag = f"--{part}.options"
            if current is None:
                raise ValueError(f"{flag}: got {options!r}, expected --{part}.name too: the recipe has no {part}")
            current = replace(current, options=parse_json(flag, options))
        config = replace(config, **{part: current})
    return config


def _check_teacher_is_there(config: TrainConfig) -> None:
    """Raise ValueError if a published teacher, or one that another recipe trains, is not there. It says what to do."""
    weights = None if config.teacher is None else config.teacher.weights
    if weights is None or Path(weights).exists() or config.resume:
        return
    if (published := published_teacher_in(weights)) is not None:
        address = TEACHER_URL.format(name=published.name.removeprefix("cifar:"))
        raise ValueError(f"teacher.weights: {weights} is not there; download {address}")
    first = next((name for name, recipe in RECIPES.items() if recipe().run_dir == weights), None)
    if first is not None:
        raise ValueError(
            f"teacher.weights: {weights} is not there; first: fastkd train {first}, or --teacher.weights FILE, or "
            "--no-teacher"
        )
