"""Reads the rows of data files and hub data sets. All tasks use this reader.

read_source(source)  (split, place, row) of each row of a file, a folder or a hub data set
read_rows(path)      (place, row) of each row of one file

A place is "FILE, line N". If a row cannot be read, its DataError is yielded in its place, and the
caller raises it or adds it to BadRows. A Parquet cell without a value in Python is a DataError too.

A line ends at \\n or \\r\\n only. Unicode has more line ends, such as U+2028, which texts contain.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import itertools
import json
import math
import re
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
MOST_ROWS = 64  # rows per byte of a Parquet file
PLAIN_TYPES = (str, int, float, DataError)
LISTED = 10  # errors to show; all are counted

Row = dict[str, Any]
Read = Row | DataError
Cells = list[list[str]]
Headed = Callable[[Path, Cells], bool]
"""Returns True if the first row of the table is a header."""

# csv's default limit is 131,072 characters per cell. TSV and JSONL have none, and texts are long.
csv.field_size_limit(2**31 - 1)


class _HasPlace(Protocol):
    @property
    def place(self) -> str: ...


P = TypeVar("P", bound=_HasPlace)


@dataclass
class BadRows:
    """Collects the rows that cannot be used, so that one error lists them all."""

    allowed: int = 0  # rows that may be skipped: --skip-bad-lines
    count: int = 0
    listed: list[str] = field(default_factory=list)  # the first errors
    places: set[str] = field(default_factory=set)  # of all bad rows

    def add(self, error: DataError, place: str) -> None:
        """Counts a row as bad."""
        if place in self.places:  # a row may hold several conversations; it is one bad row
            return
        self.count += 1
        self.places.add(place)
        if len(self.listed) < LISTED:
            self.listed.append(str(error))

    def usable(self, rows: Iterable[P]) -> list[P]:
        """Returns the rows that were not added."""
        return [row for row in rows if row.place not in self.places]

    def judge(self, left: bool = True) -> list[str]:
        """Returns a note that lists the skipped rows; [] if all rows are good.

        Raises DataError if there are more bad rows than allowed, or if `left` is False: too few
        rows remain.
        """
        if not self.count:
            return []
        more = self.count - len(self.listed)
        lines = "".join(f"\n  {line}" for line in self.listed)
        lines += f"\n  and {more} more" if more else ""
        rows, them = ("1 row", "it") if self.count == 1 else (f"{self.count} rows", "them")
        if left and self.count <= self.allowed:
            return [f"{rows} skipped, as --skip-bad-lines {self.allowed} allows:{lines}"]
        advice = f"Fix {them}, or pass --skip-bad-lines {self.count} to skip {them}."
        if not left:
            advice = f"Too few other rows are left. Fix {them}, or pass other --data."
        raise DataError(f"{rows} cannot be used:{lines}\n{advice}")


def read_source(
    source: str, headed: Headed = lambda path, cells: True
) -> Iterator[tuple[str, str, Read]]:
    """Yields (split, place, row) of each row of a folder, a file or a hub data set.

    The split is "" if a file has no column `split`. Raises DataError if the source does not exist
    or a file cannot be read.
    """
    path = Path(source)
    with readable(path, DataError):
        folder, file = path.is_dir(), path.is_file()
    if folder:
        for split, names in SPLITS.items():
            paths = [path / (name + end) for name in names for end in ENDINGS]
            files = [path for path in paths if path.is_file()]
            if len(files) > 1:
                listed = ", ".join(path.name for path in files)
                raise DataError(f"{source} has {listed} for one split. Keep one of them.")
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
    """Returns the split in a row's column `split`, "" if there is none.

    Raises DataError if the column holds anything else than the name of a split.
    """
    value = next((value for name, value in row.items() if name.strip().lower() == "split"), None)
    if value is None or value == "":
        return ""
    known = {name: split for split, names in SPLITS.items() for name in names}
    if not isinstance(value, str) or value.strip() not in known:
        raise DataError(f"split {str(value)[:40]!r} is none of {', '.join(sorted(known))}.")
    return known[value.strip()]


def read_rows(path: Path, headed: Headed = lambda path, cells: True) -> Iterator[tuple[str, Read]]:
    """Yields (place, row) of each row of a file. If a row cannot be read, its error is the row.

    A column without a name in the header, or of a table without a header, is named by its number
    from 0. Raises DataError if the file cannot be read at all.
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
    file = str(path)
    for location, row in rows:
        place = f"{file}, {location}"
        yield place, DataError(f"{place}: {row}") if isinstance(row, str) else row


