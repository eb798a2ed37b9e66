"""tyro's messages about flags in one line, which names the flag and the command that lists all of them."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection
from typing import Any

try:
    from tyro._errors import on_parse_error
except ImportError:  # it is no public name; without it tyro prints its boxes
    on_parse_error = contextlib.nullcontext  # type: ignore[assignment]


def errors_in_one_line(arguments: list[str], flags: Collection[str]) -> Any:
    """The context in which tyro's errors are ValueErrors of one line.

    ``arguments`` is what tyro parses. ``flags`` are those that a wrong one is compared with. An error of a kind that is
    not known here is left to tyro.
    """

    def raise_in_one_line(event: Any) -> None:
        message = _message(event, arguments, flags)
        if message is not None:
            raise ValueError(f"{message}; see {event.prog} --help") from None

    return on_parse_error(raise_in_one_line)


def _message(event: Any, arguments: list[str], flags: Collection[str]) -> str | None:
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        return _unknown(event.tokens, flags)
    if kind == "MissingArgs":
        if event.unrecognized_tokens:
            return _unknown(event.unrecognized_tokens, flags)
        return f"{' '.join(_name(missing.arg) for missing in event.missing_arguments)}: is missing"
    if kind == "BadValue" and event.reason == "too_few_values":
        return f"{_name(event.argument)}: has no value, or too few"
    if kind == "InvalidChoice":
        return f"{_name(event.argument)}: got {event.value!r}, expected one of {', '.join(event.choices)}"
    if kind == "InstantiationFailure":
        text = " ".join(event.message.split())  # for a value that may be of several types it has several lines
        if union := re.match(r"no type matching (.+) could be instantiated from \[(.*?)\]", text):
            text = f"got {union[2]}, expected {union[1].replace('{None}|', 'None or ')}"
        text = re.sub(r"^invalid literal for int\(\) with base 10: (.+)$", r"got \1, expected an int", text)
        text = re.sub(r"^could not convert string to float: (.+)$", r"got \1, expected a number", text)
        text = text if event.argument is None else f"{_name(event.argument)}: {text}"
        return _with_role(text, arguments)
    return None


def _name(argument: Any) -> str:
    return argument.lowered.name_or_flags[0] if argument.lowered.name_or_flags else str(argument.lowered.metavar)


def _unknown(tokens: list[str], flags: Collection[str]) -> str:
    wrong = next((token for token in tokens if token.startswith("--")), tokens[0])
    near = difflib.get_close_matches(wrong.split("=")[0], flags, 3, cutoff=0.75)
    return f"{wrong}: is no flag here" + (f", did you mean {' or '.join(near)}?" if near else "")


def _with_role(text: str, arguments: list[str]) -> str:
    """``model.name: ...`` with the part whose flag was given in the place of ``model``."""
    setting, _, _ = text.removeprefix("model.").partition(":")
    flags = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    for role in ("student", "teacher") if text.startswith("model.") else ():
        names = (f"--{role}.{setting}", f"--{role}.no-{setting}")
        if flags & {name.replace("_", "-") for name in names}:
            return text.replace("model.", f"{role}.", 1)
    return text
