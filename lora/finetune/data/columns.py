"""Which columns of a table hold the text, the pair and the label: choose_columns(rows, columns)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora.errors import DataError
from lora.finetune.data.headers import has_header
from lora.finetune.data.rows import Cells, Row

TEXT = ("text", "sentence", "review", "question", "sentence1", "question1", "premise")
PAIR = {"sentence1": "sentence2", "question1": "question2", "premise": "hypothesis",
        "question": "sentence"}  # fmt: skip
LABEL = ("label", "labels", "score", "target", "class")

LARGEST_LABEL = 3.4028234663852886e38  # of float32; its square is still a float64

Placed = tuple[str, Row]  # where it stands, for errors: "FILE, line N"


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, by name or by number from 0, and whether the first row of a table
    names them."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    header: Literal["auto", "yes", "no"] = "auto"


ANY = Columns()


@dataclass
class Header:
    """Decides for each table of a source, the training split first, whether it has a header."""

    columns: Columns
    known: Columns = ANY  # of the run that the table is read for, and its classes
    classes: Sequence[str] = ()
    seen: bool | None = None  # None: no table was read
    first: Sequence[str] = ()

    def __call__(self, path: Path, cells: Cells) -> bool:
        if self.first and cells[0] == self.first and self.seen:
            return True
        seen = self._decide(cells)
        if seen is None and self.seen is False:  # as the training split
            seen = False
        if seen is None:
            raise DataError(
                f"{path}: does its first row name the columns, or is it an example?"
                f" {_listed_columns(cells)}"
                " Pass --header yes or --header no."
            )
        if self.seen is None:
            self.seen, self.first = seen, cells[0]
        return seen

    def _decide(self, cells: Cells) -> bool | None:
        if self.columns.header != "auto":
            return self.columns.header == "yes"
        first = [cell.strip() for cell in cells[0]]
        asked = (self.columns.text, self.columns.pair, self.columns.label)
        known = (self.known.text, self.known.pair, self.known.label)
        if any(name is not None and not name.isdecimal() for name in asked) or any(
            name is not None and not name.isdecimal() and name in first for name in known
        ):
            return True
        return False if {*first} & {*self.classes} else has_header(cells)


def _listed_columns(cells: Cells) -> str:
    """The columns of a first row with their numbers."""
    shown = ", ".join(f"{number} {cell[:40]!r}" for number, cell in enumerate(cells[0][:12]))
    return f"{len(cells[0])} columns, the first row: {shown}."


def adopted(
    rows: Sequence[Placed], columns: Columns, trained: Columns, headed: bool | None
) -> Columns:
    """The columns that are asked for, and beside them those of the training as this file has them.

    A name is looked for as it is. A number means the same place in a file without a header; in one
    with a header it is the last resort, since its columns may stand in another order.
    """
    names = names_of(rows)
    asked = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    before = {"text": trained.text, "pair": trained.pair, "label": trained.label}
    by_name = {role: name if name in names else None for role, name in before.items()}
    by_place = {role: find_column(name, names) for role, name in before.items()}
    tries = {None: [by_name], True: [by_name, by_place], False: [by_place]}[headed]
    for there in tries:
        found = {role: there[role] if name is None else name for role, name in asked.items()}
        given = [find_column(name, names) for name in found.values() if name is not None]
        chosen = Columns(found["text"], found["pair"], found["label"])
        if len({*given}) < len(given):
            continue
        try:
            choose_columns(rows, chosen)
        except DataError:
            continue
        return chosen
    return columns


def names_of(rows: Iterable[Placed]) -> list[str]:
    """The columns that any row has, in order."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def find_column(asked: str | None, names: Sequence[str]) -> str | None:
    """The column of that name, or else of that number."""
    if asked is None or asked in names:
        return asked
    there = asked.isdecimal() and len(asked) < 9 and int(asked) < len(names)
    return names[int(asked)] if there else None


