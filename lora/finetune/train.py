"""The training loop: fit().

    begin(model, rate)                      a Training: the model, AdamW, no step done
    fit(training, data, task, settings)     one optimizer step at each `next`
    add_gradients(model, batch, ...)        forward and backward of one part of a batch

The batch of an optimizer step is divided among the ranks, and each rank computes its share in parts
of `micro_batch_size` rows. Each part's loss is a sum, divided by the number of examples in the
whole batch (of texts: of tokens with a label; with class weights: by the sum of the weights of the
examples' classes), so that the parts' gradients add up to the batch's.

A step is a function of the seed and its number, except for dropout, which draws from torch's
generator. lora.finetune.state saves that generator, so a resumed training is the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import TrainingError
from lora.finetune import distributed
from lora.finetune.config import Schedule
from lora.finetune.data.tokens import Encoded, ahead, batches, collate, drawn, layout
from lora.finetune.evaluate import autocast, device_of
from lora.finetune.losses import PLAIN, Batch, CrossEntropy, batch_loss
from lora.finetune.record import Step
from lora.finetune.signals import SIGNALS
from lora.finetune.state import Training, rank_seed
from lora.injection import check_memory
from lora.training import after_step, check_alive, check_steps, param_groups, penalty


@dataclass(frozen=True)
class Hyperparameters:
    """How long and in which steps to train; the learning rate belongs to begin()."""

    epochs: int
    batch_size: int
    micro_batch_size: int | None = None  # rows computed at a time; None: all of a rank's share
    warmup: float = 0.06  # share of the steps
    schedule: Schedule = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    class_weights: tuple[float, ...] = ()  # in the order of the classes; (): all 1
    label_smoothing: float = 0.0


def begin(model: Any, learning_rate: float, weight_decay: float = 0.0, seed: int = 0) -> Training:
    """A training, by AdamW, of the parameters that require a gradient. Seeds torch's generator,
    on each rank differently, so that each has its own dropout masks."""
    torch.manual_seed(rank_seed(seed))
    check_room(model)
    half = getattr(model, "lora_dtype", None) == torch.float16
    scaler = torch.amp.GradScaler(device_of(model).type) if half else None
    return Training(model, adamw(model, learning_rate, weight_decay), learning_rate, scaler=scaler)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Each group keeps its peak learning rate in "peak"."""
    groups = optimizer_groups(model, learning_rate, weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def fit(
    training: Training,
    encoded: Encoded,
    task: str,
    settings: Hyperparameters,
    stop: Callable[[], int] = lambda: 0,
) -> Iterator[Step]:
    """Train from training.step to the last step of the last epoch; calls `stop` in each step.

    Raises TrainingError at a loss or gradient that is not finite, before that step is taken, and
    TargetError if the first backward does not reach an adapter. In float16 a step whose gradient
    overflows is skipped, and the loss scale halved.
    """
    model, optimizer, first = training.model, training.optimizer, training.step
    per_epoch = steps_per_epoch(encoded, settings.batch_size)
    steps = settings.epochs * per_epoch
    check_steps(model, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    entropy = _entropy(settings, device_of(model))
    for number, (epoch, rows, parts) in enumerate(_batches(model, encoded, settings, first), first):
        started = time.perf_counter()
        model.train()
        losses: list[Tensor] = []  # read at the end of the step: until then the CPU runs ahead
        positions = 0
        targets, divisor = _divisors(encoded, rows, settings.class_weights)
        for index, part in enumerate(parts):
            penalized = index == distributed.rank() == 0  # once in each step
            arguments = part, task, divisor, penalized, training.scaler, entropy
            losses.append(add_gradients(model, *arguments))
            positions += part.batch["input_ids"].numel() if part.counts else 0
        if number == first:
            check_alive(model)
        totals, positions, stop_signal = over_ranks(trained, losses, positions, stop())
        if training.scaler is not None:
            training.scaler.unscale_(optimizer)
        clipped = nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        loss, norm = sum(torch.stack(totals).tolist(), 0.0), float(clipped)
        share = slope(number, steps, settings.warmup, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        rate = share * training.learning_rate
        skipped = training.scaler is not None and overflowed(training.scaler, norm)
        norm = 0.0 if skipped else norm
        check_finite(loss, norm, f"step {number + 1} of {steps} (epoch {epoch + 1}, ", rate)
        if skipped:
            optimizer.zero_grad(set_to_none=True)  # methods see no gradient after the step either
        else:
            optimizer.step()
        after_step(model, number + 1, steps)
        optimizer.zero_grad(set_to_none=True)
        training.step = number + 1
        tokens = sum(encoded.lengths[row] for row in rows)
        yield Step(
            step=number + 1, steps=steps, epoch=epoch + 1, loss=loss, learning_rate=rate,
            gradient_norm=norm, examples=len(rows), targets=targets, tokens=tokens,
            padding=1 - tokens / positions, seconds=time.perf_counter() - started,
            epoch_ends=(number + 1) % per_epoch == 0, skipped=skipped, stop=stop_signal,
        )  # fmt: skip


def _entropy(settings: Hyperparameters, device: torch.device) -> CrossEntropy:
    """The loss of classification that the settings ask for."""
    weights = settings.class_weights
    tensor = torch.tensor(weights, device=device) if weights else None
    return CrossEntropy(tensor, settings.label_smoothing)


def _divisors(
    encoded: Encoded, rows: list[int], class_weights: tuple[float, ...]
) -> tuple[int, float]:
    """How many targets a batch has (examples, or tokens with a label), and what its loss is divided
    by: that number, or with class weights the sum of the weights of the examples' classes."""
    targets = sum(encoded.counts[row] for row in rows)
    if not class_weights:
        return targets, targets
    return targets, sum(class_weights[label] for label in encoded.targets[rows].tolist())


@dataclass(frozen=True)
class Part:
    """The rows of a batch that one rank computes at a time."""

    batch: Batch
    targets: Tensor
    counts: bool = True  # False for a stand-in: this rank has no row, but all ranks take part


def overflowed(scaler: torch.amp.GradScaler, norm: float) -> bool:
    """Update the loss scale after a backward in float16. True if a gradient overflowed and a lower
    scale may help; False if the gradients are finite, or are not at a scale of 1 either."""
    if math.isfinite(norm):
        scaler.update()
        return False
    before = scaler.get_scale()
    scaler.update()
    return 1 < before != scaler.get_scale()


def add_gradients(
    model: Any,
    part: Part,
    task: str,
    divisor: float,
    penalized: bool,
    scaler: torch.amp.GradScaler | None = None,
    entropy: CrossEntropy = PLAIN,
) -> Tensor:
    """Forward and backward of one part of a batch: adds to the gradients of the parameters.

    `lora plan` calls it too. `divisor` is what the loss of the whole batch is divided by. With
    `penalized` the methods' penalty is added before the backward. The gradients are multiplied by
    the scale of `scaler`.

    Returns the part's share of the batch's loss, without the penalty, detached.
    """
    with autocast(model):
        loss = batch_loss(model, part.batch, part.targets, task, entropy)
    loss = loss / divisor
    if not part.counts:
        loss = loss * 0
    extra = penalty(model) if penalized else None
    if loss.requires_grad:  # False if every adapter is dead, which check_alive reports
        total: Any = loss if extra is None else loss + extra
        (total if scaler is None else scaler.scale(total)).backward()
    return loss.detach()


def _batches(
    model: Any, encoded: Encoded, settings: Hyperparameters, first: int
) -> Iterator[tuple[int, list[int], list[Part]]]:
    """The epoch (from 0), the examples, and this rank's parts of each step from `first` on, made
    one step ahead by a thread."""
    device, rank, ranks = device_of(model), distributed.rank(), distributed.size()

    def make(entry: tuple[int, list[int]]) -> tuple[int, list[int], list[Part]]:
        epoch, examples = entry
        rows = layout(encoded, examples)
        share, largest_share = rows[rank::ranks], -(-len(rows) // ranks)
        size = settings.micro_batch_size or largest_share
        parts = [share[i : i + size] for i in range(0, largest_share, size)]
        return epoch, examples, [
            Part(*collate(encoded, part or rows[:1], device), counts=bool(part)) for part in parts
        ]  # fmt: skip

    plan = batch_plan(encoded, settings.batch_size, settings.epochs, settings.seed, first)
    return ahead(plan, make)


def over_ranks(
    trained: list[nn.Parameter], losses: list[Tensor], positions: int, stop_signal: int
) -> tuple[list[Tensor], int, int]:
    """Sum gradients, losses and positions over the ranks, in one message; and find the signal that
    any rank received. A parameter that has no gradient on any rank stays without.

    Returns scalars whose sum is the loss, positions, and signal; one process gets back its own.
    """
    if distributed.size() == 1:
        return losses, positions, stop_signal
    loss = sum(torch.stack(losses).tolist(), 0.0)
    has_gradient = [parameter.grad is not None for parameter in trained]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    received = [stop_signal == number for number in SIGNALS]
    numbers = torch.tensor([loss, positions, *received, *has_gradient], dtype=torch.float64)
    numbers = numbers.to(trained[0].device)
    distributed.total([numbers, *(p.grad for p in trained if p.grad is not None)])
    _, positions_of_all, *ranks_with = numbers.tolist()
    for parameter, ranks in zip(trained, ranks_with[len(SIGNALS) :], strict=True):
        if not ranks:
            parameter.grad = None
    signals = zip(SIGNALS, ranks_with, strict=False)
    return [numbers[0]], int(positions_of_all), max((n for n, ranks in signals if ranks), default=0)


def batch_plan(
    encoded: Encoded, batch_size: int, epochs: int, seed: int, first: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """The epoch (from 0) and the examples of each step, from step `first` on."""
    first_epoch, first_batch = divmod(first, steps_per_epoch(encoded, batch_size))
    plan = (
        (epoch, rows)
        for epoch in range(first_epoch, epochs)
        for rows in batches(encoded.lengths, batch_size, seed, epoch, drawn(encoded, seed, epoch))
    )
    return itertools.islice(plan, first_batch, None)


def check_finite(loss: float, norm: float, where: str, rate: float) -> None:
    """Raise TrainingError if loss or gradient norm is not finite."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(f"{where}learning rate {rate:.2e}): loss {loss}, gradient norm {norm}.")


def check_room(model: nn.Module) -> None:
    """Raise ConfigError if the machine's memory cannot hold the trainable parameters, their
    gradients, and AdamW's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    need = sum(4 * p.numel() * p.element_size() for p in trained)
    check_memory(need, "training cannot begin: gradients and optimiser need")


def steps_per_epoch(encoded: Encoded, batch_size: int) -> int:
    """Optimizer steps of one pass over the examples."""
    return math.ceil(len(encoded.lengths) / batch_size)


def slope(number: int, steps: int, warmup: float, schedule: Schedule = "linear") -> float:
    """The share of the peak learning rate at step `number` (from 0): it rises over the warm-up,
    then falls to 0 along a line or half a cosine, or stays constant."""
    rise = math.ceil(warmup * steps)
    if number < rise:
        return (number + 1) / rise
    if schedule == "constant":
        return 1.0
    left = (steps - number) / max(1, steps - rise)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def optimizer_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters for torch's optimizers, at their method's multiple of the learning
    rate. Matrices decay; biases and norms do not."""
    return [
        {"params": group, "lr": multiple * learning_rate, "weight_decay": decay}
        for parameters, multiple in param_groups(model)
        for group, decay in (
            ([p for p in parameters if p.dim() > 1], weight_decay),
            ([p for p in parameters if p.dim() <= 1], 0.0),
        )
        if group
    ]
