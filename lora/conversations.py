"""Conversations per split, from the formats that people have: read_conversations(...).

A row is recognised by its keys:

    messages                        OpenAI's: role and content
    conversations                   ShareGPT's: from and value
    instruction, instances          Self-Instruct's seed tasks: one conversation per instance
    instruction, input, output      Alpaca's; context and response are Dolly's names for the same
    question, answer                and prompt, response: one turn; system, system_prompt beside it
    prompt, completion              raw: one goes on where the other ends
    text                            raw, without a prompt

Rows stand in JSON lines, JSON, CSV, TSV, Parquet, on the hub, or in text files: a text per line, or
`meaning representation||reference` as in E2E. In tables a list of messages is JSON.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.columns import LABEL, TEXT
from lora.errors import DataError
from lora.rows import ENDINGS, SPLITS, BadRows, Row, read_rows, read_source, text_in

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}  # fmt: skip
ASKED = ("instruction", "prompt", "question", "input")
BESIDE = ("input", "context")
ANSWERED = ("output", "completion", "response", "answer")
SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant or tool
    content: str
    learned: bool = True  # False: an answer that is read and not learned, OpenAI's weight 0
    more: tuple[tuple[str, str], ...] = ()  # its other fields that a template may read, as JSON

    def has(self, name: str) -> bool:
        return any(name == key for key, _ in self.more)

    def fields(self) -> dict[str, Any]:
        """The message as a template reads it."""
        more = {name: json.loads(value) for name, value in self.more}
        if "reasoning_content" in more:  # another name for it, in gpt-oss's template
            more["thinking"] = more["reasoning_content"]
        return {"role": self.role, "content": self.content, **more}


@dataclass(frozen=True)
class Conversation:
    """What was said, the answer to learn or to score last."""

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    """The answers that count as right, without white space around them; none without a prompt."""
    task: str = ""  # the name of its data set
    place: str = ""  # "FILE, line N"
    raw: bool = False  # stands as it is, without a template
    given: str = ""  # what a template is given beside the messages, a JSON object: tools

    def content(self) -> tuple[Any, ...]:
        """All that a model sees of it, and its answers."""
        said = [(one.role, one.content, one.learned) for one in self.messages]
        return self.task, self.raw, said, self.references

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        answered = self.messages[-1].role == "assistant"
        return self.messages[:-1] if answered else self.messages


def read_conversations(
    source: str, task: str = "", bad: BadRows | None = None
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """The conversations of a file, a folder or a hub data set as train, dev and test, and what was
    decided on the user's behalf. Rows that are none are added to `bad`, which the caller judges
    when a template has added those that it refuses; without it they are an error.

    A file without a column `split` is cut 80/10/10, and every tenth of train held out where there
    is no dev; conversations with the same prompt stay together, or the answers to it would leak.
    Raises DataError with the file, the line and the remedy.
    """
    rows = BadRows() if bad is None else bad
    splits = _read_splits(source, task, rows)
    try:
        whole, notes = _in_three(source, splits)
    except DataError:  # too few rows, of which the broken ones are the reason
        rows.judge(left=False)
        raise
    if bad is None:
        rows.judge()
    return whole, notes


def _in_three(
    source: str, splits: dict[str, list[Conversation]]
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Train, dev and test, cut and held out if the source has none of its own; and notes."""
    notes = []
    if "" in splits:
        groups = _by_prompt(splits[""])
        if len(groups) < 3:
            raise DataError(
                f"--data {source}: {len(groups)} prompts cannot be cut in three. Add rows."
            )
        random.Random(0).shuffle(groups)
        tenth = max(1, len(groups) // 10)
        cut = {
            "test": groups[:tenth],
            "dev": groups[tenth : 2 * tenth],
            "train": groups[2 * tenth :],
        }
        splits = {name: [*itertools.chain(*some)] for name, some in cut.items()}
        notes.append(
            f"{source} has no column 'split': cut 80/10/10 by prompt into train, dev and test"
        )
    if splits.get("dev") and not splits.get("train"):  # as where the training file is not public
        splits["train"] = splits.pop("dev")
        notes.append(f"{source} has no train split: dev is learned from")
    if not splits.get("train"):
        raise DataError(
            f"--data {source} has no training rows, found {', '.join(splits) or 'nothing'}. Pass a"
            f" folder with train.jsonl, or another of {', '.join(ENDINGS)}."
        )
    if not splits.get("dev"):
        groups = _by_prompt(splits["train"])
        step = min(10, len(groups))
        if step < 2:
            raise DataError(
                f"--data {source}: too few prompts to hold one out as dev. Pass a dev split."
            )
        splits["dev"] = [*itertools.chain(*groups[step - 1 :: step])]
        del groups[step - 1 :: step]
        splits["train"] = [*itertools.chain(*groups)]
        notes.append(f"{source} has no dev split: every tenth training prompt is held out as dev")
    return {name: splits.get(name, []) for name in SPLITS}, notes


def read_split(
    source: str, task: str = "", split: str | None = None, bad: BadRows | None = None
) -> tuple[list[Conversation], str]:
    """Conversations to score a trained model on, and their split's name; `bad` as above.

    A file without a column `split` is scored whole, as test. A folder needs no train file.
    """
    rows = BadRows() if bad is None else bad
    splits = _read_splits(source, task, rows)
    if "" in splits:
        splits = {split or "test": splits[""]}
    there = [name for name in ([split] if split else ["test", "dev", "train"]) if splits.get(name)]
    if not there:
        rows.judge(left=False)
        raise DataError(f"--data {source} has no {split or ''} split, found {', '.join(splits)}.")
    if bad is None:
        rows.judge()
    return splits[there[0]], there[0]


def read_prompts(path: str, task: str = "", bad: BadRows | None = None) -> list[Conversation]:
    """The conversations of one file in its order, answered or not: what a model goes on from; `bad`
    as above."""
    rows = BadRows() if bad is None else bad
    found: list[Conversation] = []
    for place, row in read_rows(Path(path)):
        try:
            if isinstance(row, DataError):
                raise row
            found += from_row(row, place, task, answered=False)
        except DataError as error:
            rows.add(error, place)
    if bad is None or not found:
        rows.judge(left=bool(found))
    if not found:
        raise DataError(f"{path} has no rows.")
    return found


def holds_conversations(source: str) -> bool:
    """Whether a data set's first row is one to converse by: what `--task auto` goes by."""
    rows = (row for _, _, row in read_source(source))
    return conversational(next((row for row in rows if not isinstance(row, DataError)), {}))


def conversational(row: Row) -> bool:
    """Whether a row is a conversation by its keys. A text alone may be of any task."""
    # A question and an answer to classify, or to rate.
    labelled = "label" in row or "labels" in row or bool({*LABEL} & {*row} and {*TEXT} & {*row})
    form = _form(row)
    return form is not None and form != "text" and not (form == "pair" and labelled)


def grouped(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Those with the same prompt as one, its references the answers of all, in first-seen order."""
    found: dict[object, Conversation] = {}
    for one in conversations:
        key = (one.task, one.raw, one.prompt) if one.prompt else len(found)
        seen = found.get(key)
        joined = one if seen is None else replace(seen, references=seen.references + one.references)
        found[key] = joined
    return list(found.values())


def _by_prompt(conversations: Iterable[Conversation]) -> list[list[Conversation]]:
    found: dict[object, list[Conversation]] = {}
    for one in conversations:
        found.setdefault(one.prompt or one.messages, []).append(one)
    return list(found.values())


def _read_splits(source: str, task: str, bad: BadRows) -> dict[str, list[Conversation]]:
    """Conversations by split; "" holds the rows of a file that names none."""
    splits: dict[str, list[Conversation]] = {}
    for split, place, row in read_source(source):
        try:
            if isinstance(row, DataError):
                raise row
            splits.setdefault(split, []).extend(from_row(row, place, task))
        except DataError as error:
            bad.add(error, place)
    if len(splits) > 1:
        for one in splits.pop("", ()):
            lacking = f"{one.place}: no split, where other rows have one. Fill it in."
            bad.add(DataError(lacking), one.place)
    return splits


def from_row(row: Row, place: str, task: str = "", answered: bool = True) -> list[Conversation]:
    """The conversations of one row; without `answered` their answers may be missing.

    Raises DataError with the place: keys that are of no format, an unknown role, no messages, a
    last one that is not the assistant's, an empty answer.
    """
    try:
        return [_checked(one, place, task, answered) for one in _read_row(row, answered)]
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _form(row: Row, answered: bool = True) -> str | None:
    if _listed(row.get("messages")) is not None:
        return "messages"
    if _listed(row.get("conversations")) is not None:
        return "conversations"
    if "instruction" in row and _listed(row.get("instances")) is not None:
        return "instances"
    if _first(ASKED, row) and (row.keys() & set(ANSWERED) or not answered):
        return "pair"
    return "text" if "text" in row else None


def _read_row(row: Row, answered: bool) -> Iterator[Conversation]:
    form = _form(row, answered)
    if form is None:
        raise DataError(
            f"no conversation among {', '.join(map(str, row)) or 'no keys'}. Known: messages;"
            " conversations; instruction, input, output; prompt, completion; text."
        )
    if form == "instances":
        instances = _listed(row["instances"])
        if not instances:
            raise DataError("no instances.")
        for instance in instances:
            if not isinstance(instance, dict):
                raise DataError(f"an instance is a {type(instance).__name__}, not an object.")
            yield from _pair({"instruction": row["instruction"], **instance}, answered)
    elif form == "pair":
        yield from _pair(row, answered)
    elif form == "text":
        role = "assistant" if answered else "user"
        yield Conversation((Message(role, _text(row, "text")),), raw=True)
    else:
        yield Conversation(_beside(row, _turns(row[form])))


def _pair(row: Row, answered: bool) -> Iterator[Conversation]:
    """One question and its answer, or several turns of each in lists of messages."""
    ask, answer = _first(ASKED, row), _first(ANSWERED, row)
    assert ask is not None
    if answer is None and answered:
        raise DataError(f"{ask} without {' or '.join(name for name in ANSWERED if name in row)}.")
    if asked := _listed(row[ask]):
        yield Conversation(_beside(row, _turns(asked) + (_turns(row[answer]) if answer else ())))
        return
    said = () if answer is None else (Message("assistant", _text(row, answer)),)
    if ask == "prompt" and answer in ("completion", None):
        prompt = _text(row, ask)
        yield Conversation((Message("user", prompt), *said) if prompt else said, raw=True)
        return
    more = _first(BESIDE, row) if ask != "input" else None
    parts = [_text(row, ask), _text(row, more) if more else ""]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise DataError(f"an empty {ask}.")
    yield Conversation(_beside(row, (Message("user", question), *said)))


def _beside(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind the system's, where that has a column of its own."""
    name = _first(SYSTEM, row)
    system = _text(row, name) if name else ""
    there = any(message.role == "system" for message in messages)
    return messages if there or not system.strip() else (Message("system", system), *messages)


def _turns(value: Any) -> tuple[Message, ...]:
    return tuple(_turn(turn, number) for number, turn in enumerate(_listed(value) or (), 1))


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"message {number} is a {type(turn).__name__}, not an object.")
    said = turn.get("role", turn.get("from"))
    if not isinstance(said, str) or said not in ROLES:
        raise DataError(f"message {number} has the role {said!r}, none of {', '.join(ROLES)}.")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise DataError(f"message {number} calls a tool: only texts can be learned.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                raise DataError(f"message {number} has a part that is no text: {str(part)[:40]}.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"message {number} has no text, found {type(content).__name__}.")
    return Message(ROLES[said], content, turn.get("weight") != 0)


def _checked(one: Conversation, place: str, task: str, answered: bool) -> Conversation:
    """The conversation with its place and references. Raises DataError where it is none."""
    messages = one.messages
    if not any(message.role in ("user", "assistant") for message in messages):
        raise DataError("an empty conversation.")
    if answered and messages[-1].role != "assistant":
        raise DataError(f"the last message is the {messages[-1].role}'s, and not the assistant's.")
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"an empty answer, message {number}.")
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{error.reason}: half of a character pair.") from None
    scored = messages[-1].role == "assistant" and one.prompt
    references = (messages[-1].content.strip(),) if scored else ()
    return replace(one, place=place, task=task, references=references)


def _first(names: Sequence[str], row: Row) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _listed(value: Any) -> list[Any] | None:
    """A list, also where a table holds it as JSON; None for all else.

    A text is taken for one only where it holds turns or instances: `[3, 1, 2]` may be a prompt.
    """
    if isinstance(value, DataError):  # a cell that could not be read
        raise value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not all(
            isinstance(one, dict) and one.keys() & {"role", "from", "output"} for one in value
        ):
            return None
    return value if isinstance(value, list) else None


def _text(row: Row, name: str) -> str:
    if isinstance(row[name], bool):
        raise DataError(f"{name} is no text, found bool.")
    return text_in(row, name)
