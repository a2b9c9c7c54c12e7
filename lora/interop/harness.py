"""Runs tasks of EleutherAI's LM Evaluation Harness with its library (the extra "harness").

A task is a name that `lm_eval ls tasks` lists, with data from the hub, or your own YAML file in the
library's format.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lora.declared import is_number
from lora.errors import DataError
from lora.interop.rendering import LimitError, render
from lora.inventory import evaluating


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, dict[str, float]]:
    """Returns {task: {metric: value}} of a causal or encoder-decoder model.

    The model is used as it is: on its device, with the adapters that are active. Its train or eval
    mode is restored afterwards.

    limit: evaluate only this many examples of each task. chat: apply the chat template. A metric
    that the library computes after a filter is named "metric (filter)". A YAML file may run code
    (`!function`), so pass only files that you trust. Raises DataError if a task is unknown or its
    data cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # To know its own task names the library reads about ten thousand files. Skip that if all tasks
    # are files.
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    try:
        manager.load(list(tasks))
    except Exception as error:  # names, files, their code and data raise different errors
        raise DataError(
            f"tasks {' '.join(tasks)}: {str(error).strip().partition(chr(10))[0]} Pass names that"
            " lm_eval ls tasks lists, or YAML files."
        ) from error
    with evaluating(model), torch.random.fork_rng(devices=[]):
        evaluation: Any = simple_evaluate(
            _Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=0,  # no standard errors: computing them starts processes
            random_seed=None,  # do not reseed the caller's Python and NumPy generators
            numpy_random_seed=None,
        )
    return {
        task: {
            _name(key): float(value)
            for key, value in values.items()
            if "," in key and is_number(value)
        }
        for task, values in evaluation["results"].items()
    }


class _Model(HFLM):  # type: ignore[misc]
    """The library's model. It first renders each chat template with limits of time and memory."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders as the library does. Raises DataError if the template exceeds a limit."""
        context = {
            **self.tokenizer.special_tokens_map,
            "messages": chat_history,
            "add_generation_prompt": add_generation_prompt,
        }
        (text_or_error,) = render(self.tokenizer.get_chat_template(), [context])
        if isinstance(text_or_error, LimitError):
            raise DataError(f"the base's chat template cannot be used: {text_or_error}. Fix it.")
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text


def _name(key: str) -> str:
    """Returns the name of a metric for the library's key "metric,filter"."""
    metric, _, filter_name = key.partition(",")
    return metric if filter_name == "none" else f"{metric} ({filter_name})"
