"""What is learned of a conversation is its answers and what closes them, to the token."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from conftest import needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lora.errors import ConfigError, DataError, ModelError
from lora.finetune.data.conversations import Conversation, read_one_split
from lora.finetune.data.encoding import encode, encode_pairs, prompt_ids
from lora.finetune.data.messages import Message
from lora.finetune.data.previews import preview
from lora.finetune.data.templates import Template, template_of
from lora.finetune.data.tokens import IGNORED

LINES = [
    "User: hello there\nAssistant: a good answer, indeed.",
    "name : Alimentum | area : city centre || There is a place, called Alimentum.",
    "a system prompt, then the user asks: 12 + 34 = 46? assistant model",
] * 4
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|endoftext|>",
]  # fmt: skip
SWALLOWING = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]  # Phi-3's take the line's end


def wrapped(core: Tokenizer, **special: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokens = [AddedToken(one, rstrip=True, special=True) for one in SWALLOWING]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, False)
    return tokenizer


@cache
def bytes_core() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    return str(core.to_str())


def gpt2_like() -> Any:
    """Bytes, as GPT-2, LLaMA 3 and Qwen: adds nothing, and hides spaces from its offsets."""
    return wrapped(
        Tokenizer.from_str(bytes_core()), bos_token="<|begin|>", eos_token="<|end_of_text|>"
    )


def llama3_like() -> Any:
    """Bytes, and a token that begins every text."""
    tokenizer = gpt2_like()
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


@cache
def pieces_core(crossing: bool) -> str:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *tokens], show_progress=False
    )
    core.train_from_iterator(LINES if crossing else " ".join(LINES).split(), trainer)
    state = json.loads(core.to_str())  # bytes are no special tokens
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] == "<unk>"]
    return json.dumps(state)


def llama2_like(crossing: bool = False) -> Any:
    """Pieces of words behind ▁, one of which is put before every stretch of text; bytes for what it
    does not know. crossing: its tokens may hold several words."""
    tokenizer = wrapped(
        Tokenizer.from_str(pieces_core(crossing)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def mistral_like() -> Any:
    """As LLaMA 2's, but that ▁ is put before the first word of all alone, and behind no token."""
    tokenizer = llama2_like()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2_like,
    "llama3": llama3_like,
    "llama2": llama2_like,
    "mistral": mistral_like,
    "crossing": lambda: llama2_like(crossing=True),
}


@cache
def made(kind: str) -> Any:
    return TOKENIZERS[kind]()


ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
# After the layouts and the habits of the models' own templates.
TEMPLATES = {
    "llama-2": "{% set ns = namespace(system='') %}{% set rest = messages %}"
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set ns.system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for m in rest %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{% set said = (ns.system if loop.first else '') + m.content %}"
    "{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "qwen-2.5": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen-3": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi-3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}",
    "opens by thinking": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + ':' }}"
    "{{ ' ' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: <think>\n' }}{% endif %}",
    "marked": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "never opens": "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "words alone": "{% for m in messages %}"
    "{{ '### ' + m.role + ':\n' + m.content + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
    "plain": None,
}  # fmt: skip
CLOSING = {
    "llama-2": " EOS", "mistral": "EOS", "llama-3": "<|eot_id|>", "zephyr": "EOS",
    "gemma": "<end_of_turn>", "phi-3": "<|end|>",
    "words alone": "\n### end", "plain": "EOS",
}  # fmt: skip
SYSTEMLESS = ("mistral", "gemma")


def of(tokenizer: Any, name: str) -> Template:
    tokenizer.chat_template = TEMPLATES[name]
    return template_of(tokenizer, "plain" if name == "plain" else "auto")


