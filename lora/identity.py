"""Computes a fingerprint of a base's weights, and checks that an adapter was saved on this base.

If the base was in NF4, the mark lists the packed layers. To compare an unquantized base with it,
verify() packs those layers again, and the report says that the weights are not rounded here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora import nf4
from lora.card import BUILT_IN_PREFIX
from lora.declared import is_number
from lora.errors import CheckpointError, LoraError
from lora.files import json_object
from lora.inventory import selections
from lora.layers import gathered, inside, views
from lora.nf4 import NF4Linear
from lora.targets import Plan, base_buffers, base_parameters, base_paths, walk

SAME_SCALE = 1e-4
"""Mean scales that differ by more than this share are of different weights."""


def fingerprint(
    model: nn.Module, saved: tuple[str, ...] = (), rows: Mapping[str, int] = {}
) -> dict[str, str]:
    """Returns SHA-256 digests of the base's names, shapes and sampled values.

    A digest covers at most 4,096 values of each parameter and persistent floating-point buffer,
    scattered over it. There is one digest of values rounded to bfloat16 and one of values rounded
    to float16, so that a float32 base is recognized if it is loaded in either. If the base has a
    tensor in one of the two dtypes, there is no digest for the other. Modules that are trained as a
    whole are left out, since their originals never act. A base on the meta device has no digests.
    The scales of NF4's double quantization are left out too: they come from the mean of all blocks,
    whose last bit depends on the number of threads and on the device. packed_layers() has the mean.

    rows: how many rows to include, by the name of a resized embedding.
    """
    return _digests(_base_tensors(model, {}), saved, rows, _scales(model, {}))


def _digests(
    tensors: Mapping[str, Tensor],
    saved: tuple[str, ...],
    rows: Mapping[str, int],
    left_out: Collection[str],
) -> dict[str, str]:
    """Returns the digests of fingerprint(). left_out: the names of tensors that do not count."""
    digests = {torch.bfloat16: hashlib.sha256(), torch.float16: hashlib.sha256()}
    for name, tensor in sorted(tensors.items()):
        if name in left_out or any(inside(name, module) for module in saved):
            continue
        if tensor.is_meta:
            return {}
        whole = gathered(tensor).detach()
        whole = whole[: rows[name]] if name in rows else whole
        codes = tensor.dtype == torch.uint8 and isinstance(tensor, nn.Parameter)  # an NF4 weight
        if not whole.is_floating_point() and not codes:
            continue
        values = _sampled(whole)
        for dtype, digest in list(digests.items()):
            if codes or values.dtype in (torch.float32, torch.float64, dtype):
                digest.update(f"{name} {tuple(whole.shape)}\n".encode())
                sample = (values if codes else values.to(dtype)).cpu().contiguous()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
            else:
                del digests[dtype]
    return {str(dtype).replace("torch.", "base_"): d.hexdigest() for dtype, d in digests.items()}


def _scales(model: nn.Module, packed: Mapping[str, Any]) -> set[str]:
    """Returns the names of the scales of doubly quantized layers. packed: as in _base_tensors."""
    layers = {n for n, m in walk(model) if isinstance(m, NF4Linear) and m.offset is not None}
    layers |= {name for name, (_, double_quant) in packed.items() if double_quant}
    return {f"{name}.{leaf}" for name in layers for leaf in ("absmax", "nested_absmax", "offset")}


def _base_tensors(model: nn.Module, packed: Mapping[str, tuple[int, bool]]) -> dict[str, Tensor]:
    """Returns the base's tensors by name, with the originals of selected parameters.

    packed: (block_size, double_quant) by layer. These layers are quantized to NF4.
    """
    base: dict[str, Tensor] = {**dict(base_parameters(model)), **dict(base_buffers(model))}
    names, by_path = {id(tensor): name for name, tensor in base.items()}, dict(base_paths(model))
    for part, selected in selections(model):
        if part is model:
            base |= {names[id(by_path[path])]: t for path, t in selected.originals.items()}
    modules = dict(walk(model)) if packed else {}
    for name, (block_size, double_quant) in packed.items():
        W, _ = views(modules[name])[0].read()
        del base[f"{name}.weight"]
        parameters = nf4.parameters_of(nf4.quantize(W, block_size, double_quant, name))
        base |= {f"{name}.{leaf}": parameter for leaf, parameter in parameters.items()}
    return base


def _sampled(tensor: Tensor) -> Tensor:
    """Returns at most 4,096 values of a tensor, scattered over it."""
    values = tensor.reshape(-1)
    if values.numel() <= 4096:
        return values
    # Knuth's multiplicative hash scatters the indices. A constant stride that divides the width
    # would sample one column only.
    scattered = torch.arange(4096, dtype=torch.int64, device="cpu")
    scattered = scattered * 2654435761 % values.numel()
    return values[scattered.to(values.device)]


def packed_layers(model: nn.Module) -> dict[str, list[Any]]:
    """Returns [block_size, double_quant, the mean scale or None] of each layer in NF4, by the first
    of its names."""
    layers = {id(module): (name, module) for name, module in reversed(list(walk(model)))}
    return {
        name: [
            module.block_size,
            module.nested_absmax is not None,
            None if module.offset is None else gathered(module.offset).item(),
        ]
        for name, module in layers.values()
        if isinstance(module, NF4Linear)
    }


def verify(
    model: nn.Module,
    planned: Plan,
    settings: Mapping[str, Any],
    mark: Mapping[str, str],
    folder: Path,
) -> str:
    """Check the base against a file's mark. Returns what could not be verified, for the report.

    Raises CheckpointError if the adapter was trained on another base.
    """
    if not mark:
        return "base and scaling not verifiable: the file is not of lora-from-scratch"
    if not planned.method.keeps_base:
        return ""
    rows: dict[str, int] = {}
    with suppress(ValueError):
        rows = {k: n for k, n in json_object(mark.get("rows", "{}")).items() if type(n) is int}
    if same_base(model, planned.saved, mark, rows):
        return ""
    here = fingerprint(model, planned.saved, rows)
    common = [key for key in here if key in mark]
    if not common:
        return "base not verifiable: it was held in another dtype when the adapter was saved"
    # The errors come from a mark that was edited, or that lists layers which are not here.
    with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError, LoraError):
        packed = {name: (size, double) for name, (size, double, *_) in _layers_of(mark).items()}
        if packed and same_base(model, planned.saved, mark, rows, packed):
            return "trained on this base in NF4, whose weights are not rounded here"
    key = common[0]
    base = settings.get("base_model_name_or_path") or "its base"
    base = str(base).removeprefix(BUILT_IN_PREFIX)
    raise CheckpointError(
        f"{folder}: the adapter was trained on another base: fingerprint"
        f" {mark[key][:16]}…, found {here[key][:16]}…. Load it onto {base}"
        " (a head that it does not save must be the same too: name it in modules_to_save)."
    )


def same_base(
    model: nn.Module,
    saved: tuple[str, ...],
    mark: Mapping[str, str],
    rows: Mapping[str, int] = {},
    packed: Mapping[str, tuple[int, bool]] = {},
) -> bool:
    """True if the base is that of a mark: fingerprint(), and packed_layers() as JSON in "packed".

    packed: (block_size, double_quant) by layer. These layers are quantized to NF4 first.
    """
    tensors, scales = _base_tensors(model, packed), _scales(model, packed)
    # Marks of earlier versions include the scales.
    for left_out in [scales, set[str]()] if scales else [scales]:
        digests = _digests(tensors, saved, rows, left_out)
        # One equal digest is enough: a float32 base that was rounded to bfloat16 and back is the
        # same base, and only its bfloat16 digest shows that.
        if any(mark.get(key) == digest for key, digest in digests.items()):
            return _same_scales(tensors, _layers_of(mark))
    return False


def _layers_of(mark: Mapping[str, str]) -> Mapping[str, Any]:
    """Returns the layers that a mark says are in NF4; {} if it says none, or was edited."""
    with suppress(ValueError):
        return json_object(mark.get("packed", "{}"))
    return {}


def _same_scales(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> bool:
    """True if each layer's mean scale is within SAME_SCALE of the mark's. Marks of earlier versions
    have none."""
    for name, entry in layers.items():
        offset = tensors.get(f"{name}.offset")
        then: Any = entry[2] if isinstance(entry, list) and len(entry) > 2 else None
        if offset is not None and is_number(then):
            now = gathered(offset).item()
            if abs(now - then) > SAME_SCALE * abs(then):
                return False
    return True
