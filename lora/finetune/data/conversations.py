"""Conversations per split, from the formats that people have: read_conversations(...).

A row is recognised by its keys:

    messages                        OpenAI's: role and content
    conversations                   ShareGPT's: from and value
    instruction, instances          Self-Instruct's seed tasks: one conversation per instance
    instruction, input, output      Alpaca's; context and response are Dolly's names for the same
    question, answer                and prompt, response: one turn; system, system_prompt beside it
    prompt, completion              raw: one goes on where the other ends
    text                            raw, without a prompt

Beside a conversation: `tools`, `documents` and `chat_template_kwargs` are given to the template,
and of a message `reasoning_content`, `tool_calls`, `tool_call_id` and `name`. An answer is not
learned if a mask of its own says so: `weight` 0, `train` false, `loss_mask` 0. What would change
what is to be learned and cannot be honoured is refused by name; other fields are listed as unread.

Rows stand in JSON lines, JSON, CSV, TSV, Parquet, on the hub, or in text files: a text per line, or
`meaning representation||reference` as in E2E. In tables a list of messages is JSON.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora.errors import DataError
from lora.finetune.data.columns import LABEL, TEXT
from lora.finetune.data.rows import ENDINGS, SPLITS, BadRows, Row, read_rows, read_source, text_in

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
GIVEN = ("tools", "documents", "chat_template_kwargs")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
PASSED_ON = ("tool_call_id", "name")
# Of a message: it is learned if they are 1 or true.
MASKS = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask")
ROW_MASKS = ("weight", "train", "trainable", "loss_mask")
HIDDEN = "masked"  # torchtune's, the other way round
REFUSED = {
    "function_call": "write tool_calls",
    "functions": "write tools",
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), "answers are learned whole"),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "only texts can be learned"
    ),
    "refusal": "write it as content",
}  # fmt: skip
"""Fields that change what is to be learned, and what to do about them."""
TURN = {"role", "from", "content", "value", *THOUGHTS, "tool_calls", *PASSED_ON, *MASKS, HIDDEN}


@dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant or tool
    content: str
    learned: bool = True  # False: an answer that is read and not learned, OpenAI's weight 0
    more: tuple[tuple[str, str], ...] = ()  # its other fields that a template may read, as JSON

    def has(self, name: str) -> bool:
        return any(name == key for key, _ in self.more)

    def fields(self) -> dict[str, Any]:
        """The message as its row has it, under the names that templates know."""
        more = {name: json.loads(value) for name, value in self.more}
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
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # fields of its row

    def content(self) -> tuple[Any, ...]:
        """All that a model sees of it, and its answers."""
        said = [
            (one.role, one.content, one.learned, *([one.more] if one.more else []))
            for one in self.messages
        ]
        return self.task, self.raw, said, self.references, *([self.given] if self.given else [])

    @property
    def thoughts(self) -> list[str]:
        """The reasoning of its answers."""
        more = [dict(message.more) for message in self.messages]
        return [json.loads(one["reasoning_content"]) for one in more if "reasoning_content" in one]

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
    splits = _conversation_splits(source, task, rows)
    try:
        whole, notes = _in_three(source, splits)
    except DataError:  # too few rows, of which the broken ones are the reason
        rows.judge(left=False)
        raise
    if bad is None:
        rows.judge()
    read = itertools.chain.from_iterable(splits.values())
    if unread := sorted(frozenset().union(*(one.unread for one in read))):
        notes.append(f"{source} has fields that are not read: {', '.join(unread)}")
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


def read_one_split(
    source: str, task: str = "", split: str | None = None, bad: BadRows | None = None
) -> tuple[list[Conversation], str]:
    """Conversations to score a trained model on, and their split's name; `bad` as above.

    A file without a column `split` is scored whole, as test. A folder needs no train file.
    """
    rows = BadRows() if bad is None else bad
    splits = _conversation_splits(source, task, rows)
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
        key = (one.task, one.raw, one.prompt, one.given) if one.prompt else len(found)
        seen = found.get(key)
        joined = one if seen is None else replace(seen, references=seen.references + one.references)
        found[key] = joined
    return list(found.values())


def _by_prompt(conversations: Iterable[Conversation]) -> list[list[Conversation]]:
    found: dict[object, list[Conversation]] = {}
    for one in conversations:
        found.setdefault(one.prompt or one.messages, []).append(one)
    return list(found.values())


def _conversation_splits(source: str, task: str, bad: BadRows) -> dict[str, list[Conversation]]:
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

    Raises DataError with the place: keys that are of no format, fields that cannot be honoured, an
    unknown role, no messages, a last one that is not the assistant's, an empty answer.
    """
    try:
        _check_fields(row)
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
    if _first_name(ASKED, row) and (row.keys() & set(ANSWERED) or not answered):
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
        rest = {name: value for name, value in row.items() if name != "instances"}
        for instance in instances:
            if not isinstance(instance, dict):
                raise DataError(f"an instance is a {type(instance).__name__}, not an object.")
            yield from _pair({**rest, **instance}, answered)
    elif form == "pair":
        yield from _pair(row, answered)
    elif form == "text":
        role = "assistant" if answered else "user"
        yield _made(row, (Message(role, _text(row, "text")),), ["text"], raw=True)
    else:
        yield _made(row, _turns(row[form]), [form])


