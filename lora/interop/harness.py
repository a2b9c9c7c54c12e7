"""Tasks of EleutherAI's LM Evaluation Harness, through its own library: the extra "harness".

A task is a name of the library's (`lm_eval ls tasks` lists them), whose data comes from the hub, or
a YAML file of one's own in its format.
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
    """{task: {metric: value}} of a causal or sequence-to-sequence model, as the library has them.

    The model is taken where and as it stands, its adapters on or off, and comes back in the mode
    that it was in. `limit`: the first examples of each task alone. `chat`: asked in the chat
    template. A metric that the library computes behind a filter is "metric (filter)". A YAML file
    may name code that runs (`!function`): pass such as you trust. Raises DataError where a task is
    not known, or its data is not to be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It reads some ten thousand files to know its own tasks' names.
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    try:
        manager.load(list(tasks))
    except Exception as error:  # a name, a file, its code or its data: each fails in its own way
        raise DataError(
            f"tasks {' '.join(tasks)}: {str(error).strip().partition(chr(10))[0]} Pass names that"
            " lm_eval ls tasks lists, or YAML files."
        ) from error
    with evaluating(model), torch.random.fork_rng(devices=[]):
        found: Any = simple_evaluate(
            _Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=0,  # of the errors, which starts processes
            random_seed=None,  # Python's and numpy's are the caller's
            numpy_random_seed=None,
        )
    return {
        task: {
            _name(key): float(value)
            for key, value in values.items()
            if "," in key and is_number(value)
        }
        for task, values in found["results"].items()
    }


class _Model(HFLM):  # type: ignore[misc]
    """The library's model, whose chat template is first tried within limits."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        values = {
            **self.tokenizer.special_tokens_map,
            "messages": chat_history,
            "add_generation_prompt": add_generation_prompt,
        }
        (tried,) = render(self.tokenizer.get_chat_template(), [values])
        if isinstance(tried, LimitError):
            raise DataError(f"the base's chat template cannot be used: {tried}. Mend it.")
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text


def _name(key: str) -> str:
    metric, _, kept = key.partition(",")
    return metric if kept == "none" else f"{metric} ({kept})"
