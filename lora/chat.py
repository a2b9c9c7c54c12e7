"""A talk with a run's model in the terminal: a line is a message, an empty one changes nothing.

/new   forget what was said      /exit   (or the end of the input) leave
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import rich
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from lora.conversations import Message
from lora.errors import DataError
from lora.generate import Writing
from lora.run import progress_bar, reading
from lora.trained import Acts, Trained, answers, conversation, reopen


def chat(directory: Path, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Answer what is typed until it ends. A run on prompts as they stand knows no turns: there each
    message is on its own."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(directory)
    said: list[Message] = []
    for text in _typed():
        if text == "/new":
            said.clear()
            continue
        said.append(Message("user", text))
        answer = _answered(trained, said, writing, adapter, system)
        said.append(Message("assistant", answer))
        if trained.config.template == "none":
            said.clear()


def once(directory: Path, prompt: str, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Answer one prompt as text."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(directory)
    _answered(trained, [Message("user", prompt)], writing, adapter, system)


def _typed() -> Iterator[str]:
    """Each line of the input, asked for where it is a terminal."""
    if sys.stdin is None:  # closed: `lora generate RUN <&-`
        return
    lines: Iterable[str] = iter(_ask, None) if sys.stdin.isatty() else sys.stdin
    try:
        for line in lines:
            line.encode()  # what is no UTF-8 may also arrive as surrogates
            if line.strip() == "/exit":
                return
            if line.strip():
                yield line.strip()
    except UnicodeError:
        raise DataError("a line is not in this system's encoding. Write it in UTF-8.") from None


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _answered(
    trained: Trained, said: list[Message], writing: Writing, adapter: Acts, system: str | None
) -> str:
    """Print the answer as it is written, or with the adapter on and off side by side."""
    asked = [conversation(trained, said, system)]
    if adapter == "both":
        found = answers(trained, asked, writing, adapter)
        heads = {"on": "adapter on", "off": "adapter off"}
        panels = [Panel(Text(found[acts][0].strip()), title=head) for acts, head in heads.items()]
        rich.print(Columns(panels, equal=True, expand=True))
        return found["on"][0]

    def told(text: str) -> None:
        print(text, end="", flush=True)

    (text,) = answers(trained, asked, writing, adapter, streamed=told)[adapter]
    print()
    return text
