"""Computes the initial values of A and B by init_lora_weights. No function here knows a method.

init_lora_weights    A₀ (r, in), B₀ (out, r) of a layer with the weight W (out, in), scaling s
default              A kaiming_uniform(a=√5), B zeros
gaussian             A N(0, 1/r²), B zeros                what the paper says
pissa                U S Vᵀ = W: A = √(S/s) Vᵀ, B = U √(S/s), the largest r   arXiv:2404.02948
pissa_niter_N        the same by N rounds of a randomised subspace iteration
olora                Q R = W: A = R[:r], B = Q[:, :r]                         arXiv:2406.01775
eva                  A = the main directions of the layer's inputs, B zeros   arXiv:2410.07170
lora_ga              A, B = singular vectors of W's gradient                  arXiv:2407.05000
loftq, loftq_N       A, B = pissa's of W − Q, Q = W − sBA in NF4, N times     arXiv:2310.08659
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import ConfigError
from lora.layers import View

FactorPair = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Call = Callable[[nn.Module, Any], Any]  # passes a batch through a model
Layers = Sequence[tuple[str, View, int]]  # the name, the view and the rank of each layer


def start_at_zero(
    A: Tensor, B: Tensor, view: View, std: float | None, generator: torch.Generator
) -> None:
    """Fill A (r, in) with kaiming_uniform(a=√5), or N(0, std²), and B (out, r) with zeros; on an
    Embedding A with zeros and B with N(0, 1), as PEFT does."""
    drawn, zero = (B, A) if view.of_ids else (A, B)
    # Drawn on the CPU in float32: the same seed gives the same values on every device.
    start = torch.empty(drawn.shape, dtype=torch.float32, device="cpu")
    if view.of_ids or std is not None:
        start.normal_(std=1.0 if view.of_ids else std, generator=generator)  # type: ignore[arg-type]
    else:
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    drawn.copy_(start)
    zero.zero_()


def svd_lowrank(
    M: Tensor, r: int, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, r), S (r,), Vh (r, columns): the largest r, by randomised subspace iteration.

    Halko et al. 2011, algorithm 5.1, with 8 directions more than asked for.
    """
    size = min(r + 8, *M.shape)
    # On the CPU by name: the generator is of the CPU, and torch's default device may be another.
    shape = M.shape[1], size
    start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    Q = torch.linalg.qr(M @ start.to(M.device, M.dtype)).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def wide(W: Tensor) -> torch.dtype:
    """float64, or the dtype of W on devices of which some have no float64 (Apple's and Intel's).

    Other processors and numbers of threads round differently. In float64 they differ too little to
    change a code of a weight that is quantized without B A.
    """
    return torch.float64 if W.device.type in ("cpu", "cuda", "meta") else W.dtype


def decompose(init: str, W: Tensor, r: int, s: float, generator: torch.Generator) -> FactorPair:
    """A and B of pissa and olora for W, and of loftq for what quantizing W lost."""
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]
    if init == "pissa" or init.startswith("loftq"):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = svd_lowrank(W, r, int(init.rpartition("_")[2]), generator)
    root = (S[:r] / s).sqrt()  # half of each singular value in A, half in B; s cancels
    return root[:, None] * Vh[:r], U[:, :r] * root


def from_inputs(
    layers: Layers, model: nn.Module, batches: Iterable[Any], call: Call, dtype: torch.dtype
) -> list[Tensor]:
    """EVA with equal ranks (its ρ = 1): A (r, in) of each layer, the right singular vectors of its
    inputs. Raises ConfigError if a layer saw fewer than r directions.

    The singular values and vectors of earlier batches stand for them when the next batch comes
    (incremental SVD). Padded positions do not count.
    """
    directions: dict[str, Tensor] = {}
    real: Tensor | None = None
    # The mask of an encoder is not that of its decoder.
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def look(name: str, r: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        masked = real is not None and x.shape[:-1] == real.shape
        rows = (x[real] if masked else x).detach().reshape(-1, x.shape[-1]).to(dtype)
        rows = torch.cat([directions[name], rows]) if name in directions else rows
        _, S, Vh = svd_lowrank(rows, 2 * r, 4, torch.Generator().manual_seed(0))
        directions[name] = S[:, None] * Vh

    hooks = [
        view.module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name, r=r: look(name, r, args, kwargs), with_kwargs=True
        )
        for name, view, r in layers
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                real = None if mask is None or two else mask.bool()
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, _, r in layers:
        if len(directions.get(name, ())) < r:
            raise ConfigError(
                f"eva: {name} saw {len(directions.get(name, ()))} directions for r={r}."
                " Pass more batches."
            )
    return [nn.functional.normalize(directions[name][:r]) for name, _, r in layers]


def from_gradients(
    layers: Layers, model: nn.Module, batches: Iterable[Any], call: Call, dtype: torch.dtype
) -> list[FactorPair]:
    """LoRA-GA: from W's gradient U S Vᵀ, A = c Vᵀ[:r] and B = c U[:, r:2r], c = out^¼ / √γ.

    γ = 16 and the choice of vectors as in the paper (its "stable" and "ArB2r"). The first step of
    A and B then moves W along its own gradient. Raises ConfigError if there is no loss or gradient.
    """
    # The gradients of the user's own training, if there are any, come back at the end.
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    weights = [view.parameters()[0] for _, view, _ in layers]
    pairs = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                loss = getattr(call(model, batch), "loss", None)
                if loss is None:
                    raise ConfigError("lora_ga: the model's output has no loss. Pass labels too.")
                loss.backward()
        for (name, view, r), weight in zip(layers, weights, strict=True):
            gradient = weight.grad
            if gradient is None or not bool(gradient.any()):
                raise ConfigError(
                    f"lora_ga: {name} got no gradient. Leave it out, or pass other batches."
                )
            gradient = (gradient.T if view.transposed else gradient).to(dtype)
            U, _, Vh = svd_lowrank(gradient, 2 * r, 4, torch.Generator().manual_seed(0))
            c = view.out_features**0.25 / 4
            pairs.append((c * Vh[:r], c * U[:, r:]))
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
    return pairs
