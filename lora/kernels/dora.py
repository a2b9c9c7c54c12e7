"""DoRA: W' = f V, V = W + s (B A − B₀ A₀), f = magnitude / ‖V‖ per row, without the matrix V.

B₀ A₀ is the initial B A, if that is not zero.

Without dropout y = f ∘ (x Wᵀ + s x (B A − B₀ A₀)ᵀ) + b: a low-rank update, then one factor per row.
With dropout (W' − W)(m ∘ x) needs a second matmul with W, here and in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.dropout import Mask, drop, drop_
from lora.kernels.lowrank import LowRankKernel
from lora.kernels.products import (
    Start,
    as_rows,
    cast,
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
from lora.layers import View, apply, plain_call


@dataclass(slots=True, eq=False)
class DoRAKernel:
    """A layer with the weight W and bias b under DoRA; magnitude is m (out,)."""

    view: View
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    s: float
    magnitude: Tensor
    start: Start = None  # A₀ and B₀
    direction: LowRankKernel = field(init=False)  # V in W's place, without the bias
    f: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.direction = LowRankKernel(self.view, self.A, self.B, self.s, self.start, biased=False)

    def fused(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by one autograd Function."""
        if mask is None:
            return self._scaled(self.direction.fused(x, None))
        tensors = self.view.parameters()[1], self.A, self.B, self.factor()
        y: Tensor = _DoRA.apply(x, self, mask, *tensors)  # type: ignore[no-untyped-call]
        return shaped(y, x)

    def composed(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by torch operations."""
        W, _ = self.view.read()
        if mask is None and plain_call(self.view.module):
            return self._scaled(apply(self.view, x, W), self.direction.delta(x, None))
        y: Tensor = self.view.module(x)
        factor = self.factor()
        kept = apply(self.view, drop(x, mask), W)
        return (y + (factor - 1) * kept + factor * self.direction.delta(x, mask)).to(y.dtype)

    def _scaled(self, y: Tensor, more: Tensor | None = None) -> Tensor:
        """f ∘ (y + more) + b in y's dtype."""
        _, b = self.view.parameters()
        z = self.factor() * (y if more is None else y + more)
        return (z if b is None else z + b).to(y.dtype)

    def factor(self) -> Tensor:
        """f (out,): m / ‖V‖, and m for a row of zeros, which stays zero."""
        if self.f is None:
            W, _ = self.view.read()
            # Under autocast a length would be off by a percent. It gets no gradient (section 4.3).
            with without_autocast(W):
                with torch.no_grad():
                    length = self.lengths(W)
                self.f = self.magnitude / torch.where(length > 0, length, 1.0)
        return self.f

    def lengths(self, W: Tensor) -> Tensor:
        """‖V‖ of each row, (out,), from matmuls with A and B.

        ‖W‖² + 2s rowsum(B ∘ W Aᵀ) + s² rowsum(B A Aᵀ ∘ B). If the terms cancel to less than a
        tenth, the rounding of that sum would show: those rows are computed from V itself.

        On an accelerator V is computed: to ask which rows cancelled would make the CPU wait for it.
        """
        A, B = self.A, self.s * self.B
        if self.start is not None:
            A, B = torch.cat([A, self.start[0]]), torch.cat([B, -self.s * self.start[1]], dim=1)
        if torch.compiler.is_compiling() or W.device.type != "cpu":  # the meta device has no values
            whole: Tensor = torch.linalg.vector_norm(W + B @ A, dim=1)
            return whole
        W = W.to(A.dtype)
        base = torch.linalg.vector_norm(W, dim=1).square()
        update = ((B @ (A @ A.T)) * B).sum(dim=1)
        square = base + 2 * (B * (W @ A.T)).sum(dim=1) + update
        cancelled = (square < 0.1 * (base + update)).nonzero().flatten()
        if len(cancelled):
            square[cancelled] = (W[cancelled] + B[cancelled] @ A).square().sum(dim=1)
        lengths: Tensor = square.sqrt()
        return lengths


class _DoRA(torch.autograd.Function):
    """y = x Wᵀ + b + c (f ∘ z − q), q = (m ∘ x) Wᵀ, z = q + s (m ∘ x)(B A − B₀ A₀)ᵀ: with dropout.

    h  = (m ∘ x) Aᵀ   gz = c f ∘ g   gf = c Σ g ∘ z
    gA = s (gz B)ᵀ (m ∘ x)   gB = s gzᵀ h   gb = Σ g
    gx = g W + m ∘ ((gz − c g) W + s gz (B A − B₀ A₀))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: DoRAKernel, mask: Mask, b: Tensor | None, A: Tensor, B: Tensor,
        f: Tensor,
    ) -> Tensor:  # fmt: skip
        stored, dtype = stored_weight(k.view, x)
        with without_autocast(x):
            rows, W = as_rows(x, dtype), k.view.unpacked(stored, dtype)
            y = F.linear(rows, W, None if b is None else cast(b, dtype))
            kept, factors = mask.keep(rows).mul_(rows), factor_pairs(A, B, k.s, k.start, dtype)
            q = F.linear(kept, W)
            hs = [kept @ A.t() for A, _ in factors]
            z = updated(q, hs, factors)
            y = (y + mask.scale * (f * z - q)).to(dtype)
        needs_A = ctx.needs_input_grad[4]
        save_for_backward(
            ctx, x, dtype, mask, (x if needs_A else None, hs[0], f, z), stored, *factors
        )
        ctx.view, ctx.s, ctx.rank = k.view, k.s, len(A)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (mask, ((x, h, f, z), stored, *factors)) = grads, saved(ctx)
        needs_x, _, _, needs_b, _, needs_B, needs_f = ctx.needs_input_grad
        gx = gB = gb = gf = None
        assert mask is not None
        with without_autocast(g):
            W, gz = ctx.view.unpacked(stored, ctx.dtype), (mask.scale * f * g).to(ctx.dtype)
            rows = None if x is None else as_rows(x, ctx.dtype)
            thin = [(gz @ up.t(), A) for A, up in factors]
            gA, _ = thin_gradients(thin, rows, mask, False)
            if gA is not None:
                gA = gA[: ctx.rank]
            if needs_x:
                _, gx = thin_gradients(thin, None, None, True)
                assert gx is not None
                gx.addmm_(torch.sub(gz, g, alpha=mask.scale), W)
                for part, keep in mask.blocks(len(gx), gx.dtype):
                    drop_(gx[part], keep)
                gx = gx.addmm_(g, W).view(ctx.shape).to(ctx.x_dtype)
            if needs_B:
                gB = ctx.s * summed(h, gz)[: ctx.rank].t()
            if needs_b:
                gb = g.sum(0, dtype=f.dtype)
            if needs_f:
                gf = mask.scale * (g * z).sum(0, dtype=f.dtype)
        return gx, None, None, gb, gA, gB, gf
