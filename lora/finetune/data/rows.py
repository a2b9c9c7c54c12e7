"""Rows of every file that people have, and of the hub: the one reader for all tasks.

read_source(source)  split, place and row of each row of a file, a folder or a hub data set
read_rows(path)      place and row of each row of one file

A place is "FILE, line N". A row that cannot be read is replaced by the DataError that names it, and
so is a cell of Parquet that has no value in Python: who uses it raises it, or adds it to BadRows.

A line ends at \\n or \\r\\n, and at nothing else.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lora.errors import DataError, command
from lora.files import json_object, readable
from lora.interop.hub import hub_answers

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "validation_matched"),
    "test": ("test",),
}
MOST_ROWS = 64  # of a Parquet file, for each of its bytes
PLAIN_TYPES = (str, int, float, DataError)
LISTED = 10  # errors that are shown; all are counted

Row = dict[str, Any]
Read = Row | DataError
Cells = list[list[str]]
Headed = Callable[[Path, Cells], bool]
"""Whether the first of a table's rows names its columns."""

csv.field_size_limit(2**31 - 1)  # as for TSV and JSONL: a text may be long


class _HasPlace(Protocol):
    @property
    def place(self) -> str: ...


P = TypeVar("P", bound=_HasPlace)


@dataclass
class BadRows:
    """The rows that cannot be used: counted in full, the first ten listed, `allowed` skipped."""

    allowed: int = 0
    count: int = 0
    listed: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def add(self, error: DataError, place: str) -> None:
        if place in self.places:  # another conversation of the same row
            return
        self.count += 1
        self.places.add(place)
        if len(self.listed) < LISTED:
            self.listed.append(str(error))

    def usable(self, rows: Iterable[P]) -> list[P]:
        """The rows that were not added."""
        return [row for row in rows if row.place not in self.places]

    def judge(self, left: bool = True) -> list[str]:
        """A note of what is skipped. Raises DataError if that is more than allowed, or if not
        enough is `left`."""
        if not self.count:
            return []
        more = self.count - len(self.listed)
        lines = "".join(f"\n  {line}" for line in self.listed)
        lines += f"\n  and {more} more" if more else ""
        rows, them = ("1 row", "it") if self.count == 1 else (f"{self.count} rows", "them")
        if left and self.count <= self.allowed:
            return [f"{rows} skipped, as --skip-bad-lines {self.allowed} allows:{lines}"]
        way = f"Mend {them}, or pass --skip-bad-lines {self.count} to leave {them} out."
        if not left:
            way = f"Too few others are left. Mend {them}, or pass other --data."
        raise DataError(f"{rows} cannot be used:{lines}\n{way}")


def read_source(
    source: str, headed: Headed = lambda path, cells: True
) -> Iterator[tuple[str, str, Read]]:
    """Split, place and row of each row of a folder, a file or a hub data set; the split is "" if a
    file does not say it. Raises DataError if there is no such source, or a file cannot be read."""
    path = Path(source)
    with readable(path, DataError):
        folder, file = path.is_dir(), path.is_file()
    if folder:
        for split, names in SPLITS.items():
            paths = [path / (name + end) for name in names for end in ENDINGS]
            files = [path for path in paths if path.is_file()]
            if len(files) > 1:
                raise DataError(f"{source} has {', '.join(p.name for p in files)}: keep one.")
            for place, row in read_rows(files[0], headed) if files else ():
                yield split, place, row
    elif file:
        for place, row in read_rows(path, headed):
            try:
                split = "" if isinstance(row, DataError) else _split_of(row)
            except DataError as error:
                split, row = "", DataError(f"{place}: {error}")
            yield split, place, row
    else:
        yield from read_hub(source)


def _split_of(row: Row) -> str:
    """The split that a row's own column names, "" if it names none. Raises DataError."""
    value = next((value for name, value in row.items() if name.strip().lower() == "split"), None)
    if value is None or value == "":
        return ""
    known = {name: split for split, names in SPLITS.items() for name in names}
    if not isinstance(value, str) or value.strip() not in known:
        raise DataError(f"split {str(value)[:40]!r} is none of {', '.join(sorted(known))}.")
    return known[value.strip()]


