"""Turns the conversations of a text task into token ids and labels.

encode(template, ...)         -> token ids and labels for a causal model, labels shifted by one
encode_pairs(template, ...)   -> the same for a model with an encoder and a decoder

A template writes all special tokens, so the tokenizer adds none. Without a template we add the
tokenizer's first token (BOS) ourselves and tokenize the rest separately: a SentencePiece tokenizer
puts a space before the first word of a text, but not before a word that follows a token.

Each text is tokenized as a whole. A token is learned if its characters are in an answer. Offsets
come from the tokenizer's core without its post-processor, which would drop leading spaces.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora.errors import DataError
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.rows import BadRows
from lora.finetune.data.templates import LossOn, Rendered, Span, Template
from lora.finetune.data.tokens import IGNORED

TOGETHER = 16  # conversations rendered at a time
# Texts tokenized at a time. Their offsets are Python integers, which take much memory.
TEXTS_AT_ONCE = 1_000

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """Counts of examples and tokens, and of what the user should know about them."""

    examples: int = 0
    tokens: int = 0  # after truncation
    learned: int = 0  # tokens that are targets, after truncation
    long: int = 0  # examples that were truncated
    cut: int = 0  # tokens removed by truncation
    lost: int = 0  # examples without a target, which are skipped
    straddling: int = 0  # examples with a learned token that is only partly in an answer
    unlike: int = 0  # examples that do not begin with the tokens of the prompt in generation
    special: int = 0  # examples with special tokens in a message
    unthought: int = 0  # examples of which the template drops an earlier answer's reasoning

    def note(self, max_length: int) -> str:
        """Returns one line for the user, "" if nothing is unusual."""
        notes = []
        if self.long:
            notes.append(
                f"{self.long} of {self.examples} examples are longer than --max-length {max_length}"
                f" and truncated, by {self.cut} tokens in all"
            )
        if self.lost:
            notes.append(f"{self.lost} of {self.examples} have no answer left and are skipped")
        if self.straddling:
            notes.append(f"{self.straddling} learn a token that is only partly in the answer")
        if self.unlike:
            notes.append(f"{self.unlike} begin with other tokens than the prompt in generation")
        if self.special:
            notes.append(f"{self.special} have special tokens of the tokenizer in a message")
        if self.unthought:
            notes.append(f"{self.unthought} lose the reasoning of an answer in the template")
        return "; ".join(notes)


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one example, before truncation. The flags are explained at Counts."""

    text: str
    ids: list[int]
    offsets: list[Span]  # the characters of each token
    learned: list[Span]  # ranges of tokens
    straddling: bool
    unlike: bool
    special: bool
    unthought: bool


def encode(
    template: Template,
    conversations: Sequence[Conversation],
    max_length: int,
    loss_on: LossOn = "answers",
    bad: BadRows | None = None,
) -> tuple[dict[str, Tensor], Counts]:
    """Returns token ids and labels of all examples with a target, concatenated.

    input_ids (tokens,) int32
    labels    (tokens,) int32: the token that each position predicts, -100 if it is not learned
    offsets   (examples + 1,) int64: the start of each example, and the end of the last
    rows      (examples,) int64: the index of each among the conversations

    Rows that the template refuses are added to `bad` and skipped; without `bad` they are an error.
    Raises DataError if no example is left, and what Template.render raises.
    """
    counts: Counter[str] = Counter()
    # int32 is enough for any vocabulary, and a large data set is mostly ids.
    parts: dict[str, list[Tensor]] = {"input_ids": [], "labels": []}
    lengths, rows = [], []
    for start in range(0, len(conversations), TEXTS_AT_ONCE):
        flat: dict[str, list[int]] = {"input_ids": [], "labels": []}
        batch = rendered(template, conversations[start : start + TEXTS_AT_ONCE], loss_on, bad)
        texts = [(conversations[start + row], text) for row, text in batch]
        for (row, _), tokens in zip(batch, tokenized(template, texts), strict=True):
            ids, labels = tokens.ids[:max_length], shifted_labels(tokens, max_length)
            counts["long"] += len(tokens.ids) > max_length
            counts["cut"] += len(tokens.ids) - len(ids)
            for name in ("straddling", "unlike", "special", "unthought"):
                counts[name] += getattr(tokens, name)
            if learned := len(labels) - labels.count(IGNORED):
                counts.update(tokens=len(ids), learned=learned)
                flat["input_ids"] += ids
                flat["labels"] += labels
                lengths.append(len(ids))
                rows.append(start + row)
        for name, values in flat.items():
            parts[name].append(torch.tensor(values, dtype=torch.int32))
    counts.update(examples=len(conversations), lost=len(conversations) - len(rows))
    totals = Counts(**counts)
    if not rows:
        if bad is not None:
            bad.judge(left=False)
        raise DataError(
            f"none of {len(conversations)} examples has anything to learn:"
            f" {totals.note(max_length)}. Raise --max-length, or run lora data preview."
        )
    tensors = {name: torch.cat(pieces) for name, pieces in parts.items()}
    tensors["offsets"] = torch.tensor([0, *itertools.accumulate(lengths)])
    return tensors | {"rows": torch.tensor(rows)}, totals