def said(*contents: str, system: str | None = None, **more: Any) -> Conversation:
    """The user's and the assistant's contents in turn."""
    roles = ("user", "assistant")
    messages = [Message(roles[number % 2], content) for number, content in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    return Conversation((*first, *messages), place="x.jsonl, line 7", **more)


CONVERSATIONS = {
    "one turn": said("hello there", "a good answer, indeed."),
    "two turns": said("hello", "there is a place", "and 12 + 34?", "46, of course"),
    "system": said("hello", "good", system="a system prompt"),
    "three turns": said("a", "b", "a", "b", "a", "b", system="be good"),
    "spaces": said("  hello \n", "  a good answer \n\n", " \n and? ", "\tindeed  "),
    "signs": said("né 你好 🙂", "🙂 你好, né", "…", "你"),
    "line ends": said("hello\n\nthere", "\n\na list:\n- one\n- two\n"),
    "same": said("good", "good", "good", "good"),
}


def learned(tokenizer: Any, ids: list[int], labels: list[int]) -> list[list[int]]:
    """The stretches of tokens that some position is to predict."""
    stretches: list[list[int]] = [[]]
    for position, label in enumerate(labels):
        if label == IGNORED:
            stretches.append([])
            continue
        assert label == ids[position + 1]
        stretches[-1].append(label)
    return [stretch for stretch in stretches if stretch]


@pytest.mark.parametrize("talk", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_learned_is_the_answers_and_their_ends(kind: str, name: str, talk: str) -> None:
    tokenizer, one = made(kind), CONVERSATIONS[talk]
    if name in SYSTEMLESS and one.messages[0].role == "system":
        with pytest.raises(DataError, match="refuses a conversation of system"):
            of(tokenizer, name).render(one)
        return
    template = of(tokenizer, name)
    closing = CLOSING.get(name, "<|im_end|>").replace("EOS", tokenizer.eos_token)
    assert template.closing == closing
    rendered = template.render(one)
    answers = [message.content for message in one.messages if message.role == "assistant"]
    thinks = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""
    for (start, end), answer in zip(rendered.spans, answers, strict=True):
        found = rendered.text[start:end]
        assert found.endswith(closing)
        assert rendered.text[start - 1] != " "
        found = found.removesuffix(closing)
        if answer is answers[-1]:
            found = found.removeprefix(thinks)
        assert found.strip() == answer.strip()

    tensors, counts = encode(template, [one], 10_000)
    ids, labels = tensors["input_ids"].tolist(), tensors["labels"].tolist()
    assert ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    stretches = learned(tokenizer, ids, labels)
    if kind != "crossing":
        texts = [tokenizer.decode(stretch) for stretch in stretches]
        wanted = [rendered.text[start:end] for start, end in rendered.spans]
        # White space before it may be the tokenizer's own, or swallowed by a special token.
        assert [text.lstrip() for text in texts] == [text.lstrip() for text in wanted]
        assert counts.straddling == 0
    assert counts.learned == sum(map(len, stretches))


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=12),
                      min_size=4, max_size=4),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_text_is_found_again(name: str, contents: list[str]) -> None:
    """The answer's own words begin with a letter: an empty one is refused before."""
    first, answer, second, last = contents
    one = said(first, f"A{answer}", second, f"B{last}")
    tokenizer = made("gpt2")
    template = of(tokenizer, name)
    rendered = template.render(one)
    tensors, counts = encode(template, [one], 10_000)
    stretches = learned(tokenizer, tensors["input_ids"].tolist(), tensors["labels"].tolist())
    texts = [tokenizer.decode(stretch) for stretch in stretches]
    assert texts == [rendered.text[start:end] for start, end in rendered.spans]
    for text, content in zip(texts, (f"A{answer}", f"B{last}"), strict=True):
        bare = text.removesuffix(template.closing).split("</think>")[-1]
        assert bare.strip() == content.split("</think>")[-1].strip()
    assert counts.straddling == 0


def test_a_cut_example_learns_what_is_left_of_its_answer() -> None:
    tokenizer = made("llama3")
    template = of(tokenizer, "llama-3")
    one = CONVERSATIONS["two turns"]
    whole, _ = encode(template, [one], 10_000)
    total = len(whole["input_ids"])
    for length in range(1, total + 2):
        if not (whole["labels"][: length - 1] != IGNORED).any():
            with pytest.raises(DataError, match=f"longer than --max-length {length} and trunc"):
                encode(template, [one], length)
            continue
        found, counts = encode(template, [one], length)
        kept = min(length, total)
        assert found["input_ids"].tolist() == whole["input_ids"][:length].tolist()
        expected = whole["labels"][:length].tolist()
        assert found["labels"].tolist() == [*expected[: kept - 1], IGNORED]
        assert (counts.long, counts.cut) == (int(length < total), total - kept)


