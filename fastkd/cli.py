"""The command line: ``fastkd demo``, ``fastkd train RECIPE --...``, ``fastkd eval CHECKPOINT``."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from json import dumps as dump
from pathlib import Path
from typing import Any

USAGE = """\
usage: fastkd COMMAND ...

  demo               train a teacher and students on scikit-learn's digits, write a report
  recipes            the recipes there are, a line each
  train RECIPE ...   run a recipe, its own or package.module:function; every setting is a flag
  train RECIPE --dry-run [--ranks N] ...   print what it comes to, with a memory estimate, and stop
  eval CHECKPOINT    accuracy of a checkpoint or of the newest one of a run folder
  export CHECKPOINT OUT   its student as .safetensors or .onnx, checked
  probe CHECKPOINT   linear probe of its frozen features on other data
  report RUN ...     an HTML page about a run, or several compared, from their folders

fastkd COMMAND --help describes each.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). Returns the exit status; 2 for a wrong command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in _COMMANDS:
        print(f"fastkd: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    from fastkd import trainer

    try:
        trainer.require_extras()
    except ImportError as error:
        print(f"fastkd: {error}", file=sys.stderr)
        return 1
    from fastkd.trainer.commands.export import ExportError
    from fastkd.trainer.data.encoded import BrokenImagesError

    ours = (trainer.CheckpointError, trainer.NonFiniteLossError, BrokenImagesError, ExportError)
    try:
        return _COMMANDS[command](rest)
    # What a user can put right is told in one line; any other exception keeps its traceback.
    except (ValueError, TypeError, OSError, *ours) as error:
        if isinstance(error, TypeError) and not _is_ours(error):
            raise
        message = str(error)
        if isinstance(error, BrokenImagesError):  # one from a loader's worker contains its traceback
            message = message.rpartition("BrokenImagesError: ")[2].strip()
        print(f"fastkd {command}: {message}", file=sys.stderr)
        return 1


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it: it is about an argument then, and a bug to look into otherwise."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__")).startswith("fastkd.")


def _demo(arguments: list[str]) -> int:
    import tyro

    from fastkd.demo.digits import DemoConfig, run_demo

    run_demo(tyro.cli(DemoConfig, prog="fastkd demo", args=arguments))
    return 0


