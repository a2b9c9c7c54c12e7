"""Answers of a model whose template ends a turn in words, not in a token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora.finetune.config import RunConfig
from lora.finetune.data.conversations import Conversation
from lora.finetune.data.messages import Message
from lora.finetune.export import stop_note
from lora.finetune.generate import Writing, written
from lora.finetune.inputs import answer_format, prompts_of
from lora.finetune.models import Base, load_base
from lora.interop.ollama import modelfile
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


def with_turns(folder: Path, end: str) -> RunConfig[LoRAConfig]:
    """The configuration of a run whose template ends each turn with a text."""
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    opening = "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "turns.jinja").write_text(f"{turn}{end}{{% endfor %}}{opening}")
    return RunConfig(template=str(folder / "turns.jinja"), settings=LoRAConfig())


@pytest.mark.parametrize(("end", "words"), [("\n### end\n", ["\n### end"]), ("</s>\n", [])])
def test_the_words_are_those_of_the_template(
    tiny: Base, tmp_path: Path, end: str, words: list[str]
) -> None:
    config = with_turns(tmp_path, end)
    conversation = Conversation((Message("user", "How many?"),), place="a test")
    _, stops = prompts_of(config, tiny.tokenizer, tiny.model, [conversation])
    assert [stop for stop in stops if isinstance(stop, str)] == words


def test_other_engines_are_told_the_words(tiny: Base, tmp_path: Path) -> None:
    parts = tiny.tokenizer, tiny.model.generation_config
    words = answer_format(with_turns(tmp_path, "\n### end\n"), *parts)
    assert 'PARAMETER stop "</s>"\nPARAMETER stop """\n### end"""\n' in modelfile("x", None, words)
    assert "an answer ends with the text '\\n### end'" in stop_note(words)
    token = answer_format(with_turns(tmp_path, "</s>\n"), *parts)
    assert modelfile("x", None, token).count("PARAMETER stop") == 1
    assert stop_note(token) == ""
