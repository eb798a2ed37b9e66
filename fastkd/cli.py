"""The command line: chooses the command, and tells a user's mistake in one line."""

import difflib
import os
import pkgutil
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from fastkd import __version__

USAGE = """\
usage: fastkd COMMAND ...

  demo               train a teacher and students on scikit-learn's digits, write a report
  recipes            the recipes there are, a line each
  train RECIPE ...   run a recipe, its own or package.module:function; every setting is a flag
  train --config FILE ...   run the settings of a YAML file, such as the config.yaml of a run
  train RECIPE --seeds 0 1 2 ...   a run per seed, then mean and standard deviation
  train RECIPE --dry-run [--ranks N] ...   print what it comes to, with a memory estimate, and stop
  eval CHECKPOINT    accuracy of a checkpoint or of the newest one of a run folder
  export CHECKPOINT OUT   its student as .safetensors or .onnx, checked
  probe CHECKPOINT   linear probe of its frozen features on other data
  cache-teacher RECIPE --output FOLDER ...   run its teacher once, for several runs with --teacher.cache
  study NAME ...     a table or figure of a paper: a grid of runs, resumed, beside the published numbers
  shards --root FOLDER --out DIR   a folder of images as WebDataset shards, smaller if asked for
  report RUN ...     an HTML page about a run, or several compared, from their folders

fastkd COMMAND --help describes each; fastkd --version says which fastkd this is.
"""
# Named and not imported: a command loads what it needs. Its function's parameters are its flags.
_COMMANDS = {
    "demo": "fastkd.demo.digits:demo_command",
    "recipes": "fastkd.trainer.commands.train:recipes_command",
    "train": "fastkd.trainer.commands.train:train_command",
    "eval": "fastkd.trainer.commands.evaluate_checkpoint:eval_command",
    "export": "fastkd.trainer.commands.export:export_command",
    "probe": "fastkd.trainer.commands.linear_probe:probe_command",
    "cache-teacher": "fastkd.trainer.commands.cache_teacher:cache_teacher_command",
    "shards": "fastkd.trainer.commands.shards:shards_command",
    "report": "fastkd.trainer.report.page:report_command",
    "study": "fastkd.study.command:study_command",
}
# Beside ``train``. The extra ``export`` is asked for where an ONNX file is written.
_FURTHER_EXTRAS = {"demo": ("report",), "probe": ("report",), "report": ("report",), "study": ("report",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return the exit status.

    It is 0 when all went well, 1 for a mistake that the user can put right, 2 for an unknown command, and 128 and the
    number of a signal that ended it.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command in ("-V", "--version"):
        print(f"fastkd {__version__}")
        return 0
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, 1)
        meant = f", did you mean {near[0]}?" if near else f", expected one of {', '.join(_COMMANDS)};"
        print(f"fastkd: unknown command {command!r}{meant} fastkd --help describes them", file=sys.stderr)
        return 2
    from fastkd import trainer
    from fastkd.trainer.extras import MissingExtraError, require_extras
    from fastkd.trainer.text import printable

    try:
        require_extras("train", *_FURTHER_EXTRAS.get(command, ()), by="this command")
        status = _run(command, arguments)
        sys.stdout.flush()  # here, where a reader that went away is expected
        return status
    except MissingExtraError as error:
        print(f"fastkd {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastkd {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # fastkd eval RUN | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        message = str(error)
        if isinstance(error, trainer.BrokenImagesError):  # from a loader's worker, it contains the traceback there
            message = message.rpartition("BrokenImagesError: ")[2].strip()
        # Names of files and classes may hold what moves a terminal's cursor. Some of our messages have several lines.
        message = "\n".join(map(printable, message.splitlines()))
        print(f"fastkd {command}: {message}", file=sys.stderr)
        return 1


def _run(command: str, arguments: list[str]) -> int:
    import tyro

    function = pkgutil.resolve_name(_COMMANDS[command])
    if command in ("train", "study", "cache-teacher"):  # their flags depend on the recipe or the study
        return function(arguments)
    from fastkd.trainer.commands.messages import errors_in_one_line

    with errors_in_one_line(arguments, _names_of_flags(function)):
        tyro.cli(function, prog=f"fastkd {command}", args=arguments)
    return 0


def _names_of_flags(function: Callable[..., Any]) -> list[str]:
    """The flags of a command: its parameters, and the fields of those that are dataclasses."""
    names = ["help"]
    for name, kind in typing.get_type_hints(function).items():
        prefix = "" if name == "config" else f"{name}."  # as ``demo_command`` declares it
        names += [prefix + part.name for part in fields(kind)] if is_dataclass(kind) else [name]
    return [f"--{name.replace('_', '-')}" for name in names]


def _is_users_mistake(error: Exception) -> bool:
    """Whether the user can put it right. The traceback of any other exception is shown."""
    from fastkd import trainer
    from fastkd.trainer.commands.export import ExportError

    if isinstance(error, TypeError):  # about an argument if our own code raised it, else a bug to look into
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return str(frame.f_globals.get("__name__")).startswith("fastkd.")
    ours = (trainer.CheckpointError, trainer.NonFiniteLossError, trainer.RankLostError, trainer.BrokenImagesError)
    return isinstance(error, (ValueError, OSError, ExportError, *ours))


if __name__ == "__main__":
    sys.exit(main())