def encode_pairs(
    template: Template,
    conversations: Sequence[Conversation],
    max_length: int,
    bad: BadRows | None = None,
) -> tuple[dict[str, Tensor], Counts]:
    """Returns the prompts as the encoder's input and the answers as the decoder's labels.

    As encode(), but the labels are the answer's tokens with the end token, and are not shifted.
    They have their own label_offsets (examples + 1,). Prompt and answer are each truncated to
    max_length.
    """
    rows = [
        number
        for number, conversation in enumerate(conversations)
        if _try(lambda c: _text_alone(template, c), conversation, bad) is not None
        and conversation.messages[-1].learned
    ]
    counts: Counter[str] = Counter(examples=len(conversations))
    counts["lost"] = len(conversations) - len(rows)
    sequences: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        batch = [conversations[row] for row in rows[start : start + TEXTS_AT_ONCE]]
        sources = prompt_ids(template, batch, encoder=True)
        answers = _answer_ids(template, batch)
        for source, answer in zip(sources, answers, strict=True):
            cut = [_cut(ids, max_length, template.tokenizer) for ids in (source, answer)]
            counts["long"] += cut != [source, answer]
            counts["cut"] += len(source) + len(answer) - sum(map(len, cut))
            counts.update(tokens=sum(map(len, cut)), learned=len(cut[1]))
            for name, ids in zip(sequences, cut, strict=True):
                sequences[name].append(ids)
    tensors = {}
    for name, offsets in (("input_ids", "offsets"), ("labels", "label_offsets")):
        flat = [*itertools.chain.from_iterable(sequences[name])]
        tensors[name] = torch.tensor(flat, dtype=torch.int32)
        tensors[offsets] = torch.tensor([0, *itertools.accumulate(map(len, sequences[name]))])
    if not rows and bad is not None:
        bad.judge(left=False)
    return tensors | {"rows": torch.tensor(rows)}, Counts(**counts)


def prompt_ids(
    template: Template, conversations: Sequence[Conversation], encoder: bool = False
) -> list[list[int]]:
    """Returns the token ids of the prompts, not truncated.

    encoder: add the special tokens that the tokenizer puts around a text.
    """
    texts = [template.prompt(conversation) for conversation in conversations]
    if not encoder:
        heads = [template.head(conversation) for conversation in conversations]
        return [ids for ids, _ in _token_ids(template, texts, heads)]
    head, tail = _frame(template.tokenizer, text="a")
    return _framed(template, [text.removeprefix(template.start) for text in texts], head, tail)


def _text_alone(template: Template, conversation: Conversation) -> str:
    """Returns the prompt. Raises DataError if the answer has more than a text.

    The decoder of an encoder-decoder model gets no template, so it can learn only a text.
    """
    last = conversation.messages[-1]
    if last.role == "assistant" and last.more:
        raise DataError(
            f"{conversation.place}: the answer has {last.more[0][0]}, but an encoder-decoder base"
            " can only learn a text. Remove it, or pass another --base."
        )
    return template.prompt(conversation)


def _framed(
    template: Template, texts: Sequence[str], head: list[int], tail: list[int]
) -> list[list[int]]:
    """Returns the ids of each text between head and tail.

    If a text contains them already, they are removed first, so that no token occurs twice.
    """
    decoder = template.tokenizer.added_tokens_decoder
    first = "".join(decoder[token].content for token in head if token in decoder)
    last = "".join(decoder[token].content for token in tail if token in decoder)
    bare = [
        text.strip().removeprefix(first).removesuffix(last)
        if (first and text.lstrip().startswith(first)) or (last and text.rstrip().endswith(last))
        else text
        for text in texts
    ]
    encodings = template.core.encode_batch_fast(bare, add_special_tokens=False)
    return [head + encoding.ids + tail for encoding in encodings]