def _pair(row: Row, answered: bool) -> Iterator[Conversation]:
    """One question and its answer, or several turns of each in lists of messages."""
    ask, answer = _first_name(ASKED, row), _first_name(ANSWERED, row)
    if ask is None:
        raise DataError(f"none of {', '.join(ASKED)} has a text.")
    if answer is None and answered:
        raise DataError(f"{ask} without {' or '.join(name for name in ANSWERED if name in row)}.")
    used = [ask, answer or ""]
    if asked := _listed(row[ask]):
        turns = _turns(asked) + (_turns(row[answer]) if answer else ())
        yield _made(row, turns, used)
        return
    said = () if answer is None else (Message("assistant", _text(row, answer)),)
    raw = ask == "prompt" and answer in ("completion", None)
    more = None if raw or ask == "input" else _first_name(BESIDE, row)
    used.append(more or "")
    names = dict.fromkeys((*ASKED, *BESIDE, *ANSWERED, *(SYSTEM if raw else ())))
    others = [name for name in names if name not in used and row.get(name) not in (None, "")]
    if others:
        raise DataError(
            f"{' and '.join(name for name in used if name)} are read, and {others[0]} is not."
            " Remove it, or join it with what it belongs to."
        )
    if raw:
        prompt = _text(row, ask)
        yield _made(row, (Message("user", prompt), *said) if prompt else said, used, raw=True)
        return
    parts = [_text(row, ask), _text(row, more) if more else ""]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise DataError(f"an empty {ask}.")
    before = _history(row)
    used.append("history")
    yield _made(row, (*before, Message("user", question), *said), used)


def _history(row: Row) -> tuple[Message, ...]:
    """The turns before an Alpaca row's own, [question, answer] each."""
    value = row.get("history") or []
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    messages: list[Message] = []
    for pair in value if isinstance(value, list) else [value] if value else ():
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise DataError("history is no list of [question, answer].")
        messages += Message("user", pair[0]), Message("assistant", pair[1])
    return tuple(messages)


def _made(
    row: Row, messages: tuple[Message, ...], used: Sequence[str], raw: bool = False
) -> Conversation:
    """The conversation of a row of which these columns are used, with what its other columns say
    beside it: the system's message, and what the template is given."""
    names, given = {*used, "split", *ROW_MASKS}, ""
    if not raw:
        messages, given = _after_system(row, messages), _given_json(row)
        names |= {*SYSTEM, *GIVEN}
    turns = [
        turn for name in used for turn in _listed(row.get(name)) or () if isinstance(turn, dict)
    ]
    inner = {name for turn in turns for name in turn if turn[name] is not None} - TURN
    unread = {str(name) for name in row if name not in names}
    unread |= {f"{name} of messages" for name in inner}
    return Conversation(messages, raw=raw, given=given, unread=frozenset(unread))


def _check_fields(row: Row, where: str = "") -> None:
    """Raise DataError for a field of a row or a message that cannot be honoured."""
    for name, way in REFUSED.items():
        if row.get(name):
            raise DataError(f"{where}{name} cannot be honoured: {way}, or remove it.")
    if not where:
        for name in ROW_MASKS:
            if row.get(name) is not None and not _learned(row, name):
                raise DataError(f"{name} {row[name]!r} of a row. Remove the row, or {name}.")
        if row.get("label") is False:  # an answer that is not wanted, in TRL's unpaired preferences
            raise DataError("label false: the answer is not to be learned. Remove the row.")


def _learned(fields: Row, name: str) -> bool:
    """What a mask says. Raises DataError if it is neither 0 nor 1."""
    value = fields[name]
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        value = json.loads(value.lower())
    if value not in (0, 1) or not isinstance(value, int | float):
        raise DataError(f"{name} {str(value)[:40]!r}: an answer is learned, 1, or not, 0.")
    return bool(value) != (name == HIDDEN)


def _after_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind the system's, if that has a column of its own."""
    systems = {_text(row, name) for name in SYSTEM if row.get(name) is not None}
    systems = {text for text in systems if text.strip()}
    inside = {message.content for message in messages if message.role == "system"}
    if len(systems) > 1 or (inside and systems - inside):
        raise DataError("two system prompts that differ. Remove one.")
    first = tuple(Message("system", text) for text in systems if not inside)
    return (*first, *messages)


