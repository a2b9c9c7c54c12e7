"""Defines the demo language model: a small LLaMA with one token per byte, and no weights.

`--base demo-lm-tiny` is built from this configuration with weights from the run's seed.
`make demo-lm-tiny` pretrains it on a part of lora.finetune.demo.tasks before adapters are trained
on others.
"""

from __future__ import annotations

import json

SPECIAL = ("<pad>", "<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
)
"""The messages one after another, and the end token after an answer.

Templates are rendered with Jinja's trim_blocks, which removes the line break here. So nothing
separates a prompt from its answer: the b after "spell: bade" could belong to either. Runs of
earlier versions were trained with this template, so it does not change;
recipes/demo-lm-tiny-base.toml has another.
"""

# Arguments of LlamaConfig that differ from its defaults.
LLAMA = {
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # about 1/√hidden_size; the default 0.02 learns far more slowly
    "tie_word_embeddings": True,
    "attention_bias": True,  # BitFit trains only biases
    "mlp_bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer_json() -> str:
    """Returns a tokenizer as JSON of the `tokenizers` library: a start token, then one per byte."""
    _, start, _ = SPECIAL
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *_byte_signs()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}  # fmt: skip
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": number, "content": token, "special": True, "single_word": False,
                 "lstrip": False, "rstrip": False, "normalized": False}
                for number, token in enumerate(SPECIAL)
            ],
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": start, "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                         {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {start: {"id": start, "ids": [1], "tokens": [start]}},
            },
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
    )  # fmt: skip


def _byte_signs() -> list[str]:
    """Returns the character that ByteLevel uses for each byte (GPT-2's bytes_to_unicode).

    A printable byte is its own character. The others get the characters from U+0100 on.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
