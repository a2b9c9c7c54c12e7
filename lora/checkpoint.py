"""An adapter's files, PEFT's format in and out, strict in both directions.

    adapter_config.json         the config, keys as PEFT names them, sorted
    adapter_model.safetensors   the tensors, keys `base_model.model.` + path + parameter
    README.md                   a card

The safetensors metadata carries, under `lora_from_scratch`, a fingerprint of the base and a digest
of the settings that change the mathematics: PEFT ignores it, we hold the file to it. For a file of
PEFT's own neither can be checked, and the report says so.

`load` reads and checks everything before it touches the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora.adapter import METHODS, AdapterConfig, Method, MethodConfig, config_fields, initialise
from lora.errors import CheckpointError, ConfigError
from lora.injection import (
    Plan,
    Report,
    base_parameters,
    build,
    check_mix,
    check_name,
    check_restored,
    injected,
    owned,
    plan,
    report_of,
    tensors,
    walk,
    wrap,
)
from lora.layers import views

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MARK = "lora_from_scratch"

LARGEST_JSON = 64 * 2**20  # bytes

# Keys of PEFT's config that never change what a saved adapter computes.
INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "runtime_config", "task_type"),
}


def save(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> Path:
    """Write adapter `name` as PEFT does: into `directory`, or into its subfolder `name`.

    Each file is written whole and then put in place, the tensors first: a crash in between leaves
    a pair that load() tells apart. Returns the folder. Raises CheckpointError.
    """
    check_name(name)
    if name not in injected(model):
        found = ", ".join(injected(model)) or "none"
        raise CheckpointError(f"the model has no adapter {name!r}. Found: {found}.")
    check_restored(model, "save")
    planned = injected(model)[name]
    found_tensors = tensors(model, planned, *owned(model, name))
    for key, tensor in found_tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no values (meta device). Call lora.init first.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{key} is not finite: the training diverged, nothing is written."
                " Lower the learning rate."
            )
    settings = file_config(model, planned)
    mark = {"config": config_digest(planned, settings)}
    if planned.method.keeps_base:
        mark["base"] = fingerprint(model, planned.saved)
    folder = Path(directory) if name == "default" else Path(directory) / name
    payload = safetensors.torch.save(
        {PREFIX + key: t.detach().cpu().contiguous() for key, t in found_tensors.items()},
        {"format": "pt", MARK: json.dumps(mark, sort_keys=True)},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, payload)
        write_whole(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
        write_whole(folder / "README.md", _card(planned, settings).encode())
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror or error}."
            " What stood there before is whole. Free space, or save elsewhere."
        ) from error
    return folder


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_config(model: nn.Module, planned: Plan) -> dict[str, Any]:
    """adapter_config.json as PEFT would write it."""
    settings = config_fields(planned.config)
    if isinstance(planned.config, AdapterConfig):
        if planned.config.target_modules == "all-linear":
            settings["target_modules"] = list(planned.targets)
        settings["modules_to_save"] = list(planned.saved) or None
        if "fan_in_fan_out" in planned.method.neutral:
            modules = dict(walk(model))
            transposed = [views(modules[name])[0].transposed for name in planned.targets]
            settings["fan_in_fan_out"] = bool(transposed) and all(transposed)
    settings |= {key: v for key, v in planned.method.neutral.items() if isinstance(v, str)}
    # PEFT types alpha as an int.
    settings |= {k: int(v) for k, v in settings.items() if isinstance(v, float) and v.is_integer()
                 and "dropout" not in k}  # fmt: skip
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return settings | {
        "peft_type": planned.method.peft_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": None,
    }


def config_digest(planned: Plan, settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that change what the saved adapter computes."""
    names = {field.name for field in fields(planned.config)} - planned.config.training_only
    counted = {name: settings[name] for name in names} | {"peft_type": settings["peft_type"]}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def fingerprint(model: nn.Module, saved: tuple[str, ...] = ()) -> str:
    """What tells one base from another: "dtype:SHA-256" of names, shapes and sampled values.

    Up to 4,096 values of each parameter, evenly spaced. A base held in bfloat16 has the
    fingerprint of the same base in float32, for both are rounded to bfloat16 first; the dtype is
    the name of what the rest is comparable with. Modules trained as a whole do not count: their
    originals never act. On the meta device there are no values: "meta:".
    """
    digest = hashlib.sha256()
    common = ""
    for name, parameter in sorted(base_parameters(model)):
        if any(name.startswith(module + ".") for module in saved):
            continue
        if parameter.is_meta:
            return "meta:"
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // 4096))]
        if sample.dtype in (torch.float32, torch.bfloat16):
            sample = sample.to(torch.bfloat16)
            kind = "bfloat16"
        else:
            kind = str(sample.dtype).removeprefix("torch.")
        if kind not in common.split("+"):
            common = "+".join(filter(None, [common, kind]))
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{common}:{digest.hexdigest()}"


