"""Small text tasks, made and not stored: generate("reverse", "train") -> prompts with answers.

    reverse: lanovir -> rivonal

A prompt is the task's name and what it is given: words of consonants and vowels in turn, numbers,
or a date, in ASCII. What is given belongs to one split by its hash, whatever the count and the
seed, so that nothing that a model is tested on was given to it in training, by any task.
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
    """1 where the texts are the same, but for space around them."""
    return float(prediction.strip() == answer.strip())


def number(prediction: str, answer: str) -> float:
    """1 where both are the same number, however it is written."""
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        return 0.0


def date(prediction: str, answer: str) -> float:
    """1 where day, month's name and year are the same, in any order: March 09, 1987."""
    found, wanted = (re.findall("[a-z]+|[1-9][0-9]*", t.lower()) for t in (prediction, answer))
    return float(sorted(found) == sorted(wanted))


def letters(prediction: str, answer: str) -> float:
    """The share of letters that stand in their place; what is too much counts as wrong."""
    found, wanted = prediction.strip(), answer.strip()
    right = sum(one == other for one, other in zip(found, wanted, strict=False))
    return right / max(len(found), len(wanted), 1)


@dataclass(frozen=True)
class Made:
    """How an example is drawn: what is given, and the answer to it."""

    draw: Callable[[random.Random], tuple[str, str]]
    about: str
    metric: Callable[[str, str], float] = exact
    """(prediction, answer) -> 0 to 1, beside exact match."""


def word(rng: random.Random, least: int = 3, most: int = 8) -> str:
    """Consonants and vowels in turn."""
    turn = rng.choice(((CONSONANTS, VOWELS), (VOWELS, CONSONANTS)))
    return "".join(rng.choice(turn[i % 2]) for i in range(rng.randint(least, most)))


def of_word(answer: Callable[[str], str]) -> Callable[[random.Random], tuple[str, str]]:
    """Given one word."""

    def draw(rng: random.Random) -> tuple[str, str]:
        given = word(rng)
        return given, answer(given)

    return draw


def of_words(
    answer: Callable[[list[str]], str], least: int, most: int
) -> Callable[[random.Random], tuple[str, str]]:
    """Given several short words."""

    def draw(rng: random.Random) -> tuple[str, str]:
        given = [word(rng, 2, 5) for _ in range(rng.randint(least, most))]
        return " ".join(given), answer(given)

    return draw


def of_letter(answer: Callable[[str, str], str]) -> Callable[[random.Random], tuple[str, str]]:
    """Given a word after one of its letters."""

    def draw(rng: random.Random) -> tuple[str, str]:
        given = word(rng)
        letter = rng.choice(given)
        return f"{letter} {given}", answer(letter, given)

    return draw


def of_numbers(answer: Callable[[int, int], int]) -> Callable[[random.Random], tuple[str, str]]:
    """Given two numbers of two digits, the larger one first."""

    def draw(rng: random.Random) -> tuple[str, str]:
        b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
        return f"{a} {b}", str(answer(a, b))

    return draw


def draw_replace(rng: random.Random) -> tuple[str, str]:
    given = word(rng)
    old, new = rng.choice(given), rng.choice(VOWELS + CONSONANTS)
    return f"{old} {new} {given}", given.replace(old, new)


def draw_date(rng: random.Random) -> tuple[str, str]:
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
    """So many different prompts, each with its answer: a pure function of its arguments.

    Raises DataError at an unknown task or split, and where there are not so many prompts.
    """
    for what, asked, known in (("task", name, MADE_TASKS), ("split", split, COUNTS)):
        if asked not in known:
            raise DataError(f"no built-in {what} {asked!r}. Known: {', '.join(known)}.")
    count = COUNTS[split] if count is None else count
    rng = random.Random(f"{name}:{split}:{seed}")
    found: dict[str, str] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        given, answer = MADE_TASKS[name].draw(rng)
        if split_of(given) == split:
            found[f"{name}: {given}"] = answer
    if len(found) < count:
        raise DataError(
            f"task {name!r}: {count:,} different prompts asked for split {split!r}, found"
            f" {len(found):,}. Ask for fewer."
        )
    return list(found.items())


def split_of(given: str) -> str:
    """One of 20 is dev, one is test."""
    return {0: "test", 1: "dev"}.get(zlib.crc32(given.encode()) % 20, "train")
