"""A LoRA adapter for other engines: llama.cpp's GGUF, and what vLLM asks of the folder as it is.

llama.cpp computes W x + (alpha / r) B (A x) for each adapted tensor, with one alpha for the whole
file and the tensor's own r. It gives some weights another order of rows than transformers does, and
the rows of B take it too, as in its own convert_lora_to_gguf.py:

    llama, mistral, mixtral   q_proj, k_proj    of each head the rows 0, d/2, 1, d/2 + 1, ...: its
                                                rotation pairs neighbours
    gpt_neox                  query_key_value   q of all heads, then k, then v; not head by head

    general.type = adapter    general.architecture    adapter.type = lora    adapter.lora.alpha
    TENSOR.weight.lora_a      (r, in)     of the embedding (vocab, r)
    TENSOR.weight.lora_b      (out, r)    of the embedding (dim, r)

GPT-2's Conv1D needs no transposition: A and B are (r, in) and (out, r) there as elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora.adapter_config import method_and_config
from lora.adapter_file import CONFIG, find_folder, settings_in
from lora.card import BUILT_IN, base_in
from lora.checkpoint import read_adapter, rows_filed
from lora.errors import CheckpointError, ConfigError, command
from lora.files import writable, write_whole
from lora.methods._lowrank_options import by_layer
from lora.methods.lora import LoRA, LoRAConfig
from lora.vocabulary import rows_of

Dtype = Literal["f16", "bf16", "f32"]
GGUF_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "t5")},
    "phi": "phi2",
    "gpt_neox": "gptneox",
}
"""model_type -> general.architecture, of the models whose adapters are known to fit."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
EOT = "tokenizer.ggml.eot_token_id"
"""llama.cpp's key of the token that ends a turn."""
MERGE = "Merge it into the base instead: lora merge RUN --output FOLDER."


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Prepare an adapter for another program: write GGUF for llama.cpp, or check it and print the
    vLLM command."""

    adapter: Path
    """A run directory, or the folder of an adapter, ours or PEFT's."""
    format: Literal["gguf", "vllm"] = "gguf"
    """gguf: write a GGUF file. vllm: check the adapter's folder and print the command that serves
    it; if a run's template or end-of-turn token differs from the base's, they are written into the
    folder."""
    base: str | None = None
    """Base model: a folder with config.json, or a name on the Hugging Face hub. Default: the one
    that the adapter names."""
    output: Path | None = None
    """GGUF file to write. Default: adapter.gguf in the adapter's folder."""
    dtype: Dtype = "f16"
    """dtype of the tensors in the GGUF file."""


@dataclass(frozen=True)
class FiledAdapter:
    """A LoRA adapter as its folder holds it, held to the base that it is for."""

    folder: Path
    config: LoRAConfig
    layers: dict[str, tuple[Tensor, Tensor]]  # A (r, in), B (out, r)
    alphas: dict[str, float]  # a layer's scaling times its rank
    of_ids: frozenset[str]  # those of the layers that are embeddings
    others: tuple[str, ...]  # keys of all else that acts: biases, saved modules, tokens

    def rank(self, name: str) -> int:
        return len(self.layers[name][0])


@dataclass(frozen=True)
class Ends:
    """What ends an answer of a run that writes texts, and its template."""

    tokens: tuple[str, ...]  # all that end an answer
    turn: int | None  # the id of the one that the base does not name; None if it names all
    generation: Mapping[str, Any]  # the base's generation config, with all of them
    template: str | None  # in Jinja; None if it is the base's own, or none


def folder_of(adapter: Path) -> Path:
    """The folder of an adapter's files: a run's, or the folder itself. Raises CheckpointError."""
    inside = adapter / "adapter"
    return find_folder(inside if os.path.isfile(inside / CONFIG) else adapter)


def read_filed(adapter: Path, base: Any) -> FiledAdapter:
    """The LoRA adapter in a folder, or in a run's, for the base of this transformers config.

    What lora.load refuses is refused here: both go by lora.checkpoint.read_adapter. Raises
    CheckpointError, TargetError, ConfigError, ModelError.
    """
    from lora.interop.pretrained import skeleton_of

    folder = folder_of(adapter)
    method, config = method_and_config(folder)
    if method is not LoRA:
        raise CheckpointError(f"{folder} is of {method.name}, and LoRA alone has a form. {MERGE}")
    assert isinstance(config, LoRAConfig)
    model = skeleton_of(base, "text")
    _check_tokens(folder, model, getattr(base, "_name_or_path", ""))
    found = read_adapter(model, folder)
    others = dict.fromkeys(found.values)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    adapters = {n: a for n, a in found.parts.adapters.items() if isinstance(a, LoRA)}
    for name, adapter_ in adapters.items():
        A, B = (f"{name}.{adapter_.keys[side]}" for side in ("lora_A", "lora_B"))
        layers[name] = found.values[A], found.values[B]
        del others[A], others[B]
    if not layers:
        raise CheckpointError(f"{folder} adapts no layer. {MERGE}")
    return FiledAdapter(
        folder,
        config,
        layers,
        {name: one.scaling * one.r for name, one in adapters.items()},
        frozenset(name for name, one in adapters.items() if "embedding" in one.keys["lora_A"]),
        tuple(others),
    )


