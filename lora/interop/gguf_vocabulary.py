"""Converts a byte-level BPE tokenizer of transformers into the metadata that llama.cpp reads.

llama.cpp splits a text with one of its built-in patterns, which the file names in
tokenizer.ggml.pre. A wrong name would split some texts differently, without an error. So a file is
written only if we know the name of the pattern that the tokenizer uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora.errors import ModelError

CONVERT_ADVICE = (
    "Save the merged model with lora merge, and convert it with llama.cpp's convert_hf_to_gguf.py."
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types."""
_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {_LETTERS % "{1,3}": "llama-bpe", _LETTERS % "": "qwen2"}
"""The pattern of a Split step -> tokenizer.ggml.pre."""
IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' name of a token -> llama.cpp's."""


def vocabulary(tokenizer: Any, rows: int, ends: Mapping[str, int]) -> dict[str, Any]:
    """Returns the entries tokenizer.* for a tokenizer and an embedding with this many rows.

    ends: the tokens that end an answer, with their ids. Raises ModelError if llama.cpp has no
    equivalent.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise ModelError(
            f"only tokenizers of byte-level BPE with merges can be written as GGUF, found one of"
            f" {model.get('type')}. {CONVERT_ADVICE}"
        )
    tokens, types = tokens_of(tokenizer, rows)
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer(state),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _pairs(model["merges"])],
    }
    for name, llama_name in IDS.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            entries[f"tokenizer.ggml.{llama_name}_token_id"] = number
    turn = next((number for number in ends.values() if number != tokenizer.eos_token_id), None)
    if turn is not None:
        entries["tokenizer.ggml.eot_token_id"] = turn
    ids = tokenizer("a")["input_ids"]
    entries["tokenizer.ggml.add_bos_token"] = ids[0] == tokenizer.bos_token_id
    entries["tokenizer.ggml.add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    if tokenizer.chat_template:
        entries["tokenizer.chat_template"] = tokenizer.get_chat_template()
    return entries


def tokens_of(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Returns the tokens and their types by id. Ids of rows without a token get unused ones."""
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number < rows:
            tokens[number], types[number] = token, NORMAL
            if number in added:
                types[number] = CONTROL if added[number].special else USER_DEFINED
    return tokens, types


def _pairs(merges: list[Any]) -> list[list[str]]:
    """Returns merges as pairs. Old versions of tokenizers saved "a b" in place of ["a", "b"]."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for how a tokenizer splits a text, from its tokenizer.json.

    Raises ModelError if it has none that we know.
    """
    stated = state.get("pre_tokenizer") or {}
    steps = stated.get("pretokenizers", [stated])
    *before, last = [{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps]
    pattern = None
    if last == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
        if not before:
            return "gpt-2"
        if before == [{"type": "Digits", "individual_digits": True}]:
            return "smollm"
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if last == plain and len(before) == 1 and before[0].get("behavior") == "Isolated":
        pattern = before[0].get("pattern", {}).get("Regex")
    if pattern not in PATTERNS:
        raise ModelError(
            "the tokenizer splits texts in a way for which we know no tokenizer.ggml.pre of"
            f" llama.cpp: {json.dumps(stated)[:200]}. {CONVERT_ADVICE}"
        )
    return PATTERNS[pattern]
