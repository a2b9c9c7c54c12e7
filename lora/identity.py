"""Tells one base model from another: a fingerprint of its weights, and the check of a file's mark.

If the base was in NF4, the mark says which layers were packed. A dense base is then packed again to
be compared, and the report says that its weights are not rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora import nf4
from lora.errors import CheckpointError, LoraError
from lora.files import json_object
from lora.inventory import selections
from lora.layers import gathered, inside, views
from lora.nf4 import NF4Linear
from lora.targets import (
    Plan,
    base_buffers,
    base_parameters,
    base_paths,
    walk,
)


def fingerprint(
    model: nn.Module,
    saved: tuple[str, ...] = (),
    packed: Mapping[str, tuple[int, bool]] = {},
    rows: Mapping[str, int] = {},
) -> dict[str, str]:
    """Returns SHA-256 digests of the base's names, shapes and sampled values.

    At most 4,096 values of each parameter and persistent floating buffer count, scattered over it.
    One digest is of the values rounded to bfloat16 and one of those rounded to float16, so that a
    base in float32 is recognised if it is loaded in either. A tensor in one of the two dtypes has
    no digest in the other. Modules that are trained as a whole do not count, since their originals
    never act. On the meta device there are no values and no digests.

    packed: (block_size, double_quant) by layer: these layers count as packed in NF4, from the dtype
            that they have here.
    rows: how many rows count, by the name of a resized embedding.
    """
    digests = {torch.bfloat16: hashlib.sha256(), torch.float16: hashlib.sha256()}
    for name, tensor in sorted(_base_tensors(model, packed).items()):
        if any(inside(name, module) for module in saved):
            continue
        if tensor.is_meta:
            return {}
        whole = gathered(tensor).detach()
        whole = whole[: rows[name]] if name in rows else whole
        codes = tensor.dtype == torch.uint8 and isinstance(tensor, nn.Parameter)  # of NF4
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


def _base_tensors(model: nn.Module, packed: Mapping[str, tuple[int, bool]]) -> dict[str, Tensor]:
    """Returns the base's tensors by name: the originals of what is trained, `packed` in NF4."""
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
    # Knuth's multiplier: a stride that divides the width would sample one column only.
    scattered = torch.arange(4096, dtype=torch.int64, device="cpu")
    scattered = scattered * 2654435761 % values.numel()
    return values[scattered.to(values.device)]


def packed_layers(model: nn.Module) -> dict[str, list[int]]:
    """Returns [block_size, double_quant] of each layer in NF4, by the first of its names."""
    layers = {id(module): (name, module) for name, module in reversed(list(walk(model)))}
    return {
        name: [module.block_size, module.nested_absmax is not None]
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
    here = fingerprint(model, planned.saved, rows=rows)
    common = [key for key in here if key in mark]
    if not common:
        return "base not verifiable: it was held in another dtype when the adapter was saved"
    # One is enough: a base that was rounded to 16 bits and held in float32 again is the same.
    if not any(here[key] == mark[key] for key in common):
        # A mark that was tampered with, or that names layers which are not here
        with suppress(
            ValueError, TypeError, LookupError, AttributeError, RecursionError, LoraError
        ):
            packed = fingerprint(model, planned.saved, json.loads(mark["packed"]))
            if any(packed[key] == mark[key] for key in common):
                return "trained on this base in NF4, whose weights are not rounded here"
        key = common[0]
        base = settings.get("base_model_name_or_path") or "its base"
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base: fingerprint"
            f" {mark[key][:16]}…, found {here[key][:16]}…. Load it onto {base}"
            " (a head that it does not save must be the same too: name it in modules_to_save)."
        )
    return ""
