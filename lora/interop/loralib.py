"""A checkpoint of Microsoft's loralib as an adapter in PEFT's format.

loralib              its state dict                              PEFT
Linear               M.lora_A (r, in), M.lora_B (out, r)         M.lora_A.weight, M.lora_B.weight
Embedding            M.lora_A (r, vocab), M.lora_B (dim, r)      M.lora_embedding_A, _B
MergedLinear         M.lora_A (k·r, in), M.lora_B (k·block, r)   one update of rank k·r
a bias of the base   M.bias                                      M.base_layer.bias, or M.bias

A MergedLinear adapts k of the equal blocks of a fused projection (q and v of q, k, v), each with
an update of its own. PEFT has no such thing: A stays as it is, B gets each block's part in the rows
of the block and the columns of its rank, and r and lora_alpha are multiplied by k, which leaves the
scaling as it was.

The file holds no kinds. Ranks that differ give a MergedLinear away, and `M.conv.bias` a ConvLoRA,
which is refused: it is of rank k·r over (out·k, in·k), which PEFT has no form of. One saved without
biases looks like a Linear here, and lora.load and PEFT refuse it on the convolution, by its shape.
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
from lora.methods._lowrank_options import by_layer
from lora.methods.lora import LoRA, LoRAConfig

SAVE = "Where it was trained, run torch.save(loralib.lora_state_dict(model), FILE)."
LARGEST_SHARED = 4  # times the file: tied layers are one tensor under several names
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a checkpoint of Microsoft's loralib into an adapter that PEFT and lora.load read."""

    checkpoint: Path
    """File written by torch.save(loralib.lora_state_dict(model), FILE). The dict may also be nested
    under a single key."""
    lora_alpha: float
    """lora_alpha used in training. The checkpoint does not contain it."""
    output: Path | None = None
    """Folder for the adapter. Default: the checkpoint's path without its extension."""
    embeddings: tuple[str, ...] = ()
    """Layers that are loralib.Embedding: names, or dotted endings of names."""
    merged: tuple[str, ...] = ()
    """Layers that are loralib.MergedLinear, with their enable_lora, such as c_attn=1,0,1."""
    prefix: str | None = None
    """Prefix to remove from every key, such as "module." from DataParallel."""
    fan_in_fan_out: bool = False
    """The layers store their weights as (in, out), as in GPT-2."""
    dry_run: bool = False
    """Print what would be written, and stop."""


@dataclass(frozen=True)
class Converted:
    """One layer's update as PEFT keeps it."""

    kind: str
    A: Tensor
    B: Tensor
    r: int
    alpha: float


