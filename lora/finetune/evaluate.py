"""Predictions of a model over a split, and their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from lora.errors import TrainingError
from lora.finetune import distributed
from lora.finetune.data.corpus import Corpus, Example
from lora.finetune.data.tokens import Encoded, ahead, collate, layout, sorted_batches
from lora.finetune.losses import task_loss, token_scores
from lora.finetune.metrics import score

EVALUATED = 64  # rows at a time
TOKENS = 2**13  # at a time, with their padding


@dataclass(frozen=True)
class Evaluation:
    """A model's answers on a split."""

    logits: Tensor  # as predict() gives them
    loss: float
    metrics: dict[str, float]


def autocast(model: Any) -> AbstractContextManager[Any]:
    """bfloat16 autocast if memory.hold() put the model into it: for what is computed outside its
    forward, and so that it casts what trains once for many forwards."""
    held = getattr(model, "lora_dtype", torch.float32) == torch.bfloat16
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=held)


def device_of(model: Any) -> torch.device:
    """Where the model computes: an offloaded base lies elsewhere, what trains does not."""
    trained = (p for p in model.parameters() if p.requires_grad)
    found: torch.device = next(trained, next(model.parameters())).device
    return found


def predict(
    model: Any, encoded: Encoded, batch_size: int, progress: Progress | None = None
) -> Tensor:
    """Logits (examples, outputs), float32, on the CPU, in the examples' order; of texts the summed
    loss in nats and the tokens that were the most probable ones, (examples, 2). Sets eval mode.

    The rows of each batch are divided among the ranks; every rank has all of it in the end.
    """
    device = device_of(model)
    model.eval()
    rank, ranks = distributed.rank(), distributed.size()
    found: Tensor | None = None
    order = sorted_batches(encoded.lengths, batch_size, TOKENS)
    bar = progress.add_task("evaluating", total=len(order)) if progress else None
    apart = replace(encoded, row=None)
    with torch.inference_mode(), autocast(model):
        shares = ([*rows[rank::ranks]] for rows in order)
        filled = ((own, own or rows[:1]) for own, rows in zip(shares, order, strict=True))
        for own, (batch, targets) in ahead(
            filled, lambda e: (e[0], collate(apart, layout(apart, e[1]), device))
        ):
            if encoded.labels is None:
                rows = model(**batch).logits.float().cpu()
            else:
                scores, length = token_scores(model, batch, targets), _length(batch)
                rows = scores.new_zeros(len(own or [0]), 2)
                rows = rows.index_add_(0, targets[0] // length, scores.T).cpu()
            if found is None:
                found = rows.new_zeros(len(encoded.lengths), rows.shape[-1])
            if own:  # or it was computed for company
                found[own] = rows
            if progress and bar is not None:
                progress.advance(bar)
    if progress and bar is not None:
        progress.remove_task(bar)
    assert found is not None
    ordered = found.clone()  # no inference tensor
    distributed.total([ordered])
    return ordered


def _length(batch: Mapping[str, Tensor]) -> int:
    """The positions of a row that predict."""
    return batch.get("decoder_input_ids", batch["input_ids"]).shape[1]


def evaluate(
    model: Any,
    corpus: Corpus,
    encoded: Encoded,
    examples: Sequence[Example],
    batch_size: int = EVALUATED,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss and metrics of the model on a labelled split.

    Raises TrainingError where the loss is not finite: there is nothing to score then.
    """
    logits = predict(model, encoded, batch_size, progress)
    if corpus.task == "text":
        loss, metrics = _of_tokens(corpus, encoded, logits.double())
    else:
        loss = float(task_loss(logits, encoded.targets, corpus.task)) / len(examples)
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss {loss} over {len(examples)} rows: there is nothing to score. Check the labels"
            " and the learning rate."
        )
    if corpus.task != "text":
        wanted = [[str(example.label)] for example in examples]
        metrics = score(corpus.task, predicted(corpus, logits), wanted)
    return Evaluation(logits, loss, metrics)


def _of_tokens(corpus: Corpus, encoded: Encoded, found: Tensor) -> tuple[float, dict[str, float]]:
    """The loss in nats per token, and perplexity and accuracy over the tokens with a label: of all,
    and of each task with examples where there are several, as `metric/task`."""
    counts = torch.tensor(encoded.counts, dtype=torch.float64)
    of = torch.tensor(encoded.tasks or [0] * len(counts))
    several = enumerate(corpus.tasks) if len(corpus.tasks) > 1 else ()
    parts = [("", torch.ones(len(counts), dtype=torch.bool))]
    parts += [(f"/{name}", rows) for n, name in several if (rows := of == n).any()]
    metrics = {}
    for end, rows in parts:
        loss, hits = (found[rows].sum(0) / counts[rows].sum()).tolist()
        metrics[f"perplexity{end}"] = math.exp(min(loss, 700.0))
        metrics[f"token_accuracy{end}"] = hits
    return float(found[:, 0].sum() / counts.sum()), metrics


def predicted(corpus: Corpus, logits: Tensor) -> list[str]:
    """What the logits say: class names, or numbers."""
    if corpus.task == "regression":
        return [repr(value) for value in logits[:, 0].tolist()]
    return [corpus.labels[index] for index in logits.argmax(-1).tolist()]


def records_of(
    corpus: Corpus, examples: Sequence[Example], logits: Tensor
) -> Iterator[dict[str, Any]]:
    """One record per example: its text, its label where known, the prediction and its scores."""
    scores = logits.tolist() if corpus.task == "regression" else logits.softmax(-1).tolist()
    for example, answer, row in zip(examples, predicted(corpus, logits), scores, strict=True):
        known = {"pair": example.pair, "label": example.label}
        yield {
            "text": example.text,
            **{key: value for key, value in known.items() if value is not None},
            "prediction": float(answer) if corpus.task == "regression" else answer,
            **({} if corpus.task == "regression" else {"scores": [round(p, 6) for p in row]}),
        }
