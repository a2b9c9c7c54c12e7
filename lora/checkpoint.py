"""Saves an adapter and loads it, in PEFT's format, strict in both directions.

A file that save() wrote contains a mark (adapter_file.py), against which load() checks the config
and the base. A file that PEFT wrote has no mark; the report then says that neither was checked.

load() has two phases. read_adapter() reads and checks everything; only then does load() change the
model. A load that fails therefore leaves the model as it was.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, initialise
from lora.adapter_config import check_unedited, config_digest, file_config, method_for, read_config
from lora.adapter_file import (
    CONFIG,
    MARK,
    WEIGHTS,
    adapter_files,
    find_folder,
    read_tensors,
    settings_in,
    whole_key,
)
from lora.card import arguments_of, class_names_of, labels_of
from lora.errors import CheckpointError
from lora.files import writable, write_together
from lora.foreign import as_peft_means, check_tying, renamed
from lora.identity import fingerprint, packed_layers, verify
from lora.injection import build, check_mix, check_name, check_statistics, wrap
from lora.inventory import (
    Parts,
    adapter_parts,
    check_restored,
    filed_key,
    injected,
    stored_tensors,
    tensors,
    with_views,
)
from lora.layers import fits, gathered, inside, views
from lora.method import Follower
from lora.methods._tokens import Tokens
from lora.report import Report, report_of
from lora.settings import PartialConfig
from lora.targets import Plan, base_paths, beside_saved, plan_of, walk
from lora.vocabulary import (
    check_filed,
    check_rows,
    embeddings,
    filed_rows,
    resized,
    resizing,
    rows_beyond,
    rows_of,
)
from lora.wrappers import AdaptedLayer

LARGEST_UNFILED = 2**24  # values that a config may state beyond 64 times those in its file


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    writes: bool = True,
) -> Path:
    """Write adapter `name` as PEFT does, and return the folder.

    "default" goes to `directory`, another name to its subfolder `name`. All files are complete on
    disk under temporary names before the first of them is renamed. If a crash between two renames
    leaves files of two different saves, load() detects it. If the base is sharded over several
    processes, all of them must call save(), since it reads the whole base, but only one `writes`.
    Raises CheckpointError.
    """
    check_name(name)
    if name not in injected(model):
        others = ", ".join(injected(model)) or "none"
        raise CheckpointError(f"the model has no adapter {name!r}. Found: {others}.")
    check_restored(model, "save")
    planned = injected(model)[name]
    settings = file_config(model, planned, name)
    stored = _tensors_to_save(model, planned, name, settings)
    mark = _mark_of(model, planned, settings)
    metadata = {"format": "pt", MARK: json.dumps(mark, sort_keys=True)}
    arguments = arguments_of(model, planned.saved)
    files = adapter_files(stored, metadata, settings, planned.method, arguments)
    folder = Path(directory) if name == "default" else Path(directory) / name
    if not writes:  # this process only helped to gather the tensors
        return folder
    advice = "Files of an earlier save are unchanged. Free space, or save elsewhere."
    with writable(folder, CheckpointError, advice):
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, files)
    return folder


def _tensors_to_save(
    model: nn.Module, planned: Plan, name: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns the tensors of the file by key, on the CPU.

    Raises CheckpointError if one holds NaN or infinity, or has no values.
    """
    # On the right what wins: a trained tensor replaces a base weight with the same key.
    tensors = carried(model, settings) | stored_tensors(model, name)
    if planned.method.in_peft:
        tensors = dict[str, Tensor](beside_saved(model, planned)) | tensors
    tensors = rows_beyond(model, planned, adapter_parts(model, name)) | tensors
    tensors = {key: gathered(tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no values (meta device). Call lora.init first.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{key} is not finite: the training diverged, nothing is written."
                " Train again with a lower learning rate."
            )
    stored = {whole_key(key): t.detach().cpu().contiguous() for key, t in tensors.items()}
    # safetensors refuses tensors that share memory, such as a tied weight inside a saved module.
    sharers = Counter(t.untyped_storage().data_ptr() for t in stored.values())
    for key, tensor in stored.items():
        if sharers[tensor.untyped_storage().data_ptr()] > 1:
            stored[key] = tensor.clone()
    return stored


def _mark_of(model: nn.Module, planned: Plan, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the mark: what identifies the config and the base, as strings."""
    mark = {"config": config_digest(planned.method, settings)}
    if labels := labels_of(model):
        mark["labels"] = json.dumps(labels)
        if (names := class_names_of(model)) != labels:
            mark["class_names"] = json.dumps(names)
    if planned.method.keeps_base:
        mark |= fingerprint(model, planned.saved, rows=resized(model))
        if resized(model):
            mark["rows"] = json.dumps(resized(model))
        if packed := packed_layers(model):
            mark["packed"] = json.dumps(packed)
    return mark


def carried(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the base weights of embeddings that PEFT saves with the adapter, by key.

    The rule is that of PEFT's save_embedding_layers="auto": if target_modules matches an
    `embed_tokens` or an `lm_head`, PEFT saves the input and output embeddings that are adapted.
    """
    wanted, names = settings.get("target_modules"), ("embed_tokens", "lm_head")
    if isinstance(wanted, str):
        ends = [n for n, _ in walk(model) if n.rpartition(".")[2] in names]
        matched = any(fits(name, wanted) for name in ends)
    else:
        matched = any(name in (wanted or ()) for name in names)
    # With trained tokens PEFT saves only their rows.
    rows = settings["peft_type"] == "TRAINABLE_TOKENS" or settings.get("trainable_token_indices")
    if not matched or rows:
        return {}
    weights: dict[str, Tensor] = {}
    paths = {id(module): path for path, module in walk(model)}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, get, lambda: None)()
        if isinstance(layer, AdaptedLayer):
            path = paths[id(layer.base_layer)]
            for name, parameter in layer.base_layer.named_parameters():
                weights[f"{path}.base_layer.{name}"] = parameter
    return weights


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    resize_embeddings: bool = False,
) -> Report:
    """Load an adapter, ours or PEFT's, into the model under `name`, and activate it.

    Its parameters become float32, even if the file has 16 bits. If the file was made on a base with
    another number of tokens, `resize_embeddings` resizes this base to it, permanently. Raises what
    read_adapter() raises, and CheckpointError if the model is on the meta device. If it raises, the
    model is as it was before: values, modules and requires_grad.
    """
    before = rows_of(model)
    with resizing(model, rows_filed(model, directory, name) if resize_embeddings else before):
        read = read_adapter(model, directory, name, trainable)
        planned, parts = read.plan, read.parts
        on_meta = [key for key, tensor in read.wanted.items() if tensor.is_meta]
        if on_meta:
            raise CheckpointError(
                f"{read.folder}: {on_meta[0]} cannot be loaded onto the meta device. Load the base"
                " first."
            )
        # If the embeddings grew, the file must say what is in the new rows.
        if (rows_of(model) or 0) > min(resized(model).values(), default=sys.maxsize):
            check_filed(read.folder, rows_beyond(model, planned, parts))
    for path, (adapter, view) in with_views(model, parts.adapters).items():
        # Buffers are not in the file. initialise() computes them from the base.
        if next(adapter.buffers(), None) is not None:
            initialise(adapter, view, seed=0)
        # Buffers hold initial values that the equation subtracts from W. If the file replaces W,
        # PEFT has subtracted them from it already.
        if f"{path}.weight" in planned.carried and not isinstance(adapter, Tokens):
            for buffer in adapter.buffers():
                buffer.zero_()
    wrap(model, planned, parts, name)
    with torch.no_grad():
        for key, tensor in read.wanted.items():
            tensor.copy_(read.values[key])
    notes = [read.note]
    if rows_of(model) != before:
        notes.append(f"the embeddings were resized from {before} to {rows_of(model)} rows")
    return report_of(model, name, "\n".join(filter(None, notes)))