def text_of(path: Path) -> str:
    """Returns the file's text with \\n as its line ending.

    Raises DataError if the file is empty, is not UTF-8, or cannot be read.
    """
    with readable(path, DataError):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        likely = "utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        raise DataError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8."
            f" Run {command('iconv', '-f', likely, '-t', 'utf-8', path)} if that is its encoding."
        ) from None
    if "\0" in text:
        convert = command("iconv", "-f", "utf-16le", "-t", "utf-8", path)
        raise DataError(f"{path} has NUL characters, so it is no UTF-8 text. Run {convert}.")
    text = text.replace("\r\n", "\n")
    if "\n" not in text:  # classic Mac OS ended lines with \r
        text = text.replace("\r", "\n")
    if not text.strip():
        raise DataError(f"{path} is empty. Pass a file with rows.")
    return text


def is_plain(value: object) -> bool:
    """True if a cell is a text, a number or an error, and not a list, an object or null."""
    return isinstance(value, PLAIN_TYPES)


def text_in(row: Row, name: str) -> str:
    """Returns a cell as text; numbers and booleans as JSON writes them.

    Raises DataError if the cell is NaN, infinite, null, a list or an object, or cannot be read.
    """
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, DataError):
        raise value
    if isinstance(value, float) and not math.isfinite(value):
        # pandas writes a missing value as NaN. Taken as text, it would be the class "nan".
        raise DataError(f"{name} is {value}: no text, and no finite number. Fill it in.")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise DataError(f"{name} must be a text, found {type(value).__name__}.")


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    """Yields an object per line of JSONL, or in its place a message. Empty lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json_object(line)
            except ValueError as error:
                yield f"line {number}", f"not a JSON object: {error}."


def _json(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    """Yields the objects of a JSON list, or of the list under the key "data"."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "Rename it to .jsonl" if error.msg == "Extra data" else "Fix it"
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}. {hint}."
        ) from None
    except ValueError as error:  # an integer with more than 4,300 digits
        raise DataError(f"{path}: its JSON cannot be read: {error}. Fix it.") from None
    except RecursionError:
        raise DataError(f"{path}: its JSON is nested too deeply. Write a list of rows.") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(
            f"{path} must be a list of rows, found a {type(value).__name__}. Write [{{...}}, ...],"
            ' or {"data": [...]}.'
        )
    for number, row in enumerate(rows, 1):
        kind = type(row).__name__
        yield f"item {number}", row if isinstance(row, dict) else f"found a {kind}, not an object."


def _table_rows(path: Path, text: str, headed: Headed) -> Iterator[tuple[str, Read | str]]:
    """Yields the rows of a CSV or TSV under the names of its columns."""
    if path.suffix == ".tsv":
        lines = [*_tabs(text)]
    elif stated := re.match(r"sep=(.)\n", text):  # Excel's own line, which names the separator
        lines = [(n + 1, cells) for n, cells in _cells(text[stated.end() :], stated[1])]
    else:
        lines = [*_cells(text, _delimiter(text))]
    if not lines:
        raise DataError(f"{path} is empty. Pass a file with rows.")
    table = [cells for _, cells in lines if not isinstance(cells, str)]  # without broken lines
    if not table:
        number, error = lines[0]
        raise DataError(f"{path}, line {number}: {error}")
    first = table[0]
    has_names = headed(path, table)
    names = [str(number) for number in range(len(first))]
    if has_names:
        names = [cell.strip() or name for cell, name in zip(first, names, strict=True)]
    _check_names(path, names)
    after_header = not has_names
    for number, cells in lines:
        if isinstance(cells, str):
            yield f"line {number}", cells
        elif not after_header:
            after_header = True
        elif len(cells) != len(names):
            widths = f"{len(cells)} columns, the first row has {len(names)}"
            yield f"line {number}", f"{widths}. Fix the line, or quote the separator."
        elif has_names and cells == first:  # from files that were joined with cat
            yield f"line {number}", f"the header again: {', '.join(cells)}. Remove the line."
        else:
            yield f"line {number}", dict(zip(names, cells, strict=True))


