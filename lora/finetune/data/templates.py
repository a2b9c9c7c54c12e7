"""Conversations as text, as tokens, and as what is to be learned of them.

template_of(tokenizer, asked)   -> Template: the base's own, the plain one, none, or a file's
template.render(conversation)   -> Rendered: the text, and where in it the answers are
encode(template, ...)           -> token ids and labels, the labels shifted by one
encode_pairs(template, ...)     -> the same for an encoder and a decoder
preview(template, ...)          prints examples token by token, what is masked dimmed

Where an answer is. A template is a program, which may do anything with a message, and few mark by
{% generation %} what the model writes; those that do often leave out the token that ends the turn,
without which nobody learns to stop. (transformers' own mask from those marks is no measure: where a
token hides its space it drops the answer, or learns all that follows.) So answers are found in the
same way under every template, from what it makes of the conversation and of two others:

    the messages before the answer, with the opening of the next turn    what generation sees
    the conversation with a mark in the answer's place                    what lies around it

An answer begins where generation goes on, if the whole begins with what generation sees, and else
behind what lies before the mark. It ends before what lies behind the mark, and with it go the
characters that close a turn, found once per template by the same mark in a conversation of one
turn. Where the pieces do not fit together, or a message before the answer is nowhere before it,
the template is refused: better no mask than a wrong one.

Text into tokens. The text holds every special token, and the tokenizer adds none: a template writes
its own, and where there is none we write the first token that the tokenizer would, and hand it what
follows alone: a SentencePiece tokenizer may begin the first word of all by a space, and no word
behind a token. Each text is tokenised whole; a token is learned where its characters lie in an
answer. Offsets are those of the tokenizer's core without its post-processor, which would leave out
leading spaces.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import rich.console
import torch
from rich.text import Text
from torch import Tensor

from lora.errors import ConfigError, DataError, ModelError
from lora.files import readable
from lora.finetune.data.conversations import Conversation, Message
from lora.finetune.data.rows import BadRows
from lora.finetune.data.tokens import IGNORED
from lora.interop.rendering import LimitError, RenderError, render

LossOn = Literal["answers", "all"]
TEMPLATES = ("auto", "plain", "none")
"""What --template takes besides a file."""
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'system' %}{{ message.content }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MARK = "\ue0d7\ue0d8\ue0d9"  # of the private use area: no template trims or escapes it
TOGETHER = 16  # conversations rendered at a time
AT_ONCE = 1_000  # texts tokenised at a time: the offsets of more would be held as Python's numbers

THOUGHT = "\ue0da\ue0db\ue0dc"  # in the place of an answer's reasoning
LISTS = ("tools", "documents")  # what a template is given beside messages, and writes

Span = tuple[int, int]
T = TypeVar("T")
_Asked = tuple[tuple[Message, ...], str, bool]  # a text: messages, what else is given, an opening


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # characters of each answer with the end of its turn
    prompt: str  # what generation would go on from, to the last answer


@dataclass(frozen=True)
class Template:
    """How a base wants conversations written."""

    tokenizer: Any
    jinja: str | None  # None: prompt and answer as they stand, and the end token
    name: str
    raw: bool  # whether raw conversations go by the template too
    _texts: dict[_Asked, str | RenderError] = field(default_factory=dict, compare=False, repr=False)

    def render(self, conversation: Conversation, loss_on: LossOn = "answers") -> Rendered:
        """Text, what is to be learned of it, and prompt.

        Raises DataError if the template refuses the conversation, leaves out a part of it, or if
        its answers cannot be told from the rest; ConfigError if nothing ends them.
        """
        messages = conversation.messages
        if self._bare(conversation):
            prompt = self.prompt(conversation)
            text, written = self._as_it_stands(conversation)
            answers = {len(messages) - 1: (len(written), len(text))}
        else:
            numbers = _to_find(messages, loss_on)
            if (messages, conversation.given, False) not in self._texts:
                self.prepare([conversation], loss_on)
            prompt, text = self.prompt(conversation), self._text(conversation)
            openings = {len(messages) - 1: prompt}
            answers = {
                number: self._span(conversation, number, text, openings.get(number))
                for number in numbers
            }
        if loss_on == "answers":
            spans = [span for number, span in answers.items() if messages[number].learned]
        else:
            muted = [span for number, span in answers.items() if not messages[number].learned]
            spans = _between(len(text), muted)
        return Rendered(text, tuple(spans), prompt)

    def prompt(self, conversation: Conversation) -> str:
        """The text that a model is asked to continue."""
        if self._bare(conversation):
            roles = [message.role for message in conversation.messages]
            fields = conversation.given or any(message.more for message in conversation.messages)
            if fields or roles not in (["user"], ["assistant"], ["user", "assistant"]):
                found = f"{len(roles)} messages ({', '.join(roles[:4])})"
                raise DataError(
                    f"{conversation.place}: {'tools or thoughts' if fields else found} need a"
                    " template. Pass --template plain, or a file."
                )
            return self._as_it_stands(conversation)[1]
        self._check_written(conversation)
        return self._opening(replace(conversation, messages=conversation.prompt))

    def _as_it_stands(self, conversation: Conversation) -> tuple[str, str]:
        """A conversation without a template, whole and to the answer, with the tokens that begin
        and end a text: each once, also if the text has them already."""
        ended = conversation.messages[-1].role == "assistant"
        asked = "".join(message.content for message in conversation.prompt)
        answer = conversation.messages[-1].content if ended else ""
        begin, end = self.start, _end_token(self.tokenizer)
        if begin and (asked or answer).lstrip().startswith(begin):
            asked, answer, begin = asked.lstrip(), answer if asked else answer.lstrip(), ""
        if answer.rstrip().endswith(end):
            answer = answer.rstrip().removesuffix(end)
        text = begin + asked + answer + end
        if (ended and text.endswith(2 * end)) or (self.start and text.startswith(2 * self.start)):
            token = end if text.endswith(2 * end) else self.start
            raise DataError(f"{conversation.place}: {token} stands there twice. Remove one.")
        return text, begin + asked

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The token ids that end an answer."""
        found = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        last = self.core.encode(self.closing, add_special_tokens=False).ids[-1]
        if last in self.tokenizer.added_tokens_decoder and last not in found:
            found.append(last)
        return tuple(found)

    @cached_property
    def core(self) -> Any:
        """The tokenizer without what it adds to a text: tokenizers.Tokenizer.

        Raises ModelError for a tokenizer that is not built on it, and says no offsets.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(self.tokenizer).__name__} has no fast backend, which says where each token"
                " stands in the text. Save the base with a tokenizer.json."
            )
        core = copy.deepcopy(backend)
        core.post_processor = None
        core.no_truncation()
        core.no_padding()
        return core

    @cached_property
    def start(self) -> str:
        """The token that the tokenizer itself puts before a text, "" where it puts none."""
        bos = self.tokenizer.bos_token_id
        added = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return str(self.tokenizer.bos_token) if added else ""

    @cached_property
    def closing(self) -> str:
        """What closes the assistant's turn: the first special token behind the answer, with what
        lies between. Raises ConfigError where the template writes nothing there."""
        if self.jinja is None:
            return _end_token(self.tokenizer)
        behind = self._around(_probe(Message("assistant", MARK)), 1)[1]
        ends = [behind.find(one) + len(one) for one in self._special if one in behind]
        closing = behind[: min(ends)] if ends else behind.rstrip()
        if not closing:
            raise ConfigError(
                f"the chat template ({self.name}) writes nothing behind an answer: a model that"
                " learns from it never stops. Pass --template plain, or a file that ends the turn."
            )
        return closing

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The special tokens that are not white space."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.content.strip())

    @cached_property
    def _opens(self) -> bool:
        """Whether the template writes the opening of an answer where it is asked for it."""
        return self._text(_probe()) != self._text(_probe(), True)

    @cached_property
    def thought_end(self) -> str:
        """What a model writes between its reasoning and its answer, special tokens left out; "" if
        the template knows no reasoning."""
        if self.jinja is None:
            return ""
        thought = _thinking(Message("assistant", MARK))
        between = self._text(_probe(thought)).partition(THOUGHT)[2].partition(MARK)[0]
        ids = self.core.encode(between, add_special_tokens=False).ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    @cached_property
    def _thinks(self) -> bool:
        """Whether the template writes the reasoning of an answer."""
        return THOUGHT in self._text(_probe(_thinking(Message("assistant", "y"))))

    def head(self, conversation: Conversation) -> str:
        """The token before its text that the tokenizer would put there; "" where a template, or the
        text, has what begins it."""
        if not self._bare(conversation):
            return ""
        first = next((one.content for one in conversation.messages if one.content), "")
        return "" if first.lstrip().startswith(self.start) else self.start

    def has_special(self, conversation: Conversation) -> bool:
        """Whether what was said in a conversation holds a special token of the tokenizer."""
        return not self._bare(conversation) and any(
            self._special_tokens.search(message.content) for message in conversation.messages
        )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        tokens = self.tokenizer.added_tokens_decoder.values()
        names = [re.escape(one.content) for one in tokens if one.special and one.content.strip()]
        return re.compile("|".join(names) or "(?!)")

    def _bare(self, conversation: Conversation) -> bool:
        return self.jinja is None or (conversation.raw and not self.raw)

    def _text(self, conversation: Conversation, opening: bool = False) -> str:
        """A conversation as the template writes it, with the opening of an answer behind it or
        not."""
        place, messages = conversation.place, conversation.messages
        key = messages, conversation.given, opening
        if key not in self._texts:
            self._render([key])
        text = self._texts[key]
        if isinstance(text, LimitError):
            raise ConfigError(
                f"the chat template ({self.name}) cannot be used. At {place} {text}. Pass"
                " --template plain, or a file with another."
            ) from text
        if isinstance(text, RenderError):  # a template raises what it likes
            roles = ", ".join(dict.fromkeys(one.role for one in messages))
            raise DataError(
                f"{place}: the chat template ({self.name}) refuses a conversation of {roles}:"
                f" {text}. Mend the row, or pass --template plain."
            ) from text
        return text

    def prepare(self, conversations: Sequence[Conversation], loss_on: LossOn = "answers") -> None:
        """Render in one go, which is faster, what render() needs of most of these conversations;
        what was rendered before is forgotten."""
        keys: list[_Asked] = []
        for one in conversations:
            if not self._bare(one):
                messages, given = one.messages, one.given
                numbers = _to_find(messages, loss_on)
                keys.append((messages, given, False))
                keys += [(messages[:number], given, True) for number in numbers if number]
                keys += [(_marked(messages, number), given, False) for number in numbers]
        self._texts.clear()
        if keys:
            self._render(keys)

    def _render(self, keys: Sequence[_Asked]) -> None:
        assert self.jinja is not None
        if len(self._texts) > AT_ONCE:  # of many prompts, one after the other
            self._texts.clear()
        special = self.tokenizer.special_tokens_map
        values = [
            {
                **special,
                "tools": None,
                "documents": None,
                **(json.loads(given) if given else {}),
                "messages": [self._fields(message) for message in messages],
                "add_generation_prompt": opening,
            }
            for messages, given, opening in keys
        ]
        try:
            self._texts.update(zip(keys, render(self.jinja, values), strict=True))
        except ImportError as error:
            raise ModelError(str(error)) from error

    def _fields(self, message: Message) -> dict[str, Any]:
        """A message as the template reads it, whatever form its row has."""
        found = message.fields()
        if "reasoning_content" in found:
            found["thinking"] = found["reasoning_content"]  # its name in gpt-oss's template
        for call in found.get("tool_calls", ()):
            inner = call.get("function", call)
            inner["arguments"] = _arguments(inner["arguments"], self._arguments_are_text)
        return found

    @cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template writes a call's arguments as they are: they must be JSON then, and
        an object would be written as Python writes it."""
        values = []
        for arguments in ({"x": "y"}, "{}"):
            function = {"name": "f", "arguments": arguments}
            call = {"id": "call00000", "type": "function", "function": function}
            said = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages = [{"role": "user", "content": "x"}, said]
            values.append({**self.tokenizer.special_tokens_map, "messages": messages})
        object_, text = render(str(self.jinja), values)
        if isinstance(object_, RenderError):
            return isinstance(text, str)
        return "{'x': 'y'}" in object_

    def _around(self, conversation: Conversation, number: int) -> tuple[str, str]:
        """What lies before and behind what the model writes of a message without calls."""
        marked = replace(conversation, messages=_marked(conversation.messages, number))
        ahead, *behind = self._text(marked).split(MARK)
        if len(behind) != 1:
            raise DataError(
                f"{conversation.place}: the chat template ({self.name}) writes an answer"
                f" {len(behind)} times, not once: what is to be learned is unknown. Pass --template"
                " plain."
            )
        return ahead.partition(THOUGHT)[0], behind[0]

    def _behind_calls(self, conversation: Conversation, number: int) -> str:
        """What lies behind a message that calls tools. Raises DataError if the template does not
        write the calls."""
        messages = conversation.messages
        marked = (*messages[:number], _called(messages[number]))
        alone = replace(conversation, messages=marked)
        whole = replace(conversation, messages=(*marked, *messages[number + 1 :]))
        tails = [self._text(one).split(MARK)[1:] for one in (alone, whole)]
        if [len(tail) for tail in tails] == [1, 1]:
            (tail,), (rest,) = tails
            last = self.closing.strip()
            ends = [tail.rfind(one) + len(one) for one in self._special if one in tail]
            end = tail.rfind(last) + len(last) if last in tail else max(ends, default=0)
            if end and rest.startswith(tail[:end]):
                return rest[end:]
        raise DataError(
            f"{conversation.place}: the chat template ({self.name}) does not write the tool_calls"
            f" of message {number + 1} so that they can be learned. Pass --template FILE with one"
            " that does, or remove them."
        )

    def _opening(self, conversation: Conversation) -> str:
        """The messages and the opening of the answer, also where the template writes the one with
        an answer alone; a space before it is the answer's."""
        messages = conversation.messages
        asked = self._text(conversation, True) if messages else ""
        if messages and self._opens:
            return asked
        answered = replace(conversation, messages=(*messages, Message("assistant", MARK)))
        ahead = self._around(answered, len(messages))[0].rstrip(" ")
        return ahead if ahead.startswith(asked) else asked

    def _span(
        self, conversation: Conversation, number: int, text: str, opening: str | None
    ) -> Span:
        """From and to: the characters of an answer and the end of its turn."""
        messages, calls = conversation.messages, conversation.messages[number].has("tool_calls")
        before = replace(conversation, messages=messages[:number])
        opening = self._opening(before) if opening is None else opening
        said = [one for one in messages[:number] if one.role in ("system", "user")]
        lost = [one.role for one in said if one.content.strip() not in text]
        # An opening that lacks what was said is none: its template writes that with the answer.
        full = all(one.content.strip() in opening for one in said)
        start = len(opening) if full and text.startswith(opening) else None
        behind = self._behind_calls(conversation, number) if calls else None
        if start is None or behind is None:
            ahead, rest = self._around(conversation, number)
            ahead, behind = ahead.rstrip(" "), rest if behind is None else behind
            if start is None:
                start = len(ahead) if text.startswith(ahead) else len(text)
        end = len(text) - len(behind)
        around = start < end and text.endswith(behind)
        if around and not lost and (calls or behind.startswith(self.closing)):
            return start, end + (0 if calls else len(self.closing))
        why = f"changes around message {number + 1}"
        why = f"leaves out the {lost[0]}'s message" if lost else why
        raise DataError(
            f"{conversation.place}: the chat template ({self.name}) {why}: what is to be learned"
            " cannot be told from the rest. Pass --template plain."
        )

    def _check_written(self, conversation: Conversation) -> None:
        """Raise DataError if the template leaves out a part of the conversation beside what was
        said, or would write a token a second time that a message has already."""
        messages = conversation.messages
        for number, one in enumerate(messages):
            self._check_ends(conversation.place, number, one)
            lost = None
            if one.has("tool_calls"):
                self._behind_calls(conversation, number)
            if one.has("reasoning_content") and not self._thinks:
                thought = (*messages[:number], _thinking(one), *messages[number + 1 :])
                if THOUGHT not in self._text(replace(conversation, messages=thought)):
                    lost = f"the reasoning_content of message {number + 1}"
            if one.role == "tool" and one.content not in self._text(conversation):
                marked = replace(conversation, messages=_marked(messages, number))
                if MARK not in self._text(marked):
                    lost = f"the tool's message {number + 1}"
            if lost:
                raise self._unwritten(conversation.place, lost)
        given: dict[str, Any] = json.loads(conversation.given) if conversation.given else {}
        for name in given:
            rest = json.dumps({key: value for key, value in given.items() if key != name})
            without = replace(conversation, given=rest)
            if name not in str(self.jinja) or (
                name in LISTS and self._text(without) == self._text(conversation)
            ):
                raise self._unwritten(conversation.place, name)

    def _unwritten(self, place: str, what: str) -> DataError:
        return DataError(
            f"{place}: the chat template ({self.name}) does not write {what}, so that it cannot be"
            " learned from. Pass --template FILE with one that does, or remove it."
        )

    def _check_ends(self, place: str, number: int, message: Message) -> None:
        """Raise DataError for what was said with a token at its edge that the template writes."""
        content, begin = message.content.strip(), self.tokenizer.bos_token
        ends = [self.tokenizer.eos_token, self.closing.strip()]
        twice = [begin] if begin and content.startswith(begin) else []
        twice += [end for end in ends if end and content.endswith(end)]
        if twice:
            raise DataError(
                f"{place}: message {number + 1} has {twice[0]} at its edge, which is the chat"
                f" template's ({self.name}) to write. Remove it; for texts that are written out"
                " already, pass --template none."
            )