def first_row(rows: Sequence[Placed]) -> str:
    """The first row, column by column."""
    cells = [f"{name} {str(value)[:40]!r}" for name, value in [*rows[0][1].items()][:12]]
    return f"First row: {', '.join(cells)}."


def choose_columns(rows: Sequence[Placed], columns: Columns) -> Columns:
    """The names of the text, pair and label columns: as asked, by their usual names, or by what
    they hold where that leaves no doubt."""
    names = names_of(rows)
    if not names:
        raise DataError("the rows have no columns. Give each a text and a label.")
    asked = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    given: dict[str, str | None] = {}
    for role, name in asked.items():
        given[role] = find_column(name, names)
        if name is not None and given[role] is None:
            raise DataError(f"--{role}-column {name}: no such column. Found: {', '.join(names)}.")
    taken = [name for name in given.values() if name is not None]
    if len(set(taken)) < len(taken):
        raise DataError(f"one column cannot be two of text, pair and label: {', '.join(taken)}.")
    usual = {name.strip().lower(): name for name in names if name not in taken}
    texts = [usual[name] for name in TEXT if name in usual]
    # A question with a sentence beside it is the first of a pair, a sentence alone is the text.
    paired = [usual[a] for a, b in PAIR.items() if a in usual and b in usual]
    text = given["text"] or next(iter(paired or texts), None)
    pair = given["pair"]
    if text is not None:
        pair = pair or usual.get(PAIR.get(text.strip().lower(), ""))
    labels = [usual[name] for name in LABEL if name in usual and usual[name] != text]
    label = given["label"] or (labels[0] if labels else None)
    free = [n for n in names if n not in (text, pair, label) and n.strip().lower() != "split"]
    if text is None:
        text, label = _by_content(rows, free, label)
    elif label is None and len(free) == 1 and _recurs(rows, free[0]):
        label = free[0]
    return Columns(text, pair, label, columns.header)


def _by_content(
    rows: Sequence[Placed], free: Sequence[str], label: str | None
) -> tuple[str, str | None]:
    """The text, and the label if it is not known, among one or two columns of no usual name.

    Without a header, and if neither holds classes or both do, the text comes first.
    """
    if len(free) == 1 and not _holds_labels(rows, free[0]):
        return free[0], label
    if len(free) == 2 and label is None:
        first, last = free
        classes = [_holds_labels(rows, name) for name in free]
        if classes == [True, True]:  # texts that recur, beside far fewer labels
            counts = [_count_values(rows, name) for name in free]
            classes = [4 * one <= other for one, other in zip(counts, counts[::-1], strict=True)]
        numbered = all(name.isdecimal() for name in free)
        if classes == [True, False]:
            return last, first if _recurs(rows, first) else None
        if classes == [False, True] or numbered:
            return first, last
    names = names_of(rows)
    called = "text or label" if label is None else f"text beside the label {label}"
    raise DataError(
        f"{len(names)} columns, and none that is called {called}: {', '.join(names)}."
        f" {first_row(rows)} Set --text-column and --label-column to names or to numbers from 0,"
        " and --pair-column for pairs."
    )


def _count_values(rows: Sequence[Placed], name: str) -> int:
    """The distinct values of a column."""
    return len({str(row[name]).strip() for _, row in rows if name in row})


def _recurs(rows: Sequence[Placed], name: str) -> bool:
    """Whether a column's values recur, as labels do and the numbers of rows do not."""
    return 2 * _count_values(rows, name) <= sum(name in row for _, row in rows)


def _holds_labels(rows: Sequence[Placed], name: str) -> bool:
    """Whether a column holds labels: numbers, or a few values that recur."""
    values = [str(row[name]).strip() for _, row in rows if name in row]
    numbers = sum(not math.isnan(number_of(value)) for value in values)
    return 10 * numbers >= 9 * len(values) or _recurs(rows, name)


def number_of(label: str | None) -> float:
    try:
        return float(str(label))
    except ValueError:
        return math.nan
