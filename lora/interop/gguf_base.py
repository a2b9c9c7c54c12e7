"""Loads a GGUF file as a transformers model: config, tokenizer, and the weights as float32.

transformers translates the file (`gguf_file=`). This module adds what transformers lacks: errors
that name what is wrong with a file, the scaled RoPE of Llama 3, the token that ends a turn, some
pre-tokenizers, and a check that the model uses every tensor of the file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers.models.auto import modeling_auto

from lora.errors import ModelError
from lora.interop import documents
from lora.interop.basefile import BASE_FILE
from lora.interop.gguf_file import GGUFHeader, read_header

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tables of RoPE factors, which GGUF files store as tensors. They are not weights."""
SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of tokenizer.ggml.pre that split numbers into digits, and the rest as GPT-2 does."""


def gguf_config(path: Path, **head: Any) -> Any:
    """Returns the transformers config of a GGUF file. Raises ModelError.

    head: settings of the head, from head_settings().
    """
    header = read_header(path)
    config = transformers.AutoConfig.for_model(**_settings_in(header), **head)
    names = (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if config.is_encoder_decoder
        else modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    name = names.get(config.model_type)
    config.architectures = [name] if isinstance(name, str) else None
    config._name_or_path = str(path)
    return config


@functools.lru_cache(maxsize=4)
def _settings_in(header: GGUFHeader) -> dict[str, Any]:
    """Returns the settings of the transformers config that a header states. Raises ModelError."""
    path = header.path
    _check_mapped(header)
    try:
        with _fast_reader(header), _isolated(path) as (folder, file):
            stated, _ = transformers.PretrainedConfig.get_config_dict(folder, gguf_file=file)
    except Exception as error:  # a damaged file may raise any error
        raise ModelError(f"--base {path} cannot be loaded: {error}. Pass another file.") from error
    name = f"--base {path}: its metadata, as config.json,"
    documents.validate(stated, BASE_FILE, name, ModelError, "Download or convert the file again.")
    turn, end = header.metadata.get("tokenizer.ggml.eot_token_id"), stated.get("eos_token_id")
    if isinstance(turn, int) and isinstance(end, int) and turn != end:
        stated["eos_token_id"] = [end, turn]
    settings: dict[str, Any] = stated | _sizes(header, stated) | _rope(header, stated)
    return settings


def _sizes(header: GGUFHeader, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sizes that transformers does not read from the file, but takes from its defaults."""
    keys = {"qwen3": ("head_dim", "attention.key_length"),
            "gpt2": ("n_positions", "context_length")}  # fmt: skip
    sizes = {"vocab_size": stated.get("vocab_size", header.lengths["tokenizer.ggml.tokens"])}
    name, key = keys.get(stated["model_type"], ("", ""))
    size = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(size, int) and 0 < size < 2**26:
        sizes[name] = size
    return sizes


