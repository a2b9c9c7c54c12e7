"""Losses of a task: sums in float32, which a batch divides once by what it has summed over.

    batch_loss(model, batch, targets, task)   over the examples, or over the tokens of a text
    token_scores(model, batch, targets)       of each token, without a gradient
    check_language(model)                     that what follows is the model's own forward

A text's loss never holds the logits of the whole batch. The model's backbone gives h, and only
positions with a label go through its head, a few at a time:

    z = cap(scale · head(h) + bias)    loss = − Σ log softmax(z)[label]

Since the sum's gradient by h is made of the same z, it is taken there and then, stretch by stretch,
so that nothing is computed twice (a checkpoint around each stretch would do the head's product once
more). cap(z) = c · tanh(z / c) is Gemma's `final_logit_softcapping`; scale is Cohere's
`logit_scale`, or one over Granite's `logits_scaling`; the bias is BART's `final_logits_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ModelError

AT_ONCE = 2**24
"""Logits computed at a time: 64 MiB in float32, four times that with what their gradient takes."""

Batch = Mapping[str, Tensor]


def batch_loss(model: Any, batch: Batch, targets: Tensor, task: str) -> Tensor:
    """The sum over the batch's examples (task_loss), or over the tokens with a label (text), in
    nats, float32.

    A text's targets are (2, tokens): the places among the batch's rows x length positions, and the
    token that each is to predict.
    """
    if task != "text":
        return task_loss(model(**batch).logits, targets, task)
    with _as_forward(model, _summed_loss):
        total: Tensor = model(targets=targets, **batch)
    return total


def task_loss(logits: Tensor, targets: Tensor, task: str) -> Tensor:
    """Sum over the examples, float32: cross-entropy in nats, or the squared error.

    logits (examples, classes) and targets (examples,) long; for regression (examples, 1) and
    float32.
    """
    if task == "regression":
        return F.mse_loss(logits.float().squeeze(-1), targets, reduction="sum")
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def token_scores(model: Any, batch: Batch, targets: Tensor) -> Tensor:
    """Of each target the loss in nats, and 1 where it is the most probable token, (2, tokens),
    float32."""
    with torch.no_grad(), _as_forward(model, _scored):
        found: Tensor = model(targets=targets, **batch)
    return found


@contextmanager
def _as_forward(model: Any, forward: Any) -> Iterator[None]:
    """Within, the model is called with a forward of ours, and so with its own hooks: those of FSDP
    put its weights together."""
    own = model.__dict__.get("forward")
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _summed_loss(model: Any, targets: Tensor, **batch: Any) -> Tensor:
    h = _at(targets[0], features(model, batch))
    trained = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    found: Tensor = _Summed.apply(model, h, targets[1], *trained)  # type: ignore[no-untyped-call]
    return found


def _scored(model: Any, targets: Tensor, **batch: Any) -> Tensor:
    h, wanted = _at(targets[0], features(model, batch)), targets[1]
    found = torch.empty(targets.shape, device=h.device)
    for some in _stretches(model, len(h)):
        z = logits_of(model, h[some]).float()
        found[0, some] = F.cross_entropy(z, wanted[some], reduction="none")
        found[1, some] = (z.argmax(-1) == wanted[some]).float()
    return found


def _at(places: Tensor, h: Tensor) -> Tensor:
    """(tokens, width) of (rows, length, width)."""
    return h.flatten(0, 1).index_select(0, places)


def features(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What the model's forward gives its head: (rows, length, width)."""
    trunk = model.base_model
    if trunk is not model:
        h: Tensor = trunk(**batch, use_cache=False).last_hidden_state
        return h
    head = model.get_output_embeddings()  # T5's forward is of one piece
    with _as_forward(head, lambda _, h: h):
        found: Tensor = type(model).forward(model, **batch, use_cache=False).logits
    return found


def logits_of(model: Any, h: Tensor) -> Tensor:
    """z of h (..., width), as the model's own forward goes on after its backbone: (..., vocab)."""
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


def _stretches(model: Any, tokens: int) -> Iterator[slice]:
    size = max(1, AT_ONCE // model.get_output_embeddings().out_features)
    return (slice(start, start + size) for start in range(0, tokens, size))


class _Summed(torch.autograd.Function):
    """Σ over the tokens, with the gradients by h and by what trains in the head taken beside it."""

    @staticmethod
    def forward(ctx: Any, model: Any, h: Tensor, labels: Tensor, *trained: Tensor) -> Tensor:
        total = torch.zeros((), device=h.device)
        wanted = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        sums = [torch.zeros_like(t) if need else None for t, need in zip((h, *trained), wanted)]
        for some in _stretches(model, len(h)):
            with torch.set_grad_enabled(any(wanted)):
                x = h[some].detach().requires_grad_(wanted[0])
                z = logits_of(model, x).float()
                loss = F.cross_entropy(z, labels[some], reduction="sum")
            total += loss.detach()
            of = [t for t, need in zip((x, *trained), wanted) if need]
            found = iter(torch.autograd.grad(loss, of) if of else ())
            for index, into in enumerate(sums):
                if into is not None:
                    (into[some] if index == 0 else into).add_(next(found))
        ctx.sums = sums
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        by_h, *by_trained = (None if s is None else s * grad.to(s.dtype) for s in ctx.sums)
        return None, by_h, None, *by_trained


@torch.no_grad()
def check_language(model: nn.Module, packs: bool = False) -> None:
    """Raise ModelError where our logits are not those of the model's own forward; with `packs`,
    where one text is seen by another of its row."""
    model_: Any = model
    was = model.training
    model.eval()
    try:
        device = next(p for p in model.parameters()).device
        vocabulary = model_.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(1, 17, device=device) * 7919 % vocabulary).view(2, 8)
        more = {"decoder_input_ids": ids} if model_.config.is_encoder_decoder else {}
        own = model_(input_ids=ids, **more, use_cache=False).logits.float()
        if not bool(own.isfinite().all()):
            raise ModelError(
                f"{type(model).__name__}: the base's own logits are NaN or infinite, computed in"
                f" {_computed(model)}, though its weights are not. Set --dtype float32, or pass"
                " another base."
            )
        eps, most = torch.finfo(_computed(model)).eps, own.abs().max()
        with _as_forward(model, lambda m, **batch: logits_of(m, features(m, batch))):
            ours = model_(input_ids=ids, **more)
        if not (ours.float() - own).abs().max() <= 16 * eps * most:
            raise ModelError(
                f"{type(model).__name__} does more after its head than is known here: its logits"
                " are not those of losses.logits_of. Pass a base of another architecture."
            )
        if packs:
            positions = torch.arange(8, device=device).repeat(2)[None]
            row = model_(input_ids=ids.view(1, 16), position_ids=positions, use_cache=False)
            # Rounding adds up over the layers; what another text does is of the logits' own size.
            if not (row.logits.view_as(own).float() - own).abs().max() <= eps**0.5 * most:
                raise ModelError(
                    f"--packing: in {type(model).__name__} texts of a row see one another. Leave it"
                    " out."
                )
    finally:
        model.train(was)


def _computed(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that the model computes in."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        found.add(torch.bfloat16)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)
