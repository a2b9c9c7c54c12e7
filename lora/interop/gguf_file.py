"""Reads the header of a GGUF file: its metadata, and the name, type and size of each tensor.

Every count that the file states is compared with the size of the file before anything is allocated
or looped over, so that a damaged file cannot use all memory. The gguf library, with which we and
transformers read the values, does not check them.

    "GGUF"    version u32    tensor count u64    entry count u64
    entry     key, type u32, value                  a string is its length u64, then UTF-8;
                                                    an array its type u32, its length u64, values
    tensor    name, dimension count u32, dimensions u64 each, type u32, offset u64
    padding   to a multiple of general.alignment; then the values of the tensors
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.errors import ModelError
from lora.files import readable

MOST_ELEMENTS = 2**21  # in an array; the largest vocabularies and merge lists have about 500,000
MOST_DIMENSIONS = 4  # as in ggml
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
"""Value type -> format character of struct."""
STRING, ARRAY = 8, 9  # the other value types
BASE_ADVICE = "Pass a folder with config.json, or a GGUF file of a language model."


@dataclass(frozen=True)
class TensorEntry:
    """What a header states about one tensor."""

    name: str
    shape: tuple[int, ...]  # in PyTorch's order
    type: str  # GGML's name, for instance F32 or Q4_1
    start: int  # of its values, in bytes from the start of the file
    length: int  # of its values, in bytes

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class GGUFHeader:
    """What a GGUF file states, without the values of its tensors."""

    path: Path
    metadata: dict[str, Any]  # without arrays of strings
    lengths: dict[str, int]  # of the arrays of strings: tokens, merges
    tensors: tuple[TensorEntry, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def weight_type(self) -> str:
        """The type that holds the most weights."""
        counts = Counter[str]()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.size
        return counts.most_common(1)[0][0]


def gguf_in(base: str) -> Path | None:
    """Returns the GGUF file that --base means; None if it means another kind of base.

    --base may be the file itself, or a folder without config.json in which it is the only .gguf.
    Raises ModelError if such a folder has several.
    """
    with readable(base, ModelError, BASE_ADVICE):
        path = Path(base)
        if path.is_file():
            return path
        if not path.is_dir() or (path / "config.json").exists():
            return None
        files = sorted(file for file in path.iterdir() if file.suffix == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(
            f"--base {base} has no config.json and {len(files)} GGUF files: {names}. Pass one of"
            f" them: --base {files[0]}."
        )
    return files[0] if files else None


def read_header(path: Path) -> GGUFHeader:
    """Returns the header of a GGUF file that contains a whole model with its tokenizer.

    Raises ModelError if the file is not GGUF, is damaged or truncated, or contains something else:
    an adapter, a part of a split model, a model without a tokenizer.
    """
    with readable(path, ModelError, BASE_ADVICE):
        status = path.stat()
        return _read_header(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, size: int, changed: int) -> GGUFHeader:
    """Implements read_header(). size, changed: so that a file that changed is read again."""
    types = ggml_types()
    if size < 24:
        raise ModelError(f"{path} has {size} bytes, which is no GGUF file. {BASE_ADVICE}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file: it begins with {data[:4]!r}. {BASE_ADVICE}"
            )
        try:
            header = _Cursor(data).header(path, types)
        except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            raise ModelError(
                f"{path} is damaged or truncated: {error}. Download or convert it again."
            ) from None
    _check_whole_model(header)
    return header


def ggml_types() -> dict[int, tuple[str, int, int]]:
    """Returns GGML's tensor types by number: name, values per block, bytes per block.

    Raises ModelError if the gguf library is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModelError(
            "GGUF files are read with the library gguf, which is not installed. Run pip install"
            " 'lora-from-scratch[gguf]'."
        ) from error
    return {kind.value: (kind.name, *block) for kind, block in gguf.GGML_QUANT_SIZES.items()}


@dataclass(frozen=True)
class _Strings:
    """An array of strings in the metadata."""

    count: int