def test_examples_lie_in_a_row_and_what_learns_nothing_is_left_out() -> None:
    template = of(made("gpt2"), "qwen-2.5")
    long = said("a question" * 40, "an answer")
    some = [CONVERSATIONS["one turn"], long, CONVERSATIONS["signs"], CONVERSATIONS["same"]]
    found, counts = encode(template, some, 120)
    assert found["rows"].tolist() == [0, 2, 3]
    assert found["input_ids"].dtype == found["labels"].dtype == torch.int32
    assert found["offsets"].dtype == found["rows"].dtype == torch.int64
    for row, start, end in zip(found["rows"], found["offsets"], found["offsets"][1:]):
        alone, _ = encode(template, [some[row]], 120)
        for name in ("input_ids", "labels"):
            assert torch.equal(found[name][start:end], alone[name])
    assert (counts.examples, counts.long, counts.lost) == (4, 1, 1)
    assert counts.tokens == len(found["labels"])
    assert counts.learned == int((found["labels"] != IGNORED).sum())
    assert counts.note(120) == (
        "1 of 4 examples are longer than --max-length 120 and truncated, by 270 tokens in all;"
        " 1 of 4 have no answer left and are skipped"
    )
    with pytest.raises(DataError, match="none of 1 examples has anything to learn: 1 of 1.*Raise"):
        encode(template, [long], 120)