def _check_tokens(folder: Path, model: Any, base: str) -> None:
    """Raise CheckpointError if the adapter was made on a base with more tokens than this, or fewer:
    no format for another engine resizes the base."""
    rows, there = rows_filed(model, folder), rows_of(model)
    if rows is None or there is None or rows == there:
        return
    of_run = (folder.parent / "config.toml").is_file()
    flags = [] if of_run else ["--resize-embeddings"]
    if base and base != base_in(settings_in(folder)):
        flags += ["--base", base]
    merge = command("lora", "merge", folder.parent if of_run else folder, *flags)
    raise CheckpointError(
        f"{folder}: the adapter was made on a base with {rows:,} tokens, found one with {there:,},"
        f" and other engines do not resize it. Merge it into the base instead: {merge} --output"
        " FOLDER."
    )


def base_named(adapter: Path, asked: str | None) -> str:
    """The base to export for: the one that is asked for, or that the adapter's file names."""
    named = asked or base_in(settings_in(folder_of(adapter)))
    if not named or named in BUILT_IN:
        raise ConfigError(f"{adapter} names no base that another engine has. Pass --base FOLDER.")
    return named


def export(config: ExportConfig, ends: Ends | None = None) -> str:
    """Do what `lora export` asks, and return what it says; `ends` of a run that writes texts.

    Raises CheckpointError, ConfigError, ModelError."""
    from lora.interop.pretrained import base_config

    base = base_named(config.adapter, config.base)
    if config.format == "vllm":
        if config.output is not None:
            raise ConfigError("--format vllm writes no GGUF. Leave --output out.")
        return vllm_command(config.adapter, base, ends)
    output = config.output or config.adapter / "adapter.gguf"
    count = export_gguf(config.adapter, base_config(base), output, config.dtype)
    flags: list[object] = ["--lora", output]
    if ends and ends.turn is not None:
        flags += ["--override-kv", f"{EOT}=int:{ends.turn}"]
    if ends and ends.template:
        template = _write_beside(output.with_suffix(".jinja"), ends.template)
        flags += ["--jinja", "--chat-template-file", template]
    run = command("llama-cli", "-m", "BASE.gguf", *flags)
    said = f"written: {output}, {count} layers. Run {run}"
    if ends is None:
        return said
    file = _write_beside(output.with_suffix(".Modelfile"), modelfile(output, ends))
    create = command("ollama", "create", "NAME", "-f", file)
    return f"{said}\nFor Ollama, name the base in {file}, and run {create}"


def modelfile(adapter: Path, ends: Ends) -> str:
    """What Ollama makes a model of: a GGUF adapter on a base, stopping where the run does."""
    lines = ["FROM BASE.gguf", f"ADAPTER ./{adapter.name}"]
    for token in ends.tokens:
        quotes = '"""' if '"' in token else '"'
        lines.append(f"PARAMETER stop {quotes}{token}{quotes}")
    if ends.template:
        lines.append("# The base's template is not the run's: TEMPLATE says it, in Go's syntax.")
    return "\n".join(lines) + "\n"


def _write_beside(path: Path, text: str) -> Path:
    """Write a text file that belongs to an adapter."""
    with writable(path, CheckpointError, "Free space, or pass another --output."):
        write_whole(path, text.encode())
    return path


def export_gguf(adapter: Path, base: Any, output: Path, dtype: Dtype = "f16") -> int:
    """Write an adapter as llama.cpp reads it, for the base of this transformers config.

    Of layers with another alpha than most have, what differs is folded into B. Returns the number
    of layers. Raises CheckpointError if llama.cpp has no form of what the adapter does, ConfigError
    if the base's architecture is none that is known, or the file stands already, and what
    read_filed() raises.
    """
    with writable(output, CheckpointError, "Pass another --output."):
        if os.path.lexists(output):
            raise ConfigError(f"{output} stands already: it is not written over. Pass --output.")
    if base.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"of model_type {base.model_type!r} no adapters for llama.cpp are known, but of"
            f" {', '.join(ARCHITECTURES)}. {MERGE}"
        )
    filed = read_filed(adapter, base)
    alpha, _ = by_layer(filed.alphas)
    tensors = gguf_tensors(filed, base, alpha)
    for name, tensor in tensors.items():
        if not bool(tensor.to(GGUF_DTYPES[dtype]).isfinite().all()):
            raise CheckpointError(
                f"{filed.folder}: {name} is not finite in {dtype}. Set --dtype bf16 or f32, or take"
                " an earlier save."
            )
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    with writable(output, CheckpointError, "Free space, or pass another --output."):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            _write_gguf(temporary, ARCHITECTURES[base.model_type], alpha, tensors, dtype)
            os.replace(temporary, output)
        finally:
            with suppress(OSError):
                temporary.unlink()
    return len(filed.layers)


def _write_gguf(
    path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor], dtype: Dtype
) -> None:
    """Write the GGUF file."""
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


