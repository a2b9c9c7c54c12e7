"""Renders conversations as text and finds the answers in it, which the model learns.

template_of(tokenizer, name)    -> Template: the tokenizer's, the plain one, none, or a file's
template.render(conversation)   -> Rendered: the text, and the spans of its answers

How answers are found. A template is a program and may do anything with a message. Few templates
mark the model's text by {% generation %}. Those that do often exclude the token that ends the turn,
and without it a model never learns to stop. (The mask that transformers makes from these marks does
not help: if a token includes its space, it drops the answer or learns all text after it.) So we
find answers in the same way for every template. We render the conversation and two others:

    the messages before the answer and the start of the next turn    the prompt in generation
    the conversation with a mark in place of the answer              the text around the answer

If the text begins with the prompt, the answer starts where the prompt ends; if not, it starts where
the text before the mark ends. It ends where the text after the mark begins. The characters that
close a turn belong to the answer; they are found once per template, by a mark in a conversation of
one turn. If these parts do not fit, or the text before the answer lacks an earlier message, it is
an error: no mask is better than a wrong one.
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
"""The values of --template other than a file."""
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'system' %}{{ message.content }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Marks in place of an answer and of its reasoning. They are in Unicode's private use area, which
# no template trims or escapes.
CONTENT_MARK = "\ue0d7\ue0d8\ue0d9"
THOUGHT_MARK = "\ue0da\ue0db\ue0dc"

MOST_KEPT = 1_000  # rendered texts to cache

LISTS = ("tools", "documents")  # variables, other than messages, that a template has to write

Span = tuple[int, int]
_TextKey = tuple[tuple[Message, ...], str, bool]  # messages, other variables, add an opening


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # characters to learn: each answer with the end of its turn
    prompt: str  # the text before the last answer, from which a model generates


@dataclass(frozen=True)
class Template:
    """A chat template with its tokenizer: renders conversations in the format of the base."""

    tokenizer: Any
    jinja: str | None  # None: prompt, answer and end token, without a template
    name: str  # for errors
    raw: bool  # apply the template to raw conversations too
    _texts: dict[_TextKey, str | RenderError] = field(
        default_factory=dict, compare=False, repr=False
    )

    def render(self, conversation: Conversation, loss_on: LossOn = "answers") -> Rendered:
        """Returns the text, the spans to learn, and the prompt.

        Raises DataError if the template refuses the conversation or drops a part of it, or if the
        answers cannot be found in the text; ConfigError if nothing ends an answer.
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
        """Returns the text from which a model generates. Raises as render() does."""
        if self._bare(conversation):
            roles = [message.role for message in conversation.messages]
            fields = conversation.given or any(message.more for message in conversation.messages)
            if fields or roles not in (["user"], ["assistant"], ["user", "assistant"]):
                count = f"{len(roles)} messages ({', '.join(roles[:4])})"
                raise DataError(
                    f"{conversation.place}: {'tools or thoughts' if fields else count} need a"
                    " template. Pass --template plain, or a file."
                )
            return self._as_it_stands(conversation)[1]
        self._check_written(conversation)
        return self._opening(replace(conversation, messages=conversation.prompt))

    def _as_it_stands(self, conversation: Conversation) -> tuple[str, str]:
        """Returns a conversation without a template: the whole text, and the prompt.

        The first token (BOS) and the end token are not added to a text that has them already.
        """
        answered = conversation.messages[-1].role == "assistant"
        prompt = "".join(message.content for message in conversation.prompt)
        answer = conversation.messages[-1].content if answered else ""
        # The user's own program may have rendered these texts, with a base's template.
        begin, end = self.start, _end_token(self.tokenizer)
        if begin and (prompt or answer).lstrip().startswith(begin):
            prompt, answer, begin = prompt.lstrip(), answer if prompt else answer.lstrip(), ""
        if answer.rstrip().endswith(end):
            answer = answer.rstrip().removesuffix(end)
        text = begin + prompt + answer + end
        end_twice = text.endswith(2 * end)
        if (answered and end_twice) or (self.start and text.startswith(2 * self.start)):
            token = end if end_twice else self.start
            raise DataError(f"{conversation.place}: {token} occurs twice in a row. Remove one.")
        return text, begin + prompt

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The token ids that end an answer: the end token, and the template's end of a turn."""
        ids = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        last = self.core.encode(self.closing, add_special_tokens=False).ids[-1]
        # An ordinary token, such as a line break, also occurs inside answers.
        if last in self.tokenizer.added_tokens_decoder and last not in ids:
            ids.append(last)
        return tuple(ids)

    @property
    def stop_text(self) -> str:
        """The text that ends an answer if no token of `stops` does, else ""."""
        last = self.core.encode(self.closing, add_special_tokens=False).ids[-1]
        return "" if last in self.stops else self.closing

    @cached_property
    def core(self) -> Any:
        """The tokenizers.Tokenizer inside the tokenizer, set to add no tokens.

        Raises ModelError if there is none, since only it gives offsets.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(self.tokenizer).__name__} has no fast backend, which is needed for the"
                " offsets of tokens in the text. Save the base with a tokenizer.json."
            )
        core = copy.deepcopy(backend)  # the tokenizer itself must keep adding its tokens
        core.post_processor = None
        core.no_truncation()
        core.no_padding()
        return core

    @cached_property
    def start(self) -> str:
        """The token (BOS) that the tokenizer adds before a text, or ""."""
        # By a trial: the tokenizers have no common setting for it.
        bos = self.tokenizer.bos_token_id
        added = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return str(self.tokenizer.bos_token) if added else ""

    @cached_property
    def closing(self) -> str:
        """The text that closes the assistant's turn, up to the first special token.

        Raises ConfigError if the template writes nothing after an answer.
        """
        if self.jinja is None:
            return _end_token(self.tokenizer)
        after = self._around(_one_turn(Message("assistant", CONTENT_MARK)), 1)[1]
        # What follows that token may be the start of the next turn.
        ends = [after.find(token) + len(token) for token in self._special if token in after]
        closing = after[: min(ends)] if ends else after.rstrip()
        if not closing:
            raise ConfigError(
                f"the chat template ({self.name}) writes nothing after an answer: a model that"
                " learns from it never stops. Pass --template plain, or a file that ends the turn."
            )
        return closing

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The added tokens of the tokenizer that are not white space."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.content.strip())

    @cached_property
    def _opens(self) -> bool:
        """True if add_generation_prompt changes what the template writes."""
        return self._text(_one_turn()) != self._text(_one_turn(), True)

    @cached_property
    def thought_end(self) -> str:
        """The text between a model's reasoning and its answer, such as </think>; "" if none.

        Special tokens are left out, as they are when generated ids are decoded.
        """
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
        """Returns the token that the tokenizer would add before the text.

        "" if a template writes it, or if the text has it already.
        """
        if not self._bare(conversation):
            return ""
        first = next((message.content for message in conversation.messages if message.content), "")
        return "" if first.lstrip().startswith(self.start) else self.start

    def has_special(self, conversation: Conversation) -> bool:
        """True if the content of a message holds a special token of the tokenizer."""
        return not self._bare(conversation) and any(
            self._special_tokens.search(message.content) for message in conversation.messages
        )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """A pattern that matches any special token; (?!) matches nothing."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        names = [re.escape(t.content) for t in tokens if t.special and t.content.strip()]
        return re.compile("|".join(names) or "(?!)")

    def _bare(self, conversation: Conversation) -> bool:
        """True if the conversation is rendered without a template."""
        return self.jinja is None or (conversation.raw and not self.raw)

    def _text(self, conversation: Conversation, opening: bool = False) -> str:
        """Returns the template's text of a conversation.

        opening: add the start of the assistant's turn (add_generation_prompt).
        Raises ConfigError if the template exceeds its limits, DataError if it raises an error.
        """
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
        if isinstance(text, RenderError):  # such as "roles must alternate"
            roles = ", ".join(dict.fromkeys(message.role for message in messages))
            raise DataError(
                f"{place}: the chat template ({self.name}) refuses a conversation of {roles}:"
                f" {text}. Fix the row, or pass --template plain."
            ) from text
        return text

    def prepare(self, conversations: Sequence[Conversation], loss_on: LossOn = "answers") -> None:
        """Renders all texts that render() will need for these conversations. Clears the cache.

        One call of the rendering process for all of them is faster than one call for each.
        """
        keys: list[_TextKey] = []
        for conversation in conversations:
            if not self._bare(conversation):
                messages, given = conversation.messages, conversation.given
                numbers = _to_find(messages, loss_on)
                # Rare texts, as around tool calls, are left to _text().
                keys.append((messages, given, False))
                keys += [(messages[:number], given, True) for number in numbers if number]
                keys += [(_marked(messages, number), given, False) for number in numbers]
        self._texts.clear()
        if keys:
            self._render(keys)

    def _render(self, keys: Sequence[_TextKey]) -> None:
        """Renders the texts and adds them to the cache. Errors are cached too."""
        assert self.jinja is not None
        if len(self._texts) > MOST_KEPT:  # prompts that no prepare() clears
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
        """Returns a message in the form that the template reads."""
        fields = message.fields()
        if "reasoning_content" in fields:
            fields["thinking"] = fields["reasoning_content"]  # gpt-oss's template uses this name
        for call in fields.get("tool_calls", ()):
            function = call.get("function", call)
            function["arguments"] = _arguments(function["arguments"], self._arguments_are_text)
        return fields

    @cached_property
    def _arguments_are_text(self) -> bool:
        """True if the template writes a call's arguments without tojson.

        Then they must be JSON text: Jinja would write an object in Python's form, {'x': 'y'}.
        """
        values = []
        for arguments in ({"x": "y"}, "{}"):
            function = {"name": "f", "arguments": arguments}
            call = {"id": "call00000", "type": "function", "function": function}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages = [{"role": "user", "content": "x"}, answer]
            values.append({**self.tokenizer.special_tokens_map, "messages": messages})
        object_, text = render(str(self.jinja), values)
        if isinstance(object_, RenderError):  # such as a template that concatenates them to a text
            return isinstance(text, str)
        return "{'x': 'y'}" in object_

    def _around(self, conversation: Conversation, number: int) -> tuple[str, str]:
        """Returns the text before and after an answer without tool calls.

        An answer's reasoning belongs to the answer. Raises DataError if the template does not write
        the answer exactly once.
        """
        marked = replace(conversation, messages=_marked(conversation.messages, number))
        before, *after = self._text(marked).split(CONTENT_MARK)
        if len(after) != 1:
            raise DataError(
                f"{conversation.place}: the chat template ({self.name}) writes an answer"
                f" {len(after)} times, not once, so we cannot tell what to learn. Pass --template"
                " plain."
            )
        return before.partition(THOUGHT_MARK)[0], after[0]

    def _behind_calls(self, conversation: Conversation, number: int) -> str:
        """Returns the text after an answer with tool calls.

        The mark is in the last call's arguments. The text after it, rendered without the later
        messages, shows where the turn ends. Raises DataError if the template does not write the
        calls.
        """
        messages = conversation.messages
        marked = (*messages[:number], _called(messages[number]))
        alone = replace(conversation, messages=marked)
        whole = replace(conversation, messages=(*marked, *messages[number + 1 :]))
        texts = [self._text(conversation) for conversation in (alone, whole)]
        tails = [text.split(CONTENT_MARK)[1:] for text in texts]
        # A template that escapes or repeats the arguments leaves no mark, or two.
        if [len(tail) for tail in tails] == [1, 1]:
            (tail,), (rest,) = tails
            last = self.closing.strip()
            ends = [tail.rfind(token) + len(token) for token in self._special if token in tail]
            end = tail.rfind(last) + len(last) if last in tail else max(ends, default=0)
            if end and rest.startswith(tail[:end]):
                return rest[end:]
        raise DataError(
            f"{conversation.place}: the chat template ({self.name}) does not write the tool_calls"
            f" of message {number + 1} in a form that can be learned. Pass --template FILE with a"
            " template that does, or remove them."
        )

    def _opening(self, conversation: Conversation) -> str:
        """Returns the text of the messages with the start of the assistant's turn: the prompt.

        If add_generation_prompt has no effect, it is the text before a marked answer. A space
        between the two belongs to the answer.
        """
        messages = conversation.messages
        prompt = self._text(conversation, True) if messages else ""
        if messages and self._opens:
            return prompt
        answered = replace(conversation, messages=(*messages, Message("assistant", CONTENT_MARK)))
        before = self._around(answered, len(messages))[0].rstrip(" ")
        return before if before.startswith(prompt) else prompt

    def _span(
        self, conversation: Conversation, number: int, text: str, opening: str | None
    ) -> Span:
        """Returns the characters of an answer with the end of its turn: (start, end).

        text: the whole conversation. opening: its prompt for this answer, if known. The module's
        docstring explains the search. Raises DataError if the parts do not fit together.
        """
        messages, calls = conversation.messages, conversation.messages[number].has("tool_calls")
        earlier = replace(conversation, messages=messages[:number])
        opening = self._opening(earlier) if opening is None else opening
        inputs = [message for message in messages[:number] if message.role in ("system", "user")]
        lost = [message.role for message in inputs if message.content.strip() not in text]
        # Some templates write the messages only together with an answer: their opening lacks them.
        full = all(message.content.strip() in opening for message in inputs)
        start = len(opening) if full and text.startswith(opening) else None
        after = self._behind_calls(conversation, number) if calls else None
        if start is None or after is None:
            before, rest = self._around(conversation, number)
            before, after = before.rstrip(" "), rest if after is None else after
            if start is None:
                start = len(before) if text.startswith(before) else len(text)
        end = len(text) - len(after)
        fits = start < end and text.endswith(after)
        if fits and not lost and (calls or after.startswith(self.closing)):
            return start, end + (0 if calls else len(self.closing))
        why = f"changes the text around message {number + 1}"
        why = f"leaves out the {lost[0]}'s message" if lost else why
        raise DataError(
            f"{conversation.place}: the chat template ({self.name}) {why}, so we cannot tell what"
            " to learn. Pass --template plain."
        )

    def _check_written(self, conversation: Conversation) -> None:
        """Raises DataError if the template drops tool calls, reasoning, tool results or variables.

        Also if it would write a token that a message begins or ends with already.
        """
        messages = conversation.messages
        for number, message in enumerate(messages):
            self._check_ends(conversation.place, number, message)
            lost = None
            if message.has("tool_calls"):
                self._behind_calls(conversation, number)
            if message.has("reasoning_content") and not self._thinks:
                thought = (*messages[:number], _thinking(message), *messages[number + 1 :])
                if THOUGHT_MARK not in self._text(replace(conversation, messages=thought)):
                    lost = f"the reasoning_content of message {number + 1}"
            # A template may write a tool's result in another form, such as JSON. Try a mark then.
            if message.role == "tool" and message.content not in self._text(conversation):
                marked = replace(conversation, messages=_marked(messages, number))
                if CONTENT_MARK not in self._text(marked):
                    lost = f"the tool's message {number + 1}"
            if lost:
                raise self._unwritten(conversation.place, lost)
        given: dict[str, Any] = json.loads(conversation.given) if conversation.given else {}
        for name in given:
            # chat_template_kwargs may change nothing in this conversation, but tools must.
            rest = json.dumps({key: value for key, value in given.items() if key != name})
            without = replace(conversation, given=rest)
            if name not in str(self.jinja) or (
                name in LISTS and self._text(without) == self._text(conversation)
            ):
                raise self._unwritten(conversation.place, name)

    def _unwritten(self, place: str, part: str) -> DataError:
        """Returns the error for a part of a conversation that the template drops."""
        return DataError(
            f"{place}: the chat template ({self.name}) does not write {part}, so the model would"
            " not see it. Pass --template FILE with a template that does, or remove it."
        )

    def _check_ends(self, place: str, number: int, message: Message) -> None:
        """Raises DataError if a message begins or ends with a token that the template writes."""
        content, begin = message.content.strip(), self.tokenizer.bos_token
        ends = [self.tokenizer.eos_token, self.closing.strip()]
        twice = [begin] if begin and content.startswith(begin) else []
        twice += [end for end in ends if end and content.endswith(end)]
        if twice:
            raise DataError(
                f"{place}: message {number + 1} begins or ends with {twice[0]}, which the chat"
                f" template ({self.name}) adds. Remove it. If your texts are rendered already, pass"
                " --template none."
            )


