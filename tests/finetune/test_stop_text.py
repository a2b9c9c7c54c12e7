"""Answers of a model whose template ends a turn in words, not in a token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora.finetune.config import RunConfig
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.messages import Message
from lora.finetune.generate import Writing, written
from lora.finetune.inputs import prompts_of
from lora.finetune.models import Base, load_base
from lora.methods.lora import LoRAConfig

NEW = 120
WRITING = Writing(max_new_tokens=NEW, temperature=1.0, seed=3)
PROMPTS = [[1, 70, 71, 72], [1, 80, 81, 82, 83], [1, 90]]


@pytest.fixture(scope="module")
def tiny() -> Base:
    """Its weights are random, and so are the bytes that it writes."""
    return load_base("demo-lm-tiny", 1, "text", 0)


def write(base: Base, prompts: list[list[int]], stops: list[str], **more: Any) -> list[str]:
    return written(base.model, base.tokenizer, prompts, WRITING, stops, **more)


def test_each_answer_of_a_batch_stops_at_the_words(tiny: Base) -> None:
    whole = write(tiny, PROMPTS, [])
    match = re.search(r"[ -~]{2}", whole[0][8:])
    assert match
    stop = match[0]
    assert write(tiny, PROMPTS, [stop]) == [text.partition(stop)[0] for text in whole]


def test_generation_ends_there_and_shows_nothing_of_the_words(tiny: Base) -> None:
    (whole,) = write(tiny, PROMPTS[:1], [])
    match = re.search(r"[ -~]{2}", whole[8:])
    assert match
    stop = match[0]
    forwards: list[int] = []
    hook = tiny.model.register_forward_hook(lambda *_: forwards.append(1))
    pieces: list[str] = []
    (text,) = write(tiny, PROMPTS[:1], [stop], streamed=pieces.append)
    hook.remove()
    assert text == "".join(pieces) == whole.partition(stop)[0]
    assert len(forwards) < NEW


def test_the_words_are_those_of_the_template(tiny: Base, tmp_path: Path) -> None:
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    conversation = Conversation((Message("user", "How many?"),), place="a test")
    for name, end, words in (("words", "\n### end\n", ["\n### end"]), ("token", "</s>\n", [])):
        path = tmp_path / f"{name}.jinja"
        opening = "{% if add_generation_prompt %}assistant: {% endif %}"
        path.write_text(f"{turn}{end}{{% endfor %}}{opening}")
        config = RunConfig(template=str(path), settings=LoRAConfig())
        _, stops = prompts_of(config, tiny.tokenizer, tiny.model, [conversation])
        assert [stop for stop in stops if isinstance(stop, str)] == words
