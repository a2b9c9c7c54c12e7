"""Compares the answers of a GGUF file in llama.cpp with those of its model in transformers."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

NEW_TOKENS = 16  # of each answer
PART_OF_CHARACTER = re.compile(rb"(?:[\xc0-\xf7]|[\xe0-\xf7].|[\xf0-\xf7]..)\Z", re.DOTALL)
"""The start of a character of UTF-8 at the end of a text, as llama.cpp recognizes it."""


def certificate(
    file: Path, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int]
) -> str:
    """Returns a sentence: how many greedy answers are equal, and what the first difference is.

    model: its weights are rounded as in the file. ends: the tokens that end an answer. llama.cpp
    runs in the package xllamacpp. Without it, the sentence says that it is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return (
            "not compared with llama.cpp, since xllamacpp is not installed. Run pip install"
            " xllamacpp, then export again."
        )
    engine = _Engine(file, max(map(len, prompts)) + NEW_TOKENS)
    equal, first = 0, ""
    for number, ids in enumerate(prompts, 1):
        tokens, theirs = greedy(model, ids, ends), engine.answer(ids)
        ours = _answer_of(tokenizer, tokens, ends)
        same = _agree(ours, theirs)
        equal += same
        if not same and not first:
            first = f"; {_difference(model, tokenizer, number, [*ids], tokens, theirs)}"
    return (
        "llama.cpp and transformers, with the same rounded weights, give the same greedy answers"
        f" ({NEW_TOKENS} tokens) to {equal} of {len(prompts)} prompts{first}"
    )


def greedy(model: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Returns the model's most probable tokens after a prompt, up to one that ends an answer."""
    inputs = torch.tensor([list(ids)], device=next(model.parameters()).device)
    written = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=list(ends),
    )  # fmt: skip
    tokens: list[int] = written[0, len(ids) :].tolist()
    return tokens


@dataclass(frozen=True)
class _Answer:
    """An answer as bytes: llama.cpp does not give the tokens that end within a character."""

    text: bytes
    ended: bool  # by an end token, not by the limit


def _answer_of(tokenizer: Any, tokens: Sequence[int], ends: Sequence[int]) -> _Answer:
    text = b"".join(token_bytes(tokenizer, token) for token in tokens)
    return _Answer(text, tokens[-1] in ends)


def _agree(ours: _Answer, theirs: _Answer) -> bool:
    """True if the answers are equal. llama.cpp omits an incomplete character at the end."""
    text, length = ours.text, len(theirs.text)
    rest_incomplete = all(
        PART_OF_CHARACTER.search(text[:end]) for end in range(length + 1, len(text) + 1)
    )
    return ours.ended == theirs.ended and text[:length] == theirs.text and rest_incomplete


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Returns the bytes of a token's text; none for a special token."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return b"" if added.special else str(added.content).encode()
    text = str(tokenizer.convert_ids_to_tokens(token))
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]["type"] == "ByteLevel":
        return bytes(byte_of[character] for character in text)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)  # SentencePiece
    return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()


def _difference(
    model: Any, tokenizer: Any, number: int, ids: list[int], tokens: list[int], theirs: _Answer
) -> str:
    """Describes the first token that differs, with the margin between the two largest logits."""
    text, at = b"", 0
    while at < len(tokens) - 1:
        following = text + token_bytes(tokenizer, tokens[at])
        if not theirs.text.startswith(following):
            break
        text, at = following, at + 1
    other = theirs.text[len(text) :][:20].decode(errors="replace")
    inputs = torch.tensor([[*ids, *tokens[:at]]], device=next(model.parameters()).device)
    with torch.no_grad():
        first, second = model(inputs).logits[0, -1].topk(2).values.tolist()
    return (
        f"the first difference is token {at + 1} of answer {number}:"
        f" {tokenizer.decode([tokens[at]])!r} in transformers, where the two largest logits differ"
        f" by {first - second:.2g}, and {repr(other) if other else 'the end'} in llama.cpp"
    )


class _Engine:
    """llama.cpp with a GGUF file, and float32 keys and values."""

    def __init__(self, file: Path, length: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = length, 1, 0, 0
        params.warmup = params.fit_params = False
        # With more threads than free cores, they would spin while they wait for each other.
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def answer(self, ids: Sequence[int]) -> _Answer:
        """Returns the greedy answer to a prompt."""
        request = {"prompt": list(ids), "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1}
        (choice,) = self.server.handle_completions(request)["choices"]
        pieces = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
        return _Answer(b"".join(pieces), choice["finish_reason"] == "stop")
