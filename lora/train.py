"""The loop: fit() on one screen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora.errors import TrainingError
from lora.evaluate import autocast
from lora.injection import (
    after_step,
    check_alive,
    check_memory,
    check_steps,
    param_groups,
    penalty,
)
from lora.losses import task_loss
from lora.tokens import Encoded, ahead, batches, collate


@dataclass(frozen=True)
class Step:
    """What one optimiser step did; `epoch_ends` marks the last of an epoch."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    loss: float  # mean over the batch's examples
    learning_rate: float
    gradient_norm: float  # before clipping
    examples: int
    tokens: int  # without padding
    padding: float  # share of the batch's positions that are padding
    seconds: float
    epoch_ends: bool


def fit(
    model: Any,
    encoded: Encoded,
    task: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    max_grad_norm: float = 1.0,
    dtype: str = "float32",
    seed: int = 0,
) -> Iterator[Step]:
    """Train what requires a gradient, one optimiser step at each `next`.

    AdamW with a rate that rises linearly over `warmup` of the steps and falls linearly to 0.
    Raises TrainingError at a loss or gradient that is not finite, before the step is taken, and
    TargetError at an adapter that the first backward does not reach.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    lengths = encoded.lengths
    per_epoch = steps_per_epoch(encoded, batch_size)
    steps = epochs * per_epoch
    check_steps(model, steps)
    check_room(model)
    plan = ((e, rows) for e in range(epochs) for rows in batches(lengths, batch_size, seed, e))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(groups(model, learning_rate, weight_decay), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda number: slope(number, steps, warmup)
    )
    made = ahead(plan, lambda entry: (*entry, collate(encoded, entry[1], device)))
    for number, (epoch, rows, batch) in enumerate(made):
        started = time.perf_counter()
        model.train()
        with autocast(device, dtype):
            logits = model(**batch).logits
        loss = task_loss(logits, encoded.targets[rows].to(device), task)
        extra = penalty(model)
        if loss.requires_grad:  # not where every adapter is dead, which check_alive names
            (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        if number == 0:
            check_alive(model)
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
        rate = learning_rate * slope(number, steps, warmup)
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {number + 1} of {steps} (epoch {epoch + 1}, learning rate {rate:.2e}):"
                f" loss {value}, gradient norm {float(norm)}."
            )
        optimizer.step()
        after_step(model, number + 1, steps)
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(lengths[row] for row in rows)
        yield Step(
            step=number + 1,
            steps=steps,
            epoch=epoch + 1,
            loss=value,
            learning_rate=rate,
            gradient_norm=float(norm),
            examples=len(rows),
            tokens=tokens,
            padding=1 - tokens / batch["input_ids"].numel(),
            seconds=time.perf_counter() - started,
            epoch_ends=(number + 1) % per_epoch == 0,
        )


def check_room(model: nn.Module) -> None:
    """Raise ConfigError where the machine cannot hold what trains: its values, its gradients, and
    AdamW's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    need = sum(4 * p.numel() * p.element_size() for p in trained)
    check_memory(need, "training cannot begin: gradients and optimiser need")


def steps_per_epoch(encoded: Encoded, batch_size: int) -> int:
    """Optimiser steps of one pass over the examples."""
    return math.ceil(len(encoded.lengths) / batch_size)


def slope(number: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at step `number` from 0: up over the warm-up, then down to 0."""
    rise = math.ceil(warmup * steps)
    if number < rise:
        return (number + 1) / rise
    return (steps - number) / max(1, steps - rise)


def groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, at the rate of its method; matrices decay, biases and norms do not."""
    return [
        {"params": found, "lr": multiple * learning_rate, "weight_decay": decay}
        for parameters, multiple in param_groups(model)
        for found, decay in (
            ([p for p in parameters if p.dim() > 1], weight_decay),
            ([p for p in parameters if p.dim() <= 1], 0.0),
        )
        if found
    ]
