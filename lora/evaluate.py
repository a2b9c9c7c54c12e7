"""Predictions of a model over a split, and their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from lora import distributed
from lora.data import Corpus, Example
from lora.errors import TrainingError
from lora.losses import task_loss
from lora.metrics import score
from lora.tokens import Encoded, ahead, collate, sorted_batches

EVALUATED = 64  # rows at a time


@dataclass(frozen=True)
class Evaluation:
    """A model's answers on a split."""

    logits: Tensor  # (examples, classes) or (examples, 1), float32, on the CPU
    loss: float
    metrics: dict[str, float]


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast where dtype says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def device_of(model: Any) -> torch.device:
    """Where the model computes: an offloaded base lies elsewhere, what trains does not."""
    trained = (p for p in model.parameters() if p.requires_grad)
    found: torch.device = next(trained, next(model.parameters())).device
    return found


def predict(
    model: Any, encoded: Encoded, batch_size: int, dtype: str, progress: Progress | None = None
) -> Tensor:
    """Logits (examples, outputs), float32, on the CPU, in the examples' order. Sets eval mode.

    The rows of each batch are divided among the ranks; every rank has all the logits in the end.
    """
    device = device_of(model)
    model.eval()
    rank, ranks = distributed.rank(), distributed.size()
    found: Tensor | None = None
    order = sorted_batches(encoded.lengths, batch_size)
    bar = progress.add_task("evaluating", total=len(order)) if progress else None
    with torch.inference_mode(), autocast(device, dtype):
        shares = ([*rows[rank::ranks]] for rows in order)
        filled = ((own, own or rows[:1]) for own, rows in zip(shares, order, strict=True))
        for own, batch in ahead(filled, lambda e: (e[0], collate(encoded, e[1], device))):
            logits = model(**batch).logits.float().cpu()
            if found is None:
                found = logits.new_zeros(len(encoded.lengths), logits.shape[-1])
            if own:  # or it was computed for company
                found[own] = logits
            if progress and bar is not None:
                progress.advance(bar)
    if progress and bar is not None:
        progress.remove_task(bar)
    assert found is not None
    ordered = found.clone()  # no inference tensor
    distributed.total([ordered])
    return ordered


def evaluate(
    model: Any,
    corpus: Corpus,
    encoded: Encoded,
    examples: Sequence[Example],
    batch_size: int = EVALUATED,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Evaluation:
    """Loss and metrics of the model on a labelled split.

    Raises TrainingError where the loss is not finite: there is nothing to score then.
    """
    logits = predict(model, encoded, batch_size, dtype, progress)
    loss = float(task_loss(logits, encoded.targets, corpus.task)) / len(examples)
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss {loss} over {len(examples)} rows: there is nothing to score. Check the labels"
            " and the learning rate."
        )
    return Evaluation(
        logits=logits,
        loss=loss,
        metrics=score(
            corpus.task, answers(corpus, logits), [[str(example.label)] for example in examples]
        ),
    )


def answers(corpus: Corpus, logits: Tensor) -> list[str]:
    """What the logits say: class names, or numbers."""
    if corpus.task == "regression":
        return [repr(value) for value in logits[:, 0].tolist()]
    return [corpus.labels[index] for index in logits.argmax(-1).tolist()]
