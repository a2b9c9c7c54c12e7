"""Reads a saved LoRA adapter for another engine: its matrices, checked against the base's config.

What lora.load refuses is refused here with the same error: both use lora.checkpoint.read_adapter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.adapter_config import method_and_config
from lora.adapter_file import CONFIG, find_folder, settings_in
from lora.card import base_in
from lora.checkpoint import read_adapter, rows_filed
from lora.errors import CheckpointError, command
from lora.interop.pretrained import skeleton_of
from lora.methods.lora import LoRA, LoRAConfig
from lora.vocabulary import rows_of

MERGE_ADVICE = "Merge it into the base instead: lora merge RUN --output FOLDER."


@dataclass(frozen=True)
class SavedLoRA:
    """What the folder of a LoRA adapter contains."""

    folder: Path
    config: LoRAConfig
    layers: dict[str, tuple[Tensor, Tensor]]  # A (r, in), B (out, r)
    alphas: dict[str, float]  # each layer's scaling times its rank
    embeddings: frozenset[str]  # the layers that are embeddings
    other_keys: tuple[str, ...]  # what is not low-rank: biases, saved modules, trained tokens

    def rank(self, name: str) -> int:
        return len(self.layers[name][0])


def folder_of(adapter: Path) -> Path:
    """Returns the folder of an adapter's files, given a run or that folder. Raises
    CheckpointError."""
    inside = adapter / "adapter"
    return find_folder(inside if os.path.isfile(inside / CONFIG) else adapter)


def read_saved_lora(adapter: Path, base: Any) -> SavedLoRA:
    """Returns the LoRA adapter of a run or a folder, for the base with this transformers config.

    Raises CheckpointError, TargetError, ConfigError, ModelError.
    """
    folder = folder_of(adapter)
    method, config = method_and_config(folder)
    if method is not LoRA:
        raise CheckpointError(
            f"{folder} was trained with {method.name}, and other engines read only lora."
            f" {MERGE_ADVICE}"
        )
    assert isinstance(config, LoRAConfig)
    model = skeleton_of(base, "text")
    _check_rows(folder, model, getattr(base, "_name_or_path", ""))
    saved = read_adapter(model, folder)
    other_keys = dict.fromkeys(saved.values)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    adapters = {n: a for n, a in saved.parts.adapters.items() if isinstance(a, LoRA)}
    for name, lora in adapters.items():
        A, B = (f"{name}.{lora.keys[side]}" for side in ("lora_A", "lora_B"))
        layers[name] = saved.values[A], saved.values[B]
        del other_keys[A], other_keys[B]
    if not layers:
        raise CheckpointError(f"{folder} adapts no layer. {MERGE_ADVICE}")
    return SavedLoRA(
        folder,
        config,
        layers,
        {name: lora.scaling * lora.r for name, lora in adapters.items()},
        frozenset(name for name, lora in adapters.items() if "embedding" in lora.keys["lora_A"]),
        tuple(other_keys),
    )


def _check_rows(folder: Path, model: Any, base: str) -> None:
    """Raises CheckpointError if the adapter was trained on a base with another number of tokens: no
    other engine resizes a base."""
    rows_in_file, rows = rows_filed(model, folder), rows_of(model)
    if rows_in_file is None or rows is None or rows_in_file == rows:
        return
    of_run = (folder.parent / "config.toml").is_file()
    flags = [] if of_run else ["--resize-embeddings"]
    if base and base != base_in(settings_in(folder)):
        flags += ["--base", base]
    merge = command("lora", "merge", folder.parent if of_run else folder, *flags)
    raise CheckpointError(
        f"{folder}: the adapter was trained on a base with {rows_in_file:,} tokens, found one"
        f" with {rows:,}, and other engines do not resize it. Merge it into the base instead:"
        f" {merge} --output FOLDER."
    )
