"""Generates small text tasks: generate("reverse", "train") -> prompts with answers.

    reverse: lanovir -> rivonal

A prompt is the task's name and an input: words of alternating consonants and vowels, numbers, or a
date, in ASCII. The hash of an input decides its split, whatever the count and the seed. So no input
of the test split occurs in training, in any task.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from lora.errors import DataError

COUNTS = {"train": 2000, "dev": 100, "test": 100}

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip


def exact(prediction: str, answer: str) -> float:
    """Returns 1 if the texts are equal after stripping white space, else 0."""
    return float(prediction.strip() == answer.strip())


def number(prediction: str, answer: str) -> float:
    """Returns 1 if both are the same number, in any notation, else 0."""
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        return 0.0


def date(prediction: str, answer: str) -> float:
    """Returns 1 if day, name of the month and year are the same in any order, else 0."""
    predicted, expected = (
        re.findall("[a-z]+|[1-9][0-9]*", text.lower()) for text in (prediction, answer)
    )
    return float(sorted(predicted) == sorted(expected))


def letters(prediction: str, answer: str) -> float:
    """Returns the share of letters at the right position. Extra letters count as wrong."""
    predicted, expected = prediction.strip(), answer.strip()
    right = sum(letter == other for letter, other in zip(predicted, expected, strict=False))
    return right / max(len(predicted), len(expected), 1)


@dataclass(frozen=True)
class Made:
    """A generated task: how to draw an input with its answer, and how to score a prediction."""

    draw: Callable[[random.Random], tuple[str, str]]
    about: str
    metric: Callable[[str, str], float] = exact
    """(prediction, answer) -> 0 to 1, reported beside exact match."""


def word(rng: random.Random, least: int = 3, most: int = 8) -> str:
    """Returns a word of alternating consonants and vowels."""
    turn = rng.choice(((CONSONANTS, VOWELS), (VOWELS, CONSONANTS)))
    return "".join(rng.choice(turn[i % 2]) for i in range(rng.randint(least, most)))


def of_word(answer: Callable[[str], str]) -> Callable[[random.Random], tuple[str, str]]:
    """Returns a draw whose input is a word."""

    def draw(rng: random.Random) -> tuple[str, str]:
        text = word(rng)
        return text, answer(text)

    return draw


def of_words(
    answer: Callable[[list[str]], str], least: int, most: int
) -> Callable[[random.Random], tuple[str, str]]:
    """Returns a draw whose input is several short words."""

    def draw(rng: random.Random) -> tuple[str, str]:
        words = [word(rng, 2, 5) for _ in range(rng.randint(least, most))]
        return " ".join(words), answer(words)

    return draw


def of_letter(answer: Callable[[str, str], str]) -> Callable[[random.Random], tuple[str, str]]:
    """Returns a draw whose input is one letter of a word, then the word."""

    def draw(rng: random.Random) -> tuple[str, str]:
        text = word(rng)
        letter = rng.choice(text)
        return f"{letter} {text}", answer(letter, text)

    return draw


def of_numbers(answer: Callable[[int, int], int]) -> Callable[[random.Random], tuple[str, str]]:
    """Returns a draw whose input is two numbers of two digits, the larger first."""

    def draw(rng: random.Random) -> tuple[str, str]:
        b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
        return f"{a} {b}", str(answer(a, b))

    return draw


def draw_replace(rng: random.Random) -> tuple[str, str]:
    """Draws an old letter, a new letter and a word. The answer has the new letter for the old."""
    text = word(rng)
    old, new = rng.choice(text), rng.choice(VOWELS + CONSONANTS)
    return f"{old} {new} {text}", text.replace(old, new)


def draw_date(rng: random.Random) -> tuple[str, str]:
    """Draws a date such as 1987-03-09. The answer is 9 March 1987."""
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    return f"{year}-{month:02}-{day:02}", f"{day} {MONTHS[month - 1]} {year}"


MADE_TASKS = {
    "copy": Made(of_word(str), "the word as it stands"),
    "uppercase": Made(of_word(str.upper), "the word in capitals"),
    "capital": Made(of_word(str.capitalize), "the word with a capital at its head"),
    "first": Made(of_word(lambda w: w[0]), "the word's first letter"),
    "last": Made(of_word(lambda w: w[-1]), "the word's last letter"),
    "length": Made(of_word(lambda w: str(len(w))), "how many letters the word has", number),
    "reverse": Made(of_word(lambda w: w[::-1]), "the word from its end to its start", letters),
    "shout": Made(of_word(lambda w: w[::-1].upper()), "the word reversed and in capitals", letters),
    "sort": Made(of_word(lambda w: "".join(sorted(w))), "its letters in order", letters),
    "double": Made(of_word(lambda w: "".join(2 * c for c in w)), "each letter twice", letters),
    "spell": Made(of_word("-".join), "a hyphen between the letters", letters),
    "twice": Made(of_word(lambda w: f"{w} {w}"), "the word two times", letters),
    "rotate": Made(of_word(lambda w: w[1:] + w[0]), "the first letter moved to the end", letters),
    "vowels": Made(of_word(lambda w: "".join(c for c in w if c in VOWELS)), "its vowels only"),
    "swap": Made(of_words(lambda ws: " ".join(ws[::-1]), 2, 2), "two words in the other order"),
    "initials": Made(of_words(lambda ws: "".join(w[0] for w in ws), 2, 4), "their first letters"),
    "count": Made(of_letter(lambda c, w: str(w.count(c))), "how often the letter occurs", number),
    "delete": Made(of_letter(lambda c, w: w.replace(c, "")), "the word without a letter", letters),
    "replace": Made(draw_replace, "the word with one letter put for another", letters),
    "add": Made(of_numbers(int.__add__), "the sum of two numbers", number),
    "subtract": Made(of_numbers(int.__sub__), "the larger number less the other", number),
    "date": Made(draw_date, "a date in words", date),
}  # fmt: skip


def generate(
    name: str, split: str = "train", count: int | None = None, seed: int = 0
) -> list[tuple[str, str]]:
    """Returns `count` different prompts with their answers: a pure function of its arguments.

    Raises DataError if the task or split is unknown, or has fewer different prompts.
    """
    for what, asked, known in (("task", name, MADE_TASKS), ("split", split, COUNTS)):
        if asked not in known:
            raise DataError(f"no built-in {what} {asked!r}. Known: {', '.join(known)}.")
    count = COUNTS[split] if count is None else count
    rng = random.Random(f"{name}:{split}:{seed}")
    answers: dict[str, str] = {}
    for _ in range(100 * count):  # dev and test take 1 draw in 20 each
        if len(answers) == count:
            break
        text, answer = MADE_TASKS[name].draw(rng)
        if split_of(text) == split:
            answers[f"{name}: {text}"] = answer
    if len(answers) < count:
        raise DataError(
            f"task {name!r}: {count:,} different prompts asked for split {split!r}, found"
            f" {len(answers):,}. Ask for fewer."
        )
    return list(answers.items())


def split_of(text: str) -> str:
    """Returns the split of an input by its hash: 1 of 20 is dev, 1 test, the others train."""
    return {0: "test", 1: "dev"}.get(zlib.crc32(text.encode()) % 20, "train")
