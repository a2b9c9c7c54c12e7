"""Writes a LoRA adapter as a GGUF file for llama.cpp.

llama.cpp computes W x + (alpha / r) B (A x) for each adapted tensor: alpha is the same for the
whole file, r is the tensor's rank. It orders the rows of some weights differently from
transformers. The rows of B must have the same order, as in llama.cpp's convert_lora_to_gguf.py:

    llama, mistral, mixtral   q_proj, k_proj    rows 0, d/2, 1, d/2 + 1, ... of each head: RoPE
                                                rotates neighbours
    gpt_neox                  query_key_value   q of all heads, then k, then v; not head by head

The file has these entries and tensors:

    general.type = adapter    general.architecture    adapter.type = lora    adapter.lora.alpha
    TENSOR.weight.lora_a      (r, in); for the embedding (vocab, r)
    TENSOR.weight.lora_b      (out, r); for the embedding (dim, r)

GPT-2's Conv1D needs no transposition: A and B are (r, in) and (out, r) there too.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora.errors import CheckpointError, ConfigError
from lora.files import writable
from lora.interop.saved_lora import MERGE_ADVICE, SavedLoRA, read_saved_lora
from lora.methods._lowrank_options import by_layer

AdapterDtype = Literal["f16", "bf16", "f32"]
ADAPTER_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
ADAPTABLE = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "t5")},
    "phi": "phi2",
    "gpt_neox": "gptneox",
}
"""model_type -> general.architecture, for the models whose adapters we can write."""


def write_gguf_adapter(adapter: Path, base: Any, output: Path, dtype: AdapterDtype = "f16") -> int:
    """Writes an adapter as a GGUF file, for the base with this transformers config.

    If layers differ in alpha, the file has the commonest, and B is scaled to make up for it.
    Returns the number of adapted layers.

    Raises CheckpointError if llama.cpp cannot compute what the adapter does, ConfigError if the
    base's architecture is unknown or the file exists, and what read_saved_lora() raises.
    """
    check_new(output)
    if base.model_type not in ADAPTABLE:
        raise ConfigError(
            f"the base's model_type is {base.model_type!r}, and adapters for llama.cpp can be"
            f" written for {', '.join(ADAPTABLE)}. {MERGE_ADVICE}"
        )
    saved = read_saved_lora(adapter, base)
    alpha, _ = by_layer(saved.alphas)
    tensors = adapter_tensors(saved, base, alpha)
    for name, tensor in tensors.items():
        if not bool(tensor.to(ADAPTER_DTYPES[dtype]).isfinite().all()):
            raise CheckpointError(
                f"{saved.folder}: {name} is not finite in {dtype}. Set --dtype bf16 or f32, or"
                " export an earlier checkpoint."
            )
    with new_file(output) as temporary:
        _write(temporary, ADAPTABLE[base.model_type], alpha, tensors, dtype)
    return len(saved.layers)


def check_new(output: Path) -> None:
    """Raises ConfigError if a file exists already."""
    with writable(output, CheckpointError, "Pass another --output."):
        if os.path.lexists(output):
            raise ConfigError(f"{output} exists already. Pass another --output, or remove it.")


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames the file that the block writes there to `output`. If the
    block fails, no file is left. Raises CheckpointError if it cannot be written."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    with writable(output, CheckpointError, "Free space, or pass another --output."):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, output)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _write(
    path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor], dtype: AdapterDtype
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for name, tensor in tensors.items():
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def adapter_tensors(saved: SavedLoRA, base: Any, alpha: float) -> dict[str, Tensor]:
    """Returns the tensors of the GGUF file by name, float32, for a file with this alpha."""
    if saved.other_keys:
        raise CheckpointError(
            f"{saved.folder}: {saved.other_keys[0]} is not part of a low-rank update, and adapters"
            f" for llama.cpp contain nothing else. {MERGE_ADVICE}"
        )
    blocks = max(base.num_hidden_layers, getattr(base, "num_decoder_layers", 0))
    names = tensor_names(ADAPTABLE[base.model_type], blocks)
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in saved.layers.items():
        target = names.get_name(name)
        embedding = target == "token_embd"
        if target is None or embedding != (name in saved.embeddings):
            raise CheckpointError(
                f"{saved.folder}: llama.cpp does not adapt {name} in {base.model_type}."
                f" {MERGE_ADVICE}"
            )
        # llama.cpp has one tensor for both, so both would get the adapter of either.
        if target in ("token_embd", "output") and base.tie_word_embeddings:
            raise CheckpointError(
                f"{saved.folder}: {name} shares its weight with the model's other end, and"
                f" llama.cpp cannot adapt one without the other. {MERGE_ADVICE}"
            )
        try:
            rows = row_order(base, name, len(B))
        except ValueError as error:
            raise CheckpointError(
                f"{saved.folder}: {error}. Pass the --base that it was trained on."
            ) from None
        tensors[f"{target}.weight.lora_a"] = (A.T if embedding else A).float().contiguous()
        tensors[f"{target}.weight.lora_b"] = B.float()[rows] * (saved.alphas[name] / alpha)
    return tensors


def tensor_names(architecture: str, blocks: int) -> Any:
    """Returns gguf's map from transformers' layer names to llama.cpp's."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def row_order(base: Any, name: str, outputs: int) -> Tensor:
    """Returns the indices (outputs,) of a layer's outputs in llama.cpp's order.

    Raises ValueError if the number of outputs is not a multiple of the heads in the base's config.
    """
    rows, leaf = torch.arange(outputs), name.rpartition(".")[2]
    # RoPE rotates each row of the first half of a head with the same row of the second half. In
    # llama.cpp's order these two rows are neighbours.
    rotated = ADAPTABLE[base.model_type] == "llama" and leaf in ("q_proj", "k_proj")
    fused = base.model_type == "gpt_neox" and leaf == "query_key_value"
    if not rotated and not fused:
        return rows
    heads = base.num_key_value_heads if leaf == "k_proj" else base.num_attention_heads
    parts = 2 if rotated else 3  # halves of a head; q, k and v
    if outputs % (heads * parts):
        raise ValueError(f"{name} has {outputs} outputs, and the base {heads} heads")
    if rotated:
        return rows.reshape(heads, parts, -1).transpose(1, 2).reshape(-1)
    return rows.reshape(heads, parts, -1).transpose(0, 1).reshape(-1)
