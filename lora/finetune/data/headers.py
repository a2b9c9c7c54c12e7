"""Decides whether the first row of a table is a header, whatever its names are: has_header(cells).

Some evidence decides alone:

    an example   a number or a date above numbers or dates; a cell that recurs below
    a header     a word above numbers or dates; two of the usual column names

Without such evidence we test the hypothesis that the first row is an example like all others. Each
of its cells then has a p-value, the probability that a random cell of its column looks as much like
a name as this cell does:

    a column of classes   the probability of a class that no other row has (Good and Turing)
    a column of texts     the share of texts that are as short, if this text is clearly short

Fisher's method combines the p-values. If the result is at most SURE, the first row is a header. If
the evidence disagrees or is too weak, the answer is None, and the caller asks the user.

Why not csv.Sniffer (clevercsv has the same rule): it compares types and lengths of cells. Texts
have no common length, so it takes every second header of test_headers.py for an example.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

SURE = 0.02  # the combined p-value up to which the first row is taken for a header
SAMPLE = 5_000  # rows to look at, beside the first
# Cells that state a missing value. They say nothing about the type of their column.
EMPTY_CELLS = {"", "na", "n/a", "nan", "null", "none", "?", "-", "--"}
USUAL = frozenset(
    """
    abstract airline annotation answer aspect author body caption categories category class classes
    code comment comments company content contents context country date description dialogue doc
    document domain emotion emotions entity example feedback gender genre gold headline hypothesis
    id idx index input instruction intent intents intention is key label labels lang language
    location message messages name news note number opinion output paragraph pair passage phrase
    polarity post posts premise product prompt query question questions rating ratings reference
    relation reply response result review reviews score sentence sentences sentiment sentiments
    source speaker spam split stars statement subject summary tag tags target text texts time
    timestamp title tone topic topics toxic toxicity transcript tweet tweets type url user username
    utterance utterances value word words
    """.split()  # noqa: SIM905
)


def has_header(cells: Sequence[Sequence[str]]) -> bool | None:
    """Returns True if the first row is a header, False if it is an example, None if unclear."""
    first = [cell.strip() for cell in cells[0]]
    # A copy of the first row proves nothing: files that were joined repeat their header.
    below = [row for row in cells[1 : 1 + SAMPLE] if len(row) == len(first) and row != cells[0]]
    columns = [[cell.strip() for cell in column] for column in zip(*below, strict=True)]
    if not below:
        columns = [[] for _ in first]
    if _counts_up(first) and any(values and not _kind(values) for values in columns):
        return True  # 0, 1, 2, ...: pandas writes this header if the columns have no names
    pairs = [*zip(first, columns, strict=True)]
    example = any(map(_is_example, *zip(*pairs, strict=True)))
    typed = sum(map(_is_name, *zip(*pairs, strict=True)))
    usual = _usual(first)
    sentence = any(map(_sentence, first))
    if example:
        return None if typed or usual else False
    # One column of numbers under a word is too little if another cell of the row is a sentence.
    if usual or typed > sentence:
        return True
    if typed:
        return None
    if len(first) == 1:
        return _decide_by_texts(first[0], columns[0])
    unseen = [_unseen(*pair) for pair in pairs]
    chance = _combine([*unseen, *(_shorter(*pair) for pair in pairs)])
    if sentence:  # no column has a sentence as its name, but a new class beside it is odd
        return None if min(unseen) < 1 else False
    # A single usual name does not decide alone, since it may be a short text. It counts as a
    # p-value of 1/10.
    if any(map(_is_usual, first)):
        chance /= 10
    named = all(map(_like_a_name, filter(None, first)))
    return True if chance <= SURE and named else None


def _combine(chances: Sequence[float]) -> float:
    """Combines p-values by Fisher's method: P(product of n uniform values <= their product).

    A p-value of 1 means that a cell has no evidence, and is left out. Returns 1 if none has any.
    """
    usable = [chance for chance in chances if chance < 1]
    if not usable:
        return 1.0
    product = math.prod(usable)
    # The closed form of the chi-squared tail with 2n degrees of freedom.
    return product * sum((-math.log(product)) ** i / math.factorial(i) for i in range(len(usable)))


def _decide_by_texts(cell: str, values: Sequence[str]) -> bool | None:
    """Decides for a file with one column. Returns False for an example, None if unclear.

    There is no class or number beside the text to compare with. A cell with a space above texts is
    a text. A word may be a name, unless half of the texts are single words too.
    """
    words = sum(" " not in value for value in values)
    return False if " " in cell or 2 * words >= len(values) else None


def _is_example(cell: str, values: Sequence[str]) -> bool:
    """True if a cell has the type of the numbers or dates below it, or recurs below."""
    if cell.lower() in EMPTY_CELLS:
        return False
    kind = _kind(values)
    return _kind([cell]) == kind if kind else cell in values


def _is_name(cell: str, values: Sequence[str]) -> bool:
    """True if a cell is a word above numbers or dates, or empty above row numbers (pandas)."""
    if cell == "":
        return _counts_up(values) or _counts_up([str(0), *values])
    return bool(_kind(values)) and not _kind([cell]) and cell.lower() not in EMPTY_CELLS


def _counts_up(values: Sequence[str]) -> bool:
    """True if the values are 0, 1, 2, ..."""
    return len(values) > 1 and all(value == str(n) for n, value in enumerate(values))


def _kind(values: Sequence[str]) -> str:
    """Returns "number" or "date" if 19 of 20 cells that are not empty are that, else ""."""
    kinds = Counter(_kind_of(value) for value in values if value.lower() not in EMPTY_CELLS)
    for kind in ("number", "date"):
        if kinds.total() and 20 * kinds[kind] >= 19 * kinds.total():
            return kind
    return ""


def _kind_of(cell: str) -> str:
    """Returns "number", "date", or "" for words."""
    if re.fullmatch(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?", cell):
        return "date"
    try:
        float(cell.removesuffix("%").replace(",", ""))
    except ValueError:
        return ""
    return "number"


def _usual(first: Sequence[str]) -> bool:
    """True if all cells look like names, none twice, and two, or the only one, are usual."""
    known = sum(map(_is_usual, first))
    names = [cell for cell in first if cell]
    return (
        known >= min(2, len(first))
        and len({*names}) == len(names)
        and all(map(_like_a_name, names))
    )


def _is_usual(cell: str) -> bool:
    """True if the first or last word of a name is usual: review_text, labelId, "user name"."""
    pieces = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", cell)
    return (
        0 < len(pieces) < 4
        and cell.count(" ") < 2
        and any(piece.lower() in USUAL for piece in (pieces[0], pieces[-1]))
    )


def _like_a_name(cell: str) -> bool:
    """True if a cell is short enough for a column's name."""
    return 0 < len(cell) <= 40 and len(cell.split()) <= 3 and not _sentence(cell)


def _sentence(cell: str) -> bool:
    """True if a cell is a sentence: long, or several words with a full stop."""
    words = len(cell.split())
    return words >= 6 or len(cell) > 60 or (words > 1 and cell.endswith((".", "!", "?", "…")))


def _unseen(cell: str, values: Sequence[str]) -> float:
    """Returns the probability that a row has a class of its own; 1 if the column has no classes.

    Good and Turing: it is the share of rows whose class occurs once. Both counts are increased by
    1, for the first row itself.
    """
    counts = Counter(values)
    if not values or 2 * len(counts) > len(values) or cell in counts or cell.lower() in EMPTY_CELLS:
        return 1.0
    return (sum(count == 1 for count in counts.values()) + 1) / (len(values) + 1)


def _shorter(cell: str, values: Sequence[str]) -> float:
    """Returns the share of texts that are as short as the first cell; 1 if it is not clearly short.

    Clearly short: at most half of the median of the next 50 texts. In a file sorted by length the
    first text is the shortest, but not by half.
    """
    if not values or 2 * len({*values}) <= len(values):
        return 1.0
    if 2 * len(cell) > median(map(len, values[:50])):
        return 1.0
    return (sum(len(value) <= len(cell) for value in values) + 1) / (len(values) + 1)
