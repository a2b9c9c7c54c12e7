"""An adapter's files, PEFT's format in and out, strict in both directions.

    adapter_config.json         the config, keys as PEFT names them, sorted
    adapter_model.safetensors   the tensors, keys `base_model.model.` + path + parameter
    README.md                   a card

The safetensors metadata carries, under `lora_from_scratch`, a fingerprint of the base and a digest
of the settings that change the mathematics: PEFT ignores it, we hold the file to it. It also has
the names of a classifier's classes. Of a base in NF4 it says which layers were packed: the base
that it was packed from is packed anew to be known, and the report says that it is not rounded. For
a file of PEFT's own nothing can be checked, and the report says so.

`load` reads and checks everything before it touches the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora import nf4
from lora.adapter import (
    METHODS,
    SHORTHANDS,
    AdaptedLayer,
    Adapter,
    AdapterConfig,
    Method,
    MethodConfig,
    PartialConfig,
    config_fields,
    initialise,
)
from lora.card import arguments_of, card, labels_of, stated
from lora.errors import CheckpointError, ConfigError, LoraError
from lora.files import json_object, read_json, readable, writable, write_together
from lora.foreign import as_peft_means, check_tying, exactly, in_blocks, renamed
from lora.injection import (
    Parts,
    Report,
    build,
    check_mix,
    check_name,
    check_restored,
    check_statistics,
    filed_key,
    injected,
    owned,
    report_of,
    selections,
    stored_tensors,
    tensors,
    with_views,
    wrap,
)
from lora.layers import fits, gathered, inside, views
from lora.methods._tokens import Tokens
from lora.nf4 import NF4Linear
from lora.targets import (
    Plan,
    base_buffers,
    base_parameters,
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

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
ROOT = "base_model."
PREFIX = ROOT + "model."
MARK = "lora_from_scratch"

COPY_AGAIN = "Copy it again from where it was saved."

LARGEST_UNFILED = 2**24  # numbers that a config may state beyond 64 times what its file holds

# Keys of PEFT's config that never change what a saved adapter computes.
INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "runtime_config", "task_type"),
}


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    writes: bool = True,
) -> Path:
    """Write adapter `name` as PEFT does: into `directory`, or into its subfolder `name`.

    Every file is whole on disk before the first takes its place; a crash between two of the
    renames leaves files that load() tells apart, where they are of two settings. Of several
    processes among which the base is sharded all have to call it, since it samples the base, and
    one `writes`. Returns the folder. Raises CheckpointError.
    """
    check_name(name)
    if name not in injected(model):
        others = ", ".join(injected(model)) or "none"
        raise CheckpointError(f"the model has no adapter {name!r}. Found: {others}.")
    check_restored(model, "save")
    planned = injected(model)[name]
    settings = file_config(model, planned, name)
    found = carried(model, settings) | stored_tensors(model, name)
    if planned.method.in_peft:
        found = dict[str, Tensor](beside_saved(model, planned)) | found
    found = rows_beyond(model, planned, owned(model, name)) | found
    found = {key: gathered(tensor) for key, tensor in found.items()}
    for key, tensor in found.items():
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no values (meta device). Call lora.init first.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{key} is not finite: the training diverged, nothing is written."
                " Lower the learning rate."
            )
    mark = {"config": config_digest(planned.method, settings)}
    if labels := labels_of(model):
        mark["labels"] = json.dumps(labels)
    if planned.method.keeps_base:
        mark |= fingerprint(model, planned.saved, rows=resized(model))
        mark |= {"rows": json.dumps(resized(model))} if resized(model) else {}
        held = {id(m): (name, m) for name, m in reversed(list(walk(model)))}  # by its first path
        packed = {
            name: [module.block_size, module.nested_absmax is not None]
            for name, module in held.values()
            if isinstance(module, NF4Linear)
        }
        mark |= {"packed": json.dumps(packed)} if packed else {}
    stored = {whole_key(key): t.detach().cpu().contiguous() for key, t in found.items()}
    # Of tensors that share memory (a tied weight inside a saved module) each is written.
    shared = Counter(t.untyped_storage().data_ptr() for t in stored.values())
    for key, tensor in stored.items():
        if shared[tensor.untyped_storage().data_ptr()] > 1:
            stored[key] = tensor.clone()
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


def adapter_files(
    stored: dict[str, Tensor],
    metadata: dict[str, str],
    settings: dict[str, Any],
    method: type[Method],
    arguments: Mapping[str, Any] = {},
) -> dict[str, bytes]:
    """What an adapter's folder holds, by file name, of tensors by their whole keys; `arguments`
    are card.arguments_of()."""
    unstated = dict.fromkeys(("base_model_name_or_path", "task_type", "auto_mapping"))
    settings = unstated | settings | {"peft_type": method.peft_type, "inference_mode": True}
    return {
        WEIGHTS: in_one_order(safetensors.torch.save(stored, metadata)),
        CONFIG: json.dumps(_as_int(settings), indent=2, sort_keys=True).encode(),
        CARD: card(method.name, method.in_peft, settings, arguments).encode(),
    }


def in_one_order(payload: bytes) -> bytes:
    """A safetensors file with its header's keys sorted: the library orders metadata at random,
    and the same adapter shall be the same bytes."""
    length = int.from_bytes(payload[:8], "little")
    header = json.dumps(json.loads(payload[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload[8 + length :]


def whole_key(key: str) -> str:
    """A tensor's key in the file; of what all layers share it is whole already."""
    return key if key.startswith(ROOT) else PREFIX + key


