"""Writes a whole language model as a GGUF file, by the rules of llama.cpp's convert_hf_to_gguf.py.

Matrices are written in the type that is asked for, norms and biases in float32. The rows of q and k
are reordered for the llama architecture, where RoPE rotates neighbours. A tied head is left out. If
the base is a GGUF file, its metadata and tokenizer are copied; for a transformers model they are
made from the config and the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora.errors import CheckpointError, ModelError
from lora.interop.answers import AnswerFormat
from lora.interop.gguf_adapter import row_order, tensor_names
from lora.interop.gguf_base import ROPE_FACTORS, llama3_factors
from lora.interop.gguf_file import read_header
from lora.interop.gguf_vocabulary import CONVERT_ADVICE, tokens_of, vocabulary

GGUFType = Literal["f16", "q8_0", "bf16", "f32"]
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""--dtype -> general.file_type."""
WHOLE_MODELS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> general.architecture, of the models that we can write whole."""


@dataclass
class GGUFContent:
    """What a GGUF file holds besides the model's parameters."""

    architecture: str
    entries: dict[str, tuple[Any, ...]]  # key -> value, its type, and of an array that of its items
    tables: dict[str, Tensor] = field(default_factory=dict)  # tensors that are no parameters


def check_writable(config: Any) -> None:
    """Raises ModelError if we cannot write a model with this config whole."""
    if config.model_type not in WHOLE_MODELS:
        raise ModelError(
            f"models of model_type {config.model_type!r} cannot be written as GGUF here, only"
            f" {', '.join(WHOLE_MODELS)}. {CONVERT_ADVICE}"
        )
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            f"the base uses a sliding window, which llama.cpp does not in {config.model_type}."
        )
    if config.hidden_act != "silu":
        raise ModelError(
            f"the base's hidden_act is {config.hidden_act!r}, and llama.cpp computes silu."
        )


def content_of_model(
    config: Any, tokenizer: Any, rows: int, answer: AnswerFormat | None
) -> GGUFContent:
    """Returns the content for a transformers model with this tokenizer. Raises ModelError.

    rows: of its embedding.
    """
    architecture = WHOLE_MODELS[config.model_type]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope, tables = _rope_entries(config, width)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "vocab_size": rows,
        **rope,
    }
    ends = answer.ends if answer else {}
    stated = {f"{architecture}.{key}": value for key, value in values.items()}
    stated |= vocabulary(tokenizer, rows, ends)
    return GGUFContent(
        architecture, {key: _with_type(value) for key, value in stated.items()}, tables
    )


