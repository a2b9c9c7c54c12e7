"""Recognizes a chat template that only writes text around each message: text_around_turns().

Engines that read no Jinja can then be told that text. Whatever else a template does shows in the
conversations that are rendered here, and then it is not recognized.
"""

from __future__ import annotations

from dataclasses import replace

from lora.errors import LoraError
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.messages import Message
from lora.finetune.data.templates import Template
from lora.interop.answers import Turns

# Contents in Unicode's private use area, which no template trims or escapes.
SYSTEM_MARK, FIRST_MARK, ANSWER_MARK, SECOND_MARK = (
    f"\ue0d7{sign}\ue0d9" for sign in "\ue0da\ue0db\ue0dc\ue0dd"
)


def text_around_turns(template: Template) -> Turns | None:
    """Returns the text that a template writes around messages; None if it does anything else."""
    if template.jinja is None:  # the prompt alone
        return Turns("", {"user": ("", "")}, None)
    try:
        plain = _prompt(template, user=FIRST_MARK)
        whole = _prompt(
            template, system=SYSTEM_MARK, user=FIRST_MARK, assistant=ANSWER_MARK, again=SECOND_MARK
        )
        closing = template.closing.strip()
    except LoraError:  # it refuses a system message, for instance
        return None
    parts = []
    rest = whole
    for mark in (SYSTEM_MARK, FIRST_MARK, ANSWER_MARK, SECOND_MARK):
        before, separator, rest = rest.partition(mark)
        if not separator:
            return None
        parts.append(before)
    start, after_system, after_user, after_answer = parts
    system_end, user_start = _divided(after_system, closing)
    answer_end, next_start = _divided(after_answer, closing)
    before, _, after = plain.partition(FIRST_MARK)
    if not (user_start == next_start and rest == after_user == after):
        return None
    system: str | None = None
    head = before.removesuffix(user_start)
    if not start.startswith(head):
        head = template.start if start.startswith(template.start) else ""
        if not (before.startswith(start) and before.endswith(after_system)):
            return None
        system = before[len(start) : len(before) - len(after_system)]
    around = {
        "system": (start.removeprefix(head), system_end),
        "user": (user_start, after_user),
        "assistant": ("", answer_end),
    }
    turns = Turns(head, around, system)
    if not _agrees(template, turns):
        return None
    # The engine adds the token that the tokenizer adds.
    return replace(turns, head=head.removeprefix(template.start))


def _prompt(template: Template, **contents: str) -> str:
    """Returns the prompt of a conversation; `again` is a second message of the user."""
    messages = (
        Message("user" if role == "again" else role, content) for role, content in contents.items()
    )
    return template.prompt(Conversation(tuple(messages), place="a conversation to try"))


def _divided(text: str, closing: str) -> tuple[str, str]:
    """Returns the text up to the end of a turn with the space after it, and the rest."""
    before, end, after = text.partition(closing)
    rest = after.lstrip()
    return (before + end + after[: len(after) - len(rest)], rest) if end else ("", text)


def _agrees(template: Template, turns: Turns) -> bool:
    """True if the text around messages gives the template's prompts of other conversations."""
    contents = {"user": " Two\nlines ", "assistant": "B", "again": "C"}
    for system in ({}, {"system": "S"}):
        try:
            expected = _prompt(template, **system, **contents)
        except LoraError:
            return False
        stated = system or ({"system": turns.system} if turns.system is not None else {})
        text = turns.head
        for role, content in (stated | contents).items():
            before, after = turns.around["user" if role == "again" else role]
            text += f"{before}{content}{after}"
        # Templates trim contents, and so does the engine.
        if expected not in (text, text.replace(contents["user"], contents["user"].strip())):
            return False
    return True