def file_config(model: nn.Module, planned: Plan, name: str) -> dict[str, Any]:
    """adapter_config.json as PEFT would write it."""
    settings = planned.method.file_settings(planned.config, owned(model, name).adapters)
    if isinstance(planned.config, AdapterConfig):
        names = [name for name in planned.targets if name not in planned.further]
        if settings["target_modules"] in SHORTHANDS or _blocks_differ(model, planned, names):
            found = exactly(model, names)
            settings["target_modules"] = found if isinstance(found, str) else list(found)
            for key in ("layers_to_transform", "layers_pattern"):
                settings |= {key: None} if key in settings else {}
        if "fan_in_fan_out" in planned.method.neutral:
            modules = dict(walk(model))
            every = [views(modules[name])[0] for name in names]
            linear = [view.transposed for view in every if not view.of_ids]
            settings["fan_in_fan_out"] = bool(linear) and all(linear)
    elif "target_modules" in settings:
        found = exactly(model, dict.fromkeys(n.rpartition(".")[0] for n in planned.selected))
        listed = found if isinstance(found, str) else list(found)
        settings |= {"target_modules": listed, "exclude_modules": None}
    if "modules_to_save" in settings:
        settings["modules_to_save"] = list(planned.saved) or None
    return settings | {"peft_type": planned.method.peft_type} | stated(model, planned.saved)


def _blocks_differ(model: nn.Module, planned: Plan, names: list[str]) -> bool:
    """Whether PEFT would take layers_to_transform to mean other layers than the plan's `names`."""
    config = planned.config
    assert isinstance(config, AdapterConfig)
    if not config.layers_to_transform or isinstance(config.target_modules, str):
        return False
    free = [
        name
        for name, _ in walk(model)
        if not any(inside(name, whole) for whole in planned.saved)
        and not (config.exclude_modules and fits(name, config.exclude_modules))
    ]
    return set(in_blocks(free, config)) != set(names)


def _as_int(value: Any, key: str = "") -> Any:
    """The settings with whole numbers for whole alphas, as PEFT types them."""
    if isinstance(value, dict):
        return {inner: _as_int(v, key or inner) for inner, v in value.items()}
    whole = isinstance(value, float) and value.is_integer() and "dropout" not in key
    return int(value) if whole else value


def carried(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The base's weights of adapted embeddings that PEFT files with the adapter, by key.

    Where target_modules means an `embed_tokens` or an `lm_head`, those of the model's input and
    output embeddings that are adapted, as PEFT's save_embedding_layers="auto" does.
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
    found: dict[str, Tensor] = {}
    held = {id(module): name for name, module in walk(model)}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, get, lambda: None)()
        if isinstance(layer, AdaptedLayer):
            path = held[id(layer.base_layer)]
            for name, parameter in layer.base_layer.named_parameters():
                found[f"{path}.base_layer.{name}"] = parameter
    return found