def _card(planned: Plan, settings: Mapping[str, Any]) -> str:
    base = settings["base_model_name_or_path"] or "its base model"
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\n---\n"
        f"# A {planned.method.name} adapter for {base}\n\n"
        "Written by lora-from-scratch in PEFT's format. Load it with\n\n"
        '    lora.load(model, "this folder")                       # lora-from-scratch\n'
        '    peft.PeftModel.from_pretrained(model, "this folder")  # PEFT\n'
    )


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> Report:
    """Read an adapter, ours or PEFT's, onto the model under `name`, and activate it.

    Every tensor of the file must have its place and every place its tensor, of the right shape,
    finite, in a floating dtype; 16-bit adapters are held in float32. Raises CheckpointError,
    TargetError or ConfigError, and then the model is untouched: bits, modules, requires_grad.
    """
    check_name(name)
    if name in injected(model):
        raise ConfigError(f"the model has an adapter named {name!r} already. Load under another.")
    folder = find_folder(directory, name)
    settings = read_json(folder / CONFIG)
    method = method_for(settings, folder)
    stored, mark = read_tensors(folder)
    config = read_config(method, settings, folder)
    if not mark and isinstance(config, AdapterConfig):
        config = replace(config, modules_to_save=_peft_saved(model, config, stored))
    planned = plan(model, config)
    check_mix(model, name, planned)
    adapters = build(model, planned)
    modules = dict(walk(model))
    wanted = tensors(model, planned, adapters, {path: modules[path] for path in planned.saved})
    check_fit(folder, stored, wanted)
    note = verify(model, planned, settings, mark, folder)

    for adapter in adapters.values():
        if any(p.is_meta for p in adapter.parameters()):
            raise CheckpointError(
                f"{folder}: the model has no values (meta device). Load it first."
            )
        initialise(adapter, seed=0)  # every value is overwritten below
        adapter.requires_grad_(False)
    wrap(model, planned, adapters, name, trainable)
    with torch.no_grad():
        for key, tensor in tensors(model, planned, *owned(model, name)).items():
            tensor.copy_(stored[key])
    return report_of(model, name, note)


