"""A setting's value, held to the type that its field declares.

One reading of annotations for every door (Python, the command line, TOML, an adapter's file),
whether the file that declares them begins with `from __future__ import annotations` or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora.errors import ConfigError

_WORDS = {
    bool: ("true or false", "values true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    NoneType: ("nothing", "nothing"),
}


def declared(config: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by name. Raises ConfigError if one cannot be read."""
    try:
        hints = get_type_hints(config)
    except Exception as error:  # whatever evaluating an annotation's text raises
        raise ConfigError(
            f"{config.__name__}: an annotation cannot be read: {error}. Import what it names at the"
            " top of the file that declares it."
        ) from error
    return {field.name: hints[field.name] for field in fields(config)}


def is_number(value: object) -> bool:
    """True for an int or a finite float; bool is no number here."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past the range of a float
        return False


def fitted(value: Any, kind: Any) -> Any:
    """The value as the type holds it: a list as a tuple, a whole number as a float.

    Raises TypeError if it is of another type. A type that JSON has no value of is not checked.
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
        good = any(type(value) is type(one) and value == one for one in inner)
    else:
        good = type(value) is origin or origin not in _WORDS
    if not good:
        raise TypeError
    return value


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value as it is if one of the types is its own, or as the first that can hold it does."""
    for kind in (type(value), *kinds):
        if kind in kinds:
            with suppress(TypeError):
                return fitted(value, kind)
    raise TypeError


def _items(value: Any, kinds: tuple[Any, ...]) -> list[Any]:
    """A list's items as their types hold them: list[X], tuple[X, ...] or tuple[X, Y]."""
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
        is_list(one) for one in get_args(kind) if get_origin(kind) in (Union, UnionType)
    )


def words(kind: Any, many: bool = False) -> str:
    """What a type wants, in words for an error: one such value, or many."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(words(one, many) for one in inner if one is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (tuple, list):
        return ("lists" if many else "a list") + (f" of {words(inner[0], True)}" if inner else "")
    if origin in (dict, Mapping):
        named = f" of {words(inner[1], True)} by name" if inner else ""
        return ("tables" if many else "a table") + named
    name = str(getattr(origin, "__name__", origin))
    return _WORDS.get(origin, (name, name))[many]
