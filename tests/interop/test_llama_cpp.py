"""Exported adapters in llama.cpp itself: its probabilities against transformers'.

The base is written here as llama.cpp's own converter writes it. xllamacpp brings the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from gguf_bases import bytes_of_sentencepiece, write_base
from torch import Tensor

import lora
from lora.interop.gguf_adapter import write_gguf_adapter
from lora.testing import perturb

gguf = pytest.importorskip("gguf")
engine = pytest.importorskip("xllamacpp")

IDS = [260, 17, 5, 99, 280, 41, 12]


def settings(base: Path) -> Any:
    params = engine.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 64, 1, 0, 0
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def answer(base: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """llama.cpp's log-probabilities (vocab,) of the token after ids."""
    params = settings(base)
    if adapter is not None:
        params.lora_adapters = [engine.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": VOCAB}
    found = engine.Server(params).handle_completions(asked)
    (one,) = found["choices"][0]["logprobs"]["content"]
    logs = {entry["id"]: entry["logprob"] for entry in one["top_logprobs"]}
    return torch.tensor([logs[token] for token in range(VOCAB)])


def whole(token: int) -> bool:
    """Whether a token is a text: of half a letter the server gives no probabilities."""
    return token >= 259 or 3 + 32 <= token < 3 + 127


@pytest.mark.parametrize(
    ("name", "settings", "within"),
    [
        ("llama", {"target_modules": r"model\..*_proj|lm_head|model\.embed_tokens"}, 1e-4),
        ("qwen2", {"use_rslora": True, "rank_pattern": {"down_proj": 2}}, 1e-4),
        ("phi3", {"alpha_pattern": {"qkv_proj": 11}}, 1e-4),
        ("gpt_neox", {}, 5e-3),  # llama.cpp takes GELU from a table of float16
        ("gpt2", {}, 5e-3),
    ],
)
def test_the_engine_computes_what_we_do(name: str, settings: Any, within: float, tmp_path) -> None:
    model = build(name)
    write_base(model, tmp_path / "base.gguf")
    lora.inject(model, lora.LoRAConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    perturb(model)
    write_gguf_adapter(
        lora.save(model, tmp_path / "adapter"), model.config, tmp_path / "a.gguf", "f32"
    )

    def ours(ids: list[int]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return found

    for last in range(VOCAB):
        ids = [*IDS, last]
        adapted = ours(ids)
        with lora.disabled(model):
            plain = ours(ids)
        if whole(int(adapted.argmax())) and whole(int(plain.argmax())):
            break
    torch.testing.assert_close(
        answer(tmp_path / "base.gguf", None, ids), plain, atol=within, rtol=0
    )
    found = answer(tmp_path / "base.gguf", tmp_path / "a.gguf", ids)
    torch.testing.assert_close(found, adapted, atol=within, rtol=0)
    assert float((adapted - plain).abs().max()) > 0.5


def written(base: Path, ids: list[int]) -> list[int]:
    """The 12 tokens at most that llama.cpp writes after ids."""
    params = settings(base)
    asked = {"prompt": ids, "n_predict": 12, "temperature": 0, "n_probs": 1}
    found = engine.Server(params).handle_completions(asked)
    return [entry["id"] for entry in found["choices"][0]["logprobs"]["content"]]


def test_the_engine_stops_at_the_token_that_export_names(tmp_path: Path) -> None:
    model = build("llama")
    write_base(model, tmp_path / "base.gguf")
    for first in range(5, 60):
        free = written(tmp_path / "base.gguf", [*IDS, first])
        end = next((one for one in free[1:8] if one >= 259 and one != free[0]), None)
        if len(free) == 12 and end is not None:
            break
    assert end is not None
    ended = {**bytes_of_sentencepiece(VOCAB), "eot_token_id": end}  # as --override-kv sets it
    write_base(model, tmp_path / "ended.gguf", ended)
    stopped = written(tmp_path / "ended.gguf", [*IDS, first])
    assert stopped[: free.index(end)] == free[: free.index(end)]
    assert len(stopped) <= free.index(end) + 1
