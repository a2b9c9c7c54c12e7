"""Reads opinions/NAME: sentences of film reviews and other texts that 20 people each rated.

read_opinions(name)  the texts with their labels and splits

The files come from `lora data fetch reviews`. A rating is the mean of numbers from -4 to 4. The
label is its sign, or, of opinions/rating, the rating itself. Sentences of one document, such as an
article, are in the same split.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora.errors import DataError
from lora.finetune.data.rows import read_rows
from lora.finetune.demo.fetch import path

HIGHEST = 4  # ratings are from -4 to 4
POLARITY = "Is this {} positive or negative?"
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class OpinionSet:
    """A data set under opinions/."""

    file: str  # a file of lora.finetune.demo.fetch
    about: str
    question: str  # what a language model is asked about a text
    rated: bool = False  # the label is the rating, not its sign

    @property
    def system(self) -> str:
        """The system prompt. It is shorter than the default of most models."""
        return f"Answer with {'a whole number' if self.rated else 'one word'}."


OPINIONS = {
    "films": OpinionSet(
        "films", "sentences of film reviews: positive or negative", POLARITY.format("film review")
    ),
    "amazon": OpinionSet(
        "amazon",
        "sentences of product reviews: positive or negative",
        POLARITY.format("sentence from a product review"),
    ),
    "tweets": OpinionSet("tweets", "tweets: positive or negative", POLARITY.format("tweet")),
    "editorials": OpinionSet(
        "editorials",
        "sentences of newspaper editorials: positive or negative",
        POLARITY.format("sentence from a newspaper editorial"),
    ),
    "rating": OpinionSet(
        "films",
        "sentences of film reviews with their ratings, from -4 to 4",
        "How positive is this film review, from -4 to 4?",
        rated=True,
    ),
}


@dataclass(frozen=True)
class Opinion:
    """A text with its label."""

    text: str
    label: str  # positive or negative, or a number
    answer: str  # the label as a language model should write it: a number is rounded
    split: str
    place: str  # "FILE, line N"


def read_opinions(name: str) -> list[Opinion]:
    """Returns the texts of opinions/NAME in a fixed order without a pattern.

    So the first N are a random sample: the files begin with the positive ones. A text that occurs
    twice is taken once, and where the sign is the label, a text with the rating 0 is left out.
    Raises DataError if there is no such data set, or its file is missing or damaged.
    """
    if name not in OPINIONS:
        raise DataError(f"there is no data set opinions/{name}. Known: {', '.join(OPINIONS)}.")
    chosen = OPINIONS[name]
    opinions, seen = [], set()
    for place, row in read_rows(path(chosen.file), headed=lambda path, cells: False):
        if isinstance(row, DataError):
            raise row
        text, rating, document = _rated_text(place, row)
        if text not in seen and (rating or chosen.rated):
            label = row["1"].strip() if chosen.rated else "positive" if rating > 0 else "negative"
            answer = str(round(rating)) if chosen.rated else label
            split = split_by_hash(text if document is None else f"{name} {document}")
            opinions.append(Opinion(text, label, answer, split, place))
        seen.add(text)
    return sorted(opinions, key=lambda opinion: _hash(opinion.text))


def _rated_text(place: str, row: Mapping[str, Any]) -> tuple[str, float, str | None]:
    """Returns text, rating and document of a row; None if the text is a document by itself.

    Raises DataError if the row is anything else than an id, a rating and a text.
    """
    if row.keys() != {"0", "1", "2"}:
        raise DataError(
            f"{place}: {len(row)} columns, but three were expected: id, rating and text. Run lora"
            " data fetch reviews."
        )
    number, rating, text = row["0"].strip(), row["1"].strip(), row["2"].strip()
    try:
        value = float(rating)
    except ValueError:
        value = math.nan
    if not abs(value) <= HIGHEST or not text:
        problem = f"rating {rating[:40]!r} is no number from -4 to 4" if text else "no text"
        raise DataError(f"{place}: {problem}. Run lora data fetch reviews.")
    document, mark, _ = number.partition("_")
    return text, value, document if mark else None


def split_by_hash(key: str) -> str:
    """Returns the split of a text or document: of ten, 7 are train, 1 is dev and 2 are test."""
    return {0: "dev", 1: "test", 2: "test"}.get(_hash(key) % 10, "train")


def _hash(text: str) -> int:
    """Returns a number that is the same on every system, unlike Python's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def same_word(prediction: str, answer: str) -> float:
    """Returns 1 if both are the same word, in any case and punctuation, else 0."""
    predicted, expected = (
        text.strip().strip(".,:;!?'\"*").lower() for text in (prediction, answer)
    )
    return float(predicted == expected)


def named_label(prediction: str, answer: str) -> float:
    """Returns 1 if, of the two labels, the answer's alone occurs in the prediction, else 0.

    It scores a model that was not trained on the task, which answers in a sentence.
    """
    words = re.findall("[a-z]+", prediction.lower())
    return float([label for label in LABELS if label in words] == [answer])


def within_one(prediction: str, answer: str) -> float:
    """Returns 1 if both are numbers that differ by at most 1, else 0."""
    try:
        return float(abs(float(prediction) - float(answer)) <= 1)
    except ValueError:
        return 0.0