def convert(config: ConvertConfig) -> tuple[Path, list[tuple[str, ...]]]:
    """Convert, and return the folder and a table of the layers. Raises CheckpointError."""
    folder = config.output or config.checkpoint.parent / config.checkpoint.stem
    if folder == config.checkpoint:
        raise ConfigError(f"{folder} would be the checkpoint itself. Pass --output FOLDER.")
    with writable(folder, CheckpointError, "Pass another --output."):
        there = [file for file in (CONFIG, WEIGHTS, CARD) if os.path.lexists(folder / file)]
    if there:
        raise CheckpointError(f"{folder} has a {there[0]}: it is not written over. Pass --output.")
    state = _unprefixed(_read_tensors(config.checkpoint), config)
    layers = _layers(state, config)
    stored: dict[str, Tensor] = {}
    for name, layer in layers.items():
        ends = ("lora_embedding_A", "lora_embedding_B")
        ends = ends if layer.kind == "Embedding" else ("lora_A.weight", "lora_B.weight")
        stored |= {f"{name}.{ends[0]}": layer.A, f"{name}.{ends[1]}": layer.B}
    biases = {k: t for k, t in state.items() if k.rpartition(".")[2] == "bias"}
    own = {key for key in biases if key.rpartition(".")[0] in layers}
    for key, tensor in biases.items():
        adapted = layers.get(key.rpartition(".")[0])
        if not _usable(tensor, 1) or (adapted and len(tensor) != len(adapted.B)):
            wanted = f"({len(adapted.B)},)" if adapted else "one number per output"
            raise CheckpointError(
                f"{key} is {_shapes(tensor)}: a bias is finite, {wanted}. Save"
                " loralib.lora_state_dict(model, bias='lora_only'), or take an earlier save."
            )
        stored[f"{key.removesuffix('bias')}base_layer.bias" if key in own else key] = tensor
    settings = _settings(
        layers, config, "all" if set(biases) - own else "lora_only" if own else "none"
    )
    if not config.dry_run:
        payload = {PREFIX + key: tensor.contiguous().clone() for key, tensor in stored.items()}
        with writable(folder, CheckpointError, "Pass another --output."):
            folder.mkdir(parents=True, exist_ok=True)
            write_together(folder, adapter_files(payload, {"format": "pt"}, settings, LoRA))
    head = ("layer", "kind", "A", "B", "r", "lora_alpha")
    rows = [
        (name, one.kind, str(tuple(one.A.shape)), str(tuple(one.B.shape)), str(one.r),
         f"{one.alpha:g}")
        for name, one in layers.items()
    ]  # fmt: skip
    rows += [(key, "bias", str(tuple(t.shape)), "", "", "") for key, t in biases.items()]
    return folder, [head, *rows]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by key. Only tensors are read: torch.load with weights_only."""
    with readable(path, CheckpointError, "Pass a file."):
        size = path.stat().st_size
        if not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "Is a folder, or no file")
        _check_records(path, size)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in every way there is
        # What torch says would have the file read with weights_only=False, which runs its code.
        kind = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it holds {kind[1]}, no tensor" if kind else "it is damaged, or none of torch.save"
        raise CheckpointError(f"{path} cannot be read as tensors: {found}. {SAVE}") from None
    if isinstance(state, Mapping):
        inner = {
            key: value
            for key, value in state.items()
            if isinstance(value, Mapping) and any(str(k).endswith(".lora_A") for k in value)
        }
        if len(inner) > 1:
            raise CheckpointError(
                f"{path} holds several models: {', '.join(map(str, inner))}. {SAVE}"
            )
        state = next(iter(inner.values()), state)
    good = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not good or not state:
        found = f"a {type(state).__name__}"
        if isinstance(state, Mapping):
            few = itertools.islice(state, 6)
            names = [key if isinstance(key, str) else type(key).__name__ for key in few]
            found = ", ".join(name[:80] for name in names) or "nothing"
        raise CheckpointError(f"{path} holds {found}, not tensors by name. {SAVE}")
    _check_sizes(path, state, size)
    return dict(state)


def _check_records(path: Path, size: int) -> None:
    """Raise CheckpointError if a zip archive is compressed, or its records are larger than it is:
    a few hundred bytes can say that they are all of the memory. torch.save compresses nothing."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged archive: {error}. {SAVE}") from None
    packed = [one for one in records if one.compress_type != zipfile.ZIP_STORED]
    if packed or sum(one.file_size for one in records) > size:
        found = "compressed" if packed else "larger than the file"
        raise CheckpointError(
            f"{path}: its records are {found}, which torch.save does not write. {SAVE}"
        )


