"""Losses: float32 sums, which the training step divides once by its number of examples or tokens.

    batch_loss(model, batch, targets, task)   sum over the examples, or over the tokens of texts
    CrossEntropy(class_weights, smoothing)    the loss of classification, if it is not the plain one
    token_scores(model, batch, targets)       loss and hit of each token, without gradients
    check_language(model)                     checks our logits against the model's own forward

The loss of texts never holds the logits of the whole batch, which need much memory if the
vocabulary is large. The backbone gives the hidden states h, and only positions with a label go
through the head, one chunk at a time:

    z = cap(scale · head(h) + bias)    loss = − Σ log softmax(z)[label]

The gradient with respect to h needs the same z, so the forward computes it at once for each chunk
and the backward only scales it. (Activation checkpointing of each chunk would need the head's
matmul twice.) cap(z) = c · tanh(z / c) is Gemma's `final_logit_softcapping`; scale is Cohere's
`logit_scale`, or 1 / Granite's `logits_scaling`; the bias is BART's `final_logits_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ModelError

AT_ONCE = 2**24
"""Logits per chunk: 64 MiB in float32, and about four times that with their gradient."""
AT_ONCE_ON_ACCELERATORS = 2**26
"""With a vocabulary of 128k these are 512 tokens. Fewer would read the head more often than its
matrix products take: 2**24 is 126 times for 16k tokens."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of classification, by the definition of torch's cross_entropy.

    The loss of a row of class y, with label smoothing ε, weights w of K classes, and log
    probabilities log p: −(1 − ε) w[y] log p[y] − ε / K Σ_c w[c] log p[c]. The loss of a batch is
    their sum over its rows, divided by the sum of w[y].
    """

    class_weights: Tensor | None = None  # (classes,) float32, on the device of the logits
    label_smoothing: float = 0.0


PLAIN = CrossEntropy()


def batch_loss(
    model: Any, batch: Batch, targets: Tensor, task: str, entropy: CrossEntropy = PLAIN
) -> Tensor:
    """Returns the loss summed over the batch: a float32 scalar, in nats or squared units.

    Text: over the tokens with a label. targets (2, tokens) int64: the position of each in the
    flattened batch (rows · length), and its label. Other tasks: see task_loss().
    """
    if task != "text":
        return task_loss(model(**batch).logits, targets, task, entropy)
    with _as_forward(model, _summed_loss):
        total: Tensor = model(targets=targets, **batch)
    return total


def task_loss(logits: Tensor, targets: Tensor, task: str, entropy: CrossEntropy = PLAIN) -> Tensor:
    """Returns the sum over the examples, float32: cross-entropy in nats, or squared error.

    Classification: logits (examples, classes), targets (examples,) int64.
    Regression: logits (examples, 1), targets (examples,) float32.
    """
    # Autocast gives logits in bfloat16, whose eight bits lose small terms in a sum over a batch.
    if task == "regression":
        return F.mse_loss(logits.float().squeeze(-1), targets, reduction="sum")
    return F.cross_entropy(
        logits.float(), targets, weight=entropy.class_weights,
        label_smoothing=entropy.label_smoothing, reduction="sum",
    )  # fmt: skip


def token_scores(model: Any, batch: Batch, targets: Tensor) -> Tensor:
    """Returns (2, tokens) float32: the loss of each target in nats, and 1 if it is the argmax."""
    with torch.no_grad(), _as_forward(model, _scored):
        scores: Tensor = model(targets=targets, **batch)
    return scores


@contextmanager
def _as_forward(model: Any, forward: Any) -> Iterator[None]:
    """Replaces the forward of a model, but still runs its hooks when it is called.

    FSDP's hooks gather the sharded weights, so the model has to be called, not its parts.
    """
    patched = model.__dict__.get("forward")
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward
        if patched is not None:
            model.forward = patched


def _summed_loss(model: Any, targets: Tensor, **batch: Any) -> Tensor:
    """The forward of batch_loss(): the loss of a text."""
    h = _select(targets[0], features(model, batch))
    # Autograd knows only tensors that are arguments of a Function, not those inside `model`.
    trained = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    loss: Tensor = _Summed.apply(model, h, targets[1], *trained)  # type: ignore[no-untyped-call]
    return loss


def _scored(model: Any, targets: Tensor, **batch: Any) -> Tensor:
    """The forward of token_scores()."""
    h, labels = _select(targets[0], features(model, batch)), targets[1]
    scores = torch.empty(targets.shape, device=h.device)
    for chunk in _chunks(model, h):
        z = logits_of(model, h[chunk]).float()
        scores[0, chunk] = F.cross_entropy(z, labels[chunk], reduction="none")
        scores[1, chunk] = (z.argmax(-1) == labels[chunk]).float()
    return scores


def _select(positions: Tensor, h: Tensor) -> Tensor:
    """Returns the hidden states at these positions: (rows, length, width) -> (tokens, width)."""
    return h.flatten(0, 1).index_select(0, positions)


def features(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Returns the input of the model's head, (rows, length, width)."""
    # use_cache=False: in training nothing reads the keys and values that a cache would keep.
    backbone = model.base_model
    if backbone is not model:
        h: Tensor = backbone(**batch, use_cache=False).last_hidden_state
        return h
    # T5 has no separate backbone. Its own forward runs with a head that returns its input.
    head = model.get_output_embeddings()
    with _as_forward(head, lambda _, h: h):
        hidden: Tensor = type(model).forward(model, **batch, use_cache=False).logits
    return hidden


