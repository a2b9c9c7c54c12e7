"""Exported adapters in llama.cpp itself: its probabilities against transformers'.

The base is written here as llama.cpp's own converter writes it. xllamacpp brings the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from torch import Tensor

import lora
from lora.interop.export import ARCHITECTURES, EOT, export_gguf
from lora.testing import perturb

gguf = pytest.importorskip("gguf")
engine = pytest.importorskip("xllamacpp")

IDS = [260, 17, 5, 99, 280, 41, 12]
HEADS, GROUPS, SIZE = 4, 2, 8


def converted(model: Any, name: str, parameter: Tensor) -> Tensor:
    """A weight or bias in the order of rows that convert_hf_to_gguf.py gives it."""
    kind, layer = model.config.model_type, name.rpartition(".")[0]
    if kind == "llama" and layer.endswith(("q_proj", "k_proj")):
        heads = HEADS if layer.endswith("q_proj") else GROUPS
        return parameter.reshape(heads, 2, SIZE // 2, -1).swapaxes(1, 2).reshape(parameter.shape)
    if layer.endswith("query_key_value"):
        parts = parameter.reshape(HEADS, 3, SIZE, *parameter.shape[1:])
        return torch.cat([parts[:, i].flatten(0, 1) for i in range(3)])
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return parameter.T
    return parameter


def write_base(model: Any, path: Path, turn: int | None = None) -> None:
    """The model as a GGUF file, in float32, with a vocabulary of bytes and numbered tokens, one of
    which ends a turn."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128 if architecture == "gpt2" else 48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_parallel_residual(True)
    writer.add_rope_dimension_count(SIZE // 2 if architecture == "gptneox" else SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_sliding_window(0)
    writer.add_tokenizer_model("llama")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"t{number}" for number in range(VOCAB - len(names))]
    writer.add_token_list(names)
    writer.add_token_scores([-float(number) for number in range(VOCAB)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)])
    writer.add_add_bos_token(False)
    if turn is not None:  # as --override-kv sets it
        writer.add_uint32(EOT, turn)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    targets = gguf.get_tensor_name_map(kinds[architecture], 2)
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        values = converted(model, name, parameter.detach()).contiguous()
        writer.add_tensor(f"{targets.get_name(layer)}.{leaf}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    export_gguf(lora.save(model, tmp_path / "adapter"), model.config, tmp_path / "a.gguf", "f32")

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
    write_base(model, tmp_path / "ended.gguf", end)
    stopped = written(tmp_path / "ended.gguf", [*IDS, first])
    assert stopped[: free.index(end)] == free[: free.index(end)]
    assert len(stopped) <= free.index(end) + 1
