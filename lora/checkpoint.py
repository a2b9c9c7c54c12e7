"""Saves an adapter and loads it, in PEFT's format, strict in both directions.

A file of ours carries a mark (adapter_file.py): load() checks the config and the base against it.
Of a file that PEFT wrote neither can be checked, and the report says so.

load() reads and checks everything before it touches the model.
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
from lora.card import arguments_of, labels_of
from lora.errors import CheckpointError
from lora.files import writable, write_together
from lora.foreign import as_peft_means, check_tying, renamed
from lora.identity import fingerprint, packed_layers, verify
from lora.injection import build, check_mix, check_name, check_statistics, wrap
from lora.inventory import (
    Parts,
    check_restored,
    filed_key,
    injected,
    owned,
    stored_tensors,
    tensors,
    with_views,
)
from lora.layers import fits, gathered, inside, views
from lora.method import Follower
from lora.methods._tokens import Tokens
from lora.report import Report, report_of
from lora.settings import PartialConfig
from lora.targets import (
    Plan,
    base_paths,
    beside_saved,
    plan_of,
    walk,
)
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

LARGEST_UNFILED = 2**24  # numbers that a config may state beyond 64 times what its file holds


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    writes: bool = True,
) -> Path:
    """Write adapter `name` as PEFT does: into `directory`, or into its subfolder `name`.

    Every file is whole on disk before the first takes its place. If a crash between two of the
    renames leaves files of two saves with different settings, load() notices. If a base is sharded
    among processes, all of them have to call save(), since it samples the base, and one `writes`.
    Returns the folder. Raises CheckpointError.
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
    if not writes:
        return folder
    whole = "What stood there before is whole. Free space, or save elsewhere."
    with writable(folder, CheckpointError, whole):
        folder.mkdir(parents=True, exist_ok=True)
        write_together(folder, files)
    return folder


