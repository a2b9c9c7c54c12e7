"""Reads JSON documents and validates them against a schema, so that callers need no checks.

    summary = read_document(run / "summary.json", SUMMARY, RunError, "Run it again.")

A schema is a pydantic TypeAdapter, usually of TypedDicts. Validation is strict: "1" is not a number
and true is not 1. Unknown keys are allowed, so that a newer version can add keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field, TypeAdapter

from lora.errors import LoraError
from lora.files import readable

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Finite = Annotated[float, Field(gt=-1e305, lt=1e305)]
"""Numbers that can be summed and plotted without overflow. Perplexity is at most e^700 = 1e304."""
WORDS = {
    "string_type": "a text",
    "string_too_short": "a text of at least {min_length} character",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "greater_than_equal": "at least {ge:,}",
    "greater_than": "more than {gt:,}",
    "less_than_equal": "at most {le:,}",
    "less_than": "less than {lt:,}",
}
"""pydantic's error types, in the words of this package."""
Seconds = Annotated[float, Field(ge=0, lt=1e12)]


def read_document(path: Path, schema: TypeAdapter[T], error: type[LoraError], then: str) -> T:
    """Reads and validates a JSON file.

    Raises `error` with the file, the key, what was expected and found, and `then`: what to do next.
    """
    return decode(content(path, error, then), schema, str(path), error, then)


def content(path: Path, error: type[LoraError], then: str) -> bytes:
    """Returns the file's bytes. Raises `error` with `then` if it cannot be read."""
    with readable(path, error, then):
        return path.read_bytes()


def decode(
    payload: bytes, schema: TypeAdapter[T], name: str, error: type[LoraError], then: str
) -> T:
    """Parses and validates a JSON document. `name` is its name in the error."""
    with _valid(name, error, then):
        return schema.validate_json(payload, strict=True, extra="allow")


def decode_lines(
    payload: bytes, schema: TypeAdapter[T], path: Path, error: type[LoraError], then: str
) -> list[T]:
    """Parses and validates JSON lines that were read from `path`. Empty lines are skipped."""
    return [
        decode(line, schema, f"{path}, line {number},", error, then)
        for number, line in enumerate(payload.split(b"\n"), 1)
        if line.strip()
    ]


def validate(
    value: object, schema: TypeAdapter[T], name: str, error: type[LoraError], then: str
) -> T:
    """Validates a value that another library parsed."""
    with _valid(name, error, then):
        return schema.validate_python(value, strict=True, extra="allow")


@contextmanager
def _valid(name: str, error: type[LoraError], then: str) -> Iterator[None]:
    """Inside, pydantic's ValidationError becomes `error`."""
    try:
        yield
    except pydantic.ValidationError as problem:
        raise error(f"{name} is damaged: {describe(problem)}. {then}") from None


def describe(problem: pydantic.ValidationError) -> str:
    """Describes pydantic's first error: the key, what was expected, and what was found."""
    first: Any = problem.errors(include_url=False)[0]  # one is enough to know the file is damaged
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] in ("json_invalid", "union_tag_not_found", "union_tag_invalid"):
        return " ".join(filter(None, (key, first["msg"])))
    return f"{key or 'the document'} {wanted(first)}, found {shown(first['input'])}"


def wanted(error: Any) -> str:
    """Returns what one of pydantic's errors expected: "must be a text"."""
    if error["type"] in WORDS:
        return "must be " + WORDS[error["type"]].format(**error.get("ctx", {}))
    return re.sub(r"^(Input|\w+) should ", "must ", error["msg"]).removeprefix("Value error, ")


def shown(value: object) -> str:
    """Returns a value for an error, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
