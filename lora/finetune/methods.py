"""What --method names: a method of this package, or a class in a file of yours.

    --method dora                          one of METHODS
    --method qlora                         LoRA with --quantize nf4
    --method path/to/mine.py:MyMethod      a class in a file, which is run to define it
    --method package.module:MyMethod       a class in an installed module

A run records the file by its absolute path and its SHA-256. What opens the run later runs the file
again, so open only runs that you trust. Only the one file is compared: what it imports is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import lora.methods  # noqa: F401  (fills METHODS)
from lora.errors import ConfigError, RunError, command
from lora.files import readable
from lora.finetune.record import environment_of
from lora.method import METHODS, Method
from lora.settings import MethodConfig

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"qlora": ("lora", {"quantize": "nf4"})}
"""Names that --method takes besides the methods': the method, and the settings that it brings."""

FILE = re.compile(r"(?P<file>.+\.py)(:(?P<name>[^:/\\]*))?", re.DOTALL)
TITLE = re.compile(r"lora_own_\w+_[0-9a-f]{8}")
"""The module name of a file of the user's."""
MODULE = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<name>\w+)")
HOW_TO_NAME = "Pass --method path/to/mine.py:MyMethod."


def method_names() -> list[str]:
    """The names that --method takes, in alphabetical order."""
    return sorted({*METHODS, *PRESETS})


def is_outside(name: str) -> bool:
    """True if --method NAME is a class in a file or a module of the user's."""
    return name not in METHODS and bool(FILE.fullmatch(name) or MODULE.fullmatch(name))


def method_named(name: Any) -> type[Method]:
    """The method that --method means. Imports a file or a module of the user's. Raises ConfigError
    if there is no such method, or if it cannot be used."""
    if isinstance(name, str):
        if is_outside(name):
            return _outside(name)
        name = PRESETS[name][0] if name in PRESETS else name
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"--method {name!r} is unknown. Found: {', '.join(method_names())}. Run lora methods,"
            " or pass a class in a file of yours: --method path/to/mine.py:MyMethod."
        )
    return METHODS[name]


def settings_brought(name: str) -> dict[str, Any]:
    """The settings of a run that --method NAME brings, such as --quantize nf4 for qlora."""
    return PRESETS[name][1] if name in PRESETS else {}


def label(name: str) -> str:
    """What tables and folders call --method NAME: the name itself, or that of the user's class."""
    return method_named(name).name if is_outside(name) else name


def recordable(name: str) -> str:
    """--method NAME as a run records it: the file by its absolute path, with the class."""
    if not is_outside(name):
        return name
    method, file = method_named(name), FILE.fullmatch(name)
    place = str(Path(file["file"]).resolve()) if file else method.__module__
    return f"{place}:{method.__name__}"


def digest_of(name: str) -> str | None:
    """SHA-256 of the file that defines a method of the user's; None for one of this package."""
    if not is_outside(name):
        return None
    return hashlib.sha256(_source(_file_of(name), name)).hexdigest()


def reopened(directory: Path, recorded: Any, given: str | None = None, exact: bool = False) -> Any:
    """--method for opening a run again: as recorded, or as `given` if its file has moved.

    Raises RunError if the file is gone or has changed since the run. A changed file that is
    `given` is used with a note, unless the run has to go on `exact`ly as it began.
    """
    if not isinstance(recorded, str) or not is_outside(recorded):
        if given not in (None, recorded):
            raise ConfigError(
                f"--method {given}: {directory} was trained with --method {recorded}. Remove it."
            )
        return recorded
    if given is not None and not is_outside(given):
        raise ConfigError(
            f"--method {given}: {directory} was trained with {recorded}. {HOW_TO_NAME}"
        )
    name = recordable(given) if given is not None else recorded
    file = _file_of(name) if given is not None else _recorded_file(directory, recorded)
    if environment_of(directory).get("method") == hashlib.sha256(_source(file, name)).hexdigest():
        method_named(name)  # what is wrong with the file is no damage of the run
        return name
    changed = f"{file} has changed since {directory} was trained with it"
    if exact:
        anew = command("lora", "train", "--config", directory / "config.toml")
        raise RunError(f"{changed}. Bring the file back as it was, or train anew: {anew}.")
    if given is None:
        raise RunError(
            f"{changed}: the model could compute something else now. Bring the file back as it was,"
            f" or pass {command('--method', name)} to use it as it is now."
        )
    print(f"note: {changed}: the results can differ from those of the run.", file=sys.stderr)
    return name


def _recorded_file(directory: Path, recorded: str) -> Path:
    """The file that a run's config.toml names. Raises RunError if it is not there any more."""
    try:
        file = _file_of(recorded)
    except ConfigError:  # a module that is not installed here
        file = Path()
    if not (file.is_absolute() and file.is_file()):
        raise RunError(
            f"{directory}: the file of its method, {recorded}, is not there any more. Pass where it"
            " is now: --method path/to/mine.py:MyMethod."
        )
    return file


def _file_of(name: str) -> Path:
    """The file that defines a method of the user's."""
    if file := FILE.fullmatch(name):
        return Path(file["file"])
    module = sys.modules[method_named(name).__module__]
    return Path(str(module.__file__))


