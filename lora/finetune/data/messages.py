"""Reads the messages of a conversation: turns_of(value) -> Messages.

A value is a list of turns in OpenAI's form (role, content) or ShareGPT's (from, value), or such a
list as JSON in a table's cell. Errors name the message by its number; the caller adds the place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lora.errors import DataError
from lora.finetune.data.rows import Row

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}  # fmt: skip
"""A role in a file -> the role that templates know."""

# Names of a message's fields.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
PASSED_ON = ("tool_call_id", "name")  # passed to the template
# A message is learned if its mask is 1 or true. HIDDEN, torchtune's name, is the opposite.
MASKS = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask")
ROW_MASKS = ("weight", "train", "trainable", "loss_mask")
HIDDEN = "masked"
REFUSED = {
    "function_call": "write tool_calls",
    "functions": "write tools",
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), "answers are learned whole"),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "only texts can be learned"
    ),
    "refusal": "write it as content",
}  # fmt: skip
"""Fields that change what to learn and that we do not implement, with what to do instead."""
TURN = {"role", "from", "content", "value", *THOUGHTS, "tool_calls", *PASSED_ON, *MASKS, HIDDEN}


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str  # system, user, assistant or tool
    content: str
    learned: bool = True  # False: an answer masked in the loss, as OpenAI's weight 0
    more: tuple[tuple[str, str], ...] = ()  # (name, JSON) of other fields that templates read

    def has(self, name: str) -> bool:
        """True if the message has this field beside role and content."""
        return any(name == key for key, _ in self.more)

    def fields(self) -> dict[str, Any]:
        """Returns the message as a dict, under the names that chat templates use."""
        more = {name: json.loads(value) for name, value in self.more}
        return {"role": self.role, "content": self.content, **more}


def check_fields(row: Row, prefix: str = "") -> None:
    """Raises DataError if a row has a field that we do not implement, or is not to be learned.

    prefix: "" for a row, "message N: " for a message.
    """
    for name, advice in REFUSED.items():
        if row.get(name):
            raise DataError(f"{prefix}{name} is not supported: {advice}, or remove it.")
    if not prefix:
        for name in ROW_MASKS:
            if row.get(name) is not None and not _learned(row, name):
                raise DataError(
                    f"{name} {row[name]!r}: nothing in this row is learned. Remove the row, or"
                    f" {name}."
                )
        if row.get("label") is False:  # TRL's unpaired preferences: a rejected answer
            raise DataError("label false: the answer was rejected. Remove the row.")


def _learned(fields: Row, name: str) -> bool:
    """Returns what a mask says. Raises DataError if it is not 0, 1, true or false."""
    value = fields[name]
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        value = json.loads(value.lower())
    if value not in (0, 1) or not isinstance(value, int | float):
        raise DataError(f"{name} {str(value)[:40]!r}: it must be 0 or 1, false or true.")
    return bool(value) != (name == HIDDEN)


def json_text(value: Any, name: str) -> str:
    """Returns the value as JSON text. Raises DataError if it cannot be written as JSON."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # such as a date from Parquet
        raise DataError(f"{name} cannot be written as JSON: {error}. Write it as a text.") from None


def parsed_cell(value: Any) -> Any:
    """Returns the value of a cell that holds JSON, or else the cell."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def turns_of(value: Any) -> tuple[Message, ...]:
    """Returns the messages of a list of turns. Raises DataError naming the message."""
    return tuple(_turn(turn, number) for number, turn in enumerate(listed(value) or (), 1))


def _turn(turn: Any, number: int) -> Message:
    """Returns one message. Content may be a text, or OpenAI's list of text parts."""
    if not isinstance(turn, dict):
        raise DataError(f"message {number} is a {type(turn).__name__}, not an object.")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"message {number} has the role {name!r}, none of {', '.join(ROLES)}.")
    role = ROLES[name]
    check_fields(turn, f"message {number}: ")
    content = _one_of(turn, ("content", "value"), number)
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                raise DataError(
                    f"message {number} has a part that is not a text: {str(part)[:40]}. Remove it."
                )
        content = "".join(part["text"] for part in content)
    more = _more(turn, number, role)
    if content is None and "tool_calls" in more:  # OpenAI writes null beside tool calls
        content = ""
    if not isinstance(content, str):
        raise DataError(f"message {number} has no text, found {type(content).__name__}.")
    return Message(role, content, _is_learned(turn, number, role), tuple(more.items()))


def _one_of(turn: Row, names: Sequence[str], number: int) -> Any:
    """Returns the value of a field with several names. Raises DataError if its values differ."""
    values = [turn[name] for name in names if turn.get(name) is not None]
    if any(value != values[0] for value in values):
        raise DataError(f"message {number} has {' and '.join(names)}, which differ. Remove one.")
    return values[0] if values else None


def _is_learned(turn: Row, number: int, role: str) -> bool:
    """True unless a mask of the message is 0. Raises DataError if two masks differ."""
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
            f"message {number} has the role {role}, and {name} asks to learn it: only answers can"
            f" be learned. Remove {name}."
        )
    return learned


def _more(turn: Row, number: int, role: str) -> dict[str, str]:
    """Returns a message's other fields that templates read, as JSON by name."""
    fields: dict[str, Any] = {}
    thought = _one_of(turn, THOUGHTS, number)
    if thought:
        if role != "assistant" or not isinstance(thought, str):
            raise DataError(
                f"message {number}: only an answer can have reasoning, and it must be a text."
            )
        fields["reasoning_content"] = thought
    calls = parsed_cell(turn.get("tool_calls"))
    if calls:
        if role != "assistant" or not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise DataError(
                f"message {number}: tool_calls belong to an answer and must be a list of"
                ' {"type": "function", "function": {"name": ..., "arguments": ...}}.'
            )
        fields["tool_calls"] = calls
    for name in PASSED_ON:
        if turn.get(name) is not None:
            fields[name] = turn[name]
    return {name: json_text(value, name) for name, value in fields.items()}


def _is_call(call: Any) -> bool:
    """True if a tool call has a name, and arguments as JSON text or as an object."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    return (
        isinstance(inner, dict)
        and isinstance(inner.get("name"), str)
        and isinstance(inner.get("arguments"), str | dict)
    )


def listed(value: Any) -> list[Any] | None:
    """Returns a list, or the list that a table's cell holds as JSON; None for anything else.

    A text is parsed only if it holds turns or instances: `[3, 1, 2]` may be a prompt.
    """
    if isinstance(value, DataError):  # a cell that could not be read
        raise value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not all(
            isinstance(turn, dict) and turn.keys() & {"role", "from", "output"} for turn in value
        ):
            return None
    return value if isinstance(value, list) else None
