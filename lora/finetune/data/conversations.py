"""Reads conversations from the common formats: read_conversations(...), by split.

The keys of a row decide its format:

    messages                        OpenAI: role and content
    conversations                   ShareGPT: from and value
    instruction, instances          Self-Instruct's seed tasks: one conversation per instance
    instruction, input, output      Alpaca; Dolly calls them instruction, context, response
    question, answer                one turn, as prompt, response; optional system, system_prompt
    prompt, completion              raw: the completion continues the prompt, without a template
    text                            raw, without a prompt

A row's `tools`, `documents` and `chat_template_kwargs` go to the chat template, and so do the
`reasoning_content`, `tool_calls`, `tool_call_id` and `name` of a message. An answer is not learned
if its message has a mask: `weight` 0, `train` false, `loss_mask` 0. A field that changes what to
learn and that we do not implement is an error naming it. All other fields are listed as not read.

Rows are read from JSON lines, JSON, CSV, TSV, Parquet, the hub, and text files: a text per line, or
`meaning representation||reference` as in E2E. A table has a list of messages as JSON in its cell.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora.errors import DataError
from lora.finetune.data.columns import LABEL, TEXT
from lora.finetune.data.division import divided, groups_by, without_tenth
from lora.finetune.data.messages import (
    ROW_MASKS,
    TURN,
    Message,
    check_fields,
    json_text,
    listed,
    parsed_cell,
    turns_of,
)
from lora.finetune.data.rows import ENDINGS, SPLITS, BadRows, Row, read_rows, read_source, text_in

# Names of a row's fields, by what they hold. The first that a row has is used.
ASKED = ("instruction", "prompt", "question", "input")
BESIDE = ("input", "context")  # text that follows an instruction
ANSWERED = ("output", "completion", "response", "answer")
SYSTEM = ("system", "system_prompt")
GIVEN = ("tools", "documents", "chat_template_kwargs")  # passed to the template


@dataclass(frozen=True)
class Conversation:
    """A conversation. Its last message is the answer to learn or to score, if it has one."""

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    """The correct answers, stripped of white space. Empty if there is no prompt."""
    task: str = ""  # the name of its data set
    place: str = ""  # "FILE, line N"
    raw: bool = False  # rendered without a template
    given: str = ""  # a JSON object of the template's other variables, such as tools
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # fields of its row

    def content(self) -> tuple[Any, ...]:
        """Returns all that a model sees, and the references: what Corpus.digest() hashes.

        Empty fields are left out, so that older digests stay valid.
        """
        messages = [
            (
                message.role,
                message.content,
                message.learned,
                *([message.more] if message.more else []),
            )
            for message in self.messages
        ]
        return self.task, self.raw, messages, self.references, *([self.given] if self.given else [])

    @property
    def thoughts(self) -> list[str]:
        """Returns the reasoning texts of its answers."""
        fields = [dict(message.more) for message in self.messages]
        return [json.loads(f["reasoning_content"]) for f in fields if "reasoning_content" in f]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Returns the messages before the answer."""
        answered = self.messages[-1].role == "assistant"
        return self.messages[:-1] if answered else self.messages