def _check_mapped(header: GGUFHeader) -> None:
    """Raises ModelError if transformers has no translation of the architecture."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    with contextlib.suppress(ImportError):  # transformers before 5.23 has one list
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

        known |= {*GGUF_CONFIG_ARCHS}
    if _without_separators(header.architecture) not in map(_without_separators, known):
        raise ModelError(
            f"--base {header.path}: transformers {transformers.__version__} cannot read GGUF files"
            f" of general.architecture {header.architecture!r}, only of"
            f" {', '.join(sorted(known))}. Pass the folder of the model in safetensors."
        )


def _without_separators(architecture: str) -> str:
    """Returns qwen2moe for qwen2_moe: llama.cpp and transformers use different separators."""
    return architecture.replace("_", "").replace("-", "")


def _rope(header: GGUFHeader, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE settings that transformers does not read from the file.

    Raises ModelError for a scaling that we cannot translate. Without this error, the model would
    silently compute something else.
    """
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    tables = [tensor for tensor in header.tensors if tensor.name in ROPE_FACTORS]
    if (scaling == "none" and not tables) or stated.get("rope_scaling"):
        return {}
    llama = stated["model_type"] == "llama" and [t.name for t in tables] == ["rope_freqs.weight"]
    if scaling == "none" and llama and tables[0].type == "F32":
        with header.path.open("rb") as file:
            file.seek(tables[0].start)
            table = torch.frombuffer(bytearray(file.read(tables[0].length)), dtype=torch.float32)
        theta, width = stated.get("rope_theta", 10000.0), 2 * len(table)
        # The file has only the factors. Compute them from the settings of Llama 3.1 and 3.2, and
        # use these settings if the factors agree.
        settings = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(table.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if torch.allclose(llama3_factors(settings, width), table, rtol=1e-4):
            return {"rope_parameters": settings}
    cause = tables[0].name if tables else f"rope.scaling.type {scaling!r}"
    raise ModelError(
        f"--base {header.path}: its RoPE is scaled ({cause}), which transformers does not read from"
        " GGUF files. Pass the folder of the model in safetensors."
    )


def llama3_factors(settings: Mapping[str, Any], width: int) -> Tensor:
    """Returns the divisors (width / 2,) of Llama 3's rotation frequencies, in float32.

    GGUF files store them as the tensor rope_freqs.weight. settings: rope_parameters of rope_type
    llama3.
    """
    old, factor = settings["original_max_position_embeddings"], settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    lengths = 2 * math.pi * settings["rope_theta"] ** powers  # tokens that a full turn takes
    smooth = ((old / lengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.float()


def gguf_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file, with its chat template. Raises ModelError."""
    header = read_header(path)
    _check_mapped(header)
    # Before 5.23, transformers reads the tokens with gguf.GGUFReader, so we must not replace it.
    replaceable = importlib.util.find_spec("transformers.integrations.gguf") is not None
    try:
        with contextlib.ExitStack() as stack:
            folder, file = stack.enter_context(_isolated(path))
            if replaceable:
                stack.enter_context(_fast_reader(header))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except Exception as error:  # a damaged file may raise any error
        raise ModelError(
            f"--base {path}: its tokenizer cannot be loaded: {error}. Pass another file."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"--base {path} states no end token (tokenizer.ggml.eos_token_id), so an answer would"
            " never end. Add it with gguf_set_metadata of the gguf library, or pass another file."
        )
    if header.metadata.get("tokenizer.ggml.pre") in SPLITS_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    length = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(length, int):
        tokenizer.model_max_length = length
    tokenizer.name_or_path = str(path)
    return tokenizer


def gguf_model(path: Path, config: Any, auto: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns the model of a GGUF file in float32, and transformers' report on its keys.

    auto: the Auto class of the task. The caller turns its errors into ModelError.
    """
    if importlib.util.find_spec("accelerate") is None:  # transformers requires it
        raise ModelError(
            "GGUF files are read with the library accelerate, which is not installed. Run pip"
            " install 'lora-from-scratch[gguf]'."
        )
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # not before transformers 5.23
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.ExitStack() as stack:
        # The bar of transformers' GGUF reader ignores disable_progress_bar().
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(_fast_reader(read_header(path)))
        folder, file = stack.enter_context(_isolated(path))
        model, loading = auto.from_pretrained(
            folder, gguf_file=file, config=config, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    # transformers marks the model as quantized, though its weights are dense now. Then
    # save_pretrained would be an error.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.config._name_or_path = str(path)
    return model, loading


@contextlib.contextmanager
def _isolated(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the folder and the gguf_file to pass, so that transformers reads only this file.

    In the file's own folder, transformers would also read a tokenizer, a config, or an adapter that
    names another base.
    """
    with tempfile.TemporaryDirectory() as empty:
        yield empty, str(path.resolve())


@contextlib.contextmanager
def _fast_reader(header: GGUFHeader) -> Iterator[None]:
    """Inside, transformers gets the header that we read, without the vocabulary, from GGUFReader.

    gguf.GGUFReader makes several objects for each token, score and merge. transformers makes a new
    reader for the config, the tokenizer and the weights, and a new map of all tensor names for each
    module. For a model with 49,152 tokens and 30 layers this takes 20 s.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda path: _Reader(header)
    gguf.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


class _Reader:
    """Replaces gguf.GGUFReader. It has what transformers reads: `fields` and `tensors`."""

    def __init__(self, header: GGUFHeader) -> None:
        import gguf

        stated = {
            key: value
            for key, value in header.metadata.items()
            if not (isinstance(value, list) and key.startswith("tokenizer."))
        }
        self.fields = {key: _reader_field(key, value) for key, value in stated.items()}
        data = np.memmap(header.path, mode="r")
        plain = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
        self.tensors = []
        for tensor in header.tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            values: Any = data[tensor.start : tensor.start + tensor.length]
            if tensor.type in plain:
                values = values.view(plain[tensor.type]).reshape(tensor.shape)
            else:
                values = values.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
            entry = SimpleNamespace(name=tensor.name, tensor_type=kind, data=values)
            self.tensors.append(entry)


def _reader_field(key: str, value: Any) -> Any:
    """Returns a value of the metadata as gguf's ReaderField."""
    import gguf

    values = value if isinstance(value, list) else [value]
    first = values[0] if values else 0
    kind = gguf.GGUFValueType.get_type(first)
    parts = [item.encode() if isinstance(item, str) else [item] for item in values]
    types = [gguf.GGUFValueType.ARRAY, kind] if isinstance(value, list) else [kind]
    return gguf.gguf_reader.ReaderField(0, key, parts, list(range(len(parts))), types)


def check_tensors_used(path: Path, model: Any) -> None:
    """Raises ModelError if a file has more weights than its model: transformers ignores those that
    it has no place for, and the model would compute something else.

    model: the language model; it may be on the meta device.
    """
    header, config = read_header(path), model.config
    skipped = {*ROPE_FACTORS, *(["output.weight"] if config.tie_word_embeddings else [])}
    # Some files have more blocks than the model: they predict further tokens ahead, and are unused.
    blocks = re.compile(r"blk\.(\d+)\.")
    tensors = [
        tensor
        for tensor in header.tensors
        if tensor.name not in skipped
        and not ((block := blocks.match(tensor.name)) and int(block[1]) >= config.num_hidden_layers)
    ]
    surplus = sum(tensor.size for tensor in tensors) - sum(p.numel() for p in model.parameters())
    if surplus > 0:
        names = {_stem(tensor.name) for tensor in tensors} - _stems_of(model, header.architecture)
        listed = f" ({', '.join(sorted(names)[:5])})" if names else ""
        raise ModelError(
            f"--base {path} has {surplus:,} values{listed} that transformers has no place for in"
            f" {type(model).__name__}. Pass the folder of the model in safetensors."
        )


def _stem(name: str) -> str:
    """Returns a tensor's name without numbers: blk.attn_q.weight for blk.3.attn_q.weight."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _stems_of(model: Any, architecture: str) -> set[str]:
    """Returns the stems of llama.cpp's names for a model's parameters."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    parts = (name.rpartition(".") for name, _ in model.named_parameters())
    return {_stem(f"{names.get_name(layer)}.{leaf}") for layer, _, leaf in parts}
