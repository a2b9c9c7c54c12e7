"""The loop: fit() on one screen.

    begin(model, rate)      a Training: the model, AdamW, no step done
    fit(training, data)     one optimiser step at each `next`, from the step that it is at

The batch of an optimiser step is divided among the ranks, and computed in parts of
`micro_batch_size` rows: their losses are summed and divided once by the batch's examples, or by the
tokens that its texts are to learn, so that the parts' gradients are the batch's. A step is a
function of the seed and its number, but for dropout, which draws from torch's generator: what
lora.finetune.state keeps goes on bit for bit.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora.errors import TrainingError
from lora.finetune import distributed
from lora.finetune.config import Schedule
from lora.finetune.data.tokens import Encoded, ahead, batches, collate, drawn, layout
from lora.finetune.evaluate import autocast, device_of
from lora.finetune.losses import batch_loss
from lora.finetune.state import Training, rank_seed
from lora.injection import (
    after_step,
    check_alive,
    check_memory,
    check_steps,
    param_groups,
    penalty,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a training to end."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step did; `epoch_ends` marks the last of an epoch."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    loss: float  # mean over the batch's examples, or of a text over its tokens with a label
    learning_rate: float
    gradient_norm: float  # before clipping
    examples: int
    targets: int  # what the loss is the mean of: examples, or tokens with a label
    tokens: int  # without padding
    padding: float  # share of the batch's positions that are padding
    seconds: float
    epoch_ends: bool
    stop: int = 0  # the signal after which training is to end here, on any rank


def begin(model: Any, learning_rate: float, weight_decay: float = 0.0, seed: int = 0) -> Training:
    """A training of what requires a gradient, by AdamW; seeds torch's generator."""
    torch.manual_seed(rank_seed(seed))  # each drops by masks of its own
    check_room(model)
    optimizer = torch.optim.AdamW(groups(model, learning_rate, weight_decay), fused=True)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return Training(model, optimizer, learning_rate)


def fit(
    training: Training,
    encoded: Encoded,
    task: str,
    epochs: int,
    batch_size: int,
    micro_batch_size: int | None = None,
    warmup: float = 0.06,
    schedule: Schedule = "linear",
    max_grad_norm: float = 1.0,
    seed: int = 0,
    stop: Callable[[], int] = lambda: 0,
) -> Iterator[Step]:
    """Train from the step that the training is at to the last of `epochs`; `stop` is asked in each.

    Raises TrainingError at a loss or gradient that is not finite, before the step is taken, and
    TargetError at an adapter that the first backward does not reach.
    """
    model, optimizer, first = training.model, training.optimizer, training.step
    ranks = distributed.size()
    device = device_of(model)
    per_epoch = steps_per_epoch(encoded, batch_size)
    steps = epochs * per_epoch
    check_steps(model, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def make(entry: tuple[int, list[int]]) -> Any:
        epoch, rows = entry
        laid = layout(encoded, rows)
        own, most = laid[distributed.rank() :: ranks], -(-len(laid) // ranks)
        some = micro_batch_size or most
        parts = [own[i : i + some] for i in range(0, most, some)]
        # Of the ranks one may be without a row, and computes one that does not count.
        return epoch, rows, [(part, collate(encoded, part or laid[:1], device)) for part in parts]

    plan = plan_of(encoded, batch_size, epochs, seed, first)
    for number, (epoch, rows, parts) in enumerate(ahead(plan, make), first):
        started = time.perf_counter()
        model.train()
        value, positions = 0.0, 0
        divisor = sum(encoded.counts[row] for row in rows)
        for index, (part, (batch, targets)) in enumerate(parts):
            with autocast(model):
                loss = batch_loss(model, batch, targets, task)
            loss = loss / divisor * (1 if part else 0)
            value += loss.item()
            positions += batch["input_ids"].numel() if part else 0
            extra = penalty(model) if index == distributed.rank() == 0 else None
            if loss.requires_grad:  # not where every adapter is dead, which check_alive names
                (loss if extra is None else loss + extra).backward()
        if number == first:
            check_alive(model)
        value, positions, asked = over_ranks(trained, value, positions, stop())
        norm = float(nn.utils.clip_grad_norm_(trained, max_grad_norm))
        share = slope(number, steps, warmup, schedule)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]  # of begin()
        rate = share * training.learning_rate
        check_finite(value, norm, f"step {number + 1} of {steps} (epoch {epoch + 1}, ", rate)
        optimizer.step()
        after_step(model, number + 1, steps)
        optimizer.zero_grad(set_to_none=True)
        training.step = number + 1
        tokens = sum(encoded.lengths[row] for row in rows)
        yield Step(
            step=number + 1,
            steps=steps,
            epoch=epoch + 1,
            loss=value,
            learning_rate=rate,
            gradient_norm=norm,
            examples=len(rows),
            targets=divisor,
            tokens=tokens,
            padding=1 - tokens / positions,
            seconds=time.perf_counter() - started,
            epoch_ends=(number + 1) % per_epoch == 0,
            stop=asked,
        )


def over_ranks(
    trained: list[nn.Parameter], loss: float, positions: int, asked: int
) -> tuple[float, int, int]:
    """Sum gradients, loss and positions over the ranks, in one message; and the signal that any of
    them was sent. A parameter without a gradient on every rank stays without."""
    if distributed.size() == 1:
        return loss, positions, asked
    there = [parameter.grad is not None for parameter in trained]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sent = [asked == number for number in SIGNALS]
    numbers = torch.tensor([loss, positions, *sent, *there], dtype=torch.float64)
    numbers = numbers.to(trained[0].device)
    distributed.total([numbers, *(p.grad for p in trained if p.grad is not None)])
    loss, places, *told = numbers.tolist()
    for parameter, ranks in zip(trained, told[len(SIGNALS) :], strict=True):
        if not ranks:
            parameter.grad = None
    asked = max((number for number, ranks in zip(SIGNALS, told, strict=False) if ranks), default=0)
    return loss, int(places), asked


def plan_of(
    encoded: Encoded, batch_size: int, epochs: int, seed: int, first: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """The epoch, from 0, and the examples of each step, from the step `first` on."""
    began, within = divmod(first, steps_per_epoch(encoded, batch_size))
    plan = (
        (epoch, rows)
        for epoch in range(began, epochs)
        for rows in batches(encoded.lengths, batch_size, seed, epoch, drawn(encoded, seed, epoch))
    )
    return itertools.islice(plan, within, None)


def check_finite(loss: float, norm: float, where: str, rate: float) -> None:
    """Raise TrainingError where a step is not to be taken."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        found = f"loss {loss}, gradient norm {norm}"
        raise TrainingError(f"{where}learning rate {rate:.2e}): {found}.")


def check_room(model: nn.Module) -> None:
    """Raise ConfigError where the machine cannot hold what trains: its values, its gradients, and
    AdamW's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    need = sum(4 * p.numel() * p.element_size() for p in trained)
    check_memory(need, "training cannot begin: gradients and optimiser need")


def steps_per_epoch(encoded: Encoded, batch_size: int) -> int:
    """Optimiser steps of one pass over the examples."""
    return math.ceil(len(encoded.lengths) / batch_size)


def slope(number: int, steps: int, warmup: float, schedule: Schedule = "linear") -> float:
    """The share of the peak rate at step `number` from 0: up over the warm-up, then down to 0 along
    a line or half a cosine, or constant."""
    rise = math.ceil(warmup * steps)
    if number < rise:
        return (number + 1) / rise
    if schedule == "constant":
        return 1.0
    left = (steps - number) / max(1, steps - rise)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


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