def read_rows(path: Path, headed: Headed = lambda path, cells: True) -> Iterator[tuple[str, Read]]:
    """Each row of a file behind its place, "FILE, line N"; in a broken one's place its error.

    Columns of a table without a header are named 0, 1, ... as are those that its header does not
    name. Raises DataError if the file cannot be read at all.
    """
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: found {path.suffix or 'no ending'}. Known: {', '.join(ENDINGS)}.")
    if path.suffix == ".parquet":
        rows: Iterator[tuple[str, Read | str]] = _parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        rows = _table_rows(path, text_of(path), headed)
    else:
        read = {".jsonl": _json_lines, ".json": _json, ".txt": _text_lines}[path.suffix]
        rows = read(path, text_of(path))
    for where, row in rows:
        place = f"{path}, {where}"
        yield place, DataError(f"{place}: {row}") if isinstance(row, str) else row


def text_of(path: Path) -> str:
    """The file's text, its lines ended by \\n. Raises DataError if it is not UTF-8, is empty, or
    cannot be read."""
    with readable(path, DataError):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = raw[: error.start].count(b"\n") + 1
        likely = "utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        raise DataError(
            f"{path}, line {place}: byte {raw[error.start]:#04x} is not UTF-8."
            f" Run {command('iconv', '-f', likely, '-t', 'utf-8', path)} if that is its encoding."
        ) from None
    if "\0" in text:
        raise DataError(f"{path} has NUL characters: no text. Run iconv -f utf-16le -t utf-8.")
    text = text.replace("\r\n", "\n")
    if "\n" not in text:  # an old Macintosh's file
        text = text.replace("\r", "\n")
    if not text.strip():
        raise DataError(f"{path} is empty. Pass a file with rows.")
    return text


def is_plain(value: object) -> bool:
    """Whether a cell is a text, a number, or an error: no list, object or null."""
    return isinstance(value, PLAIN_TYPES)


def text_in(row: Row, name: str) -> str:
    """A cell as text. Raises DataError if it holds none: NaN, a list, what cannot be read."""
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, DataError):
        raise value
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{name} is {value}: no text, and no finite number. Fill it in.")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise DataError(f"{name} is no text, found {type(value).__name__}.")


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json_object(line)
            except ValueError as error:
                yield f"line {number}", f"no JSON object: {error}."


def _json(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "Rename it to .jsonl" if error.msg == "Extra data" else "Mend it"
        raise DataError(f"{path}, line {error.lineno}: no JSON: {error.msg}. {hint}.") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise DataError(f"{path}: no JSON that can be read: {error}.") from None
    except RecursionError:
        raise DataError(f"{path}: no JSON of rows: nested too deeply.") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: a {type(value).__name__} without rows. Write [{{...}}, ...], or"
            ' {"data": [...]}.'
        )
    for number, row in enumerate(rows, 1):
        kind = type(row).__name__
        yield f"item {number}", row if isinstance(row, dict) else f"found a {kind}, not an object."


def _table_rows(path: Path, text: str, headed: Headed) -> Iterator[tuple[str, Read | str]]:
    lines = [*(_tabs(text) if path.suffix == ".tsv" else _cells(text, _delimiter(text)))]
    whole = [cells for _, cells in lines if not isinstance(cells, str)]
    if not whole:
        number, error = lines[0]
        raise DataError(f"{path}, line {number}: {error}")
    first = whole[0]
    named = headed(path, whole)
    names = [str(number) for number in range(len(first))]
    if named:
        names = [cell.strip() or name for cell, name in zip(first, names, strict=True)]
    _check_names(path, names)
    seen = False
    for number, cells in lines:
        if isinstance(cells, str):
            yield f"line {number}", cells
        elif named and not seen:
            seen = True
        elif len(cells) != len(names):
            found = f"{len(cells)} columns, the first row has {len(names)}"
            yield f"line {number}", f"{found}. Mend the line, or quote the separator."
        elif named and cells == first:
            yield f"line {number}", f"the header once more: {', '.join(cells)}. Remove the line."
        else:
            yield f"line {number}", dict(zip(names, cells, strict=True))


