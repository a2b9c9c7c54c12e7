"""Small models as GGUF files, written as llama.cpp's convert_hf_to_gguf.py writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from lora.finetune.demo import language

HEADS, GROUPS, SIZE = 4, 2, 8
NAMES = {
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")},
    "gpt_neox": "gptneox",
}
"""model_type -> general.architecture."""


def converted(model: Any, name: str, parameter: Tensor) -> Tensor:
    """A weight or bias in llama.cpp's order of rows."""
    kind, layer = model.config.model_type, name.rpartition(".")[0]
    if NAMES[kind] == "llama" and layer.endswith(("q_proj", "k_proj")):
        heads = HEADS if layer.endswith("q_proj") else GROUPS
        return parameter.reshape(heads, 2, SIZE // 2, -1).swapaxes(1, 2).reshape(parameter.shape)
    if layer.endswith("query_key_value"):
        parts = parameter.reshape(HEADS, 3, SIZE, *parameter.shape[1:])
        return torch.cat([parts[:, i].flatten(0, 1) for i in range(3)])
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return parameter.T
    if kind == "gemma2" and name.endswith("norm.weight"):
        return parameter + 1
    return parameter


def bytes_of_sentencepiece(rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer with a token per byte, and numbered tokens."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"t{number}" for number in range(rows - len(names))]
    return {
        "model": "llama",
        "tokens": names,
        "scores": [-float(number) for number in range(rows)],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (rows - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "add_bos_token": False,
    }


def bytes_of_gpt2(rows: int) -> dict[str, Any]:
    """The metadata of demo-lm's tokenizer with a token of two spaces, since a file needs a merge.
    Unused tokens fill it up to so many."""
    names = [*language.SPECIAL, *language._byte_signs(), "\u0120\u0120"]
    unused = [f"[PAD{number}]" for number in range(len(names), rows)]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*names, *unused],
        "token_type": [3, 3, 3, *[1] * 257, *[5] * len(unused)],
        "merges": ["\u0120 \u0120"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "add_bos_token": False,
    }


def stored_type(tensor: Tensor, type: str) -> Any:
    """The type of a tensor in a file of `type`: F32 of a vector, F16 if blocks do not fit."""
    fits = type != "Q8_0" or tensor.shape[-1] % 32 == 0
    return gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else type if fits else "F16"]


def write_base(
    model: Any,
    path: Path,
    tokenizer: dict[str, Any] | None = None,
    template: str | None = None,
    type: str = "F32",
    positions: int = 64,
    tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes a model with a tokenizer; matrices of `type`, everything else in float32.

    tokenizer: what is under tokenizer.ggml; metadata, tensors: what is added to the file.
    """
    config = model.config
    architecture = NAMES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(positions)
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
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    writer.add_key_length(SIZE)
    writer.add_value_length(SIZE)
    tokenizer = tokenizer or bytes_of_sentencepiece(config.vocab_size)
    entries = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    for key, value in {**entries, **(metadata or {})}.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32:  # which llama.cpp does not take for ids and sizes
            kind = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    if template is not None:
        writer.add_chat_template(template)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    targets = gguf.get_tensor_name_map(kinds[architecture], 2)
    arrays = {}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        arrays[f"{targets.get_name(layer)}.{leaf}"] = converted(model, name, parameter.detach())
    for name, tensor in {**arrays, **(tensors or {})}.items():
        kind = stored_type(tensor, type)
        data = tensor.contiguous().float().numpy()
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
