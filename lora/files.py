"""The system's errors of a file, as one named error of ours.

A folder that may not be read, a full disk, a name that is too long or has a NUL in it, a folder in
a file's place, links in a circle: whatever the system, or a library that reads and writes for us,
says of them leaves these two doors as a LoraError with the path, the reason, and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors

from lora.errors import LoraError


@contextmanager
def readable(
    path: str | os.PathLike[str], error: type[LoraError], advice: str = "Pass another, or mend it."
) -> Iterator[None]:
    """Inside, what cannot be read raises the error given."""
    with _named(path, error, "read", advice):
        yield


@contextmanager
def writable(
    path: str | os.PathLike[str],
    error: type[LoraError],
    advice: str = "Free space, or pass another folder.",
) -> Iterator[None]:
    """Inside, what cannot be written raises the error given."""
    with _named(path, error, "written", advice):
        yield


@contextmanager
def _named(
    path: str | os.PathLike[str], error: type[LoraError], done: str, advice: str
) -> Iterator[None]:
    source: Exception
    try:
        yield
    except (OSError, safetensors.SafetensorError) as cause:
        reason, source = getattr(cause, "strerror", None) or str(cause), cause
    except (ValueError, RuntimeError) as cause:
        # Python has no type of its own for a NUL in a path, nor for links in a circle.
        if "embedded null" not in str(cause) and "ymlink loop" not in str(cause):
            raise
        reason, source = str(cause), cause
    else:
        return
    shown = os.fspath(path)[:200]
    shown = shown if shown.isprintable() else repr(shown)
    raise error(f"{shown} cannot be {done}: {reason}. {advice}") from source
