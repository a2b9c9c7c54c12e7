"""How a run of --task text writes conversations, for the engines that it is exported to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turns:
    """A chat template that only writes text around each message."""

    head: str  # before the first message
    # Role -> the text before and after its content. After a user's message the assistant's turn
    # begins.
    around: Mapping[str, tuple[str, str]]
    system: str | None  # the system prompt that it writes if a conversation has none


@dataclass(frozen=True)
class AnswerFormat:
    """What ends an answer of a run, and its chat template."""

    ends: Mapping[str, int]  # all tokens that end an answer, with their ids
    turn: int | None  # the id of the one that the base does not name; None if it names all
    generation: Mapping[str, Any]  # the base's generation config, with all of them
    template: str | None  # in Jinja; None if it is the base's, or none
    turns: Turns | None  # None if the template does more than write text around messages
    max_new_tokens: int
    stop_text: str = ""  # what ends an answer if none of these tokens does
