"""Resolves --method: a method of this package, or a class in a user's file.

    --method dora                          one of METHODS
    --method qlora                         LoRA with --quantize nf4
    --method path/to/mine.py:MyMethod      a class in a file, which is run to define it
    --method package.module:MyMethod       a class in an installed module

A run records the file's absolute path and its SHA-256. Opening the run executes the file again, so
open only runs that you trust. Modules that the file imports are not compared.
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
"""Other names that --method takes -> the method, and the run's settings that the name implies."""

FILE = re.compile(r"(?P<file>.+\.py)(:(?P<name>[^:/\\]*))?", re.DOTALL)
TITLE = re.compile(r"lora_own_\w+_[0-9a-f]{8}")
"""Module names that user files are imported under."""
MODULE = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<name>\w+)")
HOW_TO_NAME = "Pass --method path/to/mine.py:MyMethod."


def method_names() -> list[str]:
    """Returns the names that --method takes, in alphabetical order."""
    return sorted({*METHODS, *PRESETS})


LEGEND = (
    "W and b are the base's weight and bias, W' and b' those of the adapted layer. Other letters",
    "are what a method adds; most of it trains. ∘ multiplies element by element.",
)


def described_methods() -> str:
    """Returns what `lora methods` prints: when to choose each method, its rate, its equation."""
    lines = []
    for name, method in sorted(METHODS.items()):
        first = (inspect.getdoc(method) or "").partition("\n\n")[0]
        lines.append(f"{name:<9} {method.when}")
        rate = f"learning rate {method.learning_rate:g}"
        lines.append(f"{'':<9} {rate}   {' '.join(first.split())}")
    for name, (method_name, settings) in PRESETS.items():
        flags = " ".join(f"--{key} {value}" for key, value in settings.items())
        lines.append(f"{name:<9} Short for --method {method_name} {flags}.")
        lines.append(f"{'':<9} learning rate {METHODS[method_name].learning_rate:g}")
    return "\n".join([*lines, "", *LEGEND])


def is_outside(name: str) -> bool:
    """True if --method NAME is a class in a user's file or module."""
    return name not in METHODS and bool(FILE.fullmatch(name) or MODULE.fullmatch(name))


def method_named(name: Any) -> type[Method]:
    """Returns the method that --method names. Imports a user's file or module. Raises ConfigError
    if there is no such method, or if it cannot be used."""
    if isinstance(name, str):
        if is_outside(name):
            return _outside(name)
        name = PRESETS[name][0] if name in PRESETS else name
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"--method {name!r} is unknown. Methods: {', '.join(method_names())}. Run lora methods"
            " to see when to use each, or pass your own class: --method path/to/mine.py:MyMethod."
        )
    return METHODS[name]


def settings_brought(name: str) -> dict[str, Any]:
    """Returns the run's settings that --method NAME implies, such as quantize=nf4 for qlora."""
    return PRESETS[name][1] if name in PRESETS else {}


def label(name: str) -> str:
    """Returns the name of a method in tables and folders: for a user's class, its `name`."""
    return method_named(name).name if is_outside(name) else name


def recordable(name: str) -> str:
    """Returns --method NAME as a run records it, with the absolute path of a user's file."""
    if not is_outside(name):
        return name
    method, file = method_named(name), FILE.fullmatch(name)
    place = str(Path(file["file"]).resolve()) if file else method.__module__
    return f"{place}:{method.__name__}"


def digest_of(name: str) -> str | None:
    """Returns the SHA-256 of the file that defines a user's method; None for this package's."""
    if not is_outside(name):
        return None
    return hashlib.sha256(_source(_file_of(name), name)).hexdigest()


def reopened(directory: Path, recorded: Any, passed: str | None = None, exact: bool = False) -> Any:
    """Returns --method for opening a run: as recorded, or as `passed` if its file has moved.

    Raises RunError if the file is missing or has changed since the run. If `passed` names a changed
    file, it is used and a note is printed; with `exact`, for resuming, that is an error too.
    """
    if not isinstance(recorded, str) or not is_outside(recorded):
        if passed not in (None, recorded):
            raise ConfigError(
                f"--method {passed}: {directory} was trained with --method {recorded}. Remove it."
            )
        return recorded
    if passed is not None and not is_outside(passed):
        raise ConfigError(
            f"--method {passed}: {directory} was trained with {recorded}. {HOW_TO_NAME}"
        )
    name = recordable(passed) if passed is not None else recorded
    file = _file_of(name) if passed is not None else _recorded_file(directory, recorded)
    if environment_of(directory).get("method") == hashlib.sha256(_source(file, name)).hexdigest():
        method_named(name)  # raises here, so that a broken file is not taken for a damaged run
        return name
    changed = f"{file} has changed since {directory} was trained with it"
    if exact:
        anew = command("lora", "train", "--config", directory / "config.toml")
        raise RunError(f"{changed}. Restore the file, or start a new run: {anew}.")
    if passed is None:
        raise RunError(
            f"{changed}, so its results may differ. Restore the file, or pass"
            f" {command('--method', name)} to use the changed one."
        )
    print(f"note: {changed}: results may differ from those of the run.", file=sys.stderr)
    return name


