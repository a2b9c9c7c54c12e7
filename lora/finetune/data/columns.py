"""Chooses which columns of a table hold the text, the pair and the label.

choose_columns(rows, columns)    by the user's flags, by usual names, or by the values
adopted(rows, columns, trained)  the same for new data, with the columns of the training as default
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora.errors import DataError
from lora.finetune.data.headers import has_header
from lora.finetune.data.rows import Cells, Row

# Usual names, the most specific use first. The first that a table has wins.
TEXT = ("text", "sentence", "review", "question", "sentence1", "question1", "premise")
PAIR = {"sentence1": "sentence2", "question1": "question2", "premise": "hypothesis",
        "question": "sentence"}  # fmt: skip
LABEL = ("label", "labels", "score", "target", "class")

# The largest float32. A regression squares its labels in float64, so the square cannot overflow.
LARGEST_LABEL = 3.4028234663852886e38

Placed = tuple[str, Row]  # (place, row). Errors show the place: "FILE, line N".


@dataclass(frozen=True)
class Columns:
    """The columns of text, pair and label, each a name or a number from 0. None: not set.

    header: whether the first row of a table names its columns.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    header: Literal["auto", "yes", "no"] = "auto"


ANY = Columns()


@dataclass
class Header:
    """Decides for each table of a data set whether it has a header. The train split comes first.

    Later tables follow the first one if they are unclear: the splits of a data set are alike.
    """

    columns: Columns  # the user's flags
    known: Columns = ANY  # the columns that the model was trained on
    classes: Sequence[str] = ()  # the classes that the model was trained on
    seen: bool | None = None  # the first table has a header. None: no table was read yet
    first: Sequence[str] = ()  # the first row of the first table

    def __call__(self, path: Path, cells: Cells) -> bool:
        """True if the first row of the table is a header. Raises DataError if that is unclear."""
        if self.first and cells[0] == self.first and self.seen:
            return True
        headed = self._decide(cells)
        # An unclear first row is an example if the train split begins with an example too. If the
        # train split has a header, the same header was recognised above.
        if headed is None and self.seen is False:
            headed = False
        if headed is None:
            raise DataError(
                f"{path}: does its first row name the columns, or is it an example?"
                f" {_first_cells(cells)}"
                " Pass --header yes or --header no."
            )
        if self.seen is None:
            self.seen, self.first = headed, cells[0]
        return headed

    def _decide(self, cells: Cells) -> bool | None:
        """True for a header, False for an example, None if it is unclear."""
        if self.columns.header != "auto":
            return self.columns.header == "yes"
        first = [cell.strip() for cell in cells[0]]
        flags = (self.columns.text, self.columns.pair, self.columns.label)
        trained = (self.known.text, self.known.pair, self.known.label)
        # Only a header can have the names that the user passes, or that the model was trained on.
        if any(map(_is_named, flags)) or any(_is_named(name) and name in first for name in trained):
            return True
        # A class of the model in the first row is a label, so the row is an example.
        if {*first} & {*self.classes}:
            return False
        headed = has_header(cells)
        # Single words may be texts. If the training had a header, the first may be a name too.
        unsure = len(first) == 1 and " " not in first[0] and _is_named(self.known.text)
        return None if headed is False and unsure else headed


def _is_named(column: str | None) -> bool:
    return column is not None and not column.isdecimal()


def _first_cells(cells: Cells) -> str:
    """Describes the first row for an error: the number of columns, and each cell with its number.

    At most 12 cells of at most 40 characters.
    """
    shown = ", ".join(f"{number} {cell[:40]!r}" for number, cell in enumerate(cells[0][:12]))
    return f"{len(cells[0])} columns, the first row: {shown}."


def adopted(
    rows: Sequence[Placed], columns: Columns, trained: Columns, headed: bool | None
) -> Columns:
    """Returns the user's columns, and for those not set the columns of the training.

    headed: True if the file has a header, False if not, None if it is no table (JSON, Parquet).
    The names of the training are looked up first. A column number of the training is the same
    column in a file without a header. In a file with a header it is the last resort, since its
    columns may be in another order. If no choice fits this file, returns the user's columns alone.
    Raises DataError if the training named its text column, and this file has neither that nor one
    with a usual name: a guess by the values could take another column for the text.
    """
    names = names_of(rows)
    lacking = columns.text is None and _is_named(trained.text) and trained.text not in names
    usual = {name.strip().lower() for name in names} & {*TEXT}
    if lacking and not usual and headed is not False:
        raise DataError(
            f"no column {trained.text!r}, which the model was trained on. Found:"
            f" {', '.join(names)}. Set --text-column, or --header no if there is no header."
        )
    flags = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    training = {"text": trained.text, "pair": trained.pair, "label": trained.label}
    by_name = {role: name if name in names else None for role, name in training.items()}
    by_number = {role: find_column(name, names) for role, name in training.items()}
    candidates = {None: [by_name], True: [by_name, by_number], False: [by_number]}[headed]
    for defaults in candidates:
        merged = {role: defaults[role] if name is None else name for role, name in flags.items()}
        used = [find_column(name, names) for name in merged.values() if name is not None]
        chosen = Columns(merged["text"], merged["pair"], merged["label"])
        if len({*used}) < len(used):  # one column in two roles
            continue
        try:
            choose_columns(rows, chosen)
        except DataError:
            continue
        return chosen
    return columns


