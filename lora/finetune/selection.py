"""Which checkpoints of a run to keep, and which one is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.finetune import state
from lora.finetune.config import RunConfig
from lora.finetune.metrics import signed

Evaluations = Sequence[Mapping[str, Any]]
"""The evaluations of metrics.jsonl, in the order of their steps."""


def ranked(evaluations: Evaluations) -> list[Mapping[str, Any]]:
    """The best on dev first: by the first metric, then by the loss; of equals the earlier one."""

    def rank(row: Mapping[str, Any]) -> tuple[float, float]:
        name, score = next(iter(row["dev"].items()))
        score = signed(name, score)
        return (-math.inf if math.isnan(score) else score), -row["dev_loss"]

    return sorted(evaluations, key=rank, reverse=True)


def best_step(evaluations: Evaluations) -> int:
    """The step of the best evaluation."""
    return int(ranked(evaluations)[0]["step"])


def evaluations_since_best(evaluations: Evaluations) -> int:
    """How many evaluations came after the best one."""
    best = best_step(evaluations)
    return sum(row["step"] > best for row in evaluations)


def kept(
    config: RunConfig[Any], folder: Path, evaluations: Evaluations, step: int, last: int
) -> set[int]:
    """The steps whose checkpoints stay: the `last` newest up to `step`, and the best.

    A checkpoint of a later step is damaged; otherwise the run would have resumed from it.
    """
    newest = [other for other in reversed(state.steps(folder)) if other <= step][:last]
    best = max(config.keep_best, 1 if config.final == "best" else 0)
    return {*newest, *(row["step"] for row in ranked(evaluations)[:best])}


def divergence(evaluations: Evaluations) -> str:
    """What to say if the training loss ended above twice its start, "" if it did not."""
    first, last = evaluations[0]["first_loss"], evaluations[-1]["loss"]
    if last <= 2 * first:
        return ""
    return (
        f"the loss began at {first:.3g} and ended at {last:.3g}: the training diverged. Run again"
        " with a lower --learning-rate."
    )
