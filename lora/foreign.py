"""Reads a PEFT adapter by PEFT's rules: finds the modules that its settings and tensor keys mean.

Our settings match whole names or dotted endings, and a setting that matches nothing is an error.
PEFT has other rules for some of them. A file that PEFT wrote must be read by PEFT's rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora.errors import CheckpointError
from lora.layers import fits, inside, kind
from lora.methods._tokens import followers_of, input_embedding
from lora.patterns import compiled
from lora.settings import AdapterConfig, PartialConfig
from lora.targets import walk

ANY_BLOCKS = r".*?\.[^.]*\.(?P<idx>\d+)\.{}"
PEFT_BLOCKS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
"""How PEFT reads the number of a layer's block: the first pattern without layers_pattern, the
second with it."""


def as_peft_means(model: nn.Module, config: PartialConfig) -> tuple[PartialConfig, list[str]]:
    """Returns the config of a PEFT file with the names that PEFT matches, and notes for the report.

    PEFT matches modules_to_save with str.endswith, so the "classifier" that it adds by itself also
    matches DistilBERT's pre_classifier. PEFT ignores entries that match nothing, and entries that
    match only excluded layers or layers inside saved modules. Ignoring them is safe here, since
    check_fit() later proves that every tensor of the file has a place.
    """
    modules = {name: module for name, module in walk(model) if name}
    hits = [name for name in modules if any(name.endswith(end) for end in config.modules_to_save)]
    # A module without tensors, such as an activation, is in no file.
    saved = tuple(name for name in hits if modules[name].state_dict())
    notes = []
    if config.modules_to_save and not saved:
        # PEFT writes "classifier" and "score" for every classifier, whatever its head's name is.
        named = ", ".join(config.modules_to_save)
        notes.append(f"modules_to_save names no module of the model, as PEFT allows: {named}")
    config = replace(config, modules_to_save=saved)
    settings: Any = config
    if not hasattr(config, "target_modules"):
        return config, notes
    free = [name for name in modules if not any(inside(name, path) for path in saved)]
    wraps = isinstance(config, AdapterConfig)  # False for ln_tuning, whose layers have no View

    def matching(entries: str | tuple[str, ...] | None, names: list[str]) -> Any:
        """Returns the entries that fit at least one of the names, None if there are none."""
        if entries is None or isinstance(entries, str):  # one regular expression fits, or not
            return entries if entries and any(fits(name, entries) for name in names) else None
        return tuple(e for e in entries if any(fits(name, (e,)) for name in names)) or None

    # exclude_modules of ours must match layers. PEFT's may match anything, or nothing.
    layers = [name for name in free if kind(modules[name]) or not wraps]
    excluded = matching(settings.exclude_modules, layers)
    free = [name for name in free if excluded is None or not fits(name, excluded)]
    # If none fits, all stay, and plan_of() raises the error that names them.
    targets = matching(settings.target_modules, free) or settings.target_modules
    translated: Any = replace(settings, target_modules=targets, exclude_modules=excluded)
    in_listed = in_blocks(free, translated) if wraps and translated.layers_to_transform else []
    if in_listed:
        # PEFT reads block numbers by other rules than ours, and ignores blocks that do not exist.
        # The names of the layers state the result without either rule.
        names = exactly(model, in_listed)
        unset: dict[str, Any] = {"layers_to_transform": (), "layers_pattern": ()}
        translated = replace(translated, target_modules=names, **unset)
    return translated, notes


def check_tying(model: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError if ensure_weight_tying makes PEFT tie adapters of this model.

    PEFT does so if the model ties layers to its input embedding, and target_modules or
    modules_to_save name an embed_tokens or an lm_head. It ties trained tokens in any case.
    """
    if not settings.get("ensure_weight_tying"):
        return
    names, wanted = ("embed_tokens", "lm_head"), settings.get("target_modules") or ()
    named = [entry for entry in settings.get("modules_to_save") or () if _leaf(entry) in names]
    if isinstance(wanted, str):
        named += [name for name in names if fits(name, wanted)]
    else:
        named += [entry for entry in wanted if _leaf(entry) in names]
    tied = followers_of(model, dict(walk(model)), input_embedding(model)) if named else []
    if tied:
        raise CheckpointError(
            f"{folder}: ensure_weight_tying=True ties the adapter of {named[0]} to those of"
            f" {', '.join(tied)} and the input embedding, which is not implemented. Load it with"
            " PEFT, or merge it there."
        )


def _leaf(name: str) -> str:
    """Returns the last part of a dotted name."""
    return name.rpartition(".")[2]


def in_blocks(names: Iterable[str], config: AdapterConfig) -> list[str]:
    """Returns those of the names that PEFT matches with target_modules and layers_to_transform.

    target_modules must be a list. Without layers_pattern PEFT finds no blocks at the root of the
    model, such as those of a GPT2Model: its pattern needs a dot before the list of blocks.
    """
    entries = config.target_modules
    assert not isinstance(entries, str)  # PEFT refuses layers_to_transform then
    patterns = config.layers_pattern or (None,)

    def block(name: str) -> int | None:
        for pattern in patterns:
            frame, text = (ANY_BLOCKS, "") if pattern is None else (PEFT_BLOCKS, pattern)
            match = compiled(text, frame).match(name)
            if match:
                return int(match.groupdict()["idx"])
        return None

    # PEFT does not apply layers_to_transform to a layer that is named in full.
    return [
        name
        for name in names
        if name in entries or (fits(name, entries) and block(name) in config.layers_to_transform)
    ]


def exactly(model: nn.Module, names: Iterable[str]) -> str | tuple[str, ...]:
    """Returns a target_modules that matches these layers and no others.

    That is a tuple of their names, or a regular expression if a name is also a dotted ending of
    another layer's name, which a tuple would match too.
    """
    targets = tuple(names)
    # A tuple matches endings: "layer" would match "encoder.layer" too.
    if {name for name, _ in walk(model) if fits(name, targets)} == set(targets):
        return targets
    return "|".join(map(re.escape, targets))


def renamed(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the file's tensors, with old module names in their keys replaced by current ones.

    transformers has renamed modules: LLaVA's language_model.model is now model.language_model. It
    keeps a table of old names to read old checkpoints, and PEFT uses that table too. A key is
    renamed only if it names no layer of the model and its new name does.
    """
    modules = dict(walk(model))
    # The innermost module of a good key is a layer, which has no children.
    unmatched = [key for key in stored if _owner(key, modules)._modules]
    modules_of_classes = [c.__module__ for c in type(model).__mro__]
    if not unmatched or not any(m.startswith("transformers.") for m in modules_of_classes):
        return dict(stored)
    # Here, since the core must work without transformers. A model of theirs shows that it is there.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    candidates = {key: rename_source_key(key, renamings, [])[0] for key in unmatched}
    new_names = {
        key: name
        for key, name in candidates.items()  # never rename one tensor of the file over another
        if name not in stored and not _owner(name, modules)._modules
    }
    return {new_names.get(key, key): tensor for key, tensor in stored.items()}


def _owner(key: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the innermost module that a key names, or the model itself if it names none."""
    while key and key not in modules:
        key = key.rpartition(".")[0]
    return modules[key]
