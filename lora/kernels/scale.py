"""A factor per feature: l ∘ (x Wᵀ + b), or (x ∘ l) Wᵀ + b, without the matrix l W."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora.kernels.dropout import Mask, drop
from lora.layers import View, apply


@dataclass(slots=True, eq=False)
class ScaleKernel:
    """A layer whose outputs (out,) or inputs (in,) are scaled by `factor`."""

    view: View
    factor: Tensor
    of_inputs: bool

    def composed(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out), by torch operations."""
        if mask is not None:
            return self._with_dropout(x, mask)
        if self.of_inputs:
            y: Tensor = self.view.module((x * self.factor).to(x.dtype))
            return y
        y = self.view.module(x)
        return (y * self.factor).to(y.dtype)

    fused = composed

    def _with_dropout(self, x: Tensor, mask: Mask) -> Tensor:
        """The layer's output plus (W' − W)(m ∘ x) + b' − b. (IA)³ has no setting for dropout: this
        is for an adapter whose `dropout` is set by hand."""
        W, b = self.view.read()
        y: Tensor = self.view.module(x)
        dropped, more = drop(x, mask), self.factor - 1
        if self.of_inputs:
            return (y + apply(self.view, dropped * more, W)).to(y.dtype)
        return (y + more * apply(self.view, dropped, W, b)).to(y.dtype)
