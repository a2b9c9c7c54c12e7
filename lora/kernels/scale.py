"""A factor per feature: l ∘ (x Wᵀ + b), or (x ∘ l) Wᵀ + b, without the matrix l W."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora.kernels.dropout import Mask
from lora.layers import View


@dataclass(frozen=True)
class ScaleKernel:
    """A layer whose outputs (out,) or inputs (in,) are scaled by `factor`."""

    view: View
    factor: Tensor
    of_inputs: bool

    def composed(self, x: Tensor, mask: Mask | None) -> Tensor:
        """y (..., out). There is no dropout on a factor."""
        if self.of_inputs:
            y: Tensor = self.view.module((x * self.factor).to(x.dtype))
            return y
        y = self.view.module(x)
        return (y * self.factor).to(y.dtype)

    fused = composed
