"""What another engine needs to answer as `lora generate` does: end tokens and chat template."""

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
    system: str | None  # the default system prompt; None if the template has none


@dataclass(frozen=True)
class AnswerFormat:
    """What ends an answer of a run, and its chat template."""

    end_tokens: Mapping[str, int]  # every token that ends an answer -> its id
    new_end_token: int | None  # the id of the one that the base's own files do not name as an end
    generation: Mapping[str, Any]  # the base's generation config, with the ids of all end tokens
    template: str | None  # in Jinja; None if the run uses the base's template, or none
    turns: Turns | None  # None if the template does more than write text around messages
    max_new_tokens: int
    stop_text: str = ""  # the text that ends an answer, if no token does