def read_conversations(
    source: str, task: str = "", bad: BadRows | None = None
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Returns train, dev and test of a file, folder or hub data set, and notes for the user.

    bad: collects unusable rows. The caller judges it once its template has added the rows that it
    refuses. Without `bad`, an unusable row is an error.
    A file without a column `split` is divided 80/10/10, and a source without dev gets every tenth
    prompt of train; the notes say so. Conversations with the same prompt stay in one split, or else
    their answers would leak.
    Raises DataError with the file, the line and what to do.
    """
    rows = BadRows() if bad is None else bad
    splits = _conversation_splits(source, task, rows)
    try:
        divided, notes = _in_three(source, splits)
    except DataError:  # if unusable rows are why there are too few, list those instead
        rows.judge(left=False)
        raise
    if bad is None:
        rows.judge()
    read = itertools.chain.from_iterable(splits.values())
    if unread := sorted(frozenset().union(*(conversation.unread for conversation in read))):
        notes.append(f"{source} has fields that are not read: {', '.join(unread)}")
    return divided, notes


def _in_three(
    source: str, splits: dict[str, list[Conversation]]
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Returns train, dev and test, and notes. Divides the source if it has no splits."""
    notes = []
    if "" in splits:
        groups = groups_by(splits[""], _prompt_of)
        if len(groups) < 3:
            raise DataError(
                f"--data {source}: {len(groups)} different prompts are too few for train, dev and"
                " test. Add rows."
            )
        splits = divided(groups)
        notes.append(
            f"{source} has no column 'split': divided 80/10/10 by prompt into train, dev and test"
        )
    # Some benchmarks do not publish their train split.
    if splits.get("dev") and not splits.get("train"):
        splits["train"] = splits.pop("dev")
        notes.append(f"{source} has no train split: dev is used for training")
    if not splits.get("train"):
        raise DataError(
            f"--data {source} has no training rows, found {', '.join(splits) or 'nothing'}. Pass a"
            f" folder with train.jsonl, or another of {', '.join(ENDINGS)}."
        )
    if not splits.get("dev"):
        splits["train"], splits["dev"] = without_tenth(groups_by(splits["train"], _prompt_of))
        if not splits["train"]:
            raise DataError(
                f"--data {source}: too few prompts to hold one out as dev. Pass a dev split."
            )
        notes.append(f"{source} has no dev split: every tenth train prompt is held out as dev")
    return {name: splits.get(name, []) for name in SPLITS}, notes


def read_one_split(
    source: str, task: str = "", split: str | None = None, bad: BadRows | None = None
) -> tuple[list[Conversation], str]:
    """Returns the conversations to evaluate a trained model on, and the name of their split.

    split: default is the first of test, dev and train that exists. A file without a column `split`
    is used whole, as test. A folder needs no train file. bad: as for read_conversations().
    """
    rows = BadRows() if bad is None else bad
    splits = _conversation_splits(source, task, rows)
    if "" in splits:
        splits = {split or "test": splits[""]}
    wanted = [split] if split else ["test", "dev", "train"]
    present = [name for name in wanted if splits.get(name)]
    if not present:
        rows.judge(left=False)
        raise DataError(f"--data {source} has no {split or ''} split, found {', '.join(splits)}.")
    if bad is None:
        rows.judge()
    return splits[present[0]], present[0]


def read_prompts(path: str, task: str = "", bad: BadRows | None = None) -> list[Conversation]:
    """Returns the conversations of one file in its order, to generate from. Answers are optional.

    bad: as for read_conversations().
    """
    rows = BadRows() if bad is None else bad
    conversations: list[Conversation] = []
    for place, row in read_rows(Path(path)):
        try:
            if isinstance(row, DataError):
                raise row
            conversations += from_row(row, place, task, answered=False)
        except DataError as error:
            rows.add(error, place)
    if bad is None or not conversations:
        rows.judge(left=bool(conversations))
    if not conversations:
        raise DataError(f"{path} has no rows.")
    return conversations


def holds_conversations(source: str) -> bool:
    """True if the first row of a data set is a conversation. Decides `--task auto`."""
    rows = (row for _, _, row in read_source(source))
    return conversational(next((row for row in rows if not isinstance(row, DataError)), {}))


def conversational(row: Row) -> bool:
    """True if the keys of a row show a conversation. A text alone may belong to any task."""
    # With a label, question and answer are a pair of texts to classify or to rate.
    labelled = "label" in row or "labels" in row or bool({*LABEL} & {*row} and {*TEXT} & {*row})
    form = _form(row)
    return form is not None and form != "text" and not (form == "pair" and labelled)


def grouped(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Merges conversations with the same prompt: one for each, with the references of all.

    In order of first occurrence. A text without a prompt stays alone.
    """
    merged: dict[object, Conversation] = {}
    for conversation in conversations:
        # A number equals no other key, so a text without a prompt is never merged.
        key: object = len(merged)
        if conversation.prompt:
            key = conversation.task, conversation.raw, conversation.prompt, conversation.given
        if first := merged.get(key):
            references = first.references + conversation.references
            conversation = replace(first, references=references)
        merged[key] = conversation
    return list(merged.values())


def _prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """Returns the messages by which a conversation counts as the same question as another."""
    return conversation.prompt or conversation.messages


def _conversation_splits(source: str, task: str, bad: BadRows) -> dict[str, list[Conversation]]:
    """Returns the conversations by split; "" for rows without a split.

    If other rows have a split, those without are bad rows.
    """
    splits: dict[str, list[Conversation]] = {}
    for split, place, row in read_source(source):
        try:
            if isinstance(row, DataError):
                raise row
            splits.setdefault(split, []).extend(from_row(row, place, task))
        except DataError as error:
            bad.add(error, place)
    if len(splits) > 1:
        # A guess could put a row of test into train.
        for conversation in splits.pop("", ()):
            missing = f"{conversation.place}: no split, but other rows have one. Fill it in."
            bad.add(DataError(missing), conversation.place)
    return splits


def from_row(row: Row, place: str, task: str = "", answered: bool = True) -> list[Conversation]:
    """Returns the conversations of one row. answered=False: their answers may be missing.

    Raises DataError with the place if the keys fit no format, a field is not implemented, a role is
    unknown, there are no messages, the last is not the assistant's, or an answer is empty.
    """
    try:
        check_fields(row)
        return [
            _checked(conversation, place, task, answered)
            for conversation in _read_row(row, answered)
        ]
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _form(row: Row, answered: bool = True) -> str | None:
    """Returns the format of a row: messages, conversations, instances, pair, text, or None."""
    # Lists come first: many data sets repeat the first message in a column `prompt`.
    if listed(row.get("messages")) is not None:
        return "messages"
    if listed(row.get("conversations")) is not None:
        return "conversations"
    if "instruction" in row and listed(row.get("instances")) is not None:
        return "instances"
    if _first_name(ASKED, row) and (row.keys() & set(ANSWERED) or not answered):
        return "pair"
    return "text" if "text" in row else None


def _read_row(row: Row, answered: bool) -> Iterator[Conversation]:
    """Yields the conversations of a row: several for Self-Instruct, one for all other formats."""
    form = _form(row, answered)
    if form is None:
        raise DataError(
            f"no conversation among {', '.join(map(str, row)) or 'no keys'}. Known: messages;"
            " conversations; instruction, input, output; prompt, completion; text."
        )
    if form == "instances":
        instances = listed(row["instances"])
        if not instances:
            raise DataError("no instances. Write at least one, or remove the row.")
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
        yield _made(row, turns_of(row[form]), [form])


def _pair(row: Row, answered: bool) -> Iterator[Conversation]:
    """Yields the conversation of a question and its answer, each a text or a list of messages."""
    ask, answer = _first_name(ASKED, row), _first_name(ANSWERED, row)
    if ask is None:
        raise DataError(f"none of {', '.join(ASKED)} has a text.")
    if answer is None and answered:
        answers = " or ".join(name for name in ANSWERED if name in row)
        raise DataError(f"{ask} has no {answers}. Fill it in, or remove the row.")
    used = [ask, answer or ""]
    asked = listed(row[ask])
    if answer is None:
        reply: tuple[Message, ...] = ()
    elif asked and listed(row[answer]) is not None:
        reply = turns_of(row[answer])
    else:
        reply = (Message("assistant", _text(row, answer)),)
    if asked:
        yield _made(row, turns_of(asked) + reply, used)
        return
    # prompt and completion continue each other; prompt and response are turns.
    raw = ask == "prompt" and answer in ("completion", None)
    beside = None if raw or ask == "input" else _first_name(BESIDE, row)
    used.append(beside or "")
    # A second question or answer would be lost without notice, so it is an error.
    names = dict.fromkeys((*ASKED, *BESIDE, *ANSWERED, *(SYSTEM if raw else ())))
    others = [name for name in names if name not in used and row.get(name) not in (None, "")]
    if others:
        raise DataError(
            f"{' and '.join(name for name in used if name)} are read, and {others[0]} is not."
            " Remove it, or append it to the field that it belongs to."
        )
    if raw:
        prompt = _text(row, ask)
        yield _made(row, (Message("user", prompt), *reply) if prompt else reply, used, raw=True)
        return
    parts = [_text(row, ask), _text(row, beside) if beside else ""]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise DataError(f"an empty {ask}. Fill it in, or remove the row.")
    before = _history(row)
    used.append("history")
    yield _made(row, (*before, Message("user", question), *reply), used)


def _history(row: Row) -> tuple[Message, ...]:
    """Returns the earlier turns of an Alpaca row: a list of [question, answer]."""
    value = row.get("history") or []
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    messages: list[Message] = []
    # Any other value goes through the loop too, to raise the error.
    for pair in value if isinstance(value, list) else [value] if value else ():
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise DataError("history must be a list of [question, answer], both texts.")
        messages += Message("user", pair[0]), Message("assistant", pair[1])
    return tuple(messages)


def _made(
    row: Row, messages: tuple[Message, ...], used: Sequence[str], raw: bool = False
) -> Conversation:
    """Returns the conversation of a row, with the row's system message and template variables.

    used: the columns that the messages are from. The columns that nothing reads go to `unread`.
    """
    names, given = {*used, "split", *ROW_MASKS}, ""
    if not raw:
        messages, given = _after_system(row, messages), _given_json(row)
        names |= {*SYSTEM, *GIVEN}
    turns = [
        turn for name in used for turn in listed(row.get(name)) or () if isinstance(turn, dict)
    ]
    inner = {name for turn in turns for name in turn if turn[name] is not None} - TURN
    unread = {str(name) for name in row if name not in names}
    unread |= {f"{name} of messages" for name in inner}
    return Conversation(messages, raw=raw, given=given, unread=frozenset(unread))


def _after_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Returns the messages, after the system message if that has its own column."""
    systems = {_text(row, name) for name in SYSTEM if row.get(name) is not None}
    systems = {text for text in systems if text.strip()}  # an empty cell of a table is no prompt
    inside = {message.content for message in messages if message.role == "system"}
    if len(systems) > 1 or (inside and systems - inside):
        raise DataError("two different system prompts. Remove one.")
    first = tuple(Message("system", text) for text in systems if not inside)
    return (*first, *messages)


def _given_json(row: Row) -> str:
    """Returns the template's other variables as a JSON object; "" if there are none."""
    variables: dict[str, Any] = {}
    for name in GIVEN:
        value, kind = parsed_cell(row.get(name)), dict if name == "chat_template_kwargs" else list
        if not value:
            continue
        if not isinstance(value, kind):
            raise DataError(f"{name} is a {type(value).__name__}, not a {kind.__name__}.")
        variables |= value if isinstance(value, dict) else {name: value}
    return json_text(variables, " or ".join(variables)) if variables else ""


def _checked(conversation: Conversation, place: str, task: str, answered: bool) -> Conversation:
    """Returns the conversation with its place and references. Raises DataError if it is invalid."""
    messages = conversation.messages
    if not any(message.role in ("user", "assistant") for message in messages):
        raise DataError("an empty conversation. Remove the row.")
    if answered and messages[-1].role != "assistant":
        raise DataError(
            f"the last message has the role {messages[-1].role}, but it must be the assistant's"
            " answer. Add the answer, or remove the message."
        )
    for number, message in enumerate(messages, 1):
        empty = not message.content.strip() and not message.has("tool_calls")
        if message.role == "assistant" and empty:
            raise DataError(f"an empty answer, message {number}. Fill it in, or remove it.")
        try:
            # JSON can hold half of a UTF-16 pair (\ud800), which no file or tokenizer takes.
            "".join(
                (message.content, conversation.given, *(value for _, value in message.more))
            ).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{error.reason}: the text has half of a UTF-16 pair. Write the whole character."
            ) from None
    scored = (
        messages[-1].role == "assistant" and conversation.prompt and messages[-1].content.strip()
    )
    references = (messages[-1].content.strip(),) if scored else ()
    return replace(conversation, place=place, task=task, references=references)


def _first_name(names: Sequence[str], row: Row) -> str | None:
    """Returns the first of these names that the row has a value for."""
    return next((name for name in names if row.get(name) is not None), None)


def _text(row: Row, name: str) -> str:
    """Returns a field as text. A number is one, but true is neither a question nor an answer."""
    if isinstance(row[name], bool):
        raise DataError(f"{name} must be a text, found bool.")
    return text_in(row, name)
