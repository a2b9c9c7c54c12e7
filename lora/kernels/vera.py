"""VeRA: y = x Wᵀ + b + λ_b ∘ ((λ_d ∘ ((m ∘ x) Aᵀ)) Bᵀ) with frozen, shared A and B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.dropout import Mask, drop
from lora.kernels.products import (
    as_rows,
    cast,
    dropped_product,
    save_for_backward,
    saved,
    shaped,
    stored_weight,
    thin_gradients,
    without_autocast,
)
from lora.layers import View, apply


@dataclass(slots=True, eq=False)
class VeRAKernel:
    """A layer with the weight W and bias b under W + λ_b B λ_d A."""

    view: View
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    inner: Tensor  # λ_d (r,)
    outer: Tensor  # λ_b (out,)

    def fused(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by one autograd Function."""
        if self.A.requires_grad or self.B.requires_grad:  # frozen, unless the user trains them
            return self.composed(x, mask)
        b = self.view.parameters()[1]
        tensors = b, self.A, self.B, self.inner, self.outer
        y: Tensor = _VeRA.apply(x, self, mask, *tensors)  # type: ignore[no-untyped-call]
        return shaped(y, x)

    def composed(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by torch operations."""
        y: Tensor = self.view.module(x)
        return (y + self.delta(x, mask)).to(y.dtype)

    def delta(self, x: Tensor, mask: Mask | None) -> Tensor:
        """What the adapter adds to the layer's output."""
        # The vectors scale activations: to scale A and B would cost the gradients of both.
        h = self.inner * apply(self.view, drop(x, mask), self.A)  # (..., r)
        return self.outer * F.linear(h, self.B)


class _VeRA(torch.autograd.Function):
    """y = x Wᵀ + b + c u ∘ λ_b, u = (h ∘ λ_d) Bᵀ, h = (m ∘ x) Aᵀ. A and B are frozen.

    r is not thin here: u is saved, and x is not.
    gλ_b = c Σ g ∘ u   gv = (c g ∘ λ_b) B   gλ_d = Σ gv ∘ h   gx = g W + m ∘ ((gv ∘ λ_d) A)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: VeRAKernel, mask: Mask | None, b: Tensor | None, A: Tensor,
        B: Tensor, inner: Tensor, outer: Tensor,
    ) -> Tensor:  # fmt: skip
        stored, dtype = stored_weight(k.view, x)
        ctx.view, ctx.c = k.view, 1.0 if mask is None else mask.scale
        with without_autocast(x):
            rows, W = as_rows(x, dtype), k.view.unpacked(stored, dtype)
            y = F.linear(rows, W, None if b is None else cast(b, dtype))
            A, B = A.to(dtype), B.to(dtype)
            h = dropped_product(rows, A, mask)
            u = F.linear((h * inner).to(dtype), B)
            y = y.addcmul_(u, outer.to(dtype), value=ctx.c)
        # u (tokens, out) is saved, since r is of the size of `in` and to compute it again is dear.
        save_for_backward(ctx, x, dtype, mask, (inner, outer, h, u, A, B), stored)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (mask, ((inner, outer, h, u, A, B), stored)) = grads, saved(ctx)
        needs_x, _, _, needs_b, *_ = ctx.needs_input_grad
        gx = gb = None
        with without_autocast(g):
            wide = torch.promote_types(g.dtype, torch.float32)
            gv = (ctx.c * outer * g).to(ctx.dtype) @ B
            ginner = (gv * h).sum(0, dtype=wide)
            gouter = ctx.c * (g * u).sum(0, dtype=wide)
            if needs_b:
                gb = g.sum(0, dtype=wide)
            _, gx = thin_gradients([((gv * inner).to(ctx.dtype), A)], None, mask, needs_x)
            if gx is not None:
                gx.addmm_(g, ctx.view.unpacked(stored, ctx.dtype))
                gx = cast(gx.view(ctx.shape), ctx.x_dtype)
        return gx, None, None, gb, None, None, ginner, gouter