def test_batches_of_texts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    template = of(made("gpt2"), "zephyr")
    whole, counts = encode(template, [*CONVERSATIONS.values()], 60)
    monkeypatch.setattr("lora.finetune.data.encoding.TEXTS_AT_ONCE", 3)
    again, others = encode(template, [*CONVERSATIONS.values()], 60)
    assert counts == others
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("name", [*TEMPLATES, "none"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_answer_follows_the_tokens_that_generation_starts_from(kind: str, name: str) -> None:
    tokenizer = made(kind)
    one = said("hello there", "a good answer", raw=name == "none")
    template = template_of(tokenizer, "none") if name == "none" else of(tokenizer, name)
    (prompt,) = prompt_ids(template, [one])
    found, counts = encode(template, [one], 10_000)
    ids, labels = found["input_ids"].tolist(), found["labels"].tolist()
    same = ids[: len(prompt)] == prompt
    assert counts.unlike == (not same)
    if name == "opens by thinking":
        assert not same
    elif kind != "crossing":  # whose tokens may begin in the prompt
        assert same
        assert set(labels[: len(prompt) - 1]) == {IGNORED}
        answer = [label for label in labels if label != IGNORED]
        assert (
            labels[len(prompt) - 1 :][: len(answer)] == ids[len(prompt) :][: len(answer)] == answer
        )


@pytest.mark.parametrize("name", [*TEMPLATES, "none"])
@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_a_text_begins_with_one_beginning(kind: str, name: str) -> None:
    tokenizer = made(kind)
    template = template_of(tokenizer, "none") if name == "none" else of(tokenizer, name)
    found, _ = encode(template, [CONVERSATIONS["one turn"]], 10_000)
    count = found["input_ids"].tolist().count(tokenizer.bos_token_id)
    own = TEMPLATES.get(name) or "bos_token"  # without a template, where the tokenizer puts it
    assert count == ("bos_token" in own)
    if count:
        assert found["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_as_it_stands_is_the_tokenizers_own_tokens(kind: str) -> None:
    tokenizer = made(kind)
    template = template_of(tokenizer, "none")
    raw = said("a good", " answer", raw=True)
    assert prompt_ids(template, [raw]) == [tokenizer("a good")["input_ids"]]
    ids = encode(template, [raw], 10_000)[0]["input_ids"].tolist()
    assert ids == [*tokenizer("a good answer")["input_ids"], tokenizer.eos_token_id]


def test_a_marked_template_is_masked_as_it_marks_and_its_ends_besides() -> None:
    tokenizer = made("gpt2")
    template = of(tokenizer, "marked")
    one = CONVERSATIONS["two turns"]
    found, _ = encode(template, [one], 10_000)
    theirs = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in one.messages],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids = found["input_ids"].tolist()
    assert ids == theirs["input_ids"]
    ours = [0, *(label != IGNORED for label in found["labels"].tolist()[:-1])]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for before, after, token, mine in zip(
        [0, *theirs["assistant_masks"]], theirs["assistant_masks"], ids, ours
    ):
        assert mine == (after or (before and token == end))


def test_only_the_answers_with_weight_are_learned() -> None:
    tokenizer = made("gpt2")
    template = of(tokenizer, "llama-3")
    one = CONVERSATIONS["two turns"]
    muted = Conversation(
        tuple(Message(m.role, m.content, m.content != "46, of course") for m in one.messages)
    )
    found, counts = encode(template, [muted], 10_000)
    (stretch,) = learned(tokenizer, found["input_ids"].tolist(), found["labels"].tolist())
    assert tokenizer.decode(stretch) == "there is a place<|eot_id|>"
    assert counts.unlike == 0
    muted = Conversation((Message("user", "a"), Message("assistant", "b", learned=False)))
    with pytest.raises(DataError, match="none of 1 examples has anything to learn"):
        encode(template_of(tokenizer, "none"), [muted], 10_000)


def test_on_everything_every_token_but_the_first_is_learned() -> None:
    for template in (of(made("llama3"), "zephyr"), template_of(made("llama3"), "none")):
        found, counts = encode(template, [CONVERSATIONS["one turn"]], 10_000, "all")
        assert found["labels"].tolist() == [*found["input_ids"][1:].tolist(), IGNORED]
        assert counts.learned == counts.tokens - 1


def test_raw_conversations_stand_as_they_are_unless_a_template_is_asked_for() -> None:
    tokenizer = made("llama2")
    pair = said("name : Alimentum ||", " There is a place.", raw=True)
    text = Conversation((Message("assistant", "There is a place."),), raw=True)
    template = of(tokenizer, "llama-2")
    rendered = template.render(pair)
    assert rendered.text == "<s>name : Alimentum || There is a place.</s>"
    assert rendered.prompt == "<s>name : Alimentum ||"
    assert rendered.spans == ((len(rendered.prompt), len(rendered.text)),)
    assert template.render(text).text == "<s>There is a place.</s>"
    assert template.render(said("hello", "you")).text == "<s>[INST] hello [/INST] you </s>"
    _, counts = encode(template, [pair, text], 1000)
    assert (counts.straddling, counts.unlike) == (0, 0)
    plain = template_of(tokenizer, "plain")
    assert (
        plain.render(said("hello", "you", raw=True)).text == "<s>User: hello\nAssistant: you</s>\n"
    )
    rendered = plain.render(text)
    assert rendered.text[slice(*rendered.spans[0])] == " There is a place.</s>"
    assert plain.prompt(text) == rendered.prompt == "<s>Assistant:"


def test_without_a_template_of_its_own_a_base_gets_the_plain_one() -> None:
    tokenizer = made("gpt2")
    tokenizer.chat_template = None
    template = template_of(tokenizer)
    assert template.name == "plain"
    rendered = template.render(said("hello", "you", "and?", "no", system="be good"))
    assert rendered.text == (
        "be good\nUser: hello\nAssistant: you<|end_of_text|>\nUser: and?\nAssistant:"
        " no<|end_of_text|>\n"
    )
    assert rendered.prompt.endswith("\nUser: and?\nAssistant:")
    # What the template is can be handed on with the model.
    again = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], chat_template=template.jinja, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert again == template.prompt(said("hello", "you")) == template.prompt(said("hello"))


def test_a_token_across_the_start_of_an_answer_is_learned_and_counted() -> None:
    tokenizer = made("gpt2")
    template = template_of(tokenizer, "none")
    glued = said("the us", "er asks", raw=True)
    found, counts = encode(template, [glued, said("the", " user", raw=True)], 1000)
    assert (counts.straddling, counts.unlike) == (1, 1)
    ids, labels = found["input_ids"].tolist(), found["labels"].tolist()
    (first, second) = learned(tokenizer, ids, labels)
    assert tokenizer.decode(first) == " user asks<|end_of_text|>"
    assert tokenizer.decode(second) == " user<|end_of_text|>"
    note = counts.note(1000)
    assert "1 learn a token that is only partly" in note
    assert "1 begin with other tokens than the prompt in generation" in note


def test_generation_stops_where_a_turn_ends() -> None:
    tokenizer = made("gpt2")
    end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|im_end|>"))
    assert of(tokenizer, "qwen-3").stops == (end, turn)
    assert of(tokenizer, "zephyr").stops == (end,)
    assert of(tokenizer, "words alone").stops == (end,)
    assert template_of(tokenizer, "none").stops == (end,)
    assert of(tokenizer, "words alone").stop_text == "\n### end"
    for name in ("qwen-3", "zephyr", "plain"):
        assert of(tokenizer, name).stop_text == ""
    assert template_of(tokenizer, "none").stop_text == ""


SYSTEM_AT_THE_END = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and messages[0].role == 'system' %}"
    "{{ '[INST] ' + messages[0].content + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)  # Mistral 7B v0.3's: with an answer behind it, no user's message is the last


