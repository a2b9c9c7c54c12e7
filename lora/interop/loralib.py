"""Converts a checkpoint of Microsoft's loralib into an adapter in PEFT's format.

loralib              its state dict                              PEFT
Linear               M.lora_A (r, in), M.lora_B (out, r)         M.lora_A.weight, M.lora_B.weight
Embedding            M.lora_A (r, vocab), M.lora_B (dim, r)      M.lora_embedding_A, _B
MergedLinear         M.lora_A (k·r, in), M.lora_B (k·block, r)   one update of rank k·r
a bias of the base   M.bias                                      M.base_layer.bias, or M.bias

A MergedLinear adapts k of the equal blocks of a fused projection (q and v of q, k, v), each with
its own update of rank r. PEFT has one update per layer, so the k updates become one of rank k·r:
A is used unchanged, and B is block-diagonal. r and lora_alpha are both multiplied by k, which keeps
the scaling lora_alpha / r.

The file does not say which kind a layer is. In a MergedLinear with k > 1, A and B differ in rank; a
ConvLoRA has a key M.conv.bias. Nothing marks an Embedding, so the user has to name it.

A ConvLoRA raises an error: its update has rank k·r over (out·k, in·k), which PEFT's format cannot
express. If its biases were not saved, it looks like a Linear; then lora.load and PEFT report the
wrong shape when they load the adapter.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapter_file import CARD, CONFIG, PREFIX, WEIGHTS, adapter_files
from lora.errors import CheckpointError, ConfigError, command
from lora.files import readable, writable, write_together
from lora.layers import fits
from lora.methods._lowrank import Bias
from lora.methods._lowrank_options import by_layer
from lora.methods.lora import LoRA, LoRAConfig

HOW_TO_SAVE = "Save the model again with torch.save(loralib.lora_state_dict(model), FILE)."
LARGEST_RATIO = 4  # of the tensors' bytes to the file's: tied layers share one tensor in the file
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a checkpoint of Microsoft's loralib into an adapter that PEFT and lora.load read."""

    checkpoint: Path
    """File written by torch.save(loralib.lora_state_dict(model), FILE). The dict may also be nested
    under one key of another dict, such as {'model': ...}."""
    lora_alpha: float
    """lora_alpha used in training. The checkpoint does not contain it."""
    output: Path | None = None
    """Folder for the adapter. Default: the checkpoint's path without its extension."""
    embeddings: tuple[str, ...] = ()
    """Layers that are loralib.Embedding, which the file does not show: names or the last parts of
    names."""
    merged: tuple[str, ...] = ()
    """Layers that are loralib.MergedLinear, as NAME=ENABLE_LORA with 1 for True and 0 for False,
    such as c_attn=1,0,1."""
    prefix: str | None = None
    """Prefix to remove from every key, such as "module." from DataParallel."""
    fan_in_fan_out: bool = False
    """Set it if the layers store their weights as (in, out), as those of GPT-2 do."""
    dry_run: bool = False
    """Print what would be written, and stop."""


@dataclass(frozen=True)
class ConvertedLayer:
    """The update of one layer, as PEFT stores it."""

    kind: str
    A: Tensor
    B: Tensor
    r: int
    alpha: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """A and B under PEFT's names."""
        if self.kind == "Embedding":
            return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}


