"""Predicts a split with a model and scores the predictions: predict(...), evaluate(...)."""

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

EVALUATED = 64  # rows per batch
TOKENS = 2**13
"""Tokens per batch, with padding: 64 long texts at once could exceed the memory of a step."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a model on a split."""

    logits: Tensor  # from predict()
    loss: float
    metrics: dict[str, float]


def autocast(model: Any) -> AbstractContextManager[Any]:
    """Returns autocast to the 16 bits that memory.set_dtype() set for the model, else an empty
    context.

    The model's forward sets it by itself. Around many forwards it is faster, since the trainable
    weights are cast only once, and it covers what is computed outside the forward.
    """
    dtype = getattr(model, "lora_dtype", None)
    return torch.autocast(device_of(model).type, dtype, enabled=dtype is not None)


def device_of(model: Any) -> torch.device:
    """Returns the device that the model computes on.

    It is that of the trainable parameters: the weights of an offloaded base are on the CPU.
    """
    trainable = (p for p in model.parameters() if p.requires_grad)
    device: torch.device = next(trainable, next(model.parameters())).device
    return device


def predict(
    model: Any, encoded: Encoded, batch_size: int, progress: Progress | None = None
) -> Tensor:
    """Returns float32 logits (examples, outputs) on the CPU, in the order of the examples.

    Text: (examples, 2), the loss summed over the tokens in nats, and the number of tokens that were
    the argmax. Sets eval mode. The rows of each batch are divided among the ranks, and every rank
    gets all results.
    """
    device = device_of(model)
    model.eval()
    rank, ranks = distributed.rank(), distributed.size()
    results: Tensor | None = None
    order = sorted_batches(encoded.lengths, batch_size, TOKENS)
    bar = progress.add_task("evaluating", total=len(order)) if progress else None
    unpacked = replace(encoded, row=None)  # a packed row would mix the scores of several texts
    with torch.inference_mode(), autocast(model):
        shares = ([*rows[rank::ranks]] for rows in order)
        # A rank without rows computes one row and drops the result: the forward of a sharded model
        # needs all ranks.
        plan = ((mine, mine or rows[:1]) for mine, rows in zip(shares, order, strict=True))
        for mine, (batch, targets) in ahead(
            plan, lambda e: (e[0], collate(unpacked, layout(unpacked, e[1]), device))
        ):
            if encoded.labels is None:
                outputs = model(**batch).logits.float().cpu()
            else:
                scores, length = token_scores(model, batch, targets), _length(batch)
                outputs = scores.new_zeros(len(mine or [0]), 2)
                # position // length is the token's row: sums the scores of each row.
                outputs = outputs.index_add_(0, targets[0] // length, scores.T).cpu()
            if results is None:
                results = outputs.new_zeros(len(encoded.lengths), outputs.shape[-1])
            if mine:
                results[mine] = outputs
            if progress and bar is not None:
                progress.advance(bar)
    if progress and bar is not None:
        progress.remove_task(bar)
    assert results is not None
    # Rows of other ranks are 0 here, so the sum over the ranks is the whole result.
    total = results.clone()  # an inference tensor cannot be changed outside inference mode
    distributed.total([total])
    return total


def _length(batch: Mapping[str, Tensor]) -> int:
    """Returns the positions per row of the logits: the decoder's, if there is a separate one."""
    return batch.get("decoder_input_ids", batch["input_ids"]).shape[1]


def evaluate(
    model: Any,
    corpus: Corpus,
    encoded: Encoded,
    examples: Sequence[Example],
    progress: Progress | None = None,
) -> Evaluation:
    """Returns loss and metrics of the model on a labelled split.

    The loss is the mean over examples, or over tokens in nats if the task is text.
    Raises TrainingError if the loss is not finite.
    """
    logits = predict(model, encoded, EVALUATED, progress)
    if corpus.task == "text":
        # In float64: a sum over millions of tokens exceeds the 24 bits of float32.
        loss, metrics = _token_metrics(corpus, encoded, logits.double())
    else:
        loss = float(task_loss(logits, encoded.targets, corpus.task)) / len(examples)
    # Before the metrics: the argmax of NaN is a class too, and its accuracy looks real.
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss over {len(examples)} rows is {loss}, so nothing can be scored. Check the"
            " labels and the learning rate."
        )
    if corpus.task != "text":
        references = [[str(example.label)] for example in examples]
        metrics = score(corpus.task, predicted(corpus, logits), references)
    return Evaluation(logits, loss, metrics)


def _token_metrics(
    corpus: Corpus, encoded: Encoded, sums: Tensor
) -> tuple[float, dict[str, float]]:
    """Returns the loss in nats per token, and perplexity and accuracy over the learned tokens.

    sums (examples, 2) float64: from predict(). With several tasks, also `metric/task` for each.
    """
    counts = torch.tensor(encoded.counts, dtype=torch.float64)
    task_of = torch.tensor(encoded.tasks or [0] * len(counts))
    tasks = enumerate(corpus.tasks) if len(corpus.tasks) > 1 else ()
    groups = [("", torch.ones(len(counts), dtype=torch.bool))]
    groups += [(f"/{name}", rows) for n, name in tasks if (rows := task_of == n).any()]
    metrics = {}
    for suffix, rows in groups:
        loss, hits = (sums[rows].sum(0) / counts[rows].sum()).tolist()
        metrics[f"perplexity{suffix}"] = math.exp(min(loss, 700.0))  # e^710 overflows float64
        metrics[f"token_accuracy{suffix}"] = hits
    return float(sums[:, 0].sum() / counts.sum()), metrics


def predicted(corpus: Corpus, logits: Tensor) -> list[str]:
    """Returns the predictions as text: class names, or numbers."""
    if corpus.task == "regression":
        return [repr(value) for value in logits[:, 0].tolist()]
    return [corpus.labels[index] for index in logits.argmax(-1).tolist()]


def records_of(
    corpus: Corpus, examples: Sequence[Example], logits: Tensor
) -> Iterator[dict[str, Any]]:
    """Yields a record per example: text, label if known, prediction, its name if the classes have
    names, and the probability of each class by its label."""
    scores = logits.tolist() if corpus.task == "regression" else logits.softmax(-1).tolist()
    names = dict(zip(corpus.labels, corpus.class_names))

    def probabilities(row: Sequence[float]) -> dict[str, float]:
        return {label: round(p, 6) for label, p in zip(corpus.labels, row, strict=True)}

    for example, answer, row in zip(examples, predicted(corpus, logits), scores, strict=True):
        known = {"pair": example.pair, "label": example.label}
        yield {
            "text": example.text,
            **{key: value for key, value in known.items() if value is not None},
            "prediction": float(answer) if corpus.task == "regression" else answer,
            **({"prediction_name": names[answer]} if names else {}),
            **({} if corpus.task == "regression" else {"scores": probabilities(row)}),
        }