def _tensors_to_save(
    model: nn.Module, planned: Plan, name: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns the tensors of the file by key, on the CPU. Raises CheckpointError if one is not
    finite."""
    tensors = carried(model, settings) | stored_tensors(model, name)
    if planned.method.in_peft:
        tensors = dict[str, Tensor](beside_saved(model, planned)) | tensors
    tensors = rows_beyond(model, planned, owned(model, name)) | tensors
    tensors = {key: gathered(tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no values (meta device). Call lora.init first.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{key} is not finite: the training diverged, nothing is written."
                " Lower the learning rate."
            )
    stored = {whole_key(key): t.detach().cpu().contiguous() for key, t in tensors.items()}
    # safetensors writes no two tensors that share memory, as a tied weight in a saved module does.
    sharers = Counter(t.untyped_storage().data_ptr() for t in stored.values())
    for key, tensor in stored.items():
        if sharers[tensor.untyped_storage().data_ptr()] > 1:
            stored[key] = tensor.clone()
    return stored


def _mark_of(model: nn.Module, planned: Plan, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the file says of its config and of its base."""
    mark = {"config": config_digest(planned.method, settings)}
    if labels := labels_of(model):
        mark["labels"] = json.dumps(labels)
    if planned.method.keeps_base:
        mark |= fingerprint(model, planned.saved, rows=resized(model))
        if resized(model):
            mark["rows"] = json.dumps(resized(model))
        if packed := packed_layers(model):
            mark["packed"] = json.dumps(packed)
    return mark


def carried(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the base weights of adapted embeddings that PEFT saves with the adapter, by key.

    As PEFT's save_embedding_layers="auto": if target_modules matches an `embed_tokens` or an
    `lm_head`, the model's input and output embeddings, those of them that are adapted.
    """
    wanted, names = settings.get("target_modules"), ("embed_tokens", "lm_head")
    if isinstance(wanted, str):
        ends = [n for n, _ in walk(model) if n.rpartition(".")[2] in names]
        meant = any(fits(name, wanted) for name in ends)
    else:
        meant = any(name in (wanted or ()) for name in names)
    rows = settings["peft_type"] == "TRAINABLE_TOKENS" or settings.get("trainable_token_indices")
    if not meant or rows:
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

    16-bit adapters become float32. If the file was made on a base with more tokens or fewer,
    `resize_embeddings` gives this one as many, for good. Raises what read_adapter() raises, and
    CheckpointError if the model is on the meta device; then the model is as it was: bits, modules,
    requires_grad.
    """
    before = rows_of(model)
    with resizing(model, rows_filed(model, directory, name) if resize_embeddings else before):
        read = read_adapter(model, directory, name, trainable)
        planned, parts = read.plan, read.parts
        bare = [key for key, tensor in read.wanted.items() if tensor.is_meta]
        if bare:
            raise CheckpointError(
                f"{read.folder}: {bare[0]} has no place (meta device). Load the base first."
            )
        if (rows_of(model) or 0) > min(resized(model).values(), default=sys.maxsize):
            check_filed(read.folder, rows_beyond(model, planned, parts))
    for path, (adapter, view) in with_views(model, parts.adapters).items():
        # Buffers are not in the file: a start computes them from the base.
        if next(adapter.buffers(), None) is not None:
            initialise(adapter, view, seed=0)
        # If the file brings this weight, PEFT has subtracted the start from it already.
        if f"{path}.weight" in planned.carried and not isinstance(adapter, Tokens):
            for buffer in adapter.buffers():
                buffer.zero_()
    wrap(model, planned, parts, name)
    with torch.no_grad():
        for key, tensor in read.wanted.items():
            tensor.copy_(read.values[key])
    notes = [read.note]
    if rows_of(model) != before:
        notes.append(f"the embeddings have {rows_of(model)} rows from here on, {before} before")
    return report_of(model, name, "\n".join(filter(None, notes)))


def rows_filed(
    model: nn.Module, directory: str | os.PathLike[str], name: str = "default"
) -> int | None:
    """Returns how many rows the embeddings of an adapter's base had, None if its files do not
    say."""
    folder = find_folder(directory, name)
    stored, settings = read_tensors(folder)[0], settings_in(folder)
    return filed_rows(model, settings, renamed(model, stored))


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that was read and checked for a model, and is not in it yet."""

    folder: Path
    plan: Plan
    parts: Parts  # the new modules
    wanted: dict[str, Tensor]  # the tensor that each key of the file fills, without the prefix
    values: dict[str, Tensor]  # the file's values for each, in the tensor's dtype
    note: str  # for the report


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> ReadAdapter:
    """Read an adapter's files and check them for the model, which may be on the meta device.

    The file must hold each tensor that the adapter has and no other, in the right shape, finite,
    in a floating dtype. Raises CheckpointError, TargetError or ConfigError.
    """
    check_name(name)
    folder = find_folder(directory, name)
    settings = settings_in(folder)
    method = method_for(settings, folder)
    stored, mark = read_tensors(folder)
    config = read_config(method, settings, folder)
    check_unedited(method, settings, mark, folder)
    notes: list[str] = []
    if not mark:
        stored = renamed(model, stored)
        if isinstance(config, PartialConfig):
            config, notes = as_peft_means(model, config)
    check_tying(model, settings, folder)
    check_rows(model, filed_rows(model, settings, stored), folder)
    planned = replace(plan_of(model, config, strict=bool(mark)), trainable=trainable)
    _drop_copies(planned, stored)
    planned = replace(planned, carried=_carried(model, planned, stored))
    notes += [
        f"{name} is the file's, not the base's: kept aside, back after eject."
        for name in planned.carried
    ]
    check_mix(model, name, planned)
    if trainable:
        check_statistics(model, planned)
    check_stated_size(folder, model, planned, stored)
    parts = build(model, planned)
    _drop_repeats(parts.adapters, stored)
    wanted = tensors(model, planned, parts)
    check_fit(folder, stored, wanted)
    ready = check_values(folder, stored, wanted)
    verified = verify(model, planned, settings, mark, folder)
    note = "\n".join(filter(None, [*notes, verified]))
    return ReadAdapter(folder, planned, parts, wanted, ready, note)


def _drop_copies(planned: Plan, stored: dict[str, Tensor]) -> None:
    """Take out of the file what PEFT saves of a saved module besides the copy that acts."""
    for path in planned.saved:
        for key in [key for key in stored if key.startswith(f"{path}.")]:
            copy, _, leaf = key.removeprefix(f"{path}.").partition(".")
            # PEFT leaves the adapter's name in the keys of a head that has layers within.
            keys = (f"{path}.{leaf}", f"{path}.{leaf.partition('.')[2]}")
            acting = next((stored[key] for key in keys if key in stored), None)
            if acting is None:
                continue
            same = copy == "modules_to_save" and _equal(stored[key], acting)
            if same or copy == "original_module":
                del stored[key]


def _carried(model: nn.Module, planned: Plan, stored: dict[str, Tensor]) -> tuple[str, ...]:
    """Returns the base weights that the file replaces: of adapted layers, of embeddings, and of
    modules that PEFT saves beside the adapter. Takes those that the base already has out of
    `stored`."""
    base, of_tokens = dict(base_paths(model)), embeddings(model)
    trained = {id(base[name]) for name in planned.selected if name in base}  # by any of their names
    beside = beside_saved(model, planned)
    names = {
        filed_key(planned, name): name
        for name in base
        if (name.rpartition(".")[0] in {*planned.targets, *of_tokens} or name in beside)
        and id(base[name]) not in trained
        and not any(inside(name, whole) for whole in planned.saved)
    }
    grown = {id(base[name]) for name in resized(model) if name in base}
    replaced: list[str] = []
    first: dict[int, Tensor] = {}
    for key in [key for key in names if key in stored]:
        filed, weight = stored[key], base[names[key]]
        twin = first.setdefault(id(weight), filed)
        same = filed.shape == weight.shape and (weight.is_meta or _equal(filed, weight))
        # PEFT may have saved it in 16 bits, or the model may be in 16 bits.
        same = same or (names[key] in beside and _equal(weight, filed))
        same = same and id(weight) not in grown
        if same or (twin is not filed and _equal(filed, twin)):  # a tied weight comes twice
            del stored[key]
        else:
            replaced.append(names[key])
    return tuple(replaced)


def _equal(filed: Tensor, weight: Tensor) -> bool:
    """True if a file's tensor, cast to the other's dtype, has its values."""
    return filed.shape == weight.shape and torch.equal(
        filed.to(weight.device, weight.dtype), weight
    )


def _drop_repeats(adapters: Mapping[str, Adapter], stored: dict[str, Tensor]) -> None:
    """Take out of the file the rows that PEFT repeats for a tied layer."""
    for path, adapter in adapters.items():
        leader = adapter.leader if isinstance(adapter, Follower) else None
        for key in Adapter.placed(adapter) if leader and not adapter.placed() else ():
            repeated, first = stored.get(f"{path}.{key}"), stored.get(f"{leader}.{key}")
            if repeated is not None and first is not None and _equal(repeated, first):
                del stored[f"{path}.{key}"]


def check_stated_size(
    folder: Path, model: nn.Module, planned: Plan, stored: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError if the config states adapters far larger than the file.

    Without this, a damaged r would fill the memory before the shapes are compared.
    """
    if not issubclass(planned.method, Adapter):
        return
    modules = dict(walk(model))
    layers = {id(modules[name]): name for name in planned.targets if name not in planned.further}
    stated = sum(
        planned.method.size(views(modules[name])[0], planned.config, name)
        for name in layers.values()
    )
    held = sum(tensor.numel() for tensor in stored.values())
    if stated > LARGEST_UNFILED + 64 * held:
        raise CheckpointError(
            f"{folder / CONFIG} states adapters of {stated:,} numbers, and {WEIGHTS} holds"
            f" {held:,}. Copy both files again from where they were saved."
        )


def check_fit(folder: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless keys and shapes are the same on both sides."""
    problems = [f"{key} is not in the file" for key in wanted if key not in stored]
    problems += [f"{key} has no place in the model" for key in stored if key not in wanted]
    ranks: set[int] = set()
    for key in wanted:
        if key in stored and stored[key].shape != wanted[key].shape:
            problems.append(
                f"{key} is {tuple(stored[key].shape)} in the file,"
                f" {tuple(wanted[key].shape)} in the model"
            )
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
    """Returns the file's tensors in the dtypes of those that they fill.

    Raises CheckpointError if a dtype is not floating, or if a value is not finite in the file's
    dtype or after the cast.
    """
    ready: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for key, parameter in wanted.items():
        tensor = stored[key]
        floating = tensor.is_floating_point() and tensor.element_size() >= 2
        if not (floating if parameter.is_floating_point() else tensor.dtype == parameter.dtype):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype}, no dtype of weights. Save the"
                " adapter again, in a floating dtype."
            )
        ready[key] = tensor.to(parameter.dtype)
        off = int((~ready[key].isfinite()).sum()) if floating else 0
        if off:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} has {off} values that are not finite in"
                f" {parameter.dtype}. Train again with a lower rate, or take an earlier save."
            )
        twin = first.setdefault(id(parameter), key)
        if not torch.equal(ready[twin], ready[key]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {twin} and {key} differ, and are one parameter of the model."
                " Load it onto the base that it was made with."
            )
    return ready
