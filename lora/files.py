"""Reads and writes files, and raises LoraError in place of the system's errors.

readable() and writable() turn what the system or a library raises into a LoraError with the path,
the reason and the next step: for missing permissions, a full disk, a name that is too long or
contains a NUL, a folder in a file's place, a loop of links, or bytes that are not UTF-8.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from lora.errors import LoraError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 64 * 2**20  # bytes


@contextmanager
def readable(
    path: str | os.PathLike[str],
    error: type[LoraError],
    advice: str = "Pass another or repair it.",
) -> Iterator[None]:
    """Raises `error` if the block cannot read the path."""
    with _named_error(path, error, "read", advice):
        yield


@contextmanager
def writable(
    path: str | os.PathLike[str],
    error: type[LoraError],
    advice: str = "Free space, or pass another folder.",
) -> Iterator[None]:
    """Raises `error` if the block cannot write the path."""
    with _named_error(path, error, "written", advice):
        yield


@contextmanager
def _named_error(
    path: str | os.PathLike[str], error: type[LoraError], done: str, advice: str
) -> Iterator[None]:
    source: Exception
    try:
        yield
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError) as cause:
        reason, source = getattr(cause, "strerror", None) or str(cause), cause
    except (ValueError, RuntimeError) as cause:
        # Python has no separate exception for a NUL in a path, nor for a loop of links.
        if "embedded null" not in str(cause) and "ymlink loop" not in str(cause):
            raise
        reason, source = str(cause), cause
    else:
        return
    shown = os.fspath(path)[:200]
    shown = shown if shown.isprintable() else repr(shown)
    raise error(f"{shown} cannot be {done}: {reason}. {advice}") from source


def read_json(path: Path, error: type[LoraError], advice: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises `error` for anything else, however deep or
    large."""
    with readable(path, error, advice):
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise error(f"{path} has {size:,} bytes, at most {LARGEST_JSON:,} are read. {advice}")
        payload = path.read_bytes()
    try:
        return json_object(payload)
    except ValueError as cause:
        raise error(f"{path} cannot be read as JSON: {cause}. {advice}") from None


def json_object(text: str | bytes) -> dict[str, Any]:
    """Returns one JSON object. Raises ValueError for anything else, however deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}, not an object")  # noqa: TRY004
    return value


def read_safetensors(path: Path, error: type[LoraError], advice: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by key. Raises `error`."""
    import safetensors.torch

    with readable(path, error, advice):
        try:
            return safetensors.torch.load(path.read_bytes())
        except KeyError as cause:  # safetensors raises it for a dtype that it does not know
            raise safetensors.SafetensorError(f"unknown dtype {cause}") from None


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    write_together(path.parent, {path.name: payload})


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by name. All are on disk under temporary names before the first is renamed, so
    that a full disk leaves the old files as they were."""
    temporaries: dict[Path, Path] = {}
    try:
        for name, payload in files.items():
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            with temporary.open("xb") as file:
                temporaries[folder / name] = temporary
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())  # or a power cut after the rename could leave an empty file
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows opens no folders; NTFS keeps names in its journal
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows needs write access
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Locks a folder, or a file, which is created if it does not exist, inside the block.

    Yields a file descriptor, or None if another process holds the lock. If `wait`, waits for that
    process instead. A child process that inherits the descriptor holds the lock until it ends. File
    systems without locks lock nothing.
    """
    import filelock  # not above: torch brings it, but nothing else in the core needs it

    flags = os.O_RDWR | os.O_CREAT
    if path.is_dir():
        if sys.platform == "win32":  # which opens no folders: lock a file inside instead
            path = path / ".lock"
        else:
            flags = os.O_RDONLY
    descriptor = os.open(path, flags, 0o666)
    try:
        free = True
        with suppress(OSError):
            free = filelock.lock_descriptor(descriptor, blocking=wait)
        yield descriptor if free else None
    finally:
        os.close(descriptor)
