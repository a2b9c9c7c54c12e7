"""Chat templates that only write text around each message, and those that do more."""

from __future__ import annotations

import pytest

from lora.finetune.data.templates import Template, template_of
from lora.finetune.data.turns import text_around_turns
from lora.finetune.models import load_base
from lora.interop.answers import Turns
from lora.interop.ollama import go_template

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|system\nBe kind.</s>\n{% endif %}"
TURN = "{% for m in messages %}<|{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|assistant\n{% endif %}"
AROUND = {
    "system": ("<|system\n", "</s>\n"),
    "user": ("<|user\n", "</s>\n<|assistant\n"),
    "assistant": ("", "</s>\n"),
}


@pytest.fixture(scope="module")
def bare() -> Template:
    return template_of(load_base("demo-lm-tiny", 1, "text", 0).tokenizer, "none")


@pytest.mark.parametrize(
    ("jinja", "turns"),
    [
        (TURN + OPENING, Turns("", AROUND, None)),
        ("{{ bos_token }}" + TURN + OPENING, Turns("", AROUND, None)),  # the engine writes it
        (">" + TURN + OPENING, Turns(">", AROUND, None)),
        (DEFAULT_SYSTEM + TURN + OPENING, Turns("", AROUND, "Be kind.")),
        (TURN.replace("m.content", "m.content | trim") + OPENING, Turns("", AROUND, None)),
        (None, Turns("", {"user": ("", "")}, None)),
    ],
)
def test_text_around_messages_is_recognized(
    jinja: str | None, turns: Turns, bare: Template
) -> None:
    assert text_around_turns(Template(bare.tokenizer, jinja, "its own", raw=True)) == turns


@pytest.mark.parametrize(
    "jinja",
    [
        TURN.replace("m.content", "m.content | upper") + OPENING,
        TURN.replace("{{ m.role }}", "{{ m.role }}{{ loop.index }}") + OPENING,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURN,
        "{{ messages | length }}" + TURN + OPENING,
    ],
)
def test_a_template_that_does_more_is_not(jinja: str, bare: Template) -> None:
    assert text_around_turns(Template(bare.tokenizer, jinja, "its own", raw=True)) is None


def test_a_text_that_ends_a_modelfiles_string_is_not_written() -> None:
    assert go_template(Turns("", {"user": ('"""', "")}, None)) is None
    assert go_template(Turns("", {"user": ("{{", "")}, None)) is None
