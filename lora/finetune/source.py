"""Opens a trained model's folder: a run directory, or the folder of an adapter without its run.

A run's config.toml has the whole configuration. An adapter without its run, such as PEFT's or a
downloaded one, has its task and its base in adapter_config.json. The rest is read from the base's
config.json, the tokenizer, and the shape of the saved head.
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
from lora.finetune.demo import bases
from lora.finetune.memory import pick_dtype
from lora.finetune.methods import method_named
from lora.finetune.models import load_skeleton, place_of
from lora.finetune.run_folder import CHECKPOINTS, WHERE_RUNS_ARE, at_base, config_of, run_around
from lora.interop.pretrained import base_config

TASK_OF: dict[str, Task] = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "text",
    "SEQ_2_SEQ_LM": "text",
}
"""PEFT's task_type -> --task. SEQ_CLS with one label is regression."""
PROBE = 7919
"""A number of labels that no other size in a model equals: it identifies the head's tensors."""


@dataclass(frozen=True)
class Source:
    """A trained model on disk."""

    directory: Path  # as the user gave it
    adapter: Path  # the folder with adapter_config.json
    config: RunConfig[Any]  # its base is the path to load
    alone: bool = False  # an adapter without its run
    resizes: bool = False  # resize the base's embeddings to the adapter's number of tokens

    def on(self, device: str) -> Source:
        """Returns the model to be opened on the device that a command's --device names, whatever it
        was trained on. An adapter without its run computes in the dtype that suits it."""
        config = replace(self.config, device=device)
        if self.alone:
            config = replace(config, dtype=pick_dtype(distributed.device(device)))
        return replace(self, config=config)

    def settle(self, model: Any, tokenizer: Any) -> RunConfig[Any]:
        """Returns the configuration; for an adapter without its run, max_length and template come
        from its model and tokenizer."""
        if not self.alone:
            return self.config
        limit = tokenizer.model_max_length
        length = min(getattr(model.config, "max_position_embeddings", None) or limit, limit)
        length = length if length < 10**9 else 1024  # tokenizers without a limit state 10^30
        return replace(
            self.config,
            max_length=length,
            template="auto" if tokenizer.chat_template else "none",
        )


def open_source(
    directory: Path, base: str | None = None, resizes: bool = False, method: str | None = None
) -> Source:
    """Opens the run or the adapter in a folder.

    base     new path of the base, if it has moved or the adapter does not name it
    resizes  for an adapter without its run: resize the base's embeddings to the adapter's tokens
    method   --method: a user's class that an adapter needs, or the new path of a run's method file
    Raises RunError, CheckpointError, ConfigError or ModelError if the folder is neither, or its
    base is not named or missing.
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
        f"{directory} is neither a run directory (no config.toml) nor an adapter's folder (no"
        f" {CONFIG}). {WHERE_RUNS_ARE}"
    )


def _of_run(directory: Path, base: str | None, method: str | None) -> Source:
    config = at_base(config_of(directory, method), base, directory)
    adapter = directory / "adapter"
    if not (adapter / CONFIG).is_file() and not (directory / "summary.json").is_file():
        # The run is not complete: use the adapter of its newest checkpoint.
        path, _ = state.find(directory / CHECKPOINTS)
        if path is None:
            raise RunError(
                f"{directory}: the run was interrupted before its first checkpoint. Resume it with"
                f" {command('lora', 'train', '--resume', directory)}."
            )
        print(f"note: {directory} is not complete: using the adapter of {path}.", file=sys.stderr)
        adapter = path / "adapter"
    return Source(directory, adapter, config, resizes=config.resize_embeddings)


def _of_adapter(directory: Path, folder: Path, base: str | None, passed: str | None) -> Source:
    settings = settings_in(folder)
    if passed is not None:
        method_named(passed)  # imports the class, so that method_and_config knows it
    method, filed = method_and_config(folder)
    if passed is not None and method_named(passed) is not method:
        raise ConfigError(
            f"--method {passed}: the adapter in {folder} was trained with {method.name}. Remove it."
        )
    stated = base_in(settings)
    if base is None and stated is None:
        raise RunError(f"{folder / CONFIG} does not name its base. Pass --base FOLDER or NAME.")
    config: RunConfig[Any] = RunConfig(
        base=stated or str(base),
        method=passed or method.name,
        dtype=pick_dtype(distributed.device()),
        settings=filed,
    )
    config = at_base(config, base, directory)
    built_in = BUILT_IN[config.base] if config.base in bases.BUILT else None
    model_config = None if built_in else base_config(place_of(config.base))
    task: Task = TASK_OF[built_in or _task(folder, settings, model_config)]
    positions = getattr(model_config, "max_position_embeddings", None) or 2 * config.max_new_tokens
    config = replace(config, max_new_tokens=min(config.max_new_tokens, max(1, positions // 2)))
    if task == "classification":
        count, labels = _classes_of_head(folder, config.base, model_config)
        task = "regression" if count == 1 else task
        names = filed_labels(read_tensors(folder)[1], "class_names")
        names = names if len(names) == len(labels) else ()
        config = replace(config, labels=labels, class_names=names)
    return Source(directory, folder, replace(config, task=task), alone=True)


def _task(folder: Path, settings: Mapping[str, Any], model_config: Any) -> str:
    """Returns the task_type that the file states, or that the class name of its base implies.
    Raises CheckpointError if there is none, or if it is not one of TASK_OF."""
    task, mapping = settings.get("task_type"), settings.get("auto_mapping")
    names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    names += getattr(model_config, "architectures", None) or []
    if task is None:
        task = next(filter(None, (task_of(str(name)) for name in names)), None)
    if not isinstance(task, str) or task not in TASK_OF:
        problem = f"task_type {task!r} is not supported" if task else "it has no task_type"
        raise CheckpointError(
            f"{folder / CONFIG}: {problem}. Set it to one of {', '.join(TASK_OF)}, or load the"
            " adapter with PEFT."
        )
    return str(task)


def _classes_of_head(folder: Path, base: str, model_config: Any) -> tuple[int, tuple[str, ...]]:
    """Returns the classifier's number of outputs and the class names: those that our adapter file
    holds, else those of the base's config.json, else numbers. One output has no names."""
    stored, mark = read_tensors(folder)
    skeleton = load_skeleton(base, PROBE, "classification").model
    head = [n for n, p in skeleton.named_parameters() if PROBE in p.shape[:1]]
    sizes = {len(stored[name]) for name in head if name in stored and stored[name].dim()}
    count = sizes.pop() if len(sizes) == 1 else getattr(model_config, "num_labels", 2)
    names = getattr(model_config, "id2label", None) or {}
    base_labels = tuple(str(name) for name in names.values())
    if all(name.startswith("LABEL_") for name in base_labels):  # transformers' placeholders
        base_labels = ()
    for labels in (filed_labels(mark), base_labels):
        if len(set(labels)) == len(labels) == count > 1:
            return count, labels
    return count, tuple(map(str, range(count))) if count > 1 else ()
