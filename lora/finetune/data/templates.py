"""Conversations as text, with the spans of the answers that a model learns.

template_of(tokenizer, asked)   -> Template: the base's own, the plain one, none, or a file's
template.render(conversation)   -> Rendered: the text, and where in it the answers are

How answers are found. A template is a program, which may do anything with a message. Few templates
mark by {% generation %} what the model writes, and those that do often leave out the token that
ends the turn, without which a model never learns to stop. (transformers' own mask from those marks
is no help: if a token hides its space it drops the answer, or learns all that follows.) So answers
are found in the same way under every template, from its text of the conversation and of two others:

    the messages before the answer, with the opening of the next turn    what generation sees
    the conversation with a mark in the answer's place                    the text around the answer

If the whole text begins with what generation sees, the answer begins where that ends; else it
begins after the text before the mark. It ends before the text after the mark. The characters that
close a turn belong to it: they are found once per template, by the same mark in a conversation of
one turn. If the pieces do not fit together, or a message before the answer is not in the text
before it, the template is refused: better no mask than a wrong one.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lora.errors import ConfigError, DataError, ModelError
from lora.files import readable
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.messages import Message
from lora.interop.rendering import LimitError, RenderError, render

LossOn = Literal["answers", "all"]
TEMPLATES = ("auto", "plain", "none")
"""What --template takes besides a file."""
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'system' %}{{ message.content }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CONTENT_MARK = "\ue0d7\ue0d8\ue0d9"  # of the private use area: no template trims or escapes it

MOST_KEPT = 1_000  # texts that were rendered

THOUGHT_MARK = "\ue0da\ue0db\ue0dc"  # in the place of an answer's reasoning
LISTS = ("tools", "documents")  # what a template is given beside messages, and writes

Span = tuple[int, int]
_Asked = tuple[tuple[Message, ...], str, bool]  # a text: messages, what else is given, an opening


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # characters that are learned: each answer with the end of its turn
    prompt: str  # what a model would be asked to continue by the last answer


@dataclass(frozen=True)
class Template:
    """Writes conversations as the base was trained to read them."""

    tokenizer: Any
    jinja: str | None  # None: the bare prompt and answer, and the end token
    name: str
    raw: bool  # apply the template to raw conversations too
    _texts: dict[_Asked, str | RenderError] = field(default_factory=dict, compare=False, repr=False)

    def render(self, conversation: Conversation, loss_on: LossOn = "answers") -> Rendered:
        """Returns the text, the spans that are learned, and the prompt.

        Raises DataError if the template refuses the conversation or leaves out a part of it, or if
        the answers cannot be found in the text; ConfigError if nothing ends an answer.
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
        """Returns the text that a model is asked to continue."""
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
        """Returns a conversation without a template: all of it, and up to the answer.

        The tokens that begin and end a text are there once, even if the text has them already.
        """
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
        """The tokenizers.Tokenizer under the tokenizer, which adds nothing to a text.

        Raises ModelError for a tokenizer without one, which gives no offsets.
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
        """The token that the tokenizer itself puts before a text, or ""."""
        bos = self.tokenizer.bos_token_id
        added = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return str(self.tokenizer.bos_token) if added else ""

    @cached_property
    def closing(self) -> str:
        """The text that closes the assistant's turn, to the first special token after the answer.

        Raises ConfigError if the template writes nothing there.
        """
        if self.jinja is None:
            return _end_token(self.tokenizer)
        behind = self._around(_one_turn(Message("assistant", CONTENT_MARK)), 1)[1]
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
        """True if the template heeds add_generation_prompt."""
        return self._text(_one_turn()) != self._text(_one_turn(), True)

    @cached_property
    def thought_end(self) -> str:
        """What a model writes between its reasoning and its answer, without special tokens; "" if
        the template writes no reasoning."""
        if self.jinja is None:
            return ""
        thought = _thinking(Message("assistant", CONTENT_MARK))
        between = (
            self._text(_one_turn(thought)).partition(THOUGHT_MARK)[2].partition(CONTENT_MARK)[0]
        )
        ids = self.core.encode(between, add_special_tokens=False).ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    @cached_property
    def _thinks(self) -> bool:
        """True if the template writes the reasoning of an answer."""
        return THOUGHT_MARK in self._text(_one_turn(_thinking(Message("assistant", "y"))))

    def head(self, conversation: Conversation) -> str:
        """Returns the token that the tokenizer would put before the text; "" if a template writes
        it, or the text has it already."""
        if not self._bare(conversation):
            return ""
        first = next((one.content for one in conversation.messages if one.content), "")
        return "" if first.lstrip().startswith(self.start) else self.start

    def has_special(self, conversation: Conversation) -> bool:
        """True if the content of a message holds a special token of the tokenizer."""
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
        """Returns a conversation as the template writes it; with `opening`, an answer's opening
        follows."""
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
        """Render at once, which is faster, the texts that render() will need for these
        conversations. Forgets all other texts."""
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
        if len(self._texts) > MOST_KEPT:  # many prompts, one after the other
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
        """Returns a message as the template reads it, whatever form its row has."""
        fields = message.fields()
        if "reasoning_content" in fields:
            fields["thinking"] = fields["reasoning_content"]  # its name in gpt-oss's template
        for call in fields.get("tool_calls", ()):
            function = call.get("function", call)
            function["arguments"] = _arguments(function["arguments"], self._arguments_are_text)
        return fields

    @cached_property
    def _arguments_are_text(self) -> bool:
        """True if the template writes a call's arguments without tojson: then they must be JSON
        text, since it would write an object as Python does."""
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
        """Returns the text before and after what the model writes of a message without calls."""
        marked = replace(conversation, messages=_marked(conversation.messages, number))
        ahead, *behind = self._text(marked).split(CONTENT_MARK)
        if len(behind) != 1:
            raise DataError(
                f"{conversation.place}: the chat template ({self.name}) writes an answer"
                f" {len(behind)} times, not once: what is to be learned is unknown. Pass --template"
                " plain."
            )
        return ahead.partition(THOUGHT_MARK)[0], behind[0]

    def _behind_calls(self, conversation: Conversation, number: int) -> str:
        """Returns the text after a message that calls tools.

        Raises DataError if the template does not write the calls.
        """
        messages = conversation.messages
        marked = (*messages[:number], _called(messages[number]))
        alone = replace(conversation, messages=marked)
        whole = replace(conversation, messages=(*marked, *messages[number + 1 :]))
        tails = [self._text(one).split(CONTENT_MARK)[1:] for one in (alone, whole)]
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
        """Returns the messages with the opening of the answer, even if the template writes it only
        together with an answer. A space between the two belongs to the answer."""
        messages = conversation.messages
        asked = self._text(conversation, True) if messages else ""
        if messages and self._opens:
            return asked
        answered = replace(conversation, messages=(*messages, Message("assistant", CONTENT_MARK)))
        ahead = self._around(answered, len(messages))[0].rstrip(" ")
        return ahead if ahead.startswith(asked) else asked

    def _span(
        self, conversation: Conversation, number: int, text: str, opening: str | None
    ) -> Span:
        """Returns the characters of an answer and of the end of its turn: from, to."""
        messages, calls = conversation.messages, conversation.messages[number].has("tool_calls")
        before = replace(conversation, messages=messages[:number])
        opening = self._opening(before) if opening is None else opening
        inputs = [one for one in messages[:number] if one.role in ("system", "user")]
        lost = [one.role for one in inputs if one.content.strip() not in text]
        # Some templates write the messages only together with an answer: their opening lacks them.
        full = all(one.content.strip() in opening for one in inputs)
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
        """Raise DataError if the template leaves out tool calls, reasoning, tool results or tools,
        or would write a token again that a message has already."""
        messages = conversation.messages
        for number, one in enumerate(messages):
            self._check_ends(conversation.place, number, one)
            lost = None
            if one.has("tool_calls"):
                self._behind_calls(conversation, number)
            if one.has("reasoning_content") and not self._thinks:
                thought = (*messages[:number], _thinking(one), *messages[number + 1 :])
                if THOUGHT_MARK not in self._text(replace(conversation, messages=thought)):
                    lost = f"the reasoning_content of message {number + 1}"
            if one.role == "tool" and one.content not in self._text(conversation):
                marked = replace(conversation, messages=_marked(messages, number))
                if CONTENT_MARK not in self._text(marked):
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
        """Raise DataError if a message begins or ends with a token that the template writes."""
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
    """Returns the numbers of the answers to find: the learned ones, or, if the loss is on all
    tokens, those that are not learned."""
    return [
        number
        for number, one in enumerate(messages)
        if one.role == "assistant" and one.learned == (loss_on == "answers")
    ]


def _one_turn(*answer: Message) -> Conversation:
    return Conversation((Message("user", "x"), *answer), place="a conversation of one turn")


def _thinking(message: Message) -> Message:
    """Returns the message with a mark in place of its reasoning."""
    fields = {**dict(message.more), "reasoning_content": json.dumps(THOUGHT_MARK)}
    return replace(message, more=tuple(fields.items()))


def _marked(messages: Sequence[Message], number: int) -> tuple[Message, ...]:
    """Returns the messages with marks in place of one's content and reasoning, and without its
    calls."""
    message = messages[number]
    message = _thinking(message) if message.has("reasoning_content") else message
    more = tuple((name, value) for name, value in message.more if name != "tool_calls")
    marked = replace(message, content=CONTENT_MARK, more=more)
    return (*messages[:number], marked, *messages[number + 1 :])


def _called(message: Message) -> Message:
    """Returns the message with a mark in place of its last call's arguments."""
    *calls, last = message.fields()["tool_calls"]
    inner = last.get("function", last)
    object_ = isinstance(_arguments(inner["arguments"], False), dict)
    inner = {**inner, "arguments": {"x": CONTENT_MARK} if object_ else CONTENT_MARK}
    last = {**last, "function": inner} if "function" in last else inner
    fields = {**dict(message.more), "tool_calls": json.dumps([*calls, last])}
    return replace(message, more=tuple(fields.items()))


def _arguments(value: Any, text: bool) -> Any:
    """Returns a call's arguments as JSON text or as the value, whichever the template takes."""
    if text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            return parsed if isinstance(parsed, dict) else value
    return value


def _between(length: int, spans: Sequence[Span]) -> list[Span]:
    """Returns the stretches of a text between the spans."""
    edges = [0, *itertools.chain.from_iterable(spans), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]


def template_of(tokenizer: Any, asked: str = "auto") -> Template:
    """Returns the template that --template means.

    auto    the tokenizer's own, or plain if it has none; not for raw conversations
    plain   User: and Assistant: before each message, the end token after each answer
    none    the bare prompt and answer, of one turn
    else    a file with a template in Jinja

    Raises ConfigError if there is no such file, or if the tokenizer has several and no default;
    ModelError if a plain template finds no end token.
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
        plain = ("{{ bos_token }}" if bare.start else "") + PLAIN_TEMPLATE
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
