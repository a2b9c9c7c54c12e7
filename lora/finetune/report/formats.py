"""A table of the report, and its text as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from lora.finetune.comparison.tables import markdown


@dataclass(frozen=True)
class Cell:
    """A cell. A column is sorted by `value` if its cells have one, else by `text`."""

    text: str
    value: float | None = None
    interval: tuple[float, float, float] | None = None
    """Low, middle and high as shares of the column's axis. The page draws them."""
    download: str | None = None
    """The name of a file in the page, which a button in this cell saves."""


@dataclass(frozen=True)
class Table:
    """A table with a head. `key` is its name in the page and of its files."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The head and the rows as plain texts, each on one line."""
        rows = [self.head, *([cell.text for cell in row] for row in self.rows)]
        return [tuple(" ".join(text.split()) for text in row) for row in rows]


def cells(*texts: str) -> tuple[Cell, ...]:
    """Returns a row of plain texts."""
    return tuple(Cell(text) for text in texts)


def numeric(value: float | None, pattern: str = "{:,.0f}") -> Cell:
    """Returns the cell of a number; an empty one for None."""
    return Cell("") if value is None else Cell(pattern.format(value), float(value))


def as_csv(table: Table) -> str:
    """Returns the table as comma-separated values, with CRLF as RFC 4180 has it."""
    text = io.StringIO()
    csv.writer(text).writerows(table.texts)
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Returns the table in GitHub's Markdown. A text cannot contain HTML or end its cell."""
    return markdown([tuple(map(_escaped, row)) for row in table.texts])


def _escaped(text: str) -> str:
    for character, escape in (("\\", r"\\"), ("|", r"\|"), ("&", "&amp;"), ("<", "&lt;")):
        text = text.replace(character, escape)
    return text


def as_latex(table: Table) -> str:
    """Returns the table as a tabular for the package booktabs, with special characters escaped."""
    from tabulate import tabulate

    head, *rows = table.texts
    return str(tabulate(rows, head, tablefmt="latex_booktabs", disable_numparse=True)) + "\n"


FORMATS = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
"""The ending of each kind of file, and what writes its text."""