def _to_find(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """Returns the indices of the answers to find in the text.

    Those that are learned; or, if the loss is on all tokens, those that are masked.
    """
    return [
        number
        for number, message in enumerate(messages)
        if message.role == "assistant" and message.learned == (loss_on == "answers")
    ]


def _one_turn(*answer: Message) -> Conversation:
    """Returns a conversation to try the template on."""
    return Conversation((Message("user", "x"), *answer), place="a conversation of one turn")


def _thinking(message: Message) -> Message:
    """Returns the message with a mark in place of its reasoning."""
    fields = {**dict(message.more), "reasoning_content": json.dumps(THOUGHT_MARK)}
    return replace(message, more=tuple(fields.items()))


def _marked(messages: Sequence[Message], number: int) -> tuple[Message, ...]:
    """Returns the messages, of which one has marks as content and reasoning, and no tool calls."""
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
    """Returns a call's arguments as JSON text, or as a value if `text` is False."""
    if text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            return parsed if isinstance(parsed, dict) else value
    return value


def _between(length: int, spans: Sequence[Span]) -> list[Span]:
    """Returns the spans of a text that are outside these spans."""
    edges = [0, *itertools.chain.from_iterable(spans), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end]


def template_of(tokenizer: Any, name: str = "auto") -> Template:
    """Returns the template for a value of --template.

    auto    the tokenizer's template, or plain if it has none; raw conversations get none
    plain   User: or Assistant: before each message, the end token after each answer
    none    prompt, answer and end token, without a template; one turn only
    else    a file with a Jinja template; raw conversations get it too

    Raises ConfigError if the file cannot be read, or if the tokenizer has several templates and no
    default; ModelError if plain or none needs an end token and the tokenizer has none.
    """
    if name == "auto" and getattr(tokenizer, "chat_template", None):
        try:
            return Template(tokenizer, tokenizer.get_chat_template(), "the tokenizer's", raw=False)
        except ValueError as error:
            raise ConfigError(f"--template auto: {error} Pass --template FILE.") from None
    if name in TEMPLATES:
        _end_token(tokenizer)
        bare = Template(tokenizer, None, "none", raw=False)
        plain = ("{{ bos_token }}" if bare.start else "") + PLAIN_TEMPLATE
        return bare if name == "none" else Template(tokenizer, plain, "plain", name == "plain")
    with readable(name, ConfigError, "Pass auto, plain, none or a file to --template."):
        text = Path(name).read_text("utf-8")
    return Template(tokenizer, text, name, raw=True)


def _end_token(tokenizer: Any) -> str:
    """Returns the tokenizer's end token. Raises ModelError if it has none."""
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no end token, which raw text and the plain template"
            " need to end an answer. Set eos_token in tokenizer_config.json."
        )
    return str(tokenizer.eos_token)