def _rope_entries(config: Any, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the RoPE settings of a config as entries, and the table of llama3's factors."""
    rope = config.rope_parameters
    entries = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return entries, {"rope_freqs.weight": llama3_factors(rope, width)}
    if kind in ("linear", "yarn"):
        entries |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            old = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            entries["rope.scaling.original_context_length"] = old
    elif kind != "default":
        raise ModelError(f"the base's RoPE is scaled by {kind!r}, which cannot be written as GGUF.")
    return entries, {}


def _with_type(value: Any) -> tuple[Any, ...]:
    """Returns a value with GGUF's type for it: llama.cpp takes unsigned ids and sizes only."""
    import gguf

    kind = gguf.GGUFValueType.get_type(value)
    return value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind


def content_of_file(
    path: Path, tokenizer: Any, rows: int, answer: AnswerFormat | None
) -> GGUFContent:
    """Returns the content of a GGUF base: its metadata key for key, and its RoPE tables.

    What a run changes is changed: its chat template, the token that ends its turns, and the tokens
    that were added to the base.
    """
    import gguf

    header, reader = read_header(path), gguf.GGUFReader(path)
    entries = {
        key: (entry.contents(), *entry.types[:1], *entry.types[1:][-1:])
        for key, entry in reader.fields.items()
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.alignment")
    }
    tables = {
        tensor.name: torch.tensor(tensor.data)
        for tensor in reader.tensors
        if tensor.name in ROPE_FACTORS
    }
    if answer and answer.template:
        entries["tokenizer.chat_template"] = _with_type(answer.template)
    if answer and answer.turn is not None:
        entries["tokenizer.ggml.eot_token_id"] = _with_type(answer.turn)
    known = len(entries["tokenizer.ggml.tokens"][0])
    if rows > known:
        _extend(entries, known, *tokens_of(tokenizer, rows))
        if f"{header.architecture}.vocab_size" in entries:
            entries[f"{header.architecture}.vocab_size"] = _with_type(rows)
    return GGUFContent(header.architecture, entries, tables)


def _extend(
    entries: dict[str, tuple[Any, ...]], known: int, tokens: list[str], types: list[int]
) -> None:
    """Adds the tokens after the first `known` to the entries of a vocabulary."""
    added: dict[str, list[Any]] = {"tokens": tokens[known:], "token_type": types[known:]}
    added["scores"] = [-1000.0] * len(added["tokens"])  # SentencePiece's, never chosen in a text
    for name, values in added.items():
        key = f"tokenizer.ggml.{name}"
        if key in entries:
            old, *kinds = entries[key]
            entries[key] = ([*old, *values], *kinds)


def write_gguf_model(model: Any, content: GGUFContent, output: Path, dtype: GGUFType) -> None:
    """Writes a model's parameters with the content as a GGUF file, and rounds the model to it.

    Afterwards the model computes with the values in the file. Each tensor is converted when it is
    written, so that no second copy of the model is in memory. Raises CheckpointError if a value is
    not finite in the type.
    """
    import gguf

    writer = gguf.GGUFWriter(output, content.architecture)
    entries = content.entries | {
        "general.file_type": _with_type(FILE_TYPES[dtype]),
        "general.quantization_version": _with_type(gguf.GGML_QUANT_VERSION),
    }
    for key, entry in entries.items():
        writer.add_key_value(key, *entry)
    tensors = [_Tensor(name, parameter) for name, parameter in model.named_parameters()]
    names = tensor_names(content.architecture, model.config.num_hidden_layers)
    for tensor in tensors:
        tensor.place(names, model.config, dtype)
    for tensor in tensors:
        tensor.announce(writer)
    for name, table in content.tables.items():
        writer.add_tensor_info(name, table.shape, table.numpy().dtype, table.numpy().nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.rounded())
        for table in content.tables.values():
            writer.write_tensor_data(table.numpy())
    finally:
        writer.close()


class _Tensor:
    """A parameter of a model, and how it is written."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name, self.parameter = name, parameter

    def place(self, names: Any, config: Any, dtype: GGUFType) -> None:
        """Finds the parameter's name, row order and type in the file. Raises ModelError."""
        import gguf

        layer, _, leaf = self.name.rpartition(".")
        target = names.get_name(layer)
        if target is None or leaf not in ("weight", "bias"):
            raise ModelError(
                f"{self.name} has no name in llama.cpp's {config.model_type}, so the model cannot"
                " be written as GGUF."
            )
        self.target, columns = f"{target}.{leaf}", self.parameter.shape[-1]
        self.rows = row_order(config, layer, len(self.parameter))
        matrix = self.parameter.dim() > 1 and not target.endswith("_norm")
        kind = dtype if matrix else "f32"
        if kind == "q8_0" and columns % 32:  # its blocks have 32 values
            kind = "f16"
        self.kind = gguf.GGMLQuantizationType[kind.upper()]

    def announce(self, writer: Any) -> None:
        """Adds the tensor to the file's header."""
        import gguf

        values, width = gguf.GGML_QUANT_SIZES[self.kind]
        length = self.parameter.numel() // values * width
        dtype = np.dtype(np.float32)  # uint8 would mean that the shape counts bytes
        writer.add_tensor_info(self.target, self.parameter.shape, dtype, length, self.kind)

    def rounded(self) -> Any:
        """Returns the values as the file holds them, and rounds the parameter to them."""
        import gguf

        with np.errstate(over="ignore"):  # infinity is refused below
            data = gguf.quantize(self.parameter.detach().float().cpu().numpy(), self.kind)
            values = torch.from_numpy(gguf.dequantize(data, self.kind))
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self.name} holds numbers outside the range of {self.kind.name.lower()}. Set"
                " --dtype bf16 or f32."
            )
        self.parameter.data.copy_(values)
        return data[self.rows.numpy()]
