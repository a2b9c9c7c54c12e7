"""Compares the answers of a GGUF file in llama.cpp with those of the transformers model in it."""

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
    """Returns how many greedy answers to the prompts are equal, and the first difference.

    model: with the weights that are in the file. ends: the tokens that end an answer. The engine is
    xllamacpp; without it the sentence says that nothing was compared.
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
    """An answer as llama.cpp gives it: tokens that end within a character are not named."""

    text: bytes
    ended: bool  # by an end token, not by the limit


def _answer_of(tokenizer: Any, tokens: Sequence[int], ends: Sequence[int]) -> _Answer:
    text = b"".join(token_bytes(tokenizer, token) for token in tokens)
    return _Answer(text, tokens[-1] in ends)


def _agree(ours: _Answer, theirs: _Answer) -> bool:
    """True if the answers are equal. llama.cpp holds bytes back until they are whole characters."""
    text, known = ours.text, len(theirs.text)
    held_back = all(PART_OF_CHARACTER.search(text[: at + 1]) for at in range(known, len(text)))
    return ours.ended == theirs.ended and text[:known] == theirs.text and held_back


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Returns what a token writes; nothing for a special one."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return b"" if added.special else str(added.content).encode()
    text = str(tokenizer.convert_ids_to_tokens(token))
    signs = {sign: byte for byte, sign in bytes_to_unicode().items()}
    if json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]["type"] == "ByteLevel":
        return bytes(signs[sign] for sign in text)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)  # SentencePiece
    return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()


def _difference(
    model: Any, tokenizer: Any, number: int, ids: list[int], tokens: list[int], theirs: _Answer
) -> str:
    """Returns the first token that differs, and how near the model was to another."""
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
    """A GGUF file in llama.cpp, with float32 keys and values."""

    def __init__(self, file: Path, length: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = length, 1, 0, 0
        params.warmup = params.fit_params = False
        # More threads than cores that are free spin while they wait for each other.
        threads = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def answer(self, ids: Sequence[int]) -> _Answer:
        """Returns the most probable tokens after a prompt."""
        asked = {"prompt": list(ids), "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1}
        (choice,) = self.server.handle_completions(asked)["choices"]
        pieces = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
        return _Answer(b"".join(pieces), choice["finish_reason"] == "stop")