def _to_find(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """The numbers of the answers whose place matters: those that are learned, or of a loss on
    everything those that are not."""
    return [
        number
        for number, one in enumerate(messages)
        if one.role == "assistant" and one.learned == (loss_on == "answers")
    ]


def _probe(*answer: Message) -> Conversation:
    return Conversation((Message("user", "x"), *answer), place="a conversation of one turn")


def _thinking(message: Message) -> Message:
    """A message with a mark in the place of its reasoning."""
    fields = {**dict(message.more), "reasoning_content": json.dumps(THOUGHT)}
    return replace(message, more=tuple(fields.items()))


def _marked(messages: Sequence[Message], number: int) -> tuple[Message, ...]:
    """Messages with marks in the place of what one of them says and thinks, and without its
    calls."""
    message = messages[number]
    message = _thinking(message) if message.has("reasoning_content") else message
    more = tuple((name, value) for name, value in message.more if name != "tool_calls")
    marked = replace(message, content=MARK, more=more)
    return (*messages[:number], marked, *messages[number + 1 :])


def _called(message: Message) -> Message:
    """A message with a mark in the place of its last call's arguments."""
    *calls, last = message.fields()["tool_calls"]
    inner = last.get("function", last)
    object_ = isinstance(_arguments(inner["arguments"], False), dict)
    inner = {**inner, "arguments": {"x": MARK} if object_ else MARK}
    last = {**last, "function": inner} if "function" in last else inner
    fields = {**dict(message.more), "tool_calls": json.dumps([*calls, last])}
    return replace(message, more=tuple(fields.items()))


def _arguments(value: Any, text: bool) -> Any:
    """A call's arguments as JSON's text or as its value, whichever a template takes."""
    if text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            return found if isinstance(found, dict) else value
    return value


def _between(length: int, spans: Sequence[Span]) -> list[Span]:
    """What spans leave of a text."""
    edges = [0, *itertools.chain.from_iterable(spans), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]


def template_of(tokenizer: Any, asked: str = "auto") -> Template:
    """The template that --template means.

    auto    the tokenizer's own, or plain where it has none; raw conversations as they stand
    plain   User: and Assistant: before each message, the end token behind each answer
    none    prompt and answer as they stand, of one turn
    else    a file with a template in Jinja

    Raises ConfigError where there is no such file, or the tokenizer has several and no default;
    ModelError where a plain template finds no end token.
    """
    own = getattr(tokenizer, "chat_template", None)
    if asked == "auto" and own:
        try:
            return Template(tokenizer, tokenizer.get_chat_template(), "the tokenizer's", raw=False)
        except ValueError as error:
            raise ConfigError(f"--template auto: {error} Pass --template FILE.") from None
    if asked in TEMPLATES:
        _end_token(tokenizer)
        bare = Template(tokenizer, None, "none", raw=False)
        plain = ("{{ bos_token }}" if bare.start else "") + PLAIN
        return bare if asked == "none" else Template(tokenizer, plain, "plain", asked == "plain")
    with readable(asked, ConfigError, "Pass auto, plain, none or a file to --template."):
        text = Path(asked).read_text("utf-8")
    return Template(tokenizer, text, asked, raw=True)


def _end_token(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no end token, which raw text and the plain template"
            " end an answer with. Set eos_token in tokenizer_config.json."
        )
    return str(tokenizer.eos_token)


@dataclass(frozen=True)
class Counts:
    """What became of the examples."""

    examples: int = 0
    tokens: int = 0  # of what is left, cut
    learned: int = 0  # of those, the targets
    long: int = 0  # examples longer than max_length, and cut
    cut: int = 0  # their tokens behind it
    lost: int = 0  # examples without a target left, and left out
    straddling: int = 0  # examples with a token that is part answer, part not; it is learned
    unlike: int = 0  # examples that do not begin with the tokens that generation starts from
    special: int = 0  # examples with special tokens in what was said
    unthought: int = 0  # examples whose template leaves out the reasoning of an earlier answer

    def note(self, max_length: int) -> str:
        """One line for the user; "" where there is nothing to say."""
        said = []
        if self.long:
            said.append(
                f"{self.long} of {self.examples} examples are longer than --max-length {max_length}"
                f" and cut, {self.cut} tokens in all"
            )
        if self.lost:
            said.append(f"{self.lost} of {self.examples} have no answer left and are left out")
        if self.straddling:
            said.append(f"{self.straddling} learn a token that is only in part the answer's")
        if self.unlike:
            said.append(f"{self.unlike} begin with other tokens than generation starts from")
        if self.special:
            said.append(f"{self.special} have special tokens of the tokenizer in what was said")
        if self.unthought:
            said.append(f"of {self.unthought} the template leaves out the reasoning of an answer")
        return "; ".join(said)


@dataclass(frozen=True)
class Tokens:
    """An example, uncut."""

    text: str
    ids: list[int]
    offsets: list[Span]  # characters of each token
    learned: list[Span]  # stretches of tokens
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
    """Token ids and labels of the examples that have something to learn, one after the other.

    input_ids (tokens,) int32
    labels    (tokens,) int32: the token that each position predicts, -100 where nothing is learned
    offsets   (examples + 1,) int64: where each example begins, and where the last ends
    rows      (examples,) int64: their numbers among the conversations

    Rows that the template refuses are added to `bad` and left out; without it they are an error.
    Raises DataError if none is left, and as Template.render does.
    """
    counts: Counter[str] = Counter()
    parts: dict[str, list[Tensor]] = {"input_ids": [], "labels": []}
    lengths, rows = [], []
    for start in range(0, len(conversations), AT_ONCE):
        flat: dict[str, list[int]] = {"input_ids": [], "labels": []}
        some = _rendered(template, conversations[start : start + AT_ONCE], loss_on, bad)
        texts = [(conversations[start + row], rendered) for row, rendered in some]
        for (row, _), found in zip(some, _tokenise(template, texts), strict=True):
            ids, labels = found.ids[:max_length], _labels(found, max_length)
            counts["long"] += len(found.ids) > max_length
            counts["cut"] += len(found.ids) - len(ids)
            for name in ("straddling", "unlike", "special", "unthought"):
                counts[name] += getattr(found, name)
            if learned := len(labels) - labels.count(IGNORED):
                counts.update(tokens=len(ids), learned=learned)
                flat["input_ids"] += ids
                flat["labels"] += labels
                lengths.append(len(ids))
                rows.append(start + row)
        for name, values in flat.items():
            parts[name].append(torch.tensor(values, dtype=torch.int32))
    counts.update(examples=len(conversations), lost=len(conversations) - len(rows))
    found_counts = Counts(**counts)
    if not rows:
        if bad is not None:
            bad.judge(left=False)
        raise DataError(
            f"none of {len(conversations)} examples has anything to learn:"
            f" {found_counts.note(max_length)}. Raise --max-length, or run lora data preview."
        )
    tensors = {name: torch.cat(some) for name, some in parts.items()}
    tensors["offsets"] = torch.tensor([0, *itertools.accumulate(lengths)])
    return tensors | {"rows": torch.tensor(rows)}, found_counts


def encode_pairs(
    template: Template,
    conversations: Sequence[Conversation],
    max_length: int,
    bad: BadRows | None = None,
) -> tuple[dict[str, Tensor], Counts]:
    """What an encoder reads and its decoder writes: the prompt, and the answer as labels.

    As encode(), but that the labels are the answer's own tokens, not shifted, closed by the end
    token, with label_offsets (examples + 1,) of their own. Each is cut to max_length.
    """
    rows = [
        number
        for number, one in enumerate(conversations)
        if _try(lambda one: _text_alone(template, one), one, bad) is not None
        and one.messages[-1].learned
    ]
    counts: Counter[str] = Counter(examples=len(conversations))
    counts["lost"] = len(conversations) - len(rows)
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for start in range(0, len(rows), AT_ONCE):
        some = [conversations[row] for row in rows[start : start + AT_ONCE]]
        sources = prompt_ids(template, some, encoder=True)
        answers = _answer_ids(template, some)
        for source, answer in zip(sources, answers, strict=True):
            cut = [_cut(ids, max_length, template.tokenizer) for ids in (source, answer)]
            counts["long"] += cut != [source, answer]
            counts["cut"] += len(source) + len(answer) - sum(map(len, cut))
            counts.update(tokens=sum(map(len, cut)), learned=len(cut[1]))
            for name, ids in zip(found, cut, strict=True):
                found[name].append(ids)
    tensors = {}
    for name, offsets in (("input_ids", "offsets"), ("labels", "label_offsets")):
        flat = [*itertools.chain.from_iterable(found[name])]
        tensors[name] = torch.tensor(flat, dtype=torch.int32)
        tensors[offsets] = torch.tensor([0, *itertools.accumulate(map(len, found[name]))])
    if not rows and bad is not None:
        bad.judge(left=False)
    return tensors | {"rows": torch.tensor(rows)}, Counts(**counts)


def prompt_ids(
    template: Template, conversations: Sequence[Conversation], encoder: bool = False
) -> list[list[int]]:
    """The tokens that a model goes on from, uncut; for an encoder with what it ends a text by."""
    texts = [template.prompt(one) for one in conversations]
    if not encoder:
        heads = [template.head(one) for one in conversations]
        return [ids for ids, _ in _ids(template, texts, heads)]
    head, tail = _frame(template.tokenizer, text="a")
    return _framed(template, [text.removeprefix(template.start) for text in texts], head, tail)


def _text_alone(template: Template, conversation: Conversation) -> str:
    """What an encoder reads. Raises DataError for an answer that is more than a text, which is all
    that its decoder learns."""
    last = conversation.messages[-1]
    if last.role == "assistant" and last.more:
        raise DataError(
            f"{conversation.place}: the answer has {last.more[0][0]}, and a base with a decoder of"
            " its own learns a text alone. Remove it, or pass another --base."
        )
    return template.prompt(conversation)


def _framed(
    template: Template, texts: Sequence[str], head: list[int], tail: list[int]
) -> list[list[int]]:
    """Texts as ids between those that frame them, each once, also if a text has them already."""
    decoder = template.tokenizer.added_tokens_decoder
    first = "".join(decoder[token].content for token in head if token in decoder)
    last = "".join(decoder[token].content for token in tail if token in decoder)
    bare = [
        text.strip().removeprefix(first).removesuffix(last)
        if (first and text.lstrip().startswith(first)) or (last and text.rstrip().endswith(last))
        else text
        for text in texts
    ]
    found = template.core.encode_batch_fast(bare, add_special_tokens=False)
    return [head + one.ids + tail for one in found]


def _answer_ids(template: Template, conversations: Sequence[Conversation]) -> list[list[int]]:
    """What a decoder is to write: the answers, framed as the tokenizer frames targets."""
    head, tail = _frame(template.tokenizer, text_target="a")
    end = template.tokenizer.eos_token_id
    tail = tail if end in tail else [*tail, end]
    texts = [one.messages[-1].content.strip() for one in conversations]
    return _framed(template, texts, head, tail)


def _frame(tokenizer: Any, **text: str) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text."""
    found = tokenizer(return_special_tokens_mask=True, **text)
    ids, own = found["input_ids"], found["special_tokens_mask"]
    first, last = own.index(0), len(own) - own[::-1].index(0)
    return ids[:first], ids[last:]


def _cut(ids: list[int], length: int, tokenizer: Any) -> list[int]:
    """At most `length` ids, the end token kept."""
    ended = ids[-1:] if ids[-1] == tokenizer.eos_token_id else []
    return ids if len(ids) <= length else ids[: length - len(ended)] + ended


def _labels(found: Tokens, length: int) -> list[int]:
    """The token that each of the first `length` positions predicts, IGNORED where none is learned.

    The first token of all is predicted by none.
    """
    ids = found.ids[:length]
    labels = [IGNORED] * len(ids)
    for first, last in found.learned:
        for token in range(max(first, 1), min(last, len(ids))):
            labels[token - 1] = ids[token]
    return labels


def refuse(
    template: Template, conversations: Sequence[Conversation], loss_on: LossOn, bad: BadRows
) -> None:
    """Add the rows that the template refuses."""
    _rendered(template, conversations, loss_on, bad)


def refuse_prompts(template: Template, conversations: Sequence[Conversation], bad: BadRows) -> None:
    """Add the rows of which the template makes no prompt."""
    for one in conversations:
        _try(template.prompt, one, bad)


def _rendered(
    template: Template,
    conversations: Sequence[Conversation],
    loss_on: LossOn,
    bad: BadRows | None = None,
) -> list[tuple[int, Rendered]]:
    """The conversations as text by their numbers, less those that the template refuses."""
    found = []
    for number, one in enumerate(conversations):
        if number % TOGETHER == 0:
            template.prepare(conversations[number : number + TOGETHER], loss_on)
        text = _try(lambda one: template.render(one, loss_on), one, bad)
        if text is not None:
            found.append((number, text))
    return found


def _try(
    write: Callable[[Conversation], T], conversation: Conversation, bad: BadRows | None
) -> T | None:
    """What is written of a conversation; None if it is refused, which is added to `bad`."""
    try:
        return write(conversation)
    except DataError as error:
        if bad is None:
            raise
        bad.add(error, conversation.place)
        return None


def _tokenise(
    template: Template, texts: Sequence[tuple[Conversation, Rendered]]
) -> Iterator[Tokens]:
    rendered = [one for _, one in texts]
    heads = [template.head(one) for one, _ in texts]
    wholes = _ids(template, [one.text for one in rendered], heads)
    starts = _ids(template, [one.prompt for one in rendered], heads)
    for (said, one), (ids, offsets), (start, _) in zip(texts, wholes, starts, strict=True):
        stretches = [_stretch(one.text, offsets, span) for span in one.spans]
        yield Tokens(
            text=one.text,
            ids=ids,
            offsets=offsets,
            learned=[stretch for stretch, _ in stretches],
            straddling=any(straddling for _, straddling in stretches),
            unlike=ids[: len(start)] != start,
            special=template.has_special(said),
            unthought=any(thought.strip() not in one.text for thought in said.thoughts),
        )


def _ids(
    template: Template, texts: Sequence[str], heads: Sequence[str]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Of each text its ids and their characters: its head is a token, the rest the tokenizer's."""
    rests = [text[len(head) :] for text, head in zip(texts, heads, strict=True)]
    found = template.core.encode_batch(rests, add_special_tokens=False)
    for head, rest in zip(heads, found, strict=True):
        first, far = [template.tokenizer.bos_token_id] * bool(head), len(head)
        offsets = (
            [(start + far, end + far) for start, end in rest.offsets] if head else rest.offsets
        )
        yield first + rest.ids, [(0, far)] * bool(head) + offsets


def _stretch(text: str, offsets: Sequence[Span], span: Span) -> tuple[Span, bool]:
    """The tokens that have to do with a span, and whether an edge of it runs through one.

    A token that only takes white space from over the edge, as special tokens may, is no such one.
    """
    start, end = span
    first = bisect_right(offsets, start, key=lambda token: token[1])
    last = bisect_left(offsets, end, key=lambda token: token[0])
    if first < last and offsets[first][0] < start and not text[start : offsets[first][1]].strip():
        first += 1
    straddling = first < last and (
        bool(text[offsets[first][0] : start].strip())
        or bool(text[end : offsets[last - 1][1]].strip())
    )
    return (first, last), straddling


def preview(
    template: Template,
    conversations: Sequence[Conversation],
    max_length: int,
    loss_on: LossOn = "answers",
    count: int = 3,
    console: rich.console.Console | None = None,
) -> None:
    """Print the first `count` examples token by token, `│` between two, and what became of all.

    What is learned and what is masked stand on lines of their own that say so, for a pipe; in a
    terminal the one is bright, the other dim, and special tokens are coloured. ↵ is a line's end in
    the text.
    """
    console = console or rich.console.Console()
    some = conversations[:count]
    texts = [(some[n], rendered) for n, rendered in _rendered(template, some, loss_on)]
    for one, found in zip(some, _tokenise(template, texts), strict=True):
        labels = _labels(found, max_length)
        cut = f" of {len(found.ids)}, cut" if len(found.ids) > len(labels) else ""
        learned = len(labels) - labels.count(IGNORED)
        title = f"{one.place}: {len(labels)} tokens{cut}, {learned} learned"
        console.print(Text(f"── {title}", "bold"), soft_wrap=True)
        for line in _lines(template, found, labels):
            console.print(line, soft_wrap=True)
    counts = encode(template, conversations, max_length, loss_on)[1]
    share = f"{counts.learned} of {counts.tokens} tokens learned"
    told = f"── {counts.examples - counts.lost} of {counts.examples} examples: {share}"
    console.print(Text("\n".join(filter(None, [told, counts.note(max_length)]))), soft_wrap=True)


def _lines(template: Template, found: Tokens, labels: list[int]) -> Iterator[Text]:
    """An example's tokens, a line for each stretch and for each line of the text."""
    special = template.tokenizer.added_tokens_decoder
    line, before = Text(), None
    reached = 0
    for number, (token, offset) in enumerate(zip(found.ids, found.offsets)):
        if number == len(labels):
            break
        learned = number > 0 and labels[number - 1] != IGNORED
        if learned is not before and line:
            yield line
            line = Text()
        before = learned
        # Where several tokens share a character, as its bytes do, it is shown with the last.
        shared = found.offsets[number + 1 : number + 2] == [offset]
        piece = "" if shared else found.text[max(offset[0], reached) : offset[1]]
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
            plain = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in part)
            line.append("".join(plain), style)
    if line:
        yield line