def config_digest(method: type[Method], settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that change what the saved adapter computes, as read back: 8 and 8.0
    are the same number."""
    settings = _as_int(settings)
    config = read_config(method, settings, Path())
    # Of the fields those that the file states: a field that comes later leaves old files good.
    values = {k: v for k, v in config_fields(config).items() if k in settings}
    counted = {k: v for k, v in values.items() if k not in config.training_only}
    counted |= {k: True for k, v in method.states.items() if v}
    text = json.dumps(counted | {"peft_type": settings["peft_type"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(
    model: nn.Module,
    saved: tuple[str, ...] = (),
    packed: Mapping[str, tuple[int, bool]] = {},
    rows: Mapping[str, int] = {},
) -> dict[str, str]:
    """What tells one base from another: SHA-256 of names, shapes and sampled values.

    Up to 4,096 values of each parameter and persistent floating buffer, scattered over it. One
    digest of the values rounded to bfloat16 and one of those rounded to float16, so that a base
    held in float32 is known again where it is held in either; a tensor held in one of them has no
    digest in the other. Modules trained as a whole do not count: their originals never act. On
    the meta device there are no values, and no digest. The layers in `packed` are taken as they
    would be in NF4, of that block_size and double_quant, packed from the dtype that they have here.
    """
    digests = {torch.bfloat16: hashlib.sha256(), torch.float16: hashlib.sha256()}
    base: dict[str, Tensor] = {**dict(base_parameters(model)), **dict(base_buffers(model))}
    first, held = {id(tensor): name for name, tensor in base.items()}, dict(base_paths(model))
    for part, selected in selections(model):
        if part is model:
            base |= {first[id(held[name])]: t for name, t in selected.originals.items()}
    modules = dict(walk(model)) if packed else {}
    for name, (block_size, double_quant) in packed.items():
        W, _ = views(modules[name])[0].read()
        del base[f"{name}.weight"]
        held = nf4.parameters_of(nf4.quantize(W, block_size, double_quant, name))
        base |= {f"{name}.{leaf}": parameter for leaf, parameter in held.items()}
    for name, tensor in sorted(base.items()):
        if any(inside(name, module) for module in saved):
            continue
        if tensor.is_meta:
            return {}
        codes = tensor.dtype == torch.uint8 and isinstance(tensor, nn.Parameter)
        own = gathered(tensor).detach()
        own = own[: rows[name]] if name in rows else own
        values = own.reshape(-1)
        if not values.is_floating_point() and not codes:
            continue
        if values.numel() > 4096:
            # Knuth's multiplier: a stride that divides the width would sample one column only.
            scattered = torch.arange(4096, dtype=torch.int64, device="cpu")
            scattered = scattered * 2654435761 % values.numel()
            values = values[scattered.to(values.device)]
        for dtype, digest in list(digests.items()):
            if codes or values.dtype in (torch.float32, torch.float64, dtype):
                digest.update(f"{name} {tuple(own.shape)}\n".encode())
                sample = (values if codes else values.to(dtype)).cpu().contiguous()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
            else:
                del digests[dtype]
    return {str(dtype).replace("torch.", "base_"): d.hexdigest() for dtype, d in digests.items()}


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    resize_embeddings: bool = False,
) -> Report:
    """Read an adapter, ours or PEFT's, onto the model under `name`, and activate it.

    16-bit adapters are held in float32. If the file was made on a base with more tokens or fewer,
    `resize_embeddings` gives this one as many, for good. Raises what read_adapter() raises, and
    CheckpointError if the model has no values yet; then the model is untouched: bits, modules,
    requires_grad.
    """
    before = rows_of(model)
    with resizing(model, rows_filed(model, directory, name) if resize_embeddings else before):
        found = read_adapter(model, directory, name, trainable)
        planned, parts, wanted = found.plan, found.parts, found.wanted
        bare = [key for key, tensor in wanted.items() if tensor.is_meta]
        if bare:
            raise CheckpointError(
                f"{found.folder}: {bare[0]} has no place (meta device). Load the base first."
            )
        if (rows_of(model) or 0) > min(resized(model).values(), default=sys.maxsize):
            check_filed(found.folder, rows_beyond(model, planned, parts))
    for path, (adapter, view) in with_views(model, parts.adapters).items():
        if next(adapter.buffers(), None) is not None:  # which follow from the base
            initialise(adapter, view, seed=0)
        moved = f"{path}.weight" in planned.carried and not isinstance(adapter, Tokens)
        if moved:  # a base that has been moved by its start already
            for buffer in adapter.buffers():
                buffer.zero_()
    wrap(model, planned, parts, name)
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found.values[key])
    said = f"the embeddings have {rows_of(model)} rows from here on, {before} before"
    notes = [found.note] if rows_of(model) == before else [found.note, said]
    return report_of(model, name, "\n".join(filter(None, notes)))


def rows_filed(
    model: nn.Module, directory: str | os.PathLike[str], name: str = "default"
) -> int | None:
    """The rows of the embeddings that an adapter was made with, None if its files do not say."""
    folder = find_folder(directory, name)
    stored, settings = read_tensors(folder)[0], settings_in(folder)
    return filed_rows(model, settings, renamed(model, stored))


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter's files, read and held to a model that they have not touched."""

    folder: Path
    plan: Plan
    parts: Parts  # made for the model, and not in it
    wanted: dict[str, Tensor]  # the places of the file's tensors, by their keys less the prefix
    values: dict[str, Tensor]  # what the file holds for each, in its dtype
    note: str


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> ReadAdapter:
    """Read an adapter's files and hold them to the model, which may be on the meta device.

    Every tensor of the file must have its place and every place its tensor, of the right shape,
    finite, in a floating dtype. Raises CheckpointError, TargetError or ConfigError.
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
    planned, said = _bring(model, planned, stored)
    check_mix(model, name, planned)
    if trainable:
        check_statistics(model, planned)
    check_size(folder, model, planned, stored)
    parts = build(model, planned)
    _drop_repeats(parts.adapters, stored)
    wanted = tensors(model, planned, parts)
    check_fit(folder, stored, wanted)
    ready = check_values(folder, stored, wanted)
    verified = verify(model, planned, settings, mark, folder)
    note = "\n".join(filter(None, [*notes, *said, verified]))
    return ReadAdapter(folder, planned, parts, wanted, ready, note)


def check_unedited(
    method: type[Method], settings: Mapping[str, Any], mark: Mapping[str, str], folder: Path
) -> None:
    """Raise CheckpointError where a file of ours has other settings than it was saved with."""
    if mark and mark["config"] != config_digest(method, settings):
        raise CheckpointError(
            f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with: a setting that"
            " changes the result (r, lora_alpha, target_modules, ...) was edited, or a save was"
            " cut off. Restore the file, or save the adapter again."
        )


def settings_of(directory: str | os.PathLike[str]) -> tuple[type[Method], MethodConfig]:
    """The method of the adapter in a folder, and its config as the file states it."""
    folder = find_folder(directory)
    settings = settings_in(folder)
    method = method_for(settings, folder)
    return method, read_config(method, settings, folder)


def _bring(model: nn.Module, planned: Plan, stored: dict[str, Tensor]) -> tuple[Plan, list[str]]:
    """The plan with the base's weights that the file brings: of adapted layers, of embeddings, and
    of modules that PEFT takes for saved ones.

    Those that are the model's own already leave `stored`, the others replace them. What PEFT files
    of a saved module besides the copy that acts leaves it too. Returns notes on them as well.
    """
    for path in planned.saved:
        for key in [key for key in stored if key.startswith(f"{path}.")]:
            twice, _, leaf = key.removeprefix(f"{path}.").partition(".")
            # PEFT leaves the adapter's name in the keys of a head that has layers within.
            leaves = (leaf, leaf.partition(".")[2])
            same = next((stored[k] for one in leaves if (k := f"{path}.{one}") in stored), None)
            copied = twice == "modules_to_save" and same is not None and _equal(stored[key], same)
            if copied or (twice == "original_module" and same is not None):
                del stored[key]
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
    anew = {id(base[name]) for name in resized(model) if name in base}
    brought: list[str] = []
    first: dict[int, Tensor] = {}
    for key in [key for key in names if key in stored]:
        there, here = stored[key], base[names[key]]
        twin = first.setdefault(id(here), there)
        own = there.shape == here.shape and (here.is_meta or _equal(there, here))
        own = own or (names[key] in beside and _equal(here, there))  # whichever is held in 16 bits
        own = own and id(here) not in anew
        if own or (twin is not there and _equal(there, twin)):  # a tied weight comes twice
            del stored[key]
        else:
            brought.append(names[key])
    said = [
        f"{name} is the file's, not the base's: kept aside, back after eject." for name in brought
    ]
    return replace(planned, carried=tuple(brought)), said


def _equal(there: Tensor, here: Tensor) -> bool:
    """True if a file's tensor has the other's values, in its dtype."""
    return there.shape == here.shape and torch.equal(there.to(here.device, here.dtype), here)


def _drop_repeats(adapters: Mapping[str, Adapter], stored: dict[str, Tensor]) -> None:
    """Take out of the file the rows that PEFT writes again for a layer that is tied to theirs."""
    for path, adapter in adapters.items():
        for key in Adapter.placed(adapter) if adapter.leader and not adapter.placed() else ():
            repeated, own = stored.get(f"{path}.{key}"), stored.get(f"{adapter.leader}.{key}")
            if repeated is not None and own is not None and _equal(repeated, own):
                del stored[f"{path}.{key}"]


def find_folder(directory: str | os.PathLike[str], name: str = "default") -> Path:
    """The folder that holds the adapter's files: `directory`, or its subfolder `name`."""
    with readable(directory, CheckpointError, "Pass the folder that lora.save, or PEFT, wrote."):
        return _find_folder(Path(directory), name)


def _find_folder(folder: Path, name: str) -> Path:
    places = [folder, folder / name] if name == "default" else [folder / name, folder]
    there = [place for place in places if (place / CONFIG).is_file()]
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    if not there:
        below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"no {CONFIG} in {folder}: "
            + (
                "the folder does not exist."
                if found is None
                else f"found {found[:8] or 'nothing'}."
            )
            + (
                f" It has adapters {', '.join(below)}: load one of those folders."
                if below
                else " Pass the folder that lora.save, or PEFT, wrote."
            )
        )
    folder = there[0]
    if not (folder / WEIGHTS).is_file():
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]} is a pickle, which can run code when read: refused. Convert"
                " it where you trust it: safetensors.torch.save_file(torch.load(path,"
                f" weights_only=True), {WEIGHTS!r})."
            )
        raise CheckpointError(f"no {WEIGHTS} in {folder}. Copy it beside {CONFIG}.")
    return folder