@pytest.mark.parametrize(
    ("jinja", "one", "error", "message"),
    [
        (TEMPLATES["gemma"], CONVERSATIONS["system"], DataError,
         r"x.jsonl, line 7: the chat template \(the tokenizer's\) refuses .* of system, user:"
         " System role not supported.*--template plain"),
        (TEMPLATES["gemma"], Conversation((Message("assistant", "hello"),), place="here"),
         DataError, "here: .*refuses.*roles must alternate"),
        (SYSTEM_AT_THE_END, CONVERSATIONS["system"], DataError,
         "line 7: .*leaves out the system's message"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", CONVERSATIONS["one turn"],
         ConfigError, "writes nothing after an answer: .*never stops"),
        ("{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
         CONVERSATIONS["one turn"], DataError, "writes an answer 2 times"),
        ("{% for m in messages %}{{ m.role + eos_token }}{% endfor %}",
         CONVERSATIONS["one turn"], DataError, "writes an answer 0 times"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content + eos_token }}{% endfor %}",
         CONVERSATIONS["one turn"], DataError, "changes the text around message 2"),
        ("{% for m in messages %}{{ m.content + eos_token }}{{ m.content | length }}{% endfor %}",
         CONVERSATIONS["one turn"], DataError, "changes the text around message 2"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token if loop.last else ';' }}{% endfor %}",
         CONVERSATIONS["two turns"], DataError, "changes the text around message 2"),
        ("{% for m in messages %}{{ m.content", CONVERSATIONS["one turn"], DataError, "refuses"),
        ("{% for m in messages %}{{ m.content + m.name }}{% endfor %}",
         CONVERSATIONS["one turn"], DataError, "refuses.*has no attribute 'name'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_followed_is_refused(
    jinja: str, one: Conversation, error: type[Exception], message: str
) -> None:
    tokenizer = made("gpt2")
    tokenizer.chat_template = jinja
    with pytest.raises(error, match=message):
        template_of(tokenizer).render(one)