class _Cursor:
    """Reads a header from its start, and never past the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self, path: Path, types: dict[int, tuple[str, int, int]]) -> GGUFHeader:
        """Reads the whole header."""
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"it states version {version}, and versions 2 and 3 exist")
        # A tensor takes at least 24 bytes, and an entry of the metadata 13.
        tensor_count = self.count("tensors", 24)
        entry_count = self.count("metadata entries", 13)
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(entry_count):
            key = self.string()
            if key in metadata or key in lengths:
                raise ValueError(f"it states {key!r} twice")
            value = self.value(self.number("I"))
            if isinstance(value, _Strings):
                lengths[key] = value.count
            else:
                metadata[key] = value
        entries = [self.tensor(types) for _ in range(tensor_count)]
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two of its tensors have one name")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            raise ValueError(f"it states general.alignment={alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = [replace(entry, start=start + entry.start) for entry in entries]
        for entry in tensors:
            if entry.start + entry.length > len(self.data):
                raise ValueError(
                    f"tensor {entry.name} ends at byte {entry.start + entry.length:,}, and the file"
                    f" has {len(self.data):,} bytes"
                )
        return GGUFHeader(path, metadata, lengths, tuple(tensors))

    def take(self, length: int) -> bytes:
        """Reads the next bytes."""
        if length > len(self.data) - self.at:
            raise ValueError(f"it ends within its header, at byte {len(self.data):,}")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, kind: str) -> Any:
        """Reads a number, by its format character of struct."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return value

    def count(self, what: str, smallest: int) -> int:
        """Reads a count of things that take at least `smallest` bytes each. Raises ValueError if
        the file is too short for them."""
        count: int = self.number("Q")
        if count * smallest > len(self.data) - self.at:
            raise ValueError(f"it states {count:,} {what}, and has {len(self.data):,} bytes")
        return count

    def string(self) -> str:
        """Reads a string: its length, then UTF-8."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """Reads a value of the metadata. The strings of an array are skipped, and only counted."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"it states a value of the unknown type {kind}")
        kind = self.number("I")
        if kind != STRING and kind not in SCALARS:
            raise ValueError(f"it states an array of values of type {kind}")
        width = 8 if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")
        count = self.count("values in an array", width)
        if count > MOST_ELEMENTS:
            raise ValueError(
                f"it states an array of {count:,} values, at most {MOST_ELEMENTS:,} are read"
            )
        if kind != STRING:
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * width)))
        for _ in range(count):
            self.take(self.number("Q"))
        return _Strings(count)

    def tensor(self, types: dict[int, tuple[str, int, int]]) -> TensorEntry:
        """Reads a tensor's entry. Its `start` is relative to the values of the first tensor."""
        name, dimensions = self.string(), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions:,} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        number, offset = self.number("I"), self.number("Q")
        if number not in types:
            raise ValueError(f"tensor {name} has the unknown type {number}")
        kind, values, width = types[number]
        if not shape or shape[-1] % values:
            raise ValueError(f"tensor {name} of shape {shape} does not consist of {kind} blocks")
        return TensorEntry(name, shape, kind, offset, math.prod(shape) // values * width)


def _check_whole_model(header: GGUFHeader) -> None:
    """Raises ModelError if the file does not contain a whole model with its tokenizer."""
    path, metadata = header.path, header.metadata
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelError(f"{path} does not state general.architecture. {BASE_ADVICE}")
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        raise ModelError(
            f"{path} is an adapter (general.type), not a base. Pass the GGUF file of its base."
        )
    if kind != "model":
        raise ModelError(f"{path} holds no language model, its general.type is {kind!r}.")
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model. Join them with llama.cpp: llama-gguf-split"
            " --merge FIRST.gguf WHOLE.gguf."
        )
    if not header.lengths.get("tokenizer.ggml.tokens") or "tokenizer.ggml.model" not in metadata:
        raise ModelError(
            f"{path} holds no tokenizer (tokenizer.ggml.tokens). Pass a GGUF file that llama.cpp's"
            " convert_hf_to_gguf.py wrote with one."
        )
    if not header.tensors:
        raise ModelError(f"{path} holds no tensors. Pass a GGUF file with weights.")
