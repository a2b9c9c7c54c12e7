"""Prints examples token by token: which are learned, and which are masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import rich.console
from rich.text import Text

from lora.finetune.data.conversations import Conversation
from lora.finetune.data.encoding import TokenizedText, encode, rendered, shifted_labels, tokenized
from lora.finetune.data.templates import LossOn, Template
from lora.finetune.data.tokens import IGNORED


def preview(
    template: Template,
    conversations: Sequence[Conversation],
    max_length: int,
    loss_on: LossOn = "answers",
    count: int = 3,
    console: rich.console.Console | None = None,
) -> None:
    """Prints the first `count` examples token by token, then the token counts of all examples.

    │ separates two tokens, ↵ marks a line break of the text. Each line begins with "learned" or
    "masked", so that the output is clear in a pipe too. A terminal shows learned tokens in bold
    green, masked tokens dim, and special tokens in magenta.
    """
    console = console or rich.console.Console()
    first = conversations[:count]
    texts = [(first[number], text) for number, text in rendered(template, first, loss_on)]
    for conversation, tokens in zip(first, tokenized(template, texts), strict=True):
        labels = shifted_labels(tokens, max_length)
        cut = f" of {len(tokens.ids)}, cut" if len(tokens.ids) > len(labels) else ""
        learned = len(labels) - labels.count(IGNORED)
        title = f"{conversation.place}: {len(labels)} tokens{cut}, {learned} learned"
        console.print(Text(f"── {title}", "bold"), soft_wrap=True)
        for line in _preview_lines(template, tokens, labels):
            console.print(line, soft_wrap=True)
    counts = encode(template, conversations, max_length, loss_on)[1]
    share = f"{counts.learned} of {counts.tokens} tokens learned"
    total = f"── {counts.examples - counts.lost} of {counts.examples} examples: {share}"
    console.print(Text("\n".join(filter(None, [total, counts.note(max_length)]))), soft_wrap=True)


def _preview_lines(template: Template, tokens: TokenizedText, labels: list[int]) -> Iterator[Text]:
    """Yields lines of tokens. A line ends where the text's line ends or the mask changes."""
    special = template.tokenizer.added_tokens_decoder
    line, before = Text(), None
    reached = 0
    for number, (token, offset) in enumerate(zip(tokens.ids, tokens.offsets)):
        if number == len(labels):
            break
        learned = number > 0 and labels[number - 1] != IGNORED  # labels are shifted by one
        if learned is not before and line:
            yield line
            line = Text()
        before = learned
        # A character may be several tokens, one for each of its bytes. The last of them shows it.
        shared = tokens.offsets[number + 1 : number + 2] == [offset]
        piece = "" if shared else tokens.text[max(offset[0], reached) : offset[1]]
        reached = reached if shared else offset[1]
        style = ("bold magenta" if token in special else "bold green") if learned else "dim"
        if token in special and not learned:
            style = "magenta"
        for place, part in enumerate(piece.split("\n")):
            if place:
                line.append("↵", "dim")
                yield line
                line = Text()
            if not line and (part or not place):
                line.append("learned " if learned else "masked  ", "dim")
            elif not place:
                line.append("│", "dim")
            # A control character could change the terminal. It is shown as an escape: \x1b.
            plain = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in part)
            line.append("".join(plain), style)
    if line:
        yield line