def test_a_system_message_before_an_answer_alone_is_not_learned() -> None:
    """A template may write it with the next message, and nothing of it without one."""
    tokenizer = made("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if messages | length > 1 %}"
        "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    one = Conversation((Message("system", "be good"), Message("assistant", "I am")))
    rendered = template_of(tokenizer).render(one)
    assert rendered.text[slice(*rendered.spans[0])] == "I am<|im_end|>"


def test_a_prompt_holds_all_that_was_said() -> None:
    tokenizer = made("gpt2")
    tokenizer.chat_template = SYSTEM_AT_THE_END
    prompt = template_of(tokenizer).prompt(CONVERSATIONS["system"])
    assert prompt == "<|begin|>[INST] a system prompt\n\nhello[/INST]"


def test_thoughts_that_generation_has_to_write_are_learned() -> None:
    template = of(made("gpt2"), "qwen-3")
    rendered = template.render(
        said("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    )
    assert [rendered.text[slice(*span)] for span in rendered.spans] == [
        "b<|im_end|>",  # the template drops earlier ones
        "<think>\nso\n</think>\n\nd<|im_end|>",
    ]
    rendered = template.render(said("a", "b", "c", "d"))
    assert [rendered.text[slice(*span)] for span in rendered.spans] == [
        "b<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]
    assert rendered.prompt.endswith("<|im_start|>assistant\n")


def test_what_a_tokenizer_was_last_asked_for_changes_nothing() -> None:
    tokenizer = gpt2_like()
    tokenizer.pad_token = tokenizer.eos_token
    one = CONVERSATIONS["one turn"]
    fresh, _ = encode(of(tokenizer, "zephyr"), [one], 1000)
    for length in (4, 200):
        tokenizer("a", truncation=True, max_length=length, padding="max_length")
        again, _ = encode(of(tokenizer, "zephyr"), [one], 1000)
        assert torch.equal(fresh["input_ids"], again["input_ids"])


def test_white_space_that_is_a_token_ends_no_turn() -> None:
    tokenizer = gpt2_like()
    tokenizer.add_tokens(["\n", "\n\n"])  # as Gemma's
    assert of(tokenizer, "words alone").closing == "\n### end"


def test_a_template_from_a_file(tmp_path: Path) -> None:
    tokenizer = made("gpt2")
    (tmp_path / "mine.jinja").write_text(str(TEMPLATES["words alone"]))
    template = template_of(tokenizer, str(tmp_path / "mine.jinja"))
    assert (
        template.render(said("a", "b", raw=True)).prompt
        == "### user:\na\n### end\n### assistant:\n"
    )
    with pytest.raises(
        ConfigError, match="nowhere.*cannot be read: No such file.*Pass auto, plain"
    ):
        template_of(tokenizer, str(tmp_path / "nowhere"))


def test_what_a_tokenizer_lacks_is_named() -> None:
    tokenizer = gpt2_like()
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    with pytest.raises(ConfigError, match="--template auto: .*multiple chat templates"):
        template_of(tokenizer)
    tokenizer.eos_token = None
    for asked in ("plain", "none"):
        with pytest.raises(ModelError, match="has no end token.*Set eos_token"):
            template_of(tokenizer, asked)
    tokenizer.chat_template = TEMPLATES["qwen-2.5"]
    template = template_of(tokenizer)
    assert template.stops == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    with pytest.raises(ModelError, match="has no end token"):
        template.render(said("a", "b", raw=True))

    class Slow:
        eos_token, bos_token_id, chat_template = "</s>", None, None

    with pytest.raises(ModelError, match="Slow has no fast backend.*tokenizer.json"):
        prompt_ids(template_of(Slow(), "none"), [said("a", "b")])


def test_turns_and_no_template_do_not_go_together() -> None:
    template = template_of(made("gpt2"), "none")
    for one in (CONVERSATIONS["two turns"], CONVERSATIONS["system"]):
        with pytest.raises(DataError, match="line 7: . messages .* need a template.*plain"):
            template.render(one)


def t5_like() -> Any:
    """Ends every text by </s>."""
    core = Tokenizer.from_str(pieces_core(False))
    tokenizer = wrapped(core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def bart_like() -> Any:
    tokenizer = gpt2_like()
    first, last = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        (last, tokenizer.eos_token_id), (first, tokenizer.bos_token_id), add_prefix_space=False
    )
    return tokenizer


@pytest.mark.parametrize("make", [t5_like, bart_like])
def test_an_encoder_reads_the_prompt_and_its_decoder_writes_the_answer(
    make: Callable[[], Any],
) -> None:
    tokenizer = make()
    template = template_of(tokenizer, "none")
    some = [said("user: hello there", "a good answer"), said("name || ", " place. ", raw=True)]
    found, counts = encode_pairs(template, some, 1000)
    sources = tokenizer(["user: hello there", "name || "])["input_ids"]
    answers = tokenizer(text_target=["a good answer", "place."])["input_ids"]
    for name, offsets, rows in (
        ("input_ids", "offsets", sources),
        ("labels", "label_offsets", answers),
    ):
        assert found[name].dtype == torch.int32
        assert found[name].tolist() == [token for row in rows for token in row]
        assert found[offsets].diff().tolist() == [len(row) for row in rows]
    assert found["rows"].tolist() == [0, 1]
    assert prompt_ids(template, some, encoder=True) == sources
    assert (counts.long, counts.learned) == (0, len(found["labels"]))
    cut, counts = encode_pairs(template, some[:1], 3)
    assert cut["input_ids"].tolist() == [*sources[0][:2], tokenizer.eos_token_id]
    assert cut["labels"].tolist() == [*answers[0][:2], tokenizer.eos_token_id]
    assert (counts.long, counts.cut) == (1, len(sources[0]) + len(answers[0]) - 6)


def test_a_decoder_learns_to_stop_where_the_tokenizer_would_not_say() -> None:
    tokenizer = made("gpt2")
    found, _ = encode_pairs(template_of(tokenizer, "none"), [said("a", "b")], 1000)
    assert found["labels"].tolist()[-1] == tokenizer.eos_token_id
    assert found["input_ids"].tolist() == tokenizer("a")["input_ids"]


def shown(width: int = 60, terminal: bool = False, **more: Any) -> str:
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=terminal)
    some = [said("hello there", "a good\nanswer né \x1b[2J"), said("a question" * 20, "no")]
    preview(of(made("gpt2"), "zephyr"), some, 64, console=console, **more)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_preview_in_a_pipe_says_what_is_masked() -> None:
    lines = shown().splitlines()
    assert lines[0] == "── x.jsonl, line 7: 24 tokens, 16 learned"
    assert [line[:8] for line in lines[1:6]] == ["masked  "] * 3 + ["learned "] * 2
    assert lines[3] == "masked  <|assistant|>↵"
    assert lines[4].replace("│", "") == "learned a good↵"
    assert lines[5].replace("│", "") == r"learned answer né \x1b[2J<|end_of_text|>"
    assert "│n││é│" in lines[5]  # two tokens make up the é
    assert "── x.jsonl, line 7: 64 tokens of 188, cut, 0 learned" in lines
    assert lines[-2] == "── 1 of 2 examples: 16 of 24 tokens learned"
    assert lines[-1].startswith("1 of 2 examples are longer than --max-length 64 and truncated")
    assert "\x1b" not in "".join(lines)
    assert len(shown(count=1).splitlines()) < len(lines)
    assert "masked" not in shown(count=1, loss_on="all").replace("masked  <|user|>", "")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_preview_shows_every_character_once(kind: str) -> None:
    template = of(made(kind), "llama-3")
    for name in ("signs", "two turns", "line ends"):
        console = rich.console.Console(file=io.StringIO(), width=60)
        preview(template, [CONVERSATIONS[name]], 1000, console=console)
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().split("\n")[1:-2]
        text = "\n".join(line[8:] for line in lines).replace("│", "")
        text = text.replace("↵\n", "\0").replace("\n", "").replace("\0", "\n")
        assert text == template.render(CONVERSATIONS[name]).text


def test_a_preview_in_a_terminal_is_bright_where_it_is_learned() -> None:
    text = shown(terminal=True)
    assert "\x1b[2mmasked  \x1b[0m\x1b[35m<|user|>" in text
    assert "\x1b[1;32ma\x1b[0m" in text
    assert "\x1b[1;35m<|end_of_text|>" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.splitlines() == shown().splitlines()


def test_a_preview_shows_what_learns_nothing_before_it_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DataError, match="none of 1 examples"):
        preview(of(made("gpt2"), "zephyr"), [said("a question" * 20, "no")], 64)
    assert "64 tokens of 188, cut, 0 learned" in capsys.readouterr().out


def test_e2e_as_it_stands() -> None:
    folder = needs_shared("e2e")
    some = read_one_split(str(folder / "test.txt"))[0][::10]
    template = template_of(made("gpt2"))
    found, counts = encode(template, some, 1000)
    assert (counts.lost, counts.straddling, counts.unlike) == (0, 0, 0)
    tokenizer = template.tokenizer
    for row, start, end in zip(found["rows"], found["offsets"], found["offsets"][1:]):
        labels = found["labels"][start:end]
        answer = tokenizer.decode(labels[labels != IGNORED])
        assert answer == f" {some[row].references[0]}{tokenizer.eos_token}"
