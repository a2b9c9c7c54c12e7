"""A talk with a run's model in the terminal: a line is a message, or one of HELP's commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import rich
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from lora.errors import DataError
from lora.finetune.data.messages import Message
from lora.finetune.generate import Writing
from lora.finetune.screen import progress_bar, reading
from lora.finetune.source import Source
from lora.finetune.trained import Acts, Trained, answers, conversation, reopen, system_of

HELP = """\
exit, quit    leave, as do /exit, /quit and the end of the input (Ctrl-D)
/new          forget what was said
/system       talk with the system prompt of the training; /system TEXT with another
/help         list these"""
LEAVE = ("exit", "quit", "/exit", "/quit")
TITLES: dict[Acts, str] = {"on": "adapter on", "off": "adapter off"}


def chat(source: Source, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Answer what is typed until it ends. In a terminal, a message that cannot be answered is
    named and forgotten; raises DataError for one in a pipe."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(source)
    talk = _Talk(trained, writing, adapter, system)
    learned = None if trained.config.template == "none" else system_of(source.directory)
    typed_in = sys.stdin is not None and sys.stdin.isatty()
    if typed_in:
        print("exit, quit or Ctrl-D leaves the talk; /help lists what else there is.")
        if learned and system is None:
            print(f"The training had a system prompt, which /system sets here: {learned}")
    for text in _typed():
        command, _, rest = text.partition(" ")
        if text == "/help":
            print(HELP)
        elif text == "/new":
            talk.begin()
        elif command == "/system":
            talk.system = rest.strip() or learned
            talk.begin()
            print(f"system: {talk.system}" if talk.system else "The training had no system prompt.")
        elif text.startswith("/") and text[1:].isalpha():
            print(f"{text} is no command. /help lists them.")
        else:
            try:
                talk.answer(text)
            except DataError as error:
                if not typed_in:
                    raise
                print(f"{error} Or type /new, which forgets what was said.")


def once(source: Source, prompt: str, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Answer one prompt as text."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(source)
    _Talk(trained, writing, adapter, system).answer(prompt)


@dataclass
class _Talk:
    """What was said so far: with the adapter on and off, to each model what it answered itself."""

    trained: Trained
    writing: Writing
    adapter: Acts
    system: str | None
    said: dict[Acts, list[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        sides: tuple[Acts, ...] = ("on", "off") if self.adapter == "both" else (self.adapter,)
        self.said = {side: [] for side in sides}

    def answer(self, text: str) -> None:
        """Print the answer as it is written, or those with the adapter on and off side by side.

        A run on prompts as they stand knows no turns: there each message is on its own.
        """
        found = {}
        for side, said in self.said.items():
            asked = conversation(self.trained, [*said, Message("user", text)], self.system)
            streamed = None if self.adapter == "both" else _told
            found[side] = answers(self.trained, [asked], self.writing, side, streamed=streamed)
        written = {side: texts[side][0] for side, texts in found.items()}
        if self.adapter == "both":
            panels = [Panel(Text(written[side].strip()), title=TITLES[side]) for side in written]
            rich.print(Columns(panels, equal=True, expand=True))
        else:
            print()
        if self.trained.config.template != "none":
            for side, said in self.said.items():
                said += [Message("user", text), Message("assistant", written[side])]


def _told(text: str) -> None:
    print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Each line of the input, asked for where it is a terminal."""
    if sys.stdin is None:  # closed: `lora generate RUN <&-`
        return
    lines: Iterable[str] = iter(_ask, None) if sys.stdin.isatty() else sys.stdin
    try:
        for line in lines:
            line.encode()  # what is no UTF-8 may also arrive as surrogates
            if line.strip().lower() in LEAVE:
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
