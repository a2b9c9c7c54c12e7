"""Chat with a trained model in the terminal: a line is a message, or a command such as /help."""

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
exit, quit    leave the chat; so do /exit, /quit and the end of the input (Ctrl-D)
/new          start a new conversation
/system       start a new conversation with the system prompt used in training
/system TEXT  start a new conversation with TEXT as the system prompt
/help         list these commands"""
LEAVE = ("exit", "quit", "/exit", "/quit")
TITLES: dict[Acts, str] = {"on": "adapter on", "off": "adapter off"}


def chat(source: Source, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Answer each line of the input until it ends. In a terminal, prints an error for a message
    that cannot be answered and drops it. Raises DataError for one that is piped in."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(source)
    talk = _Talk(trained, writing, adapter, system)
    learned = None if trained.config.template == "none" else system_of(source.directory)
    in_terminal = sys.stdin is not None and sys.stdin.isatty()
    if in_terminal:
        print("Type exit, quit or Ctrl-D to leave the chat, or /help for the other commands.")
        if learned and system is None:
            print(f"The model was trained with a system prompt. /system sets it here: {learned}")
    for text in _typed():
        command, _, rest = text.partition(" ")
        if text == "/help":
            print(HELP)
        elif text == "/new":
            talk.begin()
        elif command == "/system":
            talk.system = rest.strip() or learned
            talk.begin()
            none = "The model was trained without a system prompt."
            print(f"system: {talk.system}" if talk.system else none)
        elif text.startswith("/") and text[1:].isalpha():
            print(f"There is no command {text}. /help lists the commands.")
        else:
            try:
                talk.answer(text)
            except DataError as error:
                if not in_terminal:
                    raise
                print(f"{error} Or type /new to start a new conversation.")


def once(source: Source, prompt: str, writing: Writing, adapter: Acts, system: str | None) -> None:
    """Print the answer to one prompt as text."""
    with progress_bar() as progress, reading(progress):
        trained = reopen(source)
    _Talk(trained, writing, adapter, system).answer(prompt)


@dataclass
class _Talk:
    """The conversation so far. Adapter on and off have one each, with the model's own answers."""

    trained: Trained
    writing: Writing
    adapter: Acts
    system: str | None
    histories: dict[Acts, list[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start a new conversation."""
        sides: tuple[Acts, ...] = ("on", "off") if self.adapter == "both" else (self.adapter,)
        self.histories = {side: [] for side in sides}

    def answer(self, text: str) -> None:
        """Print the answer as it is generated, or those with the adapter on and off side by side.

        A model trained with --template none has no turns: each message is answered by itself.
        """
        results = {}
        for side, history in self.histories.items():
            prompt = conversation(self.trained, [*history, Message("user", text)], self.system)
            streamed = None if self.adapter == "both" else _print_part
            results[side] = answers(self.trained, [prompt], self.writing, side, streamed=streamed)
        written = {side: texts[side][0] for side, texts in results.items()}
        if self.adapter == "both":
            panels = [Panel(Text(written[side].strip()), title=TITLES[side]) for side in written]
            rich.print(Columns(panels, equal=True, expand=True))
        else:
            print()
        if self.trained.config.template != "none":
            for side, history in self.histories.items():
                history += [Message("user", text), Message("assistant", written[side])]


def _print_part(text: str) -> None:
    print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Yields each line of the input that is not empty; prompts for it if it is a terminal."""
    if sys.stdin is None:  # closed: `lora generate RUN <&-`
        return
    lines: Iterable[str] = iter(_ask, None) if sys.stdin.isatty() else sys.stdin
    try:
        for line in lines:
            line.encode()  # bytes that are not UTF-8 may arrive as surrogates
            if line.strip().lower() in LEAVE:
                return
            if line.strip():
                yield line.strip()
    except UnicodeError:
        raise DataError(
            "a line of the input is not in this system's encoding. Write it in UTF-8."
        ) from None


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None