def find_folder(directory: str | os.PathLike[str], name: str = "default") -> Path:
    """The folder that holds the adapter's files: `directory`, or its subfolder `name`."""
    folder = Path(directory)
    if (folder / name / CONFIG).is_file():
        folder = folder / name
    if not (folder / CONFIG).is_file():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"no {CONFIG} in {folder}: "
            + (
                "the folder does not exist."
                if found is None
                else f"found {found[:8] or 'nothing'}."
            )
            + (f" It has adapters {', '.join(below)}: load one of those folders." if below else "")
        )
    if not (folder / WEIGHTS).is_file():
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]} is a pickle, which can run code when read: refused. Convert"
                " it where you trust it: safetensors.torch.save_file(torch.load(path,"
                f" weights_only=True), {WEIGHTS!r})."
            )
        raise CheckpointError(f"no {WEIGHTS} in {folder}.")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, however deep or large."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes: no adapter's config.")
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply: no adapter's config.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object of settings.")
    return value


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors by key less the prefix, and our mark in its metadata ({} if foreign)."""
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(
                f"{path} is a pickle under a safetensors name, refused. Convert it where you trust"
                " it: safetensors.torch.save_file(torch.load(path, weights_only=True), path)."
            )
        stored: dict[str, Tensor] = {}
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  (no iteration over the file itself)
                stored[key] = file.get_tensor(key)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}."
            " Copy it again from where it was saved."
        ) from None
    mark: dict[str, str] = {}
    if MARK in metadata:
        try:
            mark = json.loads(metadata[MARK])
            good = isinstance(mark, dict) and all(isinstance(v, str) for v in mark.values())
        except (ValueError, RecursionError):
            good = False
        if not good or "config" not in mark:
            raise CheckpointError(f"{path}: the metadata {MARK!r} is broken.")
    for key, tensor in stored.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{path}: {key} does not begin with {PREFIX!r}: not as PEFT writes it. Rename the"
                " keys, or save the adapter from the unwrapped model."
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(f"{path}: {key} is {tensor.dtype}, no dtype of weights.")
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{path}: {key} has {count} values that are not finite.")
    return {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}, mark


def method_for(settings: Mapping[str, Any], folder: Path) -> type[Method]:
    """The one method whose equation the file states."""
    if "peft_type" not in settings:
        raise CheckpointError(f"{folder / CONFIG} has no peft_type: not an adapter's config.")
    found = [method for method in METHODS.values() if method.matches(settings)]
    if len(found) != 1:
        known = ", ".join(sorted({method.peft_type for method in METHODS.values()}))
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type {settings['peft_type']!r} is"
            f" {'no method of ours' if not found else 'claimed twice'}. Known: {known}."
        )
    return found[0]


def read_config(method: type[Method], settings: Mapping[str, Any], folder: Path) -> MethodConfig:
    """The config from the file's settings; a setting that changes the mathematics and is no
    field of the method is an error."""
    known = {field.name for field in fields(method.Config)}
    unknown = {
        key: value
        for key, value in settings.items()
        if key not in known and key not in INERT and not _neutral(method, key, value)
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
    if values.get("modules_to_save", ()) is None:
        values["modules_to_save"] = ()
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


def _peft_saved(
    model: nn.Module, config: AdapterConfig, stored: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The modules that a file of PEFT's trained as a whole, by their exact names.

    PEFT matches modules_to_save by a bare `endswith`, so that its automatic "classifier" means
    DistilBERT's pre_classifier as well, and ignores entries that match nothing ("score").
    """
    hits = [
        name
        for name, _ in walk(model)
        if name and any(name.endswith(entry) for entry in config.modules_to_save)
    ]
    if config.modules_to_save and not hits:
        return config.modules_to_save  # for saved_of to name the first that is missing
    return tuple(name for name in hits if any(key.startswith(name + ".") for key in stored))


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
            if key.endswith("lora_A.weight"):
                ranks.add(stored[key].shape[0] if stored[key].dim() else 0)
    if problems:
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        hint = f" Set r to {ranks.pop()} in {CONFIG}." if len(ranks) == 1 else ""
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit: {len(problems)} differences over"
            f" {len(wanted)} tensors.\n  " + "\n  ".join(problems[:4]) + more
            + f".{hint or ' Load it onto the base, and with the config, it was made with.'}"
        )  # fmt: skip


def verify(
    model: nn.Module,
    planned: Plan,
    settings: Mapping[str, Any],
    mark: Mapping[str, str],
    folder: Path,
) -> str:
    """Hold a file of ours to its mark. Returns what could not be verified, for the report."""
    if not mark:
        return "base and scaling not verifiable: the file is not of lora-from-scratch"
    filled = {**config_fields(planned.config), **settings}
    if mark["config"] != config_digest(planned, filled):
        raise CheckpointError(
            f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with: a setting that"
            " changes the result (r, lora_alpha, target_modules, ...) was edited, or a save was"
            " cut off. Restore the file, or save the adapter again."
        )
    if "base" not in mark:
        return ""
    here = fingerprint(model, planned.saved)
    if here.partition(":")[0] != mark["base"].partition(":")[0]:
        return (
            f"base not verifiable: saved on {mark['base'].partition(':')[0]}, held otherwise here"
        )
    if here != mark["base"]:
        base = settings.get("base_model_name_or_path") or "its base"
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base: fingerprint {mark['base'][:24]}…,"
            f" found {here[:24]}…. Load it onto {base}"
            " (a head that it does not save must be the same too: name it in modules_to_save)."
        )
    return ""
