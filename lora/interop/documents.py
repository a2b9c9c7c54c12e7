"""The one door for documents: a schema says what a file holds, and what it returns needs no checks.

    summary = read(directory / "summary.json", SUMMARY, RunError, "Run it again.")

A schema is a pydantic TypeAdapter, of TypedDicts for the most part. It is strict: "1" is no number
and true is no 1. Keys that it does not name pass, so that a newer version may add some.
"""

from __future__ import annotations

import re
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
"""Room to be added up and drawn; perplexity goes to e^700 = 1e304."""
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
"""pydantic's errors, by their types, in the words of this package."""
Seconds = Annotated[float, Field(ge=0, lt=1e12)]


def read_document(path: Path, schema: TypeAdapter[T], error: type[LoraError], then: str) -> T:
    """The JSON file as its schema states it. Raises `error` with file, key, found and wanted, and
    `then`, the next command."""
    return decode(content(path, error, then), schema, str(path), error, then)


def content(path: Path, error: type[LoraError], then: str) -> bytes:
    """The file's bytes. Raises `error`."""
    with readable(path, error, then):
        return path.read_bytes()


def decode(
    payload: bytes, schema: TypeAdapter[T], name: str, error: type[LoraError], then: str
) -> T:
    """A JSON document as its schema states it; `name` is what the message calls it."""
    try:
        return schema.validate_json(payload, strict=True, extra="allow")
    except pydantic.ValidationError as problem:
        raise error(f"{name} is damaged: {said(problem)}. {then}") from None


def decode_lines(
    payload: bytes, schema: TypeAdapter[T], path: Path, error: type[LoraError], then: str
) -> list[T]:
    """The rows of JSON lines that were read from `path`."""
    return [
        decode(line, schema, f"{path}, line {number},", error, then)
        for number, line in enumerate(payload.split(b"\n"), 1)
        if line.strip()
    ]


def validate(
    value: object, schema: TypeAdapter[T], name: str, error: type[LoraError], then: str
) -> T:
    """What another reader made of a document, as its schema states it."""
    try:
        return schema.validate_python(value, strict=True, extra="allow")
    except pydantic.ValidationError as problem:
        raise error(f"{name} is damaged: {said(problem)}. {then}") from None


def said(problem: pydantic.ValidationError) -> str:
    """The first thing that is wrong: its key, what was wanted, and what was found."""
    first: Any = problem.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] in ("json_invalid", "union_tag_not_found", "union_tag_invalid"):
        return " ".join(filter(None, (key, first["msg"])))
    return f"{key or 'the document'} {wanted(first)}, found {shown(first['input'])}"


def wanted(error: Any) -> str:
    """What one of pydantic's errors asks for: "must be a text"."""
    if error["type"] in WORDS:
        return "must be " + WORDS[error["type"]].format(**error.get("ctx", {}))
    return re.sub(r"^(Input|\w+) should ", "must ", error["msg"]).removeprefix("Value error, ")


def shown(value: object) -> str:
    """A value in an error, of 80 characters at most."""
    found = repr(value)
    return found if len(found) <= 80 else f"{found[:80]}..."
