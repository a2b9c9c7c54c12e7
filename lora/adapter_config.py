"""Writes a config as PEFT's adapter_config.json, and reads one.

A key that we do not implement is accepted only if its value changes nothing. Otherwise it is an
error: the adapter would compute something else here than in PEFT.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from lora.adapter_file import CONFIG, WEIGHTS, find_folder, settings_in, whole_numbers
from lora.card import stated
from lora.errors import CheckpointError, ConfigError
from lora.foreign import exactly, in_blocks
from lora.inventory import adapter_parts
from lora.layers import fits, inside, views
from lora.method import METHODS, Method
from lora.settings import SHORTHANDS, AdapterConfig, MethodConfig, config_fields
from lora.targets import Plan, walk

# Keys of PEFT's config that never change what a saved adapter computes.
INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "runtime_config", "task_type"),
}


def file_config(model: nn.Module, planned: Plan, name: str) -> dict[str, Any]:
    """Returns adapter_config.json as PEFT would write it."""
    settings = planned.method.file_settings(planned.config, adapter_parts(model, name).adapters)
    if isinstance(planned.config, AdapterConfig):
        names = [name for name in planned.targets if name not in planned.further]
        # PEFT does not know all of our words for layers. Names mean the same to both.
        if settings["target_modules"] in SHORTHANDS or _blocks_differ(model, planned, names):
            matching = exactly(model, names)
            settings["target_modules"] = matching if isinstance(matching, str) else list(matching)
            # The names say it all; PEFT would apply these settings to them once more.
            for key in ("layers_to_transform", "layers_pattern"):
                settings |= {key: None} if key in settings else {}
        if "fan_in_fan_out" in planned.method.neutral:
            modules = dict(walk(model))
            layer_views = [views(modules[name])[0] for name in names]
            transposed = [view.transposed for view in layer_views if not view.of_ids]
            settings["fan_in_fan_out"] = bool(transposed) and all(transposed)
    elif "target_modules" in settings:
        matching = exactly(model, dict.fromkeys(n.rpartition(".")[0] for n in planned.selected))
        listed = matching if isinstance(matching, str) else list(matching)
        settings |= {"target_modules": listed, "exclude_modules": None}
    if "modules_to_save" in settings:
        settings["modules_to_save"] = list(planned.saved) or None
    return settings | {"peft_type": planned.method.peft_type} | stated(model, planned.saved)


def _blocks_differ(model: nn.Module, planned: Plan, names: list[str]) -> bool:
    """True if PEFT would match other layers than `names` by layers_to_transform."""
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


def config_digest(method: type[Method], settings: Mapping[str, Any]) -> str:
    """Returns SHA-256 of the settings that change what the adapter computes; 8 equals 8.0."""
    settings = whole_numbers(settings)
    config = read_config(method, settings, Path())
    # Only keys that the file has: a field added in a later version must not change old digests.
    values = {k: v for k, v in config_fields(config).items() if k in settings}
    counted = {k: v for k, v in values.items() if k not in config.training_only}
    counted |= {k: True for k, v in method.states.items() if v}
    text = json.dumps(counted | {"peft_type": settings["peft_type"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_unedited(
    method: type[Method], settings: Mapping[str, Any], mark: Mapping[str, str], folder: Path
) -> None:
    """Raise CheckpointError if a setting was edited after save() wrote the file."""
    if mark and mark["config"] != config_digest(method, settings):
        raise CheckpointError(
            f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with: a setting that"
            " changes the result (r, lora_alpha, target_modules, ...) was edited, or a save was"
            " interrupted. Restore the file, or save the adapter again."
        )


def method_and_config(directory: str | os.PathLike[str]) -> tuple[type[Method], MethodConfig]:
    """Returns the method of the adapter in a folder, and its config."""
    folder = find_folder(directory)
    settings = settings_in(folder)
    method = method_for(settings, folder)
    return method, read_config(method, settings, folder)


def method_for(settings: Mapping[str, Any], folder: Path) -> type[Method]:
    """Returns the one method whose equation the file states. Raises CheckpointError."""
    if "peft_type" not in settings:
        raise CheckpointError(f"{folder / CONFIG} has no peft_type: not an adapter's config.")
    for key in sorted({key for method in METHODS.values() for key in method.states}):
        if not isinstance(settings.get(key), bool | NoneType):
            raise CheckpointError(
                f"{folder / CONFIG}: {key} must be true or false, found {settings[key]!r}. Correct"
                " it there."
            )
    methods = [method for method in METHODS.values() if method.matches(settings)]
    if len(methods) != 1:
        known = ", ".join(sorted({method.peft_type for method in METHODS.values()}))
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type {settings['peft_type']!r} is"
            f" {'no method of ours' if not methods else 'claimed twice'}. Known: {known}."
            " Load it with PEFT. If it is of a method of your own, import the file that defines it,"
            " or pass --method path/to/mine.py:MyMethod."
        )
    return methods[0]


def read_config(method: type[Method], settings: Mapping[str, Any], folder: Path) -> MethodConfig:
    """Returns the method's config with the file's settings.

    Raises CheckpointError if a setting changes the result and the method does not implement it.
    """
    # The errors of our own configs name a field. Here they must name the file too.
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
    """True if ignoring a key with this value changes nothing."""
    allowed = method.neutral.get(key)
    if allowed is ... or value is None or value is False or value in ([], {}, ""):
        return True
    options = allowed if isinstance(allowed, tuple) else (allowed,)
    return any(
        value is option or (isinstance(value, str) and value == option) for option in options
    )