def settings_in(folder: Path) -> dict[str, Any]:
    """Returns what a folder's adapter_config.json states. Raises CheckpointError."""
    return read_json(folder / CONFIG, CheckpointError, COPY_AGAIN)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors by key less the prefix, and our mark in its metadata ({} if foreign)."""
    stored, metadata = _read_safetensors(folder / WEIGHTS)
    path = folder / WEIGHTS
    mark: dict[str, str] = {}
    if MARK in metadata:
        with suppress(ValueError):
            mark = json_object(metadata[MARK])
        if "config" not in mark or not all(isinstance(value, str) for value in mark.values()):
            raise CheckpointError(
                f"{path}: the metadata {MARK!r} is broken. Copy the file again, or save anew."
            )
    for key in stored:
        if not key.startswith(PREFIX) and key.removeprefix(ROOT).count("."):
            raise CheckpointError(
                f"{path}: {key} does not begin with {PREFIX!r}: not as PEFT writes it. Rename the"
                " keys, or save the adapter from the unwrapped model."
            )
    # What is shared by all layers lies at the root, and keeps its whole key.
    return {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}, mark


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the file's tensors by key, and its metadata."""
    with readable(path, CheckpointError, COPY_AGAIN):
        with path.open("rb") as raw:
            start, size = raw.read(4), path.stat().st_size
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                # The file itself cannot be iterated over.
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return stored, file.metadata() or {}
        except safetensors.SafetensorError as error:
            if start == b"PK\x03\x04" or start[:1] == b"\x80":
                raise CheckpointError(
                    f"{path} is a pickle under a safetensors name, refused. Convert it where you"
                    " trust it: safetensors.torch.save_file(torch.load(path, weights_only=True),"
                    " path)."
                ) from None
            raise CheckpointError(
                f"{path} ({size:,} bytes) is no whole safetensors file: {error}. {COPY_AGAIN}"
            ) from None