def _check_sizes(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    """Raise CheckpointError if the tensors have more elements than the file has room for, which
    elements that share memory can."""
    stated = sum(
        tensor.numel() * tensor.element_size() for tensor in state.values() if dense(tensor)
    )
    if stated > LARGEST_SHARED * size:
        raise CheckpointError(
            f"{path}: its tensors are {stated:,} bytes, the file {size:,}: their elements share"
            f" memory. {SAVE}"
        )


def dense(tensor: Tensor) -> bool:
    """Whether a tensor has its elements in memory, each at a place."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def _unprefixed(state: dict[str, Tensor], config: ConvertConfig) -> dict[str, Tensor]:
    """The state dict with --prefix off its keys; a wrapper's prefix that is left on is an error."""
    if config.prefix is None:
        for wrapper in WRAPPERS:
            if all(key.startswith(wrapper) for key in state):
                raise CheckpointError(
                    f"every key begins with {wrapper!r}, which a wrapper puts there. Set --prefix"
                    f" {wrapper}, or --prefix '' where the model itself names it so."
                )
    prefix = config.prefix or ""
    prefix += "." if prefix and not prefix.endswith(".") else ""
    strange = [key for key in state if not key.startswith(prefix)]
    if strange:
        raise CheckpointError(
            f"{strange[0]} does not begin with --prefix {prefix!r}. Leave the flag out, or set what"
            " every key begins with."
        )
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _usable(tensor: Tensor, dims: int) -> bool:
    """Whether it is a dense, finite tensor of weights, of that many dimensions and not empty."""
    weights = tensor.is_floating_point() and tensor.element_size() >= 2
    if not dense(tensor) or not weights or tensor.dim() != dims or not tensor.numel():
        return False
    return bool(tensor.isfinite().all())


def _shapes(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {'nested' if tensor.is_nested else tuple(tensor.shape)}"


def _layers(state: Mapping[str, Tensor], config: ConvertConfig) -> dict[str, Converted]:
    """Each adapted layer of a state dict."""
    known = re.compile(r"(.+)\.(lora_[AB]|bias)")
    strange = [key for key in state if not known.fullmatch(key)]
    if strange:
        raise CheckpointError(
            f"{config.checkpoint} holds {strange[0]}: {len(strange)} of {len(state)} keys are not"
            f" LAYER.lora_A, LAYER.lora_B or LAYER.bias. {SAVE[:-1]}, or with bias='lora_only'."
        )
    names = dict.fromkeys(key.rpartition(".")[0] for key in state if not key.endswith(".bias"))
    if not names:
        raise CheckpointError(f"{config.checkpoint} holds no lora_A and lora_B. {SAVE}")
    for name in names:
        if f"{name}.conv.bias" in state:
            raise CheckpointError(
                f"{name} is a loralib.ConvLoRA, which has no form in PEFT's format. Merge it into"
                " the model with loralib (model.eval()), and save the model."
            )
    enabled = {}
    for entry in config.merged:
        end, _, blocks = entry.partition("=")
        if not re.fullmatch(r"[01](,[01])+", blocks) or "1" not in blocks:
            raise ConfigError(f"--merged {entry!r} must be LAYER=1,0,1: enable_lora by block.")
        if end in enabled:
            raise ConfigError(f"--merged {end} is given twice. Leave one out.")
        enabled[end] = [block == "1" for block in blocks.split(",")]
    for end in (*config.embeddings, *enabled):
        if not any(fits(name, (end,)) for name in names):
            flag = "--embeddings" if end in config.embeddings else "--merged"
            raise ConfigError(f"{flag} {end!r} is no layer of the checkpoint: {', '.join(names)}.")
    for name in names:
        flags = [("--embeddings", end) for end in config.embeddings]
        flags += [("--merged", end) for end in enabled]
        meant = [f"{flag} {end}" for flag, end in flags if fits(name, (end,))]
        if len(meant) > 1:
            raise ConfigError(f"{name} is meant by {' and by '.join(meant)}. Leave one out.")
    return {name: _layer(name, state, enabled, config) for name in names}


def _layer(
    name: str, state: Mapping[str, Tensor], enabled: Mapping[str, list[bool]], config: ConvertConfig
) -> Converted:
    pair = [state.get(f"{name}.{leaf}") for leaf in ("lora_A", "lora_B")]
    A, B = pair
    if A is None or B is None:
        raise CheckpointError(f"{name} has lora_{'B' if A is None else 'A'} alone. Save it again.")
    if not _usable(A, 2) or not _usable(B, 2):
        raise CheckpointError(
            f"{name}: lora_A {_shapes(A)}, lora_B {_shapes(B)} are no finite, dense matrices"
            " of a floating dtype. Take an earlier save."
        )
    blocks = next((on for end, on in enabled.items() if fits(name, (end,))), None)
    r, alpha = B.shape[1], config.lora_alpha
    if blocks is None:
        if A.shape[0] != r:
            flag = command("--merged", f"{name.rpartition('.')[2]}=1,0,1")
            way = f"a MergedLinear. Set {flag} as its enable_lora"
            raise CheckpointError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are of different"
                f" ranks: {f'no layer of loralib. {SAVE}' if A.shape[0] % r else f'{way} was.'}"
            )
        of_ids = any(fits(name, (end,)) for end in config.embeddings)
        return Converted("Embedding" if of_ids else "Linear", A, B, r, alpha)
    k = sum(blocks)
    if A.shape[0] != k * r or B.shape[0] % k:
        raise CheckpointError(
            f"{name}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} are not of {k} blocks. Set"
            " --merged as its enable_lora was."
        )
    size = B.shape[0] // k
    whole = B.new_zeros(size * len(blocks), k * r)
    places = [number for number, on in enumerate(blocks) if on]
    for index, place in enumerate(places):
        rows, columns = slice(place * size, (place + 1) * size), slice(index * r, (index + 1) * r)
        whole[rows, columns] = B[index * size : (index + 1) * size]
    return Converted("MergedLinear", A, whole, k * r, k * alpha)


def _settings(layers: Mapping[str, Converted], config: ConvertConfig, bias: Any) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, the others by name."""
    r, ranks = by_layer({name: one.r for name, one in layers.items()})
    alpha, alphas = by_layer({name: one.alpha for name, one in layers.items()})
    found = LoRAConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(layers),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias=bias,
    )
    return LoRA.file_settings(found, {}) | {
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
    }