def rows_filed(
    model: nn.Module, directory: str | os.PathLike[str], name: str = "default"
) -> int | None:
    """Returns how many rows the embeddings of an adapter's base had, None if no file says so."""
    folder = find_folder(directory, name)
    stored, settings = read_tensors(folder)[0], settings_in(folder)
    return filed_rows(model, settings, renamed(model, stored))


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that was read and checked for a model, but not put into it yet."""

    folder: Path
    plan: Plan
    parts: Parts  # the new modules
    wanted: dict[str, Tensor]  # the tensors to fill, by the file's keys without the prefix
    values: dict[str, Tensor]  # the file's tensors by the same keys, in the dtypes of `wanted`
    note: str  # for the report


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> ReadAdapter:
    """Read an adapter's files and check them for the model, which may be on the meta device.

    The file must contain exactly the adapter's tensors, in the right shapes, without NaN or
    infinity, in a floating-point dtype. Raises CheckpointError, TargetError or ConfigError.
    """
    check_name(name)
    folder = find_folder(directory, name)
    settings = settings_in(folder)
    method = method_for(settings, folder)
    stored, mark = read_tensors(folder)
    config = read_config(method, settings, folder)
    check_unedited(method, settings, mark, folder)
    notes: list[str] = []
    if not mark:  # PEFT wrote the file
        stored = renamed(model, stored)
        if isinstance(config, PartialConfig):
            config, notes = as_peft_means(model, config)
    check_tying(model, settings, folder)
    check_rows(model, filed_rows(model, settings, stored), folder)
    planned = replace(plan_of(model, config, strict=bool(mark)), trainable=trainable)
    _drop_copies(planned, stored)
    planned = replace(planned, carried=_carried(model, planned, stored))
    notes += [
        f"{name} is the file's, not the base's, until eject() brings the base's back."
        for name in planned.carried
    ]
    check_mix(model, name, planned)
    if trainable:
        check_statistics(model, planned)
    check_stated_size(folder, model, planned, stored)  # before build() allocates the adapter
    parts = build(model, planned)
    _drop_repeats(parts.adapters, stored)
    wanted = tensors(model, planned, parts)
    check_fit(folder, stored, wanted)
    ready = check_values(folder, stored, wanted)
    # Last, since a fingerprint reads the whole base: a damaged file fails sooner.
    verified = verify(model, planned, settings, mark, folder)
    note = "\n".join(filter(None, [*notes, verified]))
    return ReadAdapter(folder, planned, parts, wanted, ready, note)


def _drop_copies(planned: Plan, stored: dict[str, Tensor]) -> None:
    """Remove from `stored` what PEFT saves of a saved module besides the copy that acts.

    Removed are the original, and a second copy under `modules_to_save` if it has the same values.
    """
    for path in planned.saved:
        for key in [key for key in stored if key.startswith(f"{path}.")]:
            copy, _, leaf = key.removeprefix(f"{path}.").partition(".")
            # If a head contains layers, PEFT leaves the adapter's name in their keys.
            keys = (f"{path}.{leaf}", f"{path}.{leaf.partition('.')[2]}")
            acting = next((stored[key] for key in keys if key in stored), None)
            if acting is None:
                continue
            same = copy == "modules_to_save" and _equal(stored[key], acting)
            if same or copy == "original_module":
                del stored[key]


def _carried(model: nn.Module, planned: Plan, stored: dict[str, Tensor]) -> tuple[str, ...]:
    """Returns the names of the base weights that the file replaces.

    They belong to adapted layers, to embeddings, or to modules that PEFT saves beside the adapter.
    If the base has the same values already, the weight is not replaced, and is removed from
    `stored`.
    """
    base, of_tokens = dict(base_paths(model)), embeddings(model)
    trained = {id(base[name]) for name in planned.selected if name in base}  # by any name
    beside = beside_saved(model, planned)
    names = {
        filed_key(planned, name): name
        for name in base
        if (name.rpartition(".")[0] in {*planned.targets, *of_tokens} or name in beside)
        and id(base[name]) not in trained
        and not any(inside(name, whole) for whole in planned.saved)
    }
    resized_ids = {id(base[name]) for name in resized(model) if name in base}
    replaced: list[str] = []
    first: dict[int, Tensor] = {}
    for key in [key for key in names if key in stored]:
        filed, weight = stored[key], base[names[key]]
        twin = first.setdefault(id(weight), filed)
        same = filed.shape == weight.shape and (weight.is_meta or _equal(filed, weight))
        # Either side may be in 16 bits: the weights are the same if one rounds to the other.
        same = same or (names[key] in beside and _equal(weight, filed))
        # The new rows of a resized weight are ours, not the base's: the file's must replace them.
        same = same and id(weight) not in resized_ids
        if same or (twin is not filed and _equal(filed, twin)):  # PEFT saves a tied weight twice
            del stored[key]
        else:
            replaced.append(names[key])
    return tuple(replaced)


def _equal(filed: Tensor, weight: Tensor) -> bool:
    """True if a file's tensor equals the weight once it is cast to the weight's dtype."""
    return filed.shape == weight.shape and torch.equal(
        filed.to(weight.device, weight.dtype), weight
    )


def _drop_repeats(adapters: Mapping[str, Adapter], stored: dict[str, Tensor]) -> None:
    """Remove from `stored` the trained rows that PEFT saves a second time for a tied layer."""
    for path, adapter in adapters.items():
        leader = adapter.leader if isinstance(adapter, Follower) else None
        if not leader or adapter.parameters_by_key():
            continue
        # A layer that follows a leader lists no parameters itself; the base class lists them.
        for key in Adapter.parameters_by_key(adapter):
            repeated, first = stored.get(f"{path}.{key}"), stored.get(f"{leader}.{key}")
            if repeated is not None and first is not None and _equal(repeated, first):
                del stored[f"{path}.{key}"]


def check_stated_size(
    folder: Path, model: nn.Module, planned: Plan, stored: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError if the adapters that the config states are far larger than the file.

    Otherwise a damaged r, such as 8000000, would fill the memory before shapes are compared.
    """
    if not issubclass(planned.method, Adapter):
        return
    modules = dict(walk(model))
    layers = {id(modules[name]): name for name in planned.targets if name not in planned.further}
    stated = sum(
        planned.method.size(views(modules[name])[0], planned.config, name)
        for name in layers.values()
    )
    in_file = sum(tensor.numel() for tensor in stored.values())
    if stated > LARGEST_UNFILED + 64 * in_file:
        raise CheckpointError(
            f"{folder / CONFIG} states adapters of {stated:,} numbers, and {WEIGHTS} holds"
            f" {in_file:,}. Copy both files again from where they were saved."
        )