def _train(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.imports import import_object
    from fastkd.trainer.recipes import RECIPES
    from fastkd.trainer.run.loop import train

    arguments, dry_run, world_size = _without_dry_run(arguments)
    known = dict(RECIPES)
    # The user's own recipes, models and datasets usually lie in the current folder, which a console script lacks.
    sys.path.insert(0, os.getcwd())
    if arguments and ":" in arguments[0]:
        known = {arguments[0]: import_object(arguments[0], "recipe")}
    elif arguments and arguments[0] in known:
        known = {arguments[0]: known[arguments[0]]}  # parsers for the others would take seconds
    defaults = {name: _call_recipe(name, recipe) for name, recipe in known.items()}
    if arguments and arguments[0] in defaults:
        defaults[arguments[0]], arguments = _with_models(defaults[arguments[0]], arguments)
    configs = tyro.extras.subcommand_type_from_defaults(
        defaults, descriptions={name: f"{recipe.__doc__ or ''}\n{_TRAIN_NOTE}" for name, recipe in known.items()}
    )
    # AvoidSubcommands: an optional teacher is --teacher.name ..., not a further subcommand.
    config = tyro.cli(configs, prog="fastkd train", args=arguments, config=(tyro.conf.AvoidSubcommands,))
    if dry_run:
        from fastkd.trainer.commands.dry_run import plan

        print("\n".join(plan(config, world_size)))
        return 0
    result = train(config)
    if result.stopped_by is not None:
        return 128 + result.stopped_by  # what a shell reports for a process that a signal ended
    if not config.quiet and not result.already_finished and os.environ.get("RANK", "0") == "0":
        print(f"accuracy {result.accuracy:.4f} in {result.seconds:.1f} s; checkpoint {result.path}")
    return 0


def _recipes(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.recipes import RECIPES, summary

    def command() -> int:
        """The recipes there are; ``fastkd train NAME --help`` says all of one, ``--dry-run`` what it comes to."""
        width = max(map(len, RECIPES))
        for name in RECIPES:
            print(f"{name:<{width}}  {summary(name)}")
        return 0

    return tyro.cli(command, prog="fastkd recipes", args=arguments)


def _without_dry_run(arguments: list[str]) -> tuple[list[str], bool, int]:
    """The arguments without ``--dry-run`` and its ``--ranks N``, whether it was there, and N (else torchrun's)."""
    if "--dry-run" not in arguments:
        return arguments, False, 1
    kept = [argument for argument in arguments if argument != "--dry-run"]
    ranks = os.environ.get("WORLD_SIZE", "1")
    if "--ranks" in kept:
        place = kept.index("--ranks")
        ranks = "".join(kept[place + 1 : place + 2])
        del kept[place : place + 2]
    if not ranks.isdecimal() or int(ranks) == 0:
        raise ValueError(f"--ranks: got {ranks!r}, expected a number of ranks")
    return kept, True, int(ranks)


def _call_recipe(name: str, recipe: Any) -> Any:
    """The recipe's TrainConfig. TypeError when it gives something else."""
    from fastkd.trainer.config import TrainConfig

    if not callable(recipe):
        raise TypeError(f"recipe: {name!r} is of type {type(recipe).__name__}, expected a function")
    config = recipe()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"recipe: {name!r} returned {type(config).__name__}, expected a TrainConfig")
    return config


def _with_models(config: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """The recipe's config with what no flag of its own can say, and the arguments without that.

    ``--PART.options JSON`` replaces all options of the student, the teacher or the data. ``--teacher.name`` (or
    student) begins a model that the recipe lacks, whose other settings are flags from then on.
    """
    from fastkd.trainer.models.build import ModelConfig

    def value(flag: str) -> str | None:
        for index, argument in enumerate(arguments):
            if argument.startswith(flag + "="):
                return argument.removeprefix(flag + "=")
            if argument == flag and index + 1 < len(arguments):
                return arguments[index + 1]
        return None

    for part in ("student", "teacher", "data"):
        name = value(f"--{part}.name")
        if getattr(config, part) is None and name is not None:
            config = dataclasses.replace(config, **{part: ModelConfig(name=name)})
        flag = f"--{part}.options"
        text = value(flag)
        if text is None or getattr(config, part) is None:
            continue
        options = _json(flag, text)
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), options=options)})
        kept = [argument for argument in arguments if not argument.startswith(flag + "=")]
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
        arguments = kept
    return config, arguments