def _answer_ids(template: Template, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Returns the ids of the answers, with the special tokens of the tokenizer for targets."""
    head, tail = _frame(template.tokenizer, text_target="a")
    end = template.tokenizer.eos_token_id
    tail = tail if end in tail else [*tail, end]  # without it the model never learns to stop
    texts = [conversation.messages[-1].content.strip() for conversation in conversations]
    return _framed(template, texts, head, tail)


def _frame(tokenizer: Any, **text: str) -> tuple[list[int], list[int]]:
    """Returns the special token ids that a tokenizer adds before and after a text."""
    # By a trial: BERT's, T5's and BART's post-processors have no common setting for them.
    encoding = tokenizer(return_special_tokens_mask=True, **text)
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]


def _cut(ids: list[int], length: int, tokenizer: Any) -> list[int]:
    """Truncates to `length` ids. If they end with the end token, it is kept."""
    # Encoders were trained with it at the end of every text.
    ended = ids[-1:] if ids[-1] == tokenizer.eos_token_id else []
    return ids if len(ids) <= length else ids[: length - len(ended)] + ended


def shifted_labels(tokens: TokenizedText, length: int) -> list[int]:
    """Returns the label of each of the first `length` positions: the next token, or IGNORED.

    labels[i] is ids[i + 1] if token i + 1 is learned. No position predicts the first token.
    """
    ids = tokens.ids[:length]
    labels = [IGNORED] * len(ids)
    for first, last in tokens.learned:
        for token in range(max(first, 1), min(last, len(ids))):
            labels[token - 1] = ids[token]
    return labels


def refuse(
    template: Template, conversations: Sequence[Conversation], loss_on: LossOn, bad: BadRows
) -> None:
    """Adds the rows that the template refuses to `bad`."""
    rendered(template, conversations, loss_on, bad)


def refuse_prompts(template: Template, conversations: Sequence[Conversation], bad: BadRows) -> None:
    """Adds the rows whose prompt the template refuses to `bad`."""
    for conversation in conversations:
        _try(template.prompt, conversation, bad)


def rendered(
    template: Template,
    conversations: Sequence[Conversation],
    loss_on: LossOn,
    bad: BadRows | None = None,
) -> list[tuple[int, Rendered]]:
    """Returns (index, text) of each conversation that the template accepts.

    The others are added to `bad`; without `bad` their DataError is raised.
    """
    texts = []
    for number, conversation in enumerate(conversations):
        if number % TOGETHER == 0:
            template.prepare(conversations[number : number + TOGETHER], loss_on)
        text = _try(lambda c: template.render(c, loss_on), conversation, bad)
        if text is not None:
            texts.append((number, text))
    return texts


def _try(
    write: Callable[[Conversation], T], conversation: Conversation, bad: BadRows | None
) -> T | None:
    """Returns write(conversation), or None if it raises DataError: then the row goes to `bad`."""
    try:
        return write(conversation)
    except DataError as error:
        if bad is None:
            raise
        bad.add(error, conversation.place)
        return None


def tokenized(
    template: Template, texts: Sequence[tuple[Conversation, Rendered]]
) -> Iterator[TokenizedText]:
    """Yields the tokens of each text."""
    heads = [template.head(conversation) for conversation, _ in texts]
    wholes = _token_ids(template, [written.text for _, written in texts], heads)
    prompts = _token_ids(template, [written.prompt for _, written in texts], heads)
    for (conversation, written), (ids, offsets), (prompt, _) in zip(
        texts, wholes, prompts, strict=True
    ):
        stretches = [_stretch(written.text, offsets, span) for span in written.spans]
        yield TokenizedText(
            text=written.text,
            ids=ids,
            offsets=offsets,
            learned=[stretch for stretch, _ in stretches],
            straddling=any(straddling for _, straddling in stretches),
            # Such as a token across the border, which no generation produces.
            unlike=ids[: len(prompt)] != prompt,
            special=template.has_special(conversation),
            unthought=any(thought.strip() not in written.text for thought in conversation.thoughts),
        )


def _token_ids(
    template: Template, texts: Sequence[str], heads: Sequence[str]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Yields (ids, offsets) of each text. Its head is the BOS token or "" and is not tokenized."""
    rests = [text[len(head) :] for text, head in zip(texts, heads, strict=True)]
    encodings = template.core.encode_batch(rests, add_special_tokens=False)
    for head, rest in zip(heads, encodings, strict=True):
        first, width = [template.tokenizer.bos_token_id] * bool(head), len(head)
        # Offsets count from the start of the rest; shift them to the start of the text.
        offsets = (
            [(start + width, end + width) for start, end in rest.offsets] if head else rest.offsets
        )
        yield first + rest.ids, [(0, width)] * bool(head) + offsets


def _stretch(text: str, offsets: Sequence[Span], span: Span) -> tuple[Span, bool]:
    """Returns the range of tokens that a span touches, and True if its edge is inside a token.

    A token that has only white space outside the span, as special tokens may, is not counted.
    """
    start, end = span
    # Offsets ascend, so two binary searches find the range, also in a text of many turns.
    first = bisect_right(offsets, start, key=lambda token: token[1])
    last = bisect_left(offsets, end, key=lambda token: token[0])
    if first < last and offsets[first][0] < start and not text[start : offsets[first][1]].strip():
        first += 1
    straddling = first < last and (
        bool(text[offsets[first][0] : start].strip())
        or bool(text[end : offsets[last - 1][1]].strip())
    )
    return (first, last), straddling