def _recorded_file(directory: Path, recorded: str) -> Path:
    """Returns the method's file that a run's config.toml names. Raises RunError if it is gone."""
    try:
        file = _file_of(recorded)
    except ConfigError:  # a module that is not installed here
        file = Path()
    if not (file.is_absolute() and file.is_file()):
        raise RunError(
            f"{directory}: the file of its method, {recorded}, does not exist any more. If it has"
            " moved, pass --method path/to/mine.py:MyMethod."
        )
    return file


def _file_of(name: str) -> Path:
    """Returns the file that defines a user's method."""
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
    """Returns the class that FILE.py:CLASS or MODULE:CLASS names, imported and checked."""
    file, dotted = FILE.fullmatch(name), MODULE.fullmatch(name)
    if file:
        module = _module_of_file(Path(file["file"]), name)
        methods = _methods_in(module)
        class_name = file["name"] or _the_only(methods, file["file"], name)
    else:
        assert dotted
        module = _imported(dotted["module"], name)
        class_name, methods = dotted["name"], _methods_in(module)
    method = getattr(module, class_name, None)
    place = name.removesuffix(f":{class_name}")
    if method is None:
        listed = ", ".join(methods) or "none: a method inherits lora.Adapter or lora.Selection"
        raise ConfigError(
            f"{place} has no class {class_name}. Methods in it: {listed}. {HOW_TO_NAME}"
        )
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(
            f"{name} is not a method: it does not inherit lora.Adapter or lora.Selection. Methods"
            f" in {place}: {', '.join(methods) or 'none'}."
        )
    _check(method, name)
    return method


def _the_only(methods: list[str], file: str, name: str) -> str:
    if len(methods) == 1:
        return methods[0]
    if methods:
        choices = " or ".join(f"--method {file}:{method}" for method in methods)
        raise ConfigError(f"{file} defines {len(methods)} methods. Pass {choices}.")
    raise ConfigError(
        f"--method {name}: {file} defines no method. A method is a class that inherits lora.Adapter"
        " or lora.Selection and has a name; examples/gated_lora.py is one."
    )


def _methods_in(module: ModuleType) -> list[str]:
    """Returns the names of the methods that a module defines, without those that it imports."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return [
        kind.__name__
        for kind in classes
        if issubclass(kind, Method) and kind.__module__ == module.__name__
    ]


def _module_of_file(file: Path, name: str) -> ModuleType:
    """Imports a file as a module. A file that has not changed since is not run again."""
    source, path = _source(file, name), str(file.resolve())
    digest = hashlib.sha256(source).hexdigest()
    # One module name per path, so that two imports of a file give the same class.
    stem = re.sub(r"\W", "_", file.stem)
    title = f"lora_own_{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    known = sys.modules.get(title)
    if known is not None and vars(known)["__digest__"] == digest:
        return known
    module = ModuleType(title)
    vars(module).update(__file__=path, __digest__=digest)
    methods_before = dict(METHODS)
    sys.modules[title] = module  # dataclasses and typing resolve annotations through it
    try:
        # Compiled from the hashed bytes: a cached .pyc could belong to an older file.
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
    """Returns the message for an exception while a user's file ran, with the line in that file."""
    if isinstance(error, SyntaxError):
        line = error.lineno if error.filename == path else None
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == path), None)
    last = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, ConfigError):  # from __init_subclass__: two methods have the same name
        last = str(error)
        for title in filter(TITLE.fullmatch, sys.modules):
            last = last.replace(f"{title}.", f"{sys.modules[title].__file__}:")
    where = f"{path}, line {line}" if line else path
    return f"--method {name} cannot be imported. {where}: {last}"


def _check(method: type[Method], name: str) -> None:
    """Raise ConfigError if a class lacks what training, saving or loading needs."""
    required = ("name", "paper", "Config", "peft_type")
    missing = [attribute for attribute in required if not hasattr(method, attribute)]
    missing += sorted(getattr(method, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{name} does not define {', '.join(missing)}. Add it to the class.")
    if METHODS.get(method.name) is not method:
        raise ConfigError(
            f"{name}: the name {method.name!r} belongs to"
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
                f"{name}: peft_type {method.peft_type!r} belongs to {other.name}, so a saved"
                " adapter could be either. Set another peft_type in the class."
            )


def _check_config(method: type[Method], name: str) -> None:
    Config: Any = method.Config
    inherits = inspect.isclass(Config) and issubclass(Config, MethodConfig)
    if not inherits or "__dataclass_params__" not in vars(Config):
        raise ConfigError(
            f"{name}: Config must be a dataclass that inherits lora.AdapterConfig, with"
            f" @dataclass(frozen=True, kw_only=True) above it, found {Config!r}."
        )
    for field in dataclasses.fields(Config):
        if field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{name}: {Config.__name__}.{field.name} has no default. Add one: every setting of"
                " a method needs a default."
            )
