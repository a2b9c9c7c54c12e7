"""Writes a whole language model as a GGUF file, by the rules of llama.cpp's convert_hf_to_gguf.py.

Matrices are written in the type that --dtype names, norms and biases in float32. In the llama
architecture, the rows of q and k are reordered, because llama.cpp's RoPE rotates neighbours. A tied
head is not written. If the base is a GGUF file, its metadata and tokenizer are copied. If it is a
transformers model, they are made from its config and tokenizer.
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
"""model_type -> general.architecture, for the models that we can write whole."""


@dataclass
class GGUFContent:
    """What a GGUF file contains besides the model's parameters."""

    architecture: str
    # Key -> (value, type), or for an array (value, ARRAY, type of the items).
    entries: dict[str, tuple[Any, ...]]
    tables: dict[str, Tensor] = field(default_factory=dict)  # tensors that are not parameters


def check_writable(config: Any) -> None:
    """Raises ModelError if a model with this config cannot be written."""
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

    rows: the number of rows of its embedding.
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
    ends = answer.end_tokens if answer else {}
    stated = {f"{architecture}.{key}": value for key, value in values.items()}
    stated |= vocabulary(tokenizer, rows, ends)
    return GGUFContent(
        architecture, {key: _with_type(value) for key, value in stated.items()}, tables
    )


def _rope_entries(config: Any, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the RoPE settings of a config as entries, and for llama3 the table of factors."""
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
    """Returns (value, its GGUF type). Integers are unsigned: llama.cpp reads no others as ids and
    sizes."""
    import gguf

    kind = gguf.GGUFValueType.get_type(value)
    return value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind


def content_of_file(
    path: Path, tokenizer: Any, rows: int, answer: AnswerFormat | None
) -> GGUFContent:
    """Returns the content of a GGUF base: its metadata key for key, and its RoPE tables.

    The run's chat template, its new end token and the tokens that it added to the base replace
    those of the base. rows: the number of rows of the model's embedding.
    """
    import gguf

    header, reader = read_header(path), gguf.GGUFReader(path)
    # The types of an array are ARRAY, once for each level of nesting, and that of its items.
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
    if answer and answer.new_end_token is not None:
        entries["tokenizer.ggml.eot_token_id"] = _with_type(answer.new_end_token)
    known = len(entries["tokenizer.ggml.tokens"][0])
    if rows > known:
        _extend_vocabulary(entries, known, *tokens_of(tokenizer, rows))
        if f"{header.architecture}.vocab_size" in entries:
            entries[f"{header.architecture}.vocab_size"] = _with_type(rows)
    return GGUFContent(header.architecture, entries, tables)


def _extend_vocabulary(
    entries: dict[str, tuple[Any, ...]], known: int, tokens: list[str], types: list[int]
) -> None:
    """Adds to a vocabulary's entries the tokens that it lacks: those after the first `known`."""
    added: dict[str, list[Any]] = {"tokens": tokens[known:], "token_type": types[known:]}
    # SentencePiece never chooses a token with such a low score in a text.
    added["scores"] = [-1000.0] * len(added["tokens"])
    for name, values in added.items():
        key = f"tokenizer.ggml.{name}"
        if key in entries:
            old, *kinds = entries[key]
            entries[key] = ([*old, *values], *kinds)


def write_gguf_model(model: Any, content: GGUFContent, output: Path, dtype: GGUFType) -> None:
    """Writes a model's parameters and the content as a GGUF file.

    Each parameter of the model is rounded to the values in the file, so that the model then
    computes what the file does. A tensor is converted just before it is written, so that memory
    never has a second copy of the model. Raises CheckpointError if a value is not finite in the
    type, and ModelError if llama.cpp has no name for a parameter.
    """
    import gguf

    writer = gguf.GGUFWriter(output, content.architecture)
    entries = content.entries | {
        "general.file_type": _with_type(FILE_TYPES[dtype]),
        "general.quantization_version": _with_type(gguf.GGML_QUANT_VERSION),
    }
    for key, entry in entries.items():
        writer.add_key_value(key, *entry)
    names = tensor_names(content.architecture, model.config.num_hidden_layers)
    tensors = [
        _Tensor(name, parameter, names, model.config, dtype)
        for name, parameter in model.named_parameters()
    ]
    for tensor in tensors:
        tensor.add_to_header(writer)
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
    """A parameter of a model, with its name, row order and type in the file.

    names: tensor_names(). Raises ModelError if they have no name for the parameter.
    """

    def __init__(
        self, name: str, parameter: Tensor, names: Any, config: Any, dtype: GGUFType
    ) -> None:
        import gguf

        self.name, self.parameter = name, parameter
        layer, _, leaf = name.rpartition(".")
        target = names.get_name(layer)
        if target is None or leaf not in ("weight", "bias"):
            raise ModelError(
                f"{name} has no name in llama.cpp's {config.model_type}, so the model cannot"
                " be written as GGUF."
            )
        self.target = f"{target}.{leaf}"
        self.rows = row_order(config, layer, len(parameter))
        is_matrix = parameter.dim() > 1 and not target.endswith("_norm")
        kind = dtype if is_matrix else "f32"
        if kind == "q8_0" and parameter.shape[-1] % 32:  # a block of q8_0 has 32 values of a row
            kind = "f16"
        self.kind = gguf.GGMLQuantizationType[kind.upper()]

    def add_to_header(self, writer: Any) -> None:
        """Adds the tensor to the file's header."""
        import gguf

        values, width = gguf.GGML_QUANT_SIZES[self.kind]
        length = self.parameter.numel() // values * width
        dtype = np.dtype(np.float32)  # uint8 would mean that the shape counts bytes
        writer.add_tensor_info(self.target, self.parameter.shape, dtype, length, self.kind)

    def rounded(self) -> Any:
        """Returns the values in the file's type, and rounds the parameter to them."""
        import gguf

        with np.errstate(over="ignore"):  # an overflow raises CheckpointError below
            data = gguf.quantize(self.parameter.detach().float().cpu().numpy(), self.kind)
            values = torch.from_numpy(gguf.dequantize(data, self.kind))
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self.name} has values outside the range of {self.kind.name.lower()}. Set"
                " --dtype bf16 or f32."
            )
        self.parameter.data.copy_(values)
        return data[self.rows.numpy()]