def _tabs(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Cells between tabs; quotes mean nothing there, as in GLUE."""
    lines = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    alone = max(map(len, lines)) == 1  # an empty line is an empty text
    return ((number, cells) for number, cells in enumerate(lines, 1) if alone or cells != [""])


def _delimiter(text: str) -> str:
    """What a CSV has between its cells: comma, semicolon (Excel's, where a comma is in decimals) or
    tab, whichever cuts the first 50 rows into the most cells, in each row as many. Else a comma."""
    found = {}
    for mark in (",", ";", "\t"):
        rows = [cells for _, cells in itertools.islice(_cells(text, mark), 50)]
        widths = {1 if isinstance(cells, str) else len(cells) for cells in rows}
        found[mark] = max(widths) if len(widths) == 1 else 1
    return max(found, key=lambda mark: found[mark])  # the comma, if others do as well


def _cells(text: str, mark: str) -> Iterator[tuple[int, list[str] | str]]:
    """Cells between commas, or another mark, quoted as in CSV."""
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=mark, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"{error}. Mend the quotes, or save it as .tsv."
            continue
        if cells is None:
            return
        if cells:
            yield reader.line_num, cells


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two columns are named {twice!r}. Rename one.")


def _text_lines(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    """A text per line; or E2E's pairs, which nine lines in ten show to be meant."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    pairs = 10 * sum("||" in line for _, line in lines) >= 9 * len(lines)
    for number, line in lines:
        meaning, mark, reference = line.partition("||")
        row: Read | str = {"text": line}
        if pairs:  # words begin with their space, as they do within a text
            row = {"prompt": f"{meaning.strip()} ||", "completion": f" {reference.strip()}"}
        if pairs and not mark:
            row = "no '||' between a meaning representation and its text."
        yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Read | str]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: Parquet needs pyarrow. Run pip install 'lora-from-scratch[hub]'."
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A value that repeats takes no room: a file of 1 KB may state a billion rows of one.
            if file.metadata.num_rows > MOST_ROWS * path.stat().st_size:
                raise DataError(f"{path} states {file.metadata.num_rows:,} rows in few bytes.")
            names = [name or str(i) for i, name in enumerate(file.schema_arrow.names)]
            _check_names(path, names)
            for batch in file.iter_batches(1000):
                columns = [_column_cells(*pair) for pair in zip(names, batch.columns, strict=True)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(names, cells, strict=True))
    except DataError:
        raise
    except Exception as error:  # of a damaged file pyarrow raises nearly anything
        raise DataError(f"{path} cannot be read: {error}. Write it anew.") from None


def _column_cells(name: str, column: Any) -> list[Any]:
    """The cells of a column as Python's values, and a DataError for each that is none: bytes that
    are not UTF-8, a date past the year 9999, a time zone that nobody knows."""
    try:
        return [_json_value(value) for value in column.to_pylist()]
    except Exception:  # pyarrow raises what the conversion of each type does
        return [_value(name, cell.as_py) for cell in column]


def _value(name: str, read: Callable[[], Any]) -> Any:
    try:
        return _json_value(read())
    except Exception as error:  # as above
        return DataError(f"{name} is no value that can be read: {error}.")


def _json_value(value: Any) -> Any:
    """A value as JSON would hold it. Raises TypeError or ValueError for what it cannot hold."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    if isinstance(value, dict):
        return {str(_json_value(name)): _json_value(one) for name, one in value.items()}
    if isinstance(value, Decimal):
        return f"{value:f}" if value.is_finite() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is neither a text nor a number")


def read_hub(source: str) -> Iterator[tuple[str, str, Read]]:
    """A data set on the hub: glue/TASK, OWNER/NAME, or OWNER/NAME/CONFIG."""
    if source.startswith((".", "/", "~")) or source.endswith(ENDINGS):
        raise DataError(
            f"--data {source}: no such file or folder. Pass one, or a data set's name on the hub."
        )
    if not hub_answers():
        raise DataError(
            f"--data {source} is no file or folder here, and the hub does not answer. Run"
            " lora train --data demo, or pass a local file."
        )
    import datasets

    datasets.disable_progress_bars()
    parts = source.split("/")
    if parts[0] == "glue" and len(parts) == 2:
        name: str = "nyu-mll/glue"
        config: str | None = parts[1]
    else:
        name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        found = datasets.load_dataset(name, config)
        for split, names in SPLITS.items():
            there = [name for name in names if name in found]
            for number, row in enumerate(found[there[0]] if there else (), 1):
                cells = {str(name): _value(str(name), partial(row.get, name)) for name in row}
                yield split, f"{source}, {there[0]} row {number}", cells
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"--data {source} cannot be loaded from the hub: {error}.") from error