def gguf_tensors(filed: FiledAdapter, base: Any, alpha: float) -> dict[str, Tensor]:
    """What the GGUF file holds by name, in float32, where its alpha is this."""
    import gguf

    if filed.others:
        raise CheckpointError(
            f"{filed.folder}: {filed.others[0]} is no part of a low-rank update, and llama.cpp's"
            f" adapters hold nothing else. {MERGE}"
        )
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = max(base.num_hidden_layers, getattr(base, "num_decoder_layers", 0))
    names = gguf.get_tensor_name_map(kinds[ARCHITECTURES[base.model_type]], blocks)
    found: dict[str, Tensor] = {}
    for name, (A, B) in filed.layers.items():
        target = names.get_name(name)
        embedding = target == "token_embd"
        if target is None or embedding != (name in filed.of_ids):
            raise CheckpointError(
                f"{filed.folder}: {name} is no tensor that llama.cpp adapts in {base.model_type}."
                f" {MERGE}"
            )
        # Its one tensor for both would give both the adapter of either.
        if target in ("token_embd", "output") and base.tie_word_embeddings:
            raise CheckpointError(
                f"{filed.folder}: {name} is tied to the model's other end, and llama.cpp cannot"
                f" adapt one without the other. {MERGE}"
            )
        rows = _row_order(filed, base, name)
        found[f"{target}.weight.lora_a"] = (A.T if embedding else A).float().contiguous()
        found[f"{target}.weight.lora_b"] = B.float()[rows] * (filed.alphas[name] / alpha)
    return found


def _row_order(filed: FiledAdapter, base: Any, name: str) -> Tensor:
    """The rows of a layer's B (out,), in the order in which llama.cpp has the layer's outputs."""
    rows, leaf = torch.arange(len(filed.layers[name][1])), name.rpartition(".")[2]
    rotated = ARCHITECTURES[base.model_type] == "llama" and leaf in ("q_proj", "k_proj")
    fused = base.model_type == "gpt_neox" and leaf == "query_key_value"
    if not rotated and not fused:
        return rows
    heads = base.num_key_value_heads if leaf == "k_proj" else base.num_attention_heads
    parts = 2 if rotated else 3  # halves of a head; q, k and v
    if len(rows) % (heads * parts):
        raise CheckpointError(
            f"{filed.folder}: {name} has {len(rows)} outputs, and the base {heads} heads. Pass the"
            " --base that it was trained on."
        )
    if rotated:
        return rows.reshape(heads, parts, -1).transpose(1, 2).reshape(-1)
    return rows.reshape(heads, parts, -1).transpose(0, 1).reshape(-1)


def check_vllm(filed: FiledAdapter) -> list[str]:
    """The reasons why vLLM cannot serve an adapter, a sentence each; none if it can.

    Whether vLLM runs adapters on the base's architecture is not in the folder.
    """
    config, found = filed.config, []
    if filed.others:
        found.append(
            f"{filed.others[0]}: vLLM takes low-rank updates alone, no biases, no modules_to_save,"
            " no trained tokens."
        )
    # It scales every layer by lora_alpha and r (or √r), and reads no pattern.
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    own = [n for n in filed.layers if not math.isclose(filed.alphas[n] / filed.rank(n), scaling)]
    if own:
        found.append(
            f"{own[0]} and {len(own) - 1} others have a rank or an alpha of their own: vLLM would"
            " scale them like the rest, without a word."
        )
    if _largest(filed) > VLLM_RANKS[-1]:
        found.append(f"rank {_largest(filed)}: vLLM takes {VLLM_RANKS[-1]} at most.")
    odd = [name for name in filed.of_ids if name.rpartition(".")[2] != "embed_tokens"]
    if odd:
        found.append(f"{odd[0]}: vLLM adapts no embedding but embed_tokens.")
    return found


def _largest(filed: FiledAdapter) -> int:
    return max(filed.rank(name) for name in filed.layers)


def vllm_command(adapter: Path, base: str, ends: Ends | None = None) -> str:
    """The command that serves an adapter with vLLM, on the base in a folder or of a name on the
    hub. What the base's own generation config and template lack is written into the adapter's
    folder. Raises CheckpointError if vLLM cannot, and what read_filed() raises."""
    from lora.interop.pretrained import base_config

    filed = read_filed(adapter, base_config(base))
    against = check_vllm(filed)
    if against:
        listed = "\n  ".join(against)
        raise CheckpointError(f"vLLM cannot serve {adapter}.\n  {listed}\n{MERGE}")
    rank = next(rank for rank in VLLM_RANKS if rank >= _largest(filed))
    named = f"{adapter.resolve().name}={filed.folder}"
    flags: list[object] = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", named]
    if ends and ends.turn is not None:
        _write_beside(
            filed.folder / "generation_config.json", json.dumps(ends.generation, indent=2)
        )
        flags += ["--generation-config", filed.folder]
    if ends and ends.template:
        template = _write_beside(filed.folder / "chat_template.jinja", ends.template)
        flags += ["--chat-template", template]
    return command("vllm", "serve", base, *flags)
