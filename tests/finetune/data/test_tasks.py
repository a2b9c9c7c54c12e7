"""The built-in text tasks: answers that can be checked by hand, splits that never meet."""

from __future__ import annotations

import random

import pytest

from lora.errors import DataError
from lora.finetune.demo.tasks import (
    COUNTS,
    MADE_TASKS,
    date,
    exact,
    generate,
    letters,
    number,
    split_of,
)

BY_HAND = {
    "copy": "lanovir",
    "uppercase": "LANOVIR",
    "capital": "Lanovir",
    "first": "l",
    "last": "r",
    "length": "7",
    "reverse": "rivonal",
    "shout": "RIVONAL",
    "sort": "ailnorv",
    "double": "llaannoovviirr",
    "spell": "l-a-n-o-v-i-r",
    "twice": "lanovir lanovir",
    "rotate": "anovirl",
    "vowels": "aoi",
}


class Scripted(random.Random):
    """Draws what the test says, in its order."""

    def __init__(self, *drawn: object) -> None:
        super().__init__(0)
        self.drawn = list(drawn)

    def choice(self, among):  # type: ignore[no-untyped-def]
        return self.drawn.pop(0)

    def randint(self, least, most):  # type: ignore[no-untyped-def]
        return self.drawn.pop(0)


def spoken(word: str) -> list[object]:
    """What word() draws to come to a word."""
    return [("", ""), len(word), *word]


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_of_a_word(name: str) -> None:
    assert MADE_TASKS[name].draw(Scripted(*spoken("lanovir"))) == ("lanovir", BY_HAND[name])


def test_of_several_things() -> None:
    two = [2, *spoken("red"), *spoken("ape")]
    banana = spoken("banana")
    wanted = {
        "swap": (two, "red ape", "ape red"),
        "initials": (two, "red ape", "ra"),
        "count": ([*banana, "a"], "a banana", "3"),
        "delete": ([*banana, "a"], "a banana", "bnn"),
        "replace": ([*banana, "a", "o"], "a o banana", "bonono"),
        "add": ([17, 85], "85 17", "102"),
        "subtract": ([17, 85], "85 17", "68"),
        "date": ([1987, 3, 9], "1987-03-09", "9 March 1987"),
    }
    assert set(wanted) | set(BY_HAND) == set(MADE_TASKS)
    for name, (drawn, given, answer) in wanted.items():
        assert MADE_TASKS[name].draw(Scripted(*drawn)) == (given, answer)


@pytest.mark.parametrize("name", list(MADE_TASKS))
def test_splits_are_full_and_never_meet(name: str) -> None:
    splits = {split: generate(name, split) for split in COUNTS}
    others = generate(name, "train", seed=1)
    prompts = {split: {prompt for prompt, _ in rows} for split, rows in splits.items()}
    for split, count in COUNTS.items():
        assert len(splits[split]) == len(prompts[split]) == count
        for other in set(COUNTS) - {split}:
            assert not prompts[split] & prompts[other]
    assert not prompts["test"] & {prompt for prompt, _ in others}
    for prompt, answer in splits["test"]:
        task, _, given = prompt.partition(": ")
        assert task == name
        assert split_of(given) == "test"
        assert (prompt + answer).isascii()
        assert len(prompt) <= 32
        assert MADE_TASKS[name].metric(f" {answer}\n", answer) == exact(answer, answer) == 1
        assert MADE_TASKS[name].metric(answer + "9", answer) < 1


def test_a_function_of_its_arguments() -> None:
    assert generate("sort", "dev", 10, 3) == generate("sort", "dev", 10, 3)
    assert generate("sort", "dev", 10, 3) == generate("sort", "dev", 20, 3)[:10]
    assert generate("sort", "dev", 10, 3) != generate("sort", "dev", 10, 4)
    assert generate("copy", "dev", 10)[0][0] == "copy: tufugup"


def test_metrics() -> None:
    assert number("42.0", "42") == 1
    assert number("forty-two", "42") == number("", "42") == number("43", "42") == 0
    assert date("March 09, 1987", "9 March 1987") == 1
    assert date("9 May 1987", "9 March 1987") == date("9 March 1988", "9 March 1987") == 0
    assert letters("lano", "lanovir") == 4 / 7
    assert letters("lanovirs", "lanovir") == 7 / 8
    assert exact("Lanovir", "lanovir") == 0


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="no built-in task 'revers'. Known: copy, uppercase, "):
        generate("revers")
    with pytest.raises(DataError, match="no built-in split 'valid'. Known: train, dev, test."):
        generate("copy", "valid")
    with pytest.raises(DataError, match="task 'add': 9,999 different prompts asked for split 'tr"):
        generate("add", "train", 9999)
