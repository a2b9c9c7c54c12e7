"""Low-rank updates: y = x Wᵀ + b + s (m ∘ x)(B A − B₀ A₀)ᵀ without the (out, in) matrix B A.

B₀ A₀ is the initial B A, if that is not zero. Autograd would keep a copy of the input for every
cast and every dropout, and would add whole activations. Here forward keeps x itself,
h = (m ∘ x) Aᵀ (tokens, r), A, B, and for dropout one bit per element. Backward computes the rest
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.dropout import Mask, drop
from lora.kernels.products import (
    Factors,
    Start,
    as_rows,
    cast,
    compute_dtype,
    dropped_product,
    factor_pairs,
    save_for_backward,
    saved,
    shaped,
    stored_weight,
    summed,
    thin_gradients,
    updated,
    without_autocast,
)
from lora.layers import View, apply

SMALL = 6
"""W' is computed if it has this many times fewer elements than the update adds to activations."""


@dataclass(slots=True, eq=False)
class LowRankKernel:
    """A layer with the weight W and bias b under s (B A − B₀ A₀)."""

    view: View
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    s: float
    start: Start = None  # A₀ and B₀
    shift: Tensor | None = None  # what the adapter adds to b, (out,)
    biased: bool = True  # False leaves b out
    made: dict[Any, Factors] = field(default_factory=dict)  # by dtype and scale

    def fused(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by one autograd Function."""
        # The bias is an argument of the Function, since it may be trained (bias="all").
        b = self.view.parameters()[1] if self.biased else None
        if self.shift is not None:
            b = self.shift if b is None else b + self.shift
        if mask is None and self.is_small(x):
            y = _Merged.apply(x, self, b, self.A, self.B)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():
            y = _LowRank.apply(x, self, mask, b, self.A, self.B)  # type: ignore[no-untyped-call]
        else:
            y = self.product(x, mask, b)[0]
        return shaped(y, x)

    def constant(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What computes y of each x of this shape and dtype, without gradients or dropout, while
        nothing is written to a weight; None for what `fused` has to compute.

        A token of a text takes as long as its operations take to start: these are the fewest.
        """
        if self.start is not None or self.shift is not None or self.is_small(x):
            return None
        (stored, dtype), view = stored_weight(self.view, x), self.view
        b = view.parameters()[1] if self.biased else None
        ((A, up),) = self.factors(dtype, 1.0)
        b, down = None if b is None else cast(b, dtype), A.t()

        def output(x: Tensor) -> Tensor:
            rows = as_rows(x, dtype)
            h = rows @ down
            y = h @ up if b is None else torch.addmm(b, h, up)
            return shaped(y.addmm_(rows, view.unpacked(stored, dtype).t()), x)

        return output

    def product(
        self, x: Tensor, mask: Mask | None, b: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Factors]:
        """y (tokens, out), and what backward multiplies with: h, what W is stored as, factors."""
        stored, dtype = stored_weight(self.view, x)
        with without_autocast(x):
            rows = as_rows(x, dtype)
            factors = self.factors(dtype, 1.0 if mask is None else mask.scale)
            hs = [dropped_product(rows, A, mask) for A, _ in factors]
            # The update first: in 16 bits its rounding is smaller than that of x Wᵀ, and a GPU adds
            # the wide product onto it in less time.
            y = updated(None if b is None else cast(b, dtype), hs, factors)
            return y.addmm_(rows, self.view.unpacked(stored, dtype).t()), hs[0], stored, factors

    def composed(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by torch operations."""
        y: Tensor = self.view.module(x)
        return (y + self.delta(x, mask)).to(y.dtype)

    def delta(self, x: Tensor, mask: Mask | None) -> Tensor:
        """What the adapter adds to the layer's output: s (B (A x) − B₀ (A₀ x)) + shift."""
        dropped = drop(x, mask)
        y: Tensor = self.s * F.linear(apply(self.view, dropped, self.A), self.B)
        if self.start is not None:
            A0, B0 = self.start
            y = y - self.s * F.linear(apply(self.view, dropped, A0), B0)
        return y if self.shift is None else y + self.shift

    def factors(self, dtype: torch.dtype, scale: float) -> Factors:
        """What products multiply with, s times `scale`."""
        if (dtype, scale) not in self.made:
            self.made[dtype, scale] = factor_pairs(
                self.A, self.B, self.s * scale, self.start, dtype
            )
        return self.made[dtype, scale]

    def is_small(self, x: Tensor) -> bool:
        """True if W' is small beside the activations, and nothing is lost by its dtype."""
        dtype, view, tokens = x.dtype, self.view, x.numel() // max(1, x.shape[-1])
        size, added = view.in_features * view.out_features, view.in_features + view.out_features
        # In 16 bits W + s B A would round the update away: it is added to activations instead.
        return (
            SMALL * size <= tokens * added
            and compute_dtype(x) == dtype
            and self.A.dtype == self.B.dtype == dtype != torch.bfloat16 != torch.float16
            and (view.packed or view.dtype == dtype)
        )


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + s (m ∘ x)(B A − B₀ A₀)ᵀ. Below, s has dropout's 1 / (1 − p) in it.

    h  = (m ∘ x) Aᵀ                        (tokens, r)
    gA = s (g B)ᵀ (m ∘ x)   gB = s gᵀ h    gb = Σ g
    gx = g W + m ∘ s g (B A − B₀ A₀)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: LowRankKernel, mask: Mask | None, b: Tensor | None, A: Tensor,
        B: Tensor,
    ) -> Tensor:  # fmt: skip
        y, h, stored, factors = k.product(x, mask, b)
        ctx.view, ctx.rank, ctx.s = k.view, len(A), k.s if mask is None else k.s * mask.scale
        needs_A = ctx.needs_input_grad[4]  # False under LoRA-FA, which then keeps no x
        save_for_backward(ctx, x, y.dtype, mask, (x if needs_A else None, h), stored, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (mask, ((x, h), stored, *factors)) = grads, saved(ctx)
        needs_x, _, _, needs_b, _, needs_B = ctx.needs_input_grad
        gb = gB = None
        with without_autocast(g):
            thin = [(F.linear(g, up), A) for A, up in factors]
            gA, gx = thin_gradients(thin, None if x is None else as_rows(x, x.dtype), mask, needs_x)
            if gx is not None:
                # W is unpacked or cast again: to keep it would cost a copy of the base a layer.
                gx.addmm_(g, ctx.view.unpacked(stored, ctx.dtype))
                gx = cast(gx.view(ctx.shape), ctx.x_dtype)
            if needs_B:
                gB = ctx.s * summed(h, g)[: ctx.rank].t()
            if needs_b:
                gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        return gx, None, None, gb, gA if gA is None else gA[: ctx.rank], gB


class _Merged(torch.autograd.Function):
    """y = x W'ᵀ + b, W' = W + s (B A − B₀ A₀), without dropout.

    For many tokens and a small layer: to make W' costs less than to add h Bᵀ to the outputs and
    g B A to the gradients.   gx = g W'   gA = s (g B)ᵀ x   gB = s gᵀ (x Aᵀ)   gb = Σ g
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: LowRankKernel, b: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        with without_autocast(x):
            W = k.view.unpacked(k.view.stored(), x.dtype)
            if k.start is None:
                W = torch.addmm(W, B, A, alpha=k.s)
            else:  # computed apart from W, so that at the start the two cancel to the last bit
                A0, B0 = k.start
                W = torch.add(W, B @ A - B0 @ A0, alpha=k.s)
            rows = as_rows(x, x.dtype)
            y = F.linear(rows, W, None if b is None else b.to(x.dtype))
            needs_A, needs_B = ctx.needs_input_grad[3:]
            h = rows @ A.t() if needs_B and not needs_A else None  # LoRA-FA keeps it in x's place
        save_for_backward(ctx, x, x.dtype, None, (x if needs_A else None, h, W, A, B))
        ctx.s = k.s
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (_, ((x, h, W, A, B),)) = grads, saved(ctx)
        needs_x, _, needs_b, _, needs_B = ctx.needs_input_grad
        gx = gA = gB = None
        with without_autocast(g):
            if x is not None:
                rows = as_rows(x, x.dtype)
                h, gA = rows @ A.t(), ctx.s * summed(g @ B, rows)
            if needs_B:
                gB = ctx.s * summed(g, h)
            if needs_x:
                gx = (g @ W).view(ctx.shape)
        return gx, None, g.sum(0) if needs_b else None, gA, gB
