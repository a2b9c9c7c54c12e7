"""Names the data sets that need no file of the user's: demo, opinions/NAME and tasks/NAME.

resolved(source)         `demo` replaced by the data set that it means here
rows_with_text(place)    rows with a text and a label, or those of the user's file
included_texts(place)    conversations: a prompt and its answer
listing()                every included data set, with its licence and source
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.card import BUILT_IN
from lora.errors import DataError
from lora.finetune import demo
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.messages import Message
from lora.finetune.data.opinions import OPINIONS, named_label, read_opinions, same_word, within_one
from lora.finetune.data.rows import SPLITS, Headed, Read, read_source
from lora.finetune.demo import tasks
from lora.finetune.demo.fetch import PACKAGES, is_here

DEMO, TINY = "demo", "demo-tiny"
MADE = "tasks/"  # the prefix of a data set that lora.finetune.demo.tasks generates
RATED = "opinions/"  # the prefix of a data set in lora.finetune.data.opinions
FILMS = f"{RATED}films"
STAND_IN = (
    f"NOT REAL REVIEWS: the film reviews have not been downloaded, so --data {DEMO} is {TINY},"
    " 1,000 sentences written for this project. Run lora data fetch reviews"
)
"""The note for a user whose `demo` is the stand-in."""


def is_included(place: str) -> bool:
    """True if a data set needs no file of the user's."""
    return place in (DEMO, TINY) or place.startswith((MADE, RATED))


def resolved(source: str) -> str:
    """Returns a --data entry, SOURCE or NAME=SOURCE, with `demo` replaced by what it means.

    It means the film reviews if they have been downloaded, and the stand-in if not. A run records
    the result, so that it resumes and is evaluated on the same data.
    """
    prefix = source.removesuffix(DEMO)
    if source != DEMO and (prefix == source or not prefix.endswith("=")):
        return source
    return prefix + (FILMS if is_here("films") else TINY)


def named(source: str) -> tuple[str, str]:
    """Returns name and path of one --data entry: NAME=PATH, or the path's last part as the name."""
    name, sign, place = source.partition("=")
    if sign and place and re.fullmatch(r"[\w.-]+", name) and not os.path.exists(source):
        return name, place
    return Path(source).stem if Path(source).suffix else Path(source).name, source


def absolute_source(source: str) -> str:
    """Returns a base or a --data entry with an absolute path if it is a file or folder."""
    _, place = named(source)
    if place in BUILT_IN or not os.path.exists(place):
        return source
    return source.removesuffix(place) + str(Path(place).resolve())


def recorded_source(source: str) -> str:
    """Returns a --data entry as a run records it: it means the same in any folder, later too."""
    _, place = named(source)
    return resolved(source) if is_included(place) else absolute_source(source)


def resolved_with_note(source: str) -> tuple[str, list[str]]:
    """Returns the data set that a --data entry means, and a note if it is the stand-in."""
    meant = resolved(source)
    return meant, [STAND_IN] if source != meant and meant.endswith(TINY) else []


def rows_with_text(
    source: str, headed: Headed = lambda path, cells: True
) -> Iterator[tuple[str, str, Read]]:
    """Yields (split, place, row) of an included data set or of the user's, as read_source does."""
    if not source.startswith(RATED):
        yield from read_source(str(demo.REVIEWS) if source == TINY else source, headed)
        return
    for opinion in read_opinions(source.removeprefix(RATED)):
        yield opinion.split, opinion.place, {"text": opinion.text, "label": opinion.label}


def included_texts(place: str, name: str) -> dict[str, list[Conversation]]:
    """Returns the conversations of each split of a data set, which the user calls `name`.

    Raises DataError if it has no prompts and answers.
    """
    if place.startswith(MADE):
        return {split: _generated(place, name, split) for split in SPLITS}
    if not place.startswith(RATED):
        raise DataError(
            f"--data {place} has no prompts and answers. Run lora data fetch reviews, and pass"
            f" --data {FILMS}."
        )
    asked = place.removeprefix(RATED)
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    for opinion in read_opinions(asked):
        prompt = f"{OPINIONS[asked].question}\n\n{opinion.text}"
        system = Message("system", OPINIONS[asked].system)
        splits[opinion.split].append(
            _conversation(prompt, opinion.answer, name, opinion.place, system)
        )
    return splits


def _generated(place: str, name: str, split: str) -> list[Conversation]:
    """Returns the conversations of a split of a generated task."""
    pairs = tasks.generate(place.removeprefix(MADE), split)
    return [
        _conversation(prompt, answer, name, f"{place}, {split} {number}")
        for number, (prompt, answer) in enumerate(pairs, 1)
    ]


def _conversation(
    prompt: str, answer: str, name: str, place: str, *before: Message
) -> Conversation:
    messages = (*before, Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, (answer,), name, place)


def answer_metrics(place: str) -> Mapping[str, Callable[[str, str], float]]:
    """Returns the metrics of an included data set's answers: (prediction, answer) -> 0 to 1.

    exact_match replaces the usual one, which ignores the sign of a number. Empty for other data.
    """
    if place.startswith(MADE):
        metric = tasks.MADE_TASKS[place.removeprefix(MADE)].metric
        others = {} if metric is tasks.exact else {metric.__name__: metric}
        return {"exact_match": tasks.exact, **others}
    if place.startswith(RATED):
        if OPINIONS[place.removeprefix(RATED)].rated:
            return {"exact_match": tasks.exact, "within_one": within_one}
        return {"exact_match": same_word, "named_label": named_label}
    return {}


def metrics_of_answers(
    sources: Sequence[str],
) -> dict[str, Mapping[str, Callable[[str, str], float]]]:
    """Returns the metrics of each included data set by name: (prediction, answer) -> 0 to 1."""
    metrics = {name: answer_metrics(place) for name, place in map(named, sources)}
    return {name: each for name, each in metrics.items() if each}


def common_metrics(own: Mapping[str, Mapping[str, Any]], group: Iterable[str]) -> list[str]:
    """Returns the metrics of metrics_of_answers() that all data sets of a group define, by name."""
    return sorted(set.intersection(*(set(own.get(name, ())) for name in group)))


def listing() -> str:
    """Returns a line for each included data set, and the licence and source of the downloads."""
    lines = {
        DEMO: f"the default of --data: {FILMS} if downloaded, else {TINY}",
        TINY: "1,000 sentences of film reviews written for this project (Apache-2.0)",
        **{f"{RATED}{name}": each.about for name, each in OPINIONS.items()},
        f"{MADE}NAME": "generated prompts and answers; lora data tasks lists them",
    }
    reviews = PACKAGES["reviews"]
    return "\n".join(
        [
            "included data sets:",
            *(f"  {name:<20} {about}" for name, about in lines.items()),
            "Before you use opinions/..., run once: lora data fetch reviews. 20 people rated each",
            "text from -4 to 4. The label is the sign of the mean; in opinions/rating, the mean.",
            f"Source: the package {reviews.name} {reviews.version}, licence {reviews.licence}.",
            f"Cite: {reviews.citation}.",
        ]
    )