def _eval(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.commands.evaluate_checkpoint import evaluate_checkpoint, hardest

    def command(
        checkpoint: tyro.conf.Positional[str],
        device: str = "auto",
        trust_code: bool = False,
        json: str | None = None,
    ) -> int:
        """Accuracy of a checkpoint, its model and data rebuilt from its own config.

        Args:
            checkpoint: a checkpoint folder, or a run folder for its newest one.
            device: auto, cpu, cuda, ...
            trust_code: allow the config in the checkpoint to import and call package.module:callable.
            json: a file to write everything to, the accuracy of every class and the confusion matrix included.
        """
        result = evaluate_checkpoint(checkpoint, device=device, trust_code=trust_code)
        print(
            f"{result.path}: step {result.step}, accuracy {result.accuracy:.4f}, top-5 {result.top5:.4f}, "
            f"loss {result.loss:.4f} on {result.samples} samples ({result.parameters:,} parameters)"
        )
        for line in hardest(result):
            print(line)
        if json is not None:
            Path(json).write_text(dump(result.to_dict(), indent=1) + "\n")
        return 0

    return tyro.cli(command, prog="fastkd eval", args=arguments)


def _export(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.commands.export import export
    from fastkd.trainer.commands.reopen import reopen

    def command(
        checkpoint: tyro.conf.Positional[str],
        out: tyro.conf.Positional[str],
        image_shape: tuple[int, ...] | None = None,
        trust_code: bool = False,
    ) -> int:
        """The student of a checkpoint as a file that others read, checked against its own outputs.

        Args:
            checkpoint: a checkpoint folder, or a run folder for its newest one.
            out: the file to write: .safetensors (the state dict) or .onnx (images to logits, any batch size).
            image_shape: C H W of an image, where the run's data cannot be read. For ONNX.
            trust_code: allow the config in the checkpoint to import and call package.module:callable.
        """
        with_data = out.endswith(".onnx") and image_shape is None
        written = export(reopen(checkpoint, with_data=with_data, trust_code=trust_code), out, image_shape=image_shape)
        how = "bit for bit" if written.path.suffix == ".safetensors" else f"logits within {written.error:.1e}"
        print(f"{written.path}: {written.bytes:,} bytes, checked {how}")
        return 0

    return tyro.cli(command, prog="fastkd export", args=arguments)


def _probe(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.commands.linear_probe import linear_probe
    from fastkd.trainer.commands.reopen import reopen
    from fastkd.trainer.data.config import DataConfig
    from fastkd.trainer.data.datasets import build_datasets
    from fastkd.trainer.models.features import FeatureModel
    from fastkd.trainer.precision import choose_device

    def command(
        checkpoint: tyro.conf.Positional[str],
        data: str,
        options: str = "{}",
        batch_size: int = 256,
        num_workers: int = 0,
        penalty: float = 1e-4,
        device: str = "auto",
        trust_code: bool = False,
    ) -> int:
        """Logistic regression on the frozen features of a checkpoint's student, on other data.

        Args:
            checkpoint: a checkpoint folder, or a run folder for its newest one.
            data: digits, images, cifar, or package.module:callable.
            options: of the data, as JSON; without augmentation, such as '{"root": "...", "augment": false}'.
            batch_size: images at a time.
            num_workers: processes that read them.
            penalty: of the squared weights.
            device: auto, cpu, cuda, ...
            trust_code: allow the config in the checkpoint to import and call package.module:callable.
        """
        reopened = reopen(checkpoint, with_data=False, trust_code=trust_code)
        config = DataConfig(
            name=data, options=_json("--options", options), eval_batch_size=batch_size, num_workers=num_workers
        )
        classifier = None if reopened.config.student is None else reopened.config.student.classifier
        model = FeatureModel(reopened.model, classifier)
        sets = build_datasets(config)
        result = linear_probe(model, *sets, config, choose_device(device), penalty=penalty)
        print(
            f"{reopened.checkpoint.path}: linear probe on {data}: accuracy {result.accuracy:.4f} of "
            f"{result.eval_samples} samples ({result.train_accuracy:.4f} of the {result.train_samples} it was fitted "
            f"to), {result.features} features" + ("" if result.converged else "; the fit did not converge")
        )
        return 0

    return tyro.cli(command, prog="fastkd probe", args=arguments)


def _report(arguments: list[str]) -> int:
    import tyro

    from fastkd.trainer.report.page import write_run_report

    def command(runs: tyro.conf.Positional[tuple[str, ...]], out: str | None = None) -> int:
        """An HTML page about a training run, or about several compared: curves, results, settings.

        Args:
            runs: run folders. A run may still be going on.
            out: the .html file; by default report.html in the run folder, comparison.html here for several.
        """
        print(write_run_report(runs, out))
        return 0

    return tyro.cli(command, prog="fastkd report", args=arguments)


def _json(flag: str, text: str) -> dict[str, Any]:
    """The JSON object in ``text``."""
    import json

    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag}: got {text!r}, expected a JSON object")
    return values


_TRAIN_NOTE = (
    "Beside the flags below: --student.options '{\"width\": 8}' (teacher, data too) replaces all options, as JSON; "
    "--teacher.name NAME gives a teacher to a recipe that has none; --dry-run [--ranks N] prints what the settings "
    "come to and stops."
)
_COMMANDS = {
    "demo": _demo,
    "recipes": _recipes,
    "train": _train,
    "eval": _eval,
    "export": _export,
    "probe": _probe,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())