def convert(config: ConvertConfig) -> tuple[Path, list[tuple[str, ...]]]:
    """Writes the adapter. Returns its folder, and a table of its layers with a header row.

    Raises CheckpointError if the checkpoint cannot be read or converted, or if the folder already
    contains an adapter, and ConfigError if a flag does not fit the checkpoint.
    """
    folder = _output_folder(config)
    state = _without_prefix(_read_tensors(config.checkpoint), config.prefix)
    layers = _converted_layers(state, config)
    tensors = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.tensors.items()
    }
    biases = {key: tensor for key, tensor in state.items() if _last_name(key) == "bias"}
    adapted_biases = {key for key in biases if _layer_name(key) in layers}
    for key, tensor in biases.items():
        _check_bias(key, tensor, layers.get(_layer_name(key)))
        # A wrapped layer's bias is inside its base_layer, also in PEFT's files.
        name = f"{_layer_name(key)}.base_layer.bias" if key in adapted_biases else key
        tensors[name] = tensor
    bias: Bias = "none"
    if biases:
        bias = "lora_only" if adapted_biases == set(biases) else "all"
    settings = _settings(layers, config, bias)
    if not config.dry_run:
        payload = {PREFIX + key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        with writable(folder, CheckpointError, "Pass another --output."):
            folder.mkdir(parents=True, exist_ok=True)
            write_together(folder, adapter_files(payload, {"format": "pt"}, settings, LoRA))
    return folder, _table_of_layers(layers, biases)


def _output_folder(config: ConvertConfig) -> Path:
    """Returns the folder to write. Raises if it is the checkpoint or contains an adapter."""
    folder = config.output or config.checkpoint.parent / config.checkpoint.stem
    if folder == config.checkpoint:
        raise ConfigError(f"{folder} would overwrite the checkpoint. Pass --output FOLDER.")
    with writable(folder, CheckpointError, "Pass another --output."):
        existing = [name for name in (CONFIG, WEIGHTS, CARD) if os.path.lexists(folder / name)]
    if existing:
        raise CheckpointError(
            f"{folder} already contains {existing[0]}, which would be overwritten. Pass another"
            " --output."
        )
    return folder


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the file's tensors by key. torch.load runs with weights_only, so that no code in the
    file runs."""
    with readable(path, CheckpointError, "Pass a file."):
        size = path.stat().st_size
        if not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "Not a regular file")
        _check_archive(path, size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any exception
        # torch's own message advises weights_only=False, which would run the file's code.
        reason = "the file is damaged, or torch.save did not write it"
        if kind := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it contains {kind[1]}, which is not a tensor"
        raise CheckpointError(
            f"{path} cannot be read as tensors: {reason}. {HOW_TO_SAVE}"
        ) from None
    state = _state_dict(path, content)
    _check_sizes(path, state, size)
    return state


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Returns the state dict that the file contains, at the top level or under a single key."""
    if isinstance(content, Mapping):
        nested = {
            key: value
            for key, value in content.items()
            if isinstance(value, Mapping) and any(str(k).endswith(".lora_A") for k in value)
        }
        if len(nested) > 1:
            raise CheckpointError(
                f"{path} contains several models: {', '.join(map(str, nested))}. {HOW_TO_SAVE}"
            )
        content = next(iter(nested.values()), content)
    if (
        isinstance(content, Mapping)
        and content
        and all(isinstance(key, str) and isinstance(t, Tensor) for key, t in content.items())
    ):
        return dict(content)
    contents = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        first_keys = itertools.islice(content, 6)
        names = [key if isinstance(key, str) else type(key).__name__ for key in first_keys]
        contents = ", ".join(name[:80] for name in names) or "nothing"
    raise CheckpointError(f"{path} contains {contents}, not tensors by name. {HOW_TO_SAVE}")


def _check_archive(path: Path, size: int) -> None:
    """Raises CheckpointError if the file is a zip archive that unpacks to more than its own size.

    A compressed archive of a few hundred bytes could otherwise fill the memory. torch.save does not
    compress, so no checkpoint of loralib is affected.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged archive: {error}. {HOW_TO_SAVE}") from None
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > size:
        problem = "compressed" if compressed else "larger than the file"
        raise CheckpointError(
            f"{path}: its records are {problem}, which torch.save does not write. {HOW_TO_SAVE}"
        )


def _check_sizes(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    """Raises CheckpointError if the tensors are much larger than the file.

    Elements can share memory (stride 0), so a file of 1 KB can describe tensors of terabytes. The
    later check for finite values would allocate them.
    """
    total = sum(
        tensor.numel() * tensor.element_size() for tensor in state.values() if _is_dense(tensor)
    )
    if total > LARGEST_RATIO * size:
        raise CheckpointError(
            f"{path}: its tensors have {total:,} bytes, the file {size:,}: their elements share"
            f" memory. {HOW_TO_SAVE}"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Returns True if the tensor is an ordinary strided one: not sparse, nested or meta."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def _without_prefix(state: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """Returns the state dict with --prefix removed from its keys. Raises CheckpointError if a key
    lacks it, or if every key begins with a wrapper's prefix and --prefix is not set."""
    if prefix is None:
        for wrapper in WRAPPER_PREFIXES:
            if all(key.startswith(wrapper) for key in state):
                raise CheckpointError(
                    f"every key begins with {wrapper!r}, which a wrapper of the model adds. Set"
                    f" --prefix {wrapper}, or --prefix '' if the model's own names begin with it."
                )
    prefix = prefix or ""
    prefix += "." if prefix and not prefix.endswith(".") else ""
    for key in state:
        if not key.startswith(prefix):
            raise CheckpointError(
                f"{key} does not begin with --prefix {prefix!r}. Remove --prefix, or set it to what"
                " every key begins with."
            )
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _converted_layers(
    state: Mapping[str, Tensor], config: ConvertConfig
) -> dict[str, ConvertedLayer]:
    """Returns the update of each adapted layer."""
    known_key = re.compile(r"(.+)\.(lora_[AB]|bias)")
    unknown = [key for key in state if not known_key.fullmatch(key)]
    if unknown:
        raise CheckpointError(
            f"{config.checkpoint} contains {unknown[0]}: {len(unknown)} of {len(state)} keys are"
            " not LAYER.lora_A, LAYER.lora_B or LAYER.bias. Save"
            " loralib.lora_state_dict(model), or with bias='lora_only' for the biases."
        )
    names = list(dict.fromkeys(_layer_name(key) for key in state if _last_name(key) != "bias"))
    if not names:
        raise CheckpointError(f"{config.checkpoint} contains no lora_A and lora_B. {HOW_TO_SAVE}")
    for name in names:
        if f"{name}.conv.bias" in state:
            raise CheckpointError(
                f"{name} is a loralib.ConvLoRA, which PEFT's format cannot express. Merge it into"
                " the model with loralib (model.eval()), and save the model."
            )
    enabled = _enabled_blocks(config.merged)
    _check_endings(names, config.embeddings, enabled)
    return {name: _converted_layer(name, state, enabled, config) for name in names}


def _enabled_blocks(merged: tuple[str, ...]) -> dict[str, list[bool]]:
    """Returns which blocks each --merged layer adapts, by the ending of its name."""
    enabled: dict[str, list[bool]] = {}
    for entry in merged:
        ending, _, blocks = entry.partition("=")
        if not re.fullmatch(r"[01](,[01])+", blocks) or "1" not in blocks:
            raise ConfigError(
                f"--merged {entry!r} must be LAYER=1,0,1: a 1 for each block that enable_lora"
                " switches on."
            )
        if ending in enabled:
            raise ConfigError(f"--merged {ending} is given twice. Remove one.")
        enabled[ending] = [block == "1" for block in blocks.split(",")]
    return enabled


def _check_endings(
    names: list[str], embeddings: tuple[str, ...], enabled: Mapping[str, list[bool]]
) -> None:
    """Raises ConfigError if an ending matches no layer, or a layer matches several endings."""
    flags = [("--embeddings", ending) for ending in embeddings]
    flags += [("--merged", ending) for ending in enabled]
    for flag, ending in flags:
        if not any(fits(name, (ending,)) for name in names):
            raise ConfigError(
                f"{flag} {ending!r} matches no layer of the checkpoint: {', '.join(names)}."
            )
    for name in names:
        matching = [f"{flag} {ending}" for flag, ending in flags if fits(name, (ending,))]
        if len(matching) > 1:
            raise ConfigError(f"{name} matches {' and '.join(matching)}. Remove one.")


def _converted_layer(
    name: str, state: Mapping[str, Tensor], enabled: Mapping[str, list[bool]], config: ConvertConfig
) -> ConvertedLayer:
    """Returns one layer's update. Raises CheckpointError if A and B do not fit together."""
    A, B = state.get(f"{name}.lora_A"), state.get(f"{name}.lora_B")
    if A is None or B is None:
        raise CheckpointError(f"{name} has only lora_{'B' if A is None else 'A'}. {HOW_TO_SAVE}")
    if not _is_finite(A, 2) or not _is_finite(B, 2):
        raise CheckpointError(
            f"{name}: lora_A and lora_B must be finite, dense matrices of floating point numbers,"
            f" found {_description(A)} and {_description(B)}. Use an earlier checkpoint."
        )
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    blocks = next((flags for ending, flags in enabled.items() if fits(name, (ending,))), None)
    r, alpha = B.shape[1], config.lora_alpha
    if blocks is not None:
        k = sum(blocks)
        if A.shape[0] != k * r or B.shape[0] % k:
            raise CheckpointError(
                f"{name}: {shapes} do not have {k} blocks. Set --merged to the enable_lora that the"
                " layer was trained with."
            )
        return ConvertedLayer("MergedLinear", A, _block_diagonal(B, blocks), k * r, k * alpha)
    if A.shape[0] != r:
        problem = f"{name}: {shapes} have different ranks"
        if A.shape[0] % r:
            raise CheckpointError(f"{problem}, which no layer of loralib has. {HOW_TO_SAVE}")
        flag = command("--merged", f"{_last_name(name)}=1,0,1")
        raise CheckpointError(
            f"{problem}, as in a MergedLinear. Set {flag}, with the enable_lora that it was trained"
            " with."
        )
    is_embedding = any(fits(name, (ending,)) for ending in config.embeddings)
    return ConvertedLayer("Embedding" if is_embedding else "Linear", A, B, r, alpha)


def _block_diagonal(B: Tensor, blocks: list[bool]) -> Tensor:
    """B (k·size, r) of a MergedLinear -> (blocks·size, k·r).

    B contains only the enabled blocks, one below the other. The i-th of them is copied to the rows
    that its block has in the whole projection, and to columns i·r to (i + 1)·r, since rows i·r to
    (i + 1)·r of A belong to it.
    """
    k, r = sum(blocks), B.shape[1]
    size = B.shape[0] // k
    result = B.new_zeros(size * len(blocks), k * r)
    enabled = [block for block, adapted in enumerate(blocks) if adapted]
    for i, block in enumerate(enabled):
        part = B[i * size : (i + 1) * size]
        result[block * size : (block + 1) * size, i * r : (i + 1) * r] = part
    return result


def _check_bias(key: str, tensor: Tensor, layer: ConvertedLayer | None) -> None:
    """Raises CheckpointError if a bias is not finite, or has not one number per output."""
    if _is_finite(tensor, 1) and (layer is None or len(tensor) == len(layer.B)):
        return
    shape = f"of shape ({len(layer.B)},)" if layer else "with one number per output"
    raise CheckpointError(
        f"{key} must be a finite tensor {shape}, found {_description(tensor)}. Save"
        " loralib.lora_state_dict(model, bias='lora_only'), or use an earlier checkpoint."
    )


def _is_finite(tensor: Tensor, dims: int) -> bool:
    """Returns True if it is dense, floating point, not empty and finite, and has `dims` axes."""
    # torch has no isfinite for one-byte floats.
    floating = tensor.is_floating_point() and tensor.element_size() >= 2
    if not _is_dense(tensor) or not floating or tensor.dim() != dims or not tensor.numel():
        return False
    return bool(tensor.isfinite().all())


def _description(tensor: Tensor) -> str:
    """Returns a tensor's dtype and shape for an error. A nested tensor has no shape to print."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {'nested' if tensor.is_nested else tuple(tensor.shape)}"


def _settings(
    layers: Mapping[str, ConvertedLayer], config: ConvertConfig, bias: Bias
) -> dict[str, Any]:
    """Returns adapter_config.json: the commonest r and lora_alpha, and a pattern for the others."""
    r, rank_pattern = by_layer({name: layer.r for name, layer in layers.items()})
    alpha, alpha_pattern = by_layer({name: layer.alpha for name, layer in layers.items()})
    method_config = LoRAConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(layers),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias=bias,
    )
    return LoRA.file_settings(method_config, {}) | {
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
    }


def _table_of_layers(
    layers: Mapping[str, ConvertedLayer], biases: Mapping[str, Tensor]
) -> list[tuple[str, ...]]:
    """Returns one row per layer and per bias, under a header row."""
    rows: list[tuple[str, ...]] = [("layer", "kind", "A", "B", "r", "lora_alpha")]
    for name, layer in layers.items():
        shapes = str(tuple(layer.A.shape)), str(tuple(layer.B.shape))
        rows.append((name, layer.kind, *shapes, str(layer.r), f"{layer.alpha:g}"))
    for key, tensor in biases.items():
        rows.append((key, "bias", str(tuple(tensor.shape)), "", "", ""))
    return rows


def _layer_name(key: str) -> str:
    return key.rpartition(".")[0]


def _last_name(key: str) -> str:
    return key.rpartition(".")[2]