def logits_of(model: Any, h: Tensor) -> Tensor:
    """Returns the logits (..., vocab) of h (..., width), as the model's own forward does."""
    config = model.config
    z: Tensor = model.get_output_embeddings()(h)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        z = z * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        z = z / scale
    if (bias := getattr(model, "final_logits_bias", None)) is not None:
        z = z + bias
    if (most := getattr(config, "final_logit_softcapping", None)) is not None:
        z = torch.tanh(z / most) * most
    return z


def _chunks(model: Any, h: Tensor) -> Iterator[slice]:
    """Yields slices of the tokens of h (tokens, width) with at most AT_ONCE logits each."""
    most = AT_ONCE if h.device.type == "cpu" else AT_ONCE_ON_ACCELERATORS
    size = max(1, most // model.get_output_embeddings().out_features)
    return (slice(start, start + size) for start in range(0, len(h), size))


class _Summed(torch.autograd.Function):
    """The loss summed over tokens. The forward also computes the gradients of h and the head."""

    @staticmethod
    def forward(ctx: Any, model: Any, h: Tensor, labels: Tensor, *trained: Tensor) -> Tensor:
        total = torch.zeros((), device=h.device)
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])  # of h and the head
        sums = [torch.zeros_like(t) if need else None for t, need in zip((h, *trained), needed)]
        for chunk in _chunks(model, h):
            # A Function's forward runs without gradients. Each chunk has a small graph of its own,
            # which is freed before the next chunk.
            with torch.set_grad_enabled(any(needed)):
                x = h[chunk].detach().requires_grad_(needed[0])
                z = logits_of(model, x).float()
                loss = F.cross_entropy(z, labels[chunk], reduction="sum")
            total += loss.detach()
            inputs = [t for t, need in zip((x, *trained), needed) if need]
            gradients = iter(torch.autograd.grad(loss, inputs) if inputs else ())
            for index, gradient_sum in enumerate(sums):
                if gradient_sum is not None:
                    # A chunk is some rows of h, but all of the head's parameters.
                    (gradient_sum[chunk] if index == 0 else gradient_sum).add_(next(gradients))
        ctx.sums = sums
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        by_h, *by_trained = (None if s is None else s * grad.to(s.dtype) for s in ctx.sums)
        return None, by_h, None, *by_trained


@torch.no_grad()
def check_language(model: nn.Module, packs: bool = False) -> None:
    """Raises ModelError if our logits differ from those of the model's own forward.

    packs: also if, in a packed row, one text attends to another.
    """
    model_: Any = model
    was_training = model.training
    model.eval()
    try:
        device = next(p for p in model.parameters()).device
        vocabulary = model_.get_input_embeddings().weight.shape[0]
        # A prime step spreads the ids over the vocabulary: the first rows are often special.
        ids = (torch.arange(1, 17, device=device) * 7919 % vocabulary).view(2, 8)
        more = {"decoder_input_ids": ids} if model_.config.is_encoder_decoder else {}
        expected = model_(input_ids=ids, **more, use_cache=False).logits.float()
        if not bool(expected.isfinite().all()):
            raise ModelError(
                f"{type(model).__name__}: the logits of the base are NaN or infinite in"
                f" {_compute_dtype(model)}, although its weights are finite. Set --dtype float32,"
                " or pass another base."
            )
        eps, most = torch.finfo(_compute_dtype(model)).eps, expected.abs().max()
        with _as_forward(model, lambda m, **batch: logits_of(m, features(m, batch))):
            ours = model_(input_ids=ids, **more)
        # Both compute the same products, so only roundings differ. "not <=" is also true for NaN.
        if not (ours.float() - expected).abs().max() <= 16 * eps * most:
            raise ModelError(
                f"{type(model).__name__} does more after its head than losses.logits_of computes,"
                " so its loss would be wrong. Pass a base of another architecture."
            )
        if packs:
            positions = torch.arange(8, device=device).repeat(2)[None]
            row = model_(input_ids=ids.view(1, 16), position_ids=positions, use_cache=False)
            # Rounding errors add up over the layers, but stay far below √eps. If texts attend to
            # one another, the logits change by as much as their own size.
            error = (row.logits.view_as(expected).float() - expected).abs().max()
            if not error <= eps**0.5 * most:
                raise ModelError(
                    f"--packing: in {type(model).__name__} the texts of a row see one another."
                    " Remove --packing."
                )
    finally:
        model.train(was_training)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Returns the least precise dtype that the model computes in."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