def filed_labels(mark: Mapping[str, str]) -> tuple[str, ...]:
    """The names of a classifier's classes as save() files them, () if it filed none."""
    try:
        labels = json.loads(mark.get("labels", "[]"))
    except (ValueError, RecursionError):
        return ()
    good = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return tuple(labels) if good else ()


def method_for(settings: Mapping[str, Any], folder: Path) -> type[Method]:
    """The one method whose equation the file states."""
    if "peft_type" not in settings:
        raise CheckpointError(f"{folder / CONFIG} has no peft_type: not an adapter's config.")
    for key in sorted({key for method in METHODS.values() for key in method.states}):
        if not isinstance(settings.get(key), bool | NoneType):
            raise CheckpointError(
                f"{folder / CONFIG}: {key} must be true or false, found {settings[key]!r}. Mend it"
                " there."
            )
    found = [method for method in METHODS.values() if method.matches(settings)]
    if len(found) != 1:
        known = ", ".join(sorted({method.peft_type for method in METHODS.values()}))
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type {settings['peft_type']!r} is"
            f" {'no method of ours' if not found else 'claimed twice'}. Known: {known}."
            " Load it with PEFT."
        )
    return found[0]


def read_config(method: type[Method], settings: Mapping[str, Any], folder: Path) -> MethodConfig:
    """The config from the file's settings; a setting that changes the mathematics and is no
    field of the method is an error."""
    try:
        settings = method.read_settings(settings)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    known = {field.name for field in fields(method.Config)} - method.Config.unsaved
    unknown = {
        key: value
        for key, value in settings.items()
        if key not in known
        and key not in INERT
        and key not in method.states
        and not _neutral(method, key, value)
    }
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{folder / CONFIG}: {listed[:400]} changes what the adapter computes and is not"
            f" implemented for {method.name}. Load it with PEFT, or merge it there."
        )
    if "target_modules" in known and not settings.get("target_modules"):
        raise CheckpointError(f"{folder / CONFIG} has no target_modules.")
    values = {k: v for k, v in settings.items() if k in known}
    unset: dict[str, Any] = {"modules_to_save": (), "exclude_modules": None}
    unset |= {"layers_to_transform": (), "layers_pattern": ()}
    values |= {k: v for k, v in unset.items() if k in values and values[k] in (None, [], "")}
    try:
        return method.Config(**values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _neutral(method: type[Method], key: str, value: object) -> bool:
    allowed = method.neutral.get(key)
    if allowed is ... or value is None or value is False or value in ([], {}, ""):
        return True
    options = allowed if isinstance(allowed, tuple) else (allowed,)
    return any(
        value is option or (isinstance(value, str) and value == option) for option in options
    )


def check_size(folder: Path, model: nn.Module, planned: Plan, stored: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the config states adapters so much larger than the file that they
    are not worth making to be compared with it."""
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
    """The stored tensors in the dtypes of their places. Raises CheckpointError where a type is
    no weight's, or a value is not finite, here or there."""
    ready: dict[str, Tensor] = {}
    placed: dict[int, str] = {}
    for key, place in wanted.items():
        tensor = stored[key]
        floating = tensor.is_floating_point() and tensor.element_size() >= 2
        if not (floating if place.is_floating_point() else tensor.dtype == place.dtype):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype}, no dtype of weights. Save the"
                " adapter again, in a floating dtype."
            )
        ready[key] = tensor.to(place.dtype)
        off = int((~ready[key].isfinite()).sum()) if floating else 0
        if off:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} has {off} values that are not finite in {place.dtype}."
                " Train again with a lower rate, or take an earlier save."
            )
        twin = placed.setdefault(id(place), key)
        if not torch.equal(ready[twin], ready[key]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {twin} and {key} differ, and are one parameter of the model."
                " Load it onto the base that it was made with."
            )
    return ready


def verify(
    model: nn.Module,
    planned: Plan,
    settings: Mapping[str, Any],
    mark: Mapping[str, str],
    folder: Path,
) -> str:
    """Hold the base to the mark of a file of ours. Returns what could not be verified, for the
    report."""
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