def names_of(rows: Iterable[Placed]) -> list[str]:
    """Returns every column name that occurs in a row, in order of first occurrence."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def find_column(column: str | None, names: Sequence[str]) -> str | None:
    """Returns the column of this name, or else of this number. None if there is no such column."""
    if column is None or column in names:
        return column
    # int() takes at most 4,300 digits; no table has 10⁹ columns.
    numbered = column.isdecimal() and len(column) < 9 and int(column) < len(names)
    return names[int(column)] if numbered else None


def first_row(rows: Sequence[Placed]) -> str:
    """Shows the first row for an error: name and value of at most 12 columns."""
    cells = [f"{name} {str(value)[:40]!r}" for name, value in [*rows[0][1].items()][:12]]
    return f"First row: {', '.join(cells)}."


def choose_columns(rows: Sequence[Placed], columns: Columns) -> Columns:
    """Returns the names of the text, pair and label columns.

    Each is the user's, or has a usual name, or is recognised by its values if they leave no doubt.
    Pair and label are None if there is no such column. Raises DataError if a column that the user
    named does not exist or has two roles, or if no column can be recognised as the text.
    """
    names = names_of(rows)
    if not names:
        raise DataError("the rows have no columns. Give each a text and a label.")
    flags = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    chosen: dict[str, str | None] = {}
    for role, name in flags.items():
        chosen[role] = find_column(name, names)
        if name is not None and chosen[role] is None:
            raise DataError(f"--{role}-column {name}: no such column. Found: {', '.join(names)}.")
    taken = [name for name in chosen.values() if name is not None]
    if len(set(taken)) < len(taken):
        raise DataError(
            f"one column cannot be two of text, pair and label: {', '.join(taken)}."
            " Pass a different column for each."
        )
    usual = {name.strip().lower(): name for name in names if name not in taken}
    texts = [usual[name] for name in TEXT if name in usual]
    # A `question` beside a `sentence` is the first text of a pair (QNLI). A `sentence` alone is
    # the text, so pairs are looked up first.
    paired = [usual[a] for a, b in PAIR.items() if a in usual and b in usual]
    text = chosen["text"] or next(iter(paired or texts), None)
    pair = chosen["pair"]
    if text is not None:
        pair = pair or usual.get(PAIR.get(text.strip().lower(), ""))
    labels = [usual[name] for name in LABEL if name in usual and usual[name] != text]
    label = chosen["label"] or (labels[0] if labels else None)
    free = [n for n in names if n not in (text, pair, label) and n.strip().lower() != "split"]
    # No usual name for the text: look at the values. The same for a label, if only one column is
    # left that it can be.
    if text is None:
        text, label = _by_content(rows, free, label)
    elif label is None and len(free) == 1 and _recurs(rows, free[0]):
        label = free[0]
    return Columns(text, pair, label, columns.header)


def _by_content(
    rows: Sequence[Placed], free: Sequence[str], label: str | None
) -> tuple[str, str | None]:
    """Returns the text column and the label column, chosen from one or two columns by their values.

    label: the label column if it is known already. If both columns hold classes, or neither does,
    a table without a header has its text first. Raises DataError if the values leave a doubt.
    """
    if len(free) == 1 and not _holds_labels(rows, free[0]):
        return free[0], label
    if len(free) == 2 and label is None:
        first, last = free
        classes = [_holds_labels(rows, name) for name in free]
        # Texts may recur too (intents, templates). The labels are then far fewer than the texts.
        if classes == [True, True]:
            counts = [_count_values(rows, name) for name in free]
            classes = [
                4 * count <= other for count, other in zip(counts, counts[::-1], strict=True)
            ]
        numbered = all(name.isdecimal() for name in free)
        if classes == [True, False]:
            return last, first if _recurs(rows, first) else None
        if classes == [False, True] or numbered:
            return first, last
    names = names_of(rows)
    file = rows[0][0].rpartition(", ")[0]  # the place without its line
    wanted = "text or label" if label is None else f"text beside the label {label}"
    raise DataError(
        f"{file} has {len(names)} columns and none is named {wanted}: {', '.join(names)}."
        f" {first_row(rows)} Set --text-column and --label-column to names or to numbers from 0,"
        " and --pair-column for pairs."
    )


def _count_values(rows: Sequence[Placed], name: str) -> int:
    """Counts the distinct values of a column."""
    return len({str(row[name]).strip() for _, row in rows if name in row})


def _recurs(rows: Sequence[Placed], name: str) -> bool:
    """True if a value occurs twice on average, as labels do and row numbers do not."""
    return 2 * _count_values(rows, name) <= sum(name in row for _, row in rows)


def _holds_labels(rows: Sequence[Placed], name: str) -> bool:
    """True if a column can hold labels: 9 values in 10 are numbers, or the values recur."""
    values = [str(row[name]).strip() for _, row in rows if name in row]
    numbers = sum(not math.isnan(number_of(value)) for value in values)
    return 10 * numbers >= 9 * len(values) or _recurs(rows, name)


def number_of(label: str | None) -> float:
    """Returns a label as a number, NaN if it is none."""
    try:
        return float(str(label))
    except ValueError:
        return math.nan
