"""Checks a setting's value against the type that its field declares, and converts it.

Python, the command line, TOML and an adapter's file all use these functions, so a type means the
same everywhere. They read annotations with and without `from __future__ import annotations`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora.errors import ConfigError

# A type in the words of an error message: one such value, several.
_WORDS = {
    bool: ("true or false", "values true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    NoneType: ("nothing", "nothing"),
}


def declared(config: type) -> Mapping[str, Any]:
    """Returns the type of each field of a dataclass. Raises ConfigError if one cannot be read."""
    return _resolved(config)


@functools.cache  # get_type_hints compiles the text of every annotation, and configs are many
def _resolved(config: type) -> Mapping[str, Any]:
    try:
        hints = get_type_hints(config)
    except Exception as error:  # whatever evaluating an annotation's text raises
        raise ConfigError(
            f"{config.__name__}: an annotation cannot be read: {error}. Import what it names at the"
            " top of the file that declares it."
        ) from error
    return {field.name: hints[field.name] for field in fields(config)}


def is_number(value: object) -> bool:
    """True for an int or a finite float, False for a bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past the range of a float
        return False


def fitted(value: Any, kind: Any) -> Any:
    """Returns the value converted to the type: a list to a tuple, a whole number to a float.

    JSON and TOML have no tuples, and write 8.0 as 8. Raises TypeError if the value is of another
    type. Types without a JSON form are not checked.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _first(value, inner)
    if origin in (tuple, list):
        return origin(_items(value, inner))
    if origin in (dict, Mapping):
        good = isinstance(value, Mapping)
        key, item = inner or (Any, Any)
        value = {fitted(k, key): fitted(v, item) for k, v in value.items()} if good else value
    elif origin is float:
        good = is_number(value)
        value = float(value) if good else value
    elif origin is Literal:
        good = any(type(value) is type(option) and value == option for option in inner)
    else:
        # type(...) is, since True is an int to isinstance.
        good = type(value) is origin or origin not in _WORDS
    if not good:
        raise TypeError
    return value


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Returns the value as the first type of a union that takes it, its own type before others."""
    for kind in (type(value), *kinds):
        if kind in kinds:
            with suppress(TypeError):
                return fitted(value, kind)
    raise TypeError


def _items(value: Any, kinds: tuple[Any, ...]) -> list[Any]:
    """Returns a list's items converted to their types: list[X], tuple[X, ...] or tuple[X, Y]."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError
    items = sorted(value) if isinstance(value, set | frozenset) else list(value)
    if len(kinds) < 2 or kinds[1] is ...:
        kinds = (kinds or (Any,))[:1] * len(items)
    if len(kinds) != len(items):
        raise TypeError
    return [fitted(item, kind) for item, kind in zip(items, kinds, strict=True)]


def is_list(kind: Any) -> bool:
    """True if the type takes several values, or one of the types in a union does."""
    return (get_origin(kind) or kind) in (tuple, list) or any(
        is_list(option) for option in get_args(kind) if get_origin(kind) in (Union, UnionType)
    )


def words(kind: Any, many: bool = False) -> str:
    """Returns a type in the words of an error message: one such value, or `many` of them."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(words(option, many) for option in inner if option is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (tuple, list):
        return ("lists" if many else "a list") + (f" of {words(inner[0], True)}" if inner else "")
    if origin in (dict, Mapping):
        named = f" of {words(inner[1], True)} by name" if inner else ""
        return ("tables" if many else "a table") + named
    name = str(getattr(origin, "__name__", origin))
    return _WORDS.get(origin, (name, name))[many]
