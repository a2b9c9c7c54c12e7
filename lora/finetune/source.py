"""What the verbs on a trained model are given: a run directory, or the folder of an adapter alone.

A run states all in its config.toml. An adapter alone, PEFT's or a download, states its task and its
base in adapter_config.json; what it does not state is read from the base's config.json, from the
tokenizer, and from the shape of the head that it saves.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora.adapter_config import method_and_config
from lora.adapter_file import CONFIG, filed_labels, find_folder, read_tensors, settings_in
from lora.card import BUILT_IN, base_in, task_of
from lora.errors import CheckpointError, ConfigError, RunError, command
from lora.files import readable
from lora.finetune import distributed, state
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Task
from lora.finetune.memory import pick_dtype
from lora.finetune.methods import method_named
from lora.finetune.models import load_skeleton
from lora.finetune.run_folder import CHECKPOINTS, at_base, config_of, run_around
from lora.interop.pretrained import base_config

TASK_OF: dict[str, Task] = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "text",
    "SEQ_2_SEQ_LM": "text",
}
"""PEFT's task_type -> --task; of one label it is regression."""
PROBE = 7919
"""So many labels: a size that nothing else in a model has, by which its head is known."""


@dataclass(frozen=True)
class Source:
    """A trained model on disk."""

    directory: Path  # as it was given
    adapter: Path  # the folder with adapter_config.json
    config: RunConfig[Any]  # its base as it is to be loaded
    alone: bool = False  # an adapter without its run
    resizes: bool = False  # its base is to have as many tokens as the adapter's had

    def settle(self, model: Any, tokenizer: Any) -> RunConfig[Any]:
        """The configuration with what an adapter alone leaves to its model and tokenizer."""
        if not self.alone:
            return self.config
        most = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        length = min(most, tokenizer.model_max_length)
        length = length if length < 10**9 else 1024  # of a tokenizer that has no limit
        return replace(
            self.config,
            max_length=length,
            template="auto" if tokenizer.chat_template else "none",
        )


def open_source(
    directory: Path, base: str | None = None, resizes: bool = False, method: str | None = None
) -> Source:
    """The run or the adapter in a folder; `base` is where its base is now, if not where it was.
    With `resizes` the base of an adapter alone gets as many tokens as the adapter's had. `method`
    is what --method names: it defines the method of an adapter alone, if that is the user's own,
    and says where the file of a run's method is now.

    Raises RunError, CheckpointError, ConfigError or ModelError if the folder is neither, or its
    base is not stated or not there.
    """
    with readable(directory, RunError, "Pass the folder of a run or of an adapter."):
        run = run_around(directory)
        adapter = (directory / CONFIG).is_file() or next(directory.glob(f"*/{CONFIG}"), None)
    if run:
        return _of_run(run, base, method)
    if adapter:
        return replace(
            _of_adapter(directory, find_folder(directory), base, method), resizes=resizes
        )
    if (directory / "config.json").is_file():
        raise RunError(
            f"{directory} is a plain model (config.json), not a run or an adapter. Load it with"
            " transformers' from_pretrained, or train on it:"
            f" {command('lora', 'train', '--base', directory)}."
        )
    raise RunError(
        f"{directory} is no run directory (no config.toml) and no adapter's folder (no {CONFIG})."
        " Run lora train first, or pass another."
    )


def _of_run(directory: Path, base: str | None, method: str | None) -> Source:
    config = at_base(config_of(directory, method), base, directory)
    adapter = directory / "adapter"
    if not (adapter / CONFIG).is_file() and not (directory / "summary.json").is_file():
        # The run is not complete: the adapter is that of its newest checkpoint.
        path, _ = state.find(directory / CHECKPOINTS)
        if path is None:
            raise RunError(
                f"{directory}: the run ended before its first checkpoint. Go on with"
                f" {command('lora', 'train', '--resume', directory)}."
            )
        print(f"note: {directory} is not complete: the adapter is that of {path}.", file=sys.stderr)
        adapter = path / "adapter"
    return Source(directory, adapter, config, resizes=config.resize_embeddings)


def _of_adapter(directory: Path, folder: Path, base: str | None, given: str | None) -> Source:
    settings = settings_in(folder)
    if given is not None:
        method_named(given)  # defines it, so that the file can be of it
    method, filed = method_and_config(folder)
    if given is not None and method_named(given) is not method:
        raise ConfigError(f"--method {given}: {folder} is an adapter of {method.name}. Remove it.")
    stated = base_in(settings)
    if base is None and stated is None:
        raise RunError(f"{folder / CONFIG} does not name its base. Pass --base FOLDER or NAME.")
    config: RunConfig[Any] = RunConfig(
        base=stated or str(base),
        method=given or method.name,
        dtype=pick_dtype(distributed.device()),
        settings=filed,
    )
    config = at_base(config, base, directory)
    built_in = BUILT_IN.get(config.base)
    told = None if built_in else base_config(config.base)
    task: Task = TASK_OF[built_in or _task(folder, settings, told)]
    most = getattr(told, "max_position_embeddings", None) or 2 * config.max_new_tokens
    config = replace(config, max_new_tokens=min(config.max_new_tokens, max(1, most // 2)))
    if task == "classification":
        count, labels = _classes_of_head(folder, config.base, told)
        task = "regression" if count == 1 else task
        config = replace(config, labels=labels)
    return Source(directory, folder, replace(config, task=task), alone=True)


def _task(folder: Path, settings: Mapping[str, Any], told: Any) -> str:
    """The task_type: as stated, or by the class that the adapter or its base names."""
    task, mapping = settings.get("task_type"), settings.get("auto_mapping")
    names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    names += getattr(told, "architectures", None) or []
    if task is None:
        task = next(filter(None, (task_of(str(name)) for name in names)), None)
    if not isinstance(task, str) or task not in TASK_OF:
        found = f"task_type {task!r}" if task else "no task_type, and a base that tells none"
        raise CheckpointError(
            f"{folder / CONFIG}: {found}. Known: {', '.join(TASK_OF)}. Set it there, or load the"
            " adapter with PEFT."
        )
    return str(task)


def _classes_of_head(folder: Path, base: str, told: Any) -> tuple[int, tuple[str, ...]]:
    """How many outputs the classifier has, and the names of its classes: as an adapter of ours
    files them, or its base names them, else numbers; () for one output."""
    stored, mark = read_tensors(folder)
    skeleton = load_skeleton(base, PROBE, "classification").model
    head = [n for n, p in skeleton.named_parameters() if PROBE in p.shape[:1]]
    sizes = {len(stored[name]) for name in head if name in stored and stored[name].dim()}
    count = sizes.pop() if len(sizes) == 1 else getattr(told, "num_labels", 2)
    names = getattr(told, "id2label", None) or {}
    of_base = tuple(str(name) for name in names.values())
    if all(name.startswith("LABEL_") for name in of_base):  # which nobody gave
        of_base = ()
    for labels in (filed_labels(mark), of_base):
        if len(set(labels)) == len(labels) == count > 1:
            return count, labels
    return count, tuple(map(str, range(count))) if count > 1 else ()
