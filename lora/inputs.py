"""From a configuration's data to what a model is given: its corpus, and every split's token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora import conversations, demo
from lora.adapter import Adapter
from lora.config import RunConfig, method_named, named
from lora.conversations import Conversation, Template
from lora.data import Columns, Corpus, Example, read
from lora.errors import ConfigError, DataError
from lora.tokens import Encoded, batches, collate, encode, layout

TASKS = "tasks/"  # before the name of a task that is made


def read_corpus(config: RunConfig[Any]) -> Corpus:
    """The data set that a configuration asks for."""
    task = config.task
    if task == "auto" and any(map(conversations.are_in, _places(config))):
        task = "text"
    if task == "text":
        return _texts(config)
    if len(config.data) > 1:
        raise ConfigError(
            f"--data {' '.join(config.data)}: several are of --task text alone. Pass one."
        )
    return read(config.data[0], asked(config), task, config.labels, config.limit)


def asked(config: Any) -> Columns:
    """The columns that a configuration names."""
    return Columns(config.text_column, config.pair_column, config.label_column)


def _places(config: RunConfig[Any]) -> list[str]:
    return [named(source)[1] for source in config.data]