def _tabs(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields the cells of each line of a TSV. Quotes have no meaning, as in GLUE's files."""
    lines = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    # With one column, an empty line is an empty text. With more, it is no row.
    one_column = max(map(len, lines)) == 1
    return ((number, cells) for number, cells in enumerate(lines, 1) if one_column or any(cells))


def _delimiter(text: str) -> str:
    """Returns the separator of a CSV: comma, semicolon or tab.

    Excel writes semicolons in countries with a decimal comma. The separator is the one that gives
    the first row the most columns, and as many to the first 50 rows, but for one in ten: those are
    bad rows. Default: the comma.
    """
    columns = {}
    for separator in (",", ";", "\t"):
        rows = [cells for _, cells in itertools.islice(_cells(text, separator), 50)]
        widths = [1 if isinstance(cells, str) else len(cells) for cells in rows] or [1]
        others = sum(width != widths[0] for width in widths)
        few = others <= max(1, len(widths) // 10) and 2 * others < len(widths)
        columns[separator] = widths[0] if few else 1
    return max(columns, key=lambda separator: columns[separator])  # the first of equals: the comma


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (line number, cells) of each row of a CSV, or in the cells' place a message.

    A quoted cell may span lines; the number is that of its last line. Lines without a cell that is
    filled are skipped.
    """
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"{error}. Fix the quotes, or save it as .tsv."
            continue
        if cells is None:
            return
        if any(cells) or len(cells) == 1:
            yield reader.line_num, cells


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises DataError if two columns have the same name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two columns are named {twice!r}. Rename one.")


def _text_lines(path: Path, text: str) -> Iterator[tuple[str, Read | str]]:
    """Yields a text per line; or `meaning representation||reference` pairs, E2E's format.

    The file is in E2E's format if 9 lines in 10 have ||. The others are then bad rows.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    pairs = 10 * sum("||" in line for _, line in lines) >= 9 * len(lines)
    for number, line in lines:
        meaning, mark, reference = line.partition("||")
        row: Read | str = {"text": line}
        if pairs:
            # The completion begins with its space: tokenizers join a space to the word after it.
            row = {"prompt": f"{meaning.strip()} ||", "completion": f" {reference.strip()}"}
        if pairs and not mark:
            row = "no '||' between a meaning representation and its text."
        yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Read | str]]:
    """Yields the rows of a Parquet file.

    Raises DataError if pyarrow is not installed or cannot read the file.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: Parquet needs pyarrow. Run pip install 'lora-from-scratch[hub]'."
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A repeated value is stored once: a file of 1 KB can state a billion rows, which
            # would fill the memory.
            size = path.stat().st_size
            if file.metadata.num_rows > MOST_ROWS * size:
                raise DataError(
                    f"{path} states {file.metadata.num_rows:,} rows in {size:,} bytes: at most"
                    f" {MOST_ROWS} per byte are read. Write it again, or as JSONL."
                )
            names = [name or str(i) for i, name in enumerate(file.schema_arrow.names)]
            _check_names(path, names)
            for batch in file.iter_batches(1000):
                columns = [_column_cells(*pair) for pair in zip(names, batch.columns, strict=True)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield f"row {number}", dict(zip(names, cells, strict=True))
    except DataError:
        raise
    except Exception as error:  # pyarrow raises almost any error for a damaged file
        raise DataError(f"{path} cannot be read: {error}. Write it again.") from None


def _column_cells(name: str, column: Any) -> list[Any]:
    """Returns the cells of a column as Python values; a DataError for a cell that has none.

    Such cells are bytes that are not UTF-8, a date after the year 9999, an unknown time zone.
    """
    try:
        return [_json_value(value) for value in column.to_pylist()]
    except Exception:  # each type fails in its own way; cell by cell shows which ones fail
        return [_value(name, cell.as_py) for cell in column]


def _value(name: str, read: Callable[[], Any]) -> Any:
    """Returns the value that `read` gives, or a DataError naming the column if it fails."""
    try:
        return _json_value(read())
    except Exception as error:  # pyarrow and datasets raise almost any error here
        return DataError(f"{name} cannot be read: {error}.")


def _json_value(value: Any) -> Any:
    """Returns a value of Parquet or the hub as JSON has it: dates as ISO texts, decimals as texts.

    Raises TypeError for other types, ValueError for bytes that are not UTF-8.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(_json_value(name)): _json_value(item) for name, item in value.items()}
    if isinstance(value, Decimal):
        return f"{value:f}" if value.is_finite() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is neither a text nor a number")


def read_hub(source: str) -> Iterator[tuple[str, str, Read]]:
    """Yields the rows of a data set on the hub: glue/TASK, OWNER/NAME, or OWNER/NAME/CONFIG.

    Raises DataError if the hub does not answer, has no such data set, or cannot load it.
    """
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
        loaded = datasets.load_dataset(name, config)
        for split, names in SPLITS.items():
            present = [name for name in names if name in loaded]
            for number, row in enumerate(loaded[present[0]] if present else (), 1):
                cells = {str(name): _value(str(name), partial(row.get, name)) for name in row}
                yield split, f"{source}, {present[0]} row {number}", cells
    except Exception as error:  # datasets raises what its many readers raise
        raise DataError(f"--data {source} cannot be loaded from the hub: {error}.") from error