def _source(file: Path, name: str) -> bytes:
    with readable(file, ConfigError, HOW_TO_NAME):
        if not file.is_file():
            raise ConfigError(f"--method {name}: there is no file {file}. {HOW_TO_NAME}")
        return file.read_bytes()


def _outside(name: str) -> type[Method]:
    """The class that FILE.py:CLASS or MODULE:CLASS names, imported and checked."""
    file, dotted = FILE.fullmatch(name), MODULE.fullmatch(name)
    if file:
        module = _module_of_file(Path(file["file"]), name)
        methods = _methods_in(module)
        asked = file["name"] or _the_only(methods, file["file"], name)
    else:
        assert dotted
        module = _imported(dotted["module"], name)
        asked, methods = dotted["name"], _methods_in(module)
    found = getattr(module, asked, None)
    place = name.removesuffix(f":{asked}")
    if found is None:
        listed = ", ".join(methods) or "none: a method inherits lora.Adapter or lora.Selection"
        raise ConfigError(f"{place} has no class {asked}. Methods in it: {listed}. {HOW_TO_NAME}")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(
            f"{name} is no method: it does not inherit lora.Adapter or lora.Selection. Methods in"
            f" {place}: {', '.join(methods) or 'none'}."
        )
    _check(found, name)
    return found


def _the_only(methods: list[str], file: str, name: str) -> str:
    if len(methods) == 1:
        return methods[0]
    if methods:
        choices = " or ".join(f"--method {file}:{one}" for one in methods)
        raise ConfigError(f"{file} defines {len(methods)} methods. Pass {choices}.")
    raise ConfigError(
        f"--method {name}: {file} defines no method. A method is a class that inherits lora.Adapter"
        " or lora.Selection and has a name; examples/gated_lora.py is one."
    )


def _methods_in(module: ModuleType) -> list[str]:
    """The names of the methods that a module defines itself, in its order."""
    return [
        one.__name__
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Method) and one.__module__ == module.__name__
    ]


def _module_of_file(file: Path, name: str) -> ModuleType:
    """The module that a file is, run once for each content that it has had."""
    source, path = _source(file, name), str(file.resolve())
    digest = hashlib.sha256(source).hexdigest()
    # One module name for each path: the class keeps its identity when the file is read again.
    stem = re.sub(r"\W", "_", file.stem)
    title = f"lora_own_{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    known = sys.modules.get(title)
    if known is not None and vars(known)["__digest__"] == digest:
        return known
    module = ModuleType(title)
    vars(module).update(__file__=path, __digest__=digest)
    methods_before = dict(METHODS)
    sys.modules[title] = module  # where dataclasses and typing look for annotations' names
    try:
        # Compiled from the bytes of the digest: a cached .pyc might be of an older file.
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        message = _failure(error, path, name)
        METHODS.clear()
        METHODS.update(methods_before)
        del sys.modules[title]
        raise ConfigError(message) from error
    return module


def _imported(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(error, module, name)) from error


def _failure(error: BaseException, path: str, name: str) -> str:
    """What went wrong while a file of the user's ran, and in which of its lines."""
    if isinstance(error, SyntaxError):
        line = error.lineno if error.filename == path else None
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == path), None)
    last = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, ConfigError):  # of __init_subclass__: two methods have one name
        last = str(error)
        for title in filter(TITLE.fullmatch, sys.modules):
            last = last.replace(f"{title}.", f"{sys.modules[title].__file__}:")
    where = f"{path}, line {line}" if line else path
    return f"--method {name} cannot be imported. {where}: {last}"


def _check(method: type[Method], name: str) -> None:
    """Raise ConfigError if a class lacks something without which it could not be trained, saved
    and read back."""
    missing = [one for one in ("name", "paper", "Config", "peft_type") if not hasattr(method, one)]
    missing += sorted(getattr(method, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{name} does not define {', '.join(missing)}. Add it to the class.")
    if METHODS.get(method.name) is not method:
        raise ConfigError(
            f"{name} has no name of its own: {method.name!r} is that of"
            f" {METHODS[method.name].__qualname__}. Set name = '...' in the class."
        )
    if method.__module__.startswith("lora."):
        raise ConfigError(f"{name} is a method of this package. Pass --method {method.name}.")
    if not re.fullmatch(r"[\w.-]+", method.name) or method.name in PRESETS:
        raise ConfigError(
            f"{name}: name must be letters, digits, _, . and -, and not {', '.join(PRESETS)}, found"
            f" {method.name!r}. Change it in the class."
        )
    _check_config(method, name)
    for other in METHODS.values():
        same = other.peft_type == method.peft_type and other.states == method.states
        if same and other is not method:
            raise ConfigError(
                f"{name}: peft_type {method.peft_type!r} is that of {other.name}, so that a saved"
                " adapter could be either. Set another peft_type in the class."
            )


def _check_config(method: type[Method], name: str) -> None:
    Config: Any = method.Config
    good = inspect.isclass(Config) and issubclass(Config, MethodConfig)
    if not good or "__dataclass_params__" not in vars(Config):
        raise ConfigError(
            f"{name}: Config must be a dataclass that inherits lora.AdapterConfig, with"
            f" @dataclass(frozen=True, kw_only=True) above it, found {Config!r}."
        )
    for field in dataclasses.fields(Config):
        if field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{name}: {Config.__name__}.{field.name} has no default. Give it one: every flag of"
                " --method has one."
            )
