"""Whether the first row of a table names its columns, for any names: has_header(cells).

csv.Sniffer, whose rule clevercsv carries too, compares types and lengths, and takes every second
header of test_headers.py for an example: texts have no length in common. Here an example is taken
for a random one of its column, so that each cell has a p-value: the share of the cells below that
look as much like a name as it does. In a column of classes that is the chance to meet a class that
never recurs (Good and Turing), in a column of texts the rank of its length, if it is clearly
shorter.

What settles it: a number or a date above numbers or dates, or a cell that recurs below, is of an
example; a word above numbers, or several of the usual names, are of a header. If the two disagree,
or neither is found and the p-values are too large, nobody knows, and the user is asked.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

SURE = 0.02  # the p-value below which a first row is no example
SAMPLE = 5_000  # rows that are looked at
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
    """True if the first row names the columns, False if it is an example, None if that is open."""
    first = [cell.strip() for cell in cells[0]]
    below = [row for row in cells[1 : 1 + SAMPLE] if len(row) == len(first) and row != cells[0]]
    columns = [[cell.strip() for cell in column] for column in zip(*below, strict=True)]
    if not below:
        columns = [[] for _ in first]
    if _counts_up(first) and any(values and not _kind(values) for values in columns):
        return True  # what pandas writes where nobody named the columns
    pairs = [*zip(first, columns, strict=True)]
    example = any(map(_is_example, *zip(*pairs, strict=True)))
    typed = sum(map(_is_name, *zip(*pairs, strict=True)))
    usual = _usual(first)
    sentence = any(map(_sentence, first))
    if example:
        return None if typed or usual else False
    if usual or typed > sentence:
        return True
    if typed:
        return None
    if len(first) == 1:
        return _decide_by_texts(first[0], columns[0])
    unseen = [_unseen(*pair) for pair in pairs]
    chance = _together([*unseen, *(_shorter(*pair) for pair in pairs)])
    if sentence:
        return None if min(unseen) < 1 else False
    if any(map(_is_usual, first)):
        chance /= 10
    named = all(map(_like_a_name, filter(None, first)))
    return True if chance <= SURE and named else None


def _together(chances: Sequence[float]) -> float:
    """The chance that the product of so many p-values is as small (Fisher); 1 is none."""
    some = [chance for chance in chances if chance < 1]
    if not some:
        return 1.0
    product = math.prod(some)
    return product * sum((-math.log(product)) ** i / math.factorial(i) for i in range(len(some)))


def _decide_by_texts(cell: str, values: Sequence[str]) -> bool | None:
    """Of a file of texts alone, in which no class tells a header from a text."""
    words = sum(" " not in value for value in values)
    return False if " " in cell or 2 * words >= len(values) else None


def _is_example(cell: str, values: Sequence[str]) -> bool:
    """Whether a cell is of the same kind as the numbers or dates below it, or recurs below."""
    if cell.lower() in EMPTY_CELLS:
        return False
    kind = _kind(values)
    return _kind([cell]) == kind if kind else cell in values


def _is_name(cell: str, values: Sequence[str]) -> bool:
    """Whether a cell is a word above numbers or dates, or nothing above an index."""
    if cell == "":
        return _counts_up(values) or _counts_up([str(0), *values])
    return bool(_kind(values)) and not _kind([cell]) and cell.lower() not in EMPTY_CELLS


def _counts_up(values: Sequence[str]) -> bool:
    return len(values) > 1 and all(value == str(n) for n, value in enumerate(values))


def _kind(values: Sequence[str]) -> str:
    """number or date, if 19 cells in 20 of those that hold something are; "" if they are words."""
    kinds = Counter(_kind_of(value) for value in values if value.lower() not in EMPTY_CELLS)
    for kind in ("number", "date"):
        if kinds.total() and 20 * kinds[kind] >= 19 * kinds.total():
            return kind
    return ""


def _kind_of(cell: str) -> str:
    if re.fullmatch(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?", cell):
        return "date"
    try:
        float(cell.removesuffix("%").replace(",", ""))
    except ValueError:
        return ""
    return "number"


def _usual(first: Sequence[str]) -> bool:
    """Whether the cells are names, no two the same, and at least two of them, or the only one, are
    usual ones."""
    known = sum(map(_is_usual, first))
    names = [cell for cell in first if cell]
    return (
        known >= min(2, len(first))
        and len({*names}) == len(names)
        and all(map(_like_a_name, names))
    )


def _is_usual(cell: str) -> bool:
    pieces = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", cell)
    return (
        0 < len(pieces) < 4
        and cell.count(" ") < 2
        and any(one.lower() in USUAL for one in (pieces[0], pieces[-1]))
    )


def _like_a_name(cell: str) -> bool:
    return 0 < len(cell) <= 40 and len(cell.split()) <= 3 and not _sentence(cell)


def _sentence(cell: str) -> bool:
    words = len(cell.split())
    return words >= 6 or len(cell) > 60 or (words > 1 and cell.endswith((".", "!", "?", "…")))


def _unseen(cell: str, values: Sequence[str]) -> float:
    """The chance that an example has a class that no other has, 1 if the column is not of classes.

    Good and Turing: as often as there are classes of one row.
    """
    counts = Counter(values)
    if not values or 2 * len(counts) > len(values) or cell in counts or cell.lower() in EMPTY_CELLS:
        return 1.0
    return (sum(count == 1 for count in counts.values()) + 1) / (len(values) + 1)


def _shorter(cell: str, values: Sequence[str]) -> float:
    """The share of texts that are as short as the first, 1 if it is not clearly shorter: in a file
    that is sorted by length it is not half as long as those which follow it."""
    if not values or 2 * len({*values}) <= len(values):
        return 1.0
    if 2 * len(cell) > median(map(len, values[:50])):
        return 1.0
    return (sum(len(value) <= len(cell) for value in values) + 1) / (len(values) + 1)