def _given_json(row: Row) -> str:
    """What a template is given beside the messages, as JSON; "" if that is nothing."""
    found: dict[str, Any] = {}
    for name in GIVEN:
        value, kind = _parsed(row.get(name)), dict if name == "chat_template_kwargs" else list
        if not value:
            continue
        if not isinstance(value, kind):
            raise DataError(f"{name} is a {type(value).__name__}, not a {kind.__name__}.")
        found |= value if isinstance(value, dict) else {name: value}
    return _json_text(found, " or ".join(found)) if found else ""


def _json_text(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date of Parquet's, say
        raise DataError(f"{name} is no JSON: {error}.") from None


def _parsed(value: Any) -> Any:
    """A value that a table holds as JSON, or as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _turns(value: Any) -> tuple[Message, ...]:
    return tuple(_turn(turn, number) for number, turn in enumerate(_listed(value) or (), 1))


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"message {number} is a {type(turn).__name__}, not an object.")
    said = turn.get("role", turn.get("from"))
    if not isinstance(said, str) or said not in ROLES:
        raise DataError(f"message {number} has the role {said!r}, none of {', '.join(ROLES)}.")
    role = ROLES[said]
    _check_fields(turn, f"message {number}: ")
    content = _one_of(turn, ("content", "value"), number)
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                raise DataError(f"message {number} has a part that is no text: {str(part)[:40]}.")
        content = "".join(part["text"] for part in content)
    more = _more(turn, number, role)
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"message {number} has no text, found {type(content).__name__}.")
    return Message(role, content, _is_learned(turn, number, role), tuple(more.items()))


def _one_of(turn: Row, names: Sequence[str], number: int) -> Any:
    """What a field says that has several names. Raises DataError if they differ."""
    values = [turn[name] for name in names if turn.get(name) is not None]
    if any(value != values[0] for value in values):
        raise DataError(f"message {number} has {' and '.join(names)}, which differ. Remove one.")
    return values[0] if values else None


def _is_learned(turn: Row, number: int, role: str) -> bool:
    """What the masks of a message say."""
    try:
        masks = {
            name: _learned(turn, name) for name in (*MASKS, HIDDEN) if turn.get(name) is not None
        }
    except DataError as error:
        raise DataError(f"message {number} has {error}") from None
    if len({*masks.values()}) > 1:
        raise DataError(f"message {number} has {' and '.join(masks)}, which differ. Remove one.")
    learned = all(masks.values())
    if masks and role != "assistant" and learned:
        name = next(iter(masks))
        raise DataError(
            f"message {number} is the {role}'s, to be learned as its {name} says: only answers can"
            f" be. Remove {name}."
        )
    return learned


def _more(turn: Row, number: int, role: str) -> dict[str, str]:
    """A message's other fields that a template may read, as JSON."""
    found: dict[str, Any] = {}
    thought = _one_of(turn, THOUGHTS, number)
    if thought:
        if role != "assistant" or not isinstance(thought, str):
            raise DataError(f"message {number}: only an answer has reasoning, and that as text.")
        found["reasoning_content"] = thought
    calls = _parsed(turn.get("tool_calls"))
    if calls:
        if role != "assistant" or not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise DataError(
                f"message {number}: tool_calls of an answer are a list of"
                ' {"type": "function", "function": {"name": ..., "arguments": ...}}.'
            )
        found["tool_calls"] = calls
    for name in PASSED_ON:
        if turn.get(name) is not None:
            found[name] = turn[name]
    return {name: _json_text(value, name) for name, value in found.items()}


def _is_call(call: Any) -> bool:
    inner = call.get("function", call) if isinstance(call, dict) else None
    return (
        isinstance(inner, dict)
        and isinstance(inner.get("name"), str)
        and isinstance(inner.get("arguments"), str | dict)
    )


def _checked(one: Conversation, place: str, task: str, answered: bool) -> Conversation:
    """The conversation with its place and references. Raises DataError where it is none."""
    messages = one.messages
    if not any(message.role in ("user", "assistant") for message in messages):
        raise DataError("an empty conversation.")
    if answered and messages[-1].role != "assistant":
        raise DataError(f"the last message is the {messages[-1].role}'s, and not the assistant's.")
    for number, message in enumerate(messages, 1):
        empty = not message.content.strip() and not message.has("tool_calls")
        if message.role == "assistant" and empty:
            raise DataError(f"an empty answer, message {number}.")
        try:
            "".join((message.content, one.given, *(value for _, value in message.more))).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{error.reason}: half of a character pair.") from None
    scored = messages[-1].role == "assistant" and one.prompt and messages[-1].content.strip()
    references = (messages[-1].content.strip(),) if scored else ()
    return replace(one, place=place, task=task, references=references)


def _first_name(names: Sequence[str], row: Row) -> str | None:
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
