"""Checks a command's flags before tyro parses them: unknown flags, and flags given twice.

check_flags(arguments, known, "lora train")    ConfigError for an unknown flag
joined(arguments, {"data"})                    --data a --data b  ->  --data a b
take(arguments, "--nproc", "N")                its value, and the other arguments
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.declared import declared
from lora.errors import ConfigError
from lora.finetune.flags import as_flag, hint
from lora.method import METHODS

BEFORE = {
    "lora train": ("config", "resume", "nproc"),
    "lora plan": ("config", "nproc", "json"),
    "lora compare": (
        "config",
        "methods",
        "seeds",
        "rates",
        "search_seeds",
        "budget",
        "jobs",
        "match_parameters",
        "noise_floor",
        "dry_run",
    ),
    "lora data preview": ("config", "count", "split"),
}
"""The flags of a command that are not settings of a run."""


def _flag(argument: str) -> str | None:
    """Returns the field that a flag sets, None if the argument is a value."""
    match = re.match(r"--?([A-Za-z][^=]*)", argument)
    return match[1].replace("-", "_") if match else None


def check_flags(arguments: Sequence[str], known: Mapping[str, Any], prog: str) -> None:
    """Raise ConfigError for a flag that the command does not have, or a value before any flag."""
    if arguments and not arguments[0].startswith("-"):
        advice = f" Did you mean --data {arguments[0]}?" if "data" in known else ""
        raise ConfigError(
            f"{prog} takes flags, found {arguments[0]} before any.{advice} See {prog} --help."
        )
    for argument in arguments:
        name = _flag(argument)
        if name is None or argument in ("-h", "--help") or (name in known and argument[1] == "-"):
            continue
        if name.startswith("no_") and known.get(name[3:]) is bool and argument[1] == "-":
            continue
        flag, names = argument.partition("=")[0], {*known, *BEFORE.get(prog, ())}
        methods = [m for m, method in METHODS.items() if name in declared(method.Config)]
        if methods and "method" in known:
            advice = f"It is a setting of --method {' or '.join(methods)}. Set that, or remove it."
        elif name in known:
            advice = f"Did you mean {as_flag(name)}?"
        else:
            advice = hint(name.lower(), names, as_flag)
        raise ConfigError(f"{prog} has no flag {flag}. {advice} See {prog} --help.")


def joined(arguments: Sequence[str], several: Collection[str]) -> list[str]:
    """Returns the arguments, with repeated flags of a list joined into one with all values."""
    counts = Counter(filter(None, map(_flag, arguments)))
    values: dict[str, list[str]] = {n: [] for n in several if counts[n] > 1}
    rest: list[str] = []
    into = rest
    for argument in arguments:
        name = _flag(argument)
        if name is not None:
            into = values.get(name, rest)
        if into is rest or name is None:
            into.append(argument)
        elif "=" in argument:
            into.append(argument.partition("=")[2])
    flags = [argument for name in values for argument in (as_flag(name), *values[name])]
    return [*rest, *flags]


def split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Returns the path after --config, or None, and the other arguments."""
    path, rest = take(arguments, "--config", "FILE.toml")
    return (None if path is None else Path(path)), rest


def take(arguments: Sequence[str], flag: str, what: str) -> tuple[str | None, list[str]]:
    """Returns the value after a flag, or None, and the other arguments. Raises ConfigError if the
    value is missing; `what` describes it."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        if argument == flag or argument.startswith(f"{flag}="):
            width = 1 if "=" in argument else 2
            value = argument.partition("=")[2] if width == 1 else "".join(rest[index + 1 :][:1])
            if not value or value.startswith("--"):
                raise ConfigError(f"{flag} has no value. Pass {flag} {what}.")
            return value, rest[:index] + rest[index + width :]
    return None, rest


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    value = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value
