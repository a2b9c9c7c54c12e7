"""What an adapter's file of PEFT's means in a model: which modules its entries and keys name."""

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
"""The patterns by which PEFT reads the number of a block, without layers_pattern and with it."""


def as_peft_means(model: nn.Module, config: PartialConfig) -> tuple[PartialConfig, list[str]]:
    """The config of a file of PEFT's with the names that PEFT makes of it, and notes on them.

    PEFT matches modules_to_save by a bare `endswith`, so that its automatic "classifier" means
    DistilBERT's pre_classifier as well. It ignores entries that match nothing, or only layers
    that are excluded or inside saved modules; check_fit then proves that none of the file's
    tensors is left over.
    """
    modules = {name: module for name, module in walk(model) if name}
    hits = [name for name in modules if any(name.endswith(end) for end in config.modules_to_save)]
    saved = tuple(name for name in hits if modules[name].state_dict())
    notes = []
    if config.modules_to_save and not saved:
        # PEFT writes classifier and score for every classifier, whatever its head is called.
        named = ", ".join(config.modules_to_save)
        notes.append(f"modules_to_save names no module of the model, as PEFT allows: {named}")
    config = replace(config, modules_to_save=saved)
    settings: Any = config
    if not hasattr(config, "target_modules"):
        return config, notes
    free = [name for name in modules if not any(inside(name, whole) for whole in saved)]
    wrapped = isinstance(config, AdapterConfig)

    def met(entries: str | tuple[str, ...] | None, names: list[str]) -> Any:
        """What of the entries fits any of the names, None where nothing does."""
        if entries is None or isinstance(entries, str):
            return entries if entries and any(fits(name, entries) for name in names) else None
        return tuple(e for e in entries if any(fits(name, (e,)) for name in names)) or None

    layers = [name for name in free if kind(modules[name]) or not wrapped]
    excluded = met(settings.exclude_modules, layers)
    free = [name for name in free if excluded is None or not fits(name, excluded)]
    targets = met(settings.target_modules, free) or settings.target_modules
    found: Any = replace(settings, target_modules=targets, exclude_modules=excluded)
    listed = in_blocks(free, found) if wrapped and found.layers_to_transform else []
    if listed:  # PEFT counts blocks by other rules than ours, and leaves out those that are not
        names = exactly(model, listed)
        found = replace(found, target_modules=names, layers_to_transform=(), layers_pattern=())
    return found, notes


def check_tying(model: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if ensure_weight_tying ties adapters of this model in PEFT.

    It does where the model ties layers to its embedding and target_modules or modules_to_save name
    an embed_tokens or an lm_head. Trained tokens are tied without it.
    """
    if not settings.get("ensure_weight_tying"):
        return
    names, wanted = ("embed_tokens", "lm_head"), settings.get("target_modules") or ()
    named = [one for one in settings.get("modules_to_save") or () if _leaf(one) in names]
    if isinstance(wanted, str):
        named += [name for name in names if fits(name, wanted)]
    else:
        named += [one for one in wanted if _leaf(one) in names]
    tied = followers_of(model, dict(walk(model)), input_embedding(model)) if named else []
    if tied:
        raise CheckpointError(
            f"{folder}: ensure_weight_tying=True ties what trains of {named[0]} to that of"
            f" {', '.join(tied)} and the input embedding, which is not implemented. Load it with"
            " PEFT, or merge it there."
        )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def in_blocks(names: Iterable[str], config: AdapterConfig) -> list[str]:
    """Those of the names that PEFT takes target_modules, a list, to mean with layers_to_transform.

    Without layers_pattern it finds no block that lies at the root of the model, as those of a
    GPT2Model do: its pattern begins with a dot.
    """
    entries = config.target_modules
    assert not isinstance(entries, str)
    patterns = config.layers_pattern or (None,)

    def number(name: str) -> int | None:
        for pattern in patterns:
            frame, text = (ANY_BLOCKS, "") if pattern is None else (PEFT_BLOCKS, pattern)
            match = compiled(text, frame).match(name)
            if match:
                return int(match.groupdict()["idx"])
        return None

    return [
        name
        for name in names
        if name in entries or (fits(name, entries) and number(name) in config.layers_to_transform)
    ]


def exactly(model: nn.Module, names: Iterable[str]) -> str | tuple[str, ...]:
    """A target_modules that means these layers and no others: their names, or if one is another's
    ending, a pattern."""
    targets = tuple(names)
    if {name for name, _ in walk(model) if fits(name, targets)} == set(targets):
        return targets
    return "|".join(map(re.escape, targets))


def renamed(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors with keys of the model's modules as transformers names them now.

    transformers has renamed modules (LLaVA's language_model.model is model.language_model), and
    knows the old names, by which it still reads checkpoints; so does PEFT. A key is renamed if it
    names no layer of the model, and does by its new name.
    """
    modules = dict(walk(model))
    lost = [key for key in stored if _owner(key, modules)._modules]
    if not lost or not any(c.__module__.startswith("transformers.") for c in type(model).__mro__):
        return dict(stored)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    found = get_model_conversion_mapping(model) or []
    renamings = [one for one in found if isinstance(one, WeightRenaming)]
    new = {key: rename_source_key(key, renamings, [])[0] for key in lost}
    new = {
        key: name
        for key, name in new.items()
        if name not in stored and not _owner(name, modules)._modules
    }
    return {new.get(key, key): tensor for key, tensor in stored.items()}


def _owner(key: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The innermost module that a key names, the model itself if it names none."""
    while key and key not in modules:
        key = key.rpartition(".")[0]
    return modules[key]