def check_fit(folder: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the file and the adapter have the same keys and shapes."""
    problems = [f"{key} is not in the file" for key in wanted if key not in stored]
    problems += [f"{key} has no place in the model" for key in stored if key not in wanted]
    ranks: set[int] = set()
    for key in wanted:
        if key in stored and stored[key].shape != wanted[key].shape:
            problems.append(
                f"{key} is {tuple(stored[key].shape)} in the file,"
                f" {tuple(wanted[key].shape)} in the model"
            )
            # If only the rank differs, and in the same way everywhere, the message can name it.
            if key.endswith("lora_A.weight") and stored[key].shape[1:] == wanted[key].shape[1:]:
                ranks.add(stored[key].shape[0])
    if problems:
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        hint = f" Set r to {ranks.pop()} in {CONFIG}." if len(ranks) == 1 else ""
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit: {len(problems)} differences over"
            f" {len(wanted)} tensors.\n  " + "\n  ".join(problems[:4]) + more
            + f".{hint or ' Load it onto the base, and with the config, it was made with.'}"
        )  # fmt: skip


def check_values(
    folder: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the file's tensors, cast to the dtypes of the tensors that they fill.

    Raises CheckpointError if a dtype is not floating-point, if a value is NaN or infinite before or
    after the cast, or if two tensors for one tied parameter differ.
    """
    ready: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for key, parameter in wanted.items():
        tensor = stored[key]
        floating = tensor.is_floating_point() and tensor.element_size() >= 2
        if not (floating if parameter.is_floating_point() else tensor.dtype == parameter.dtype):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype}, no dtype of weights. Save the"
                " adapter again in a floating-point dtype."
            )
        ready[key] = tensor.to(parameter.dtype)
        bad = int((~ready[key].isfinite()).sum()) if floating else 0
        if bad:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} has {bad} values that are not finite in"
                f" {parameter.dtype}. Train again with a lower learning rate, or load an earlier"
                " save."
            )
        twin = first.setdefault(id(parameter), key)
        if not torch.equal(ready[twin], ready[key]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {twin} and {key} differ, and are one parameter of the model."
                " Load it onto the base that it was made with."
            )
    return ready
