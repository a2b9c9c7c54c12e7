"""DoRA: the length and the direction of each weight row, trained apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.kernels import fused
from lora.kernels.dropout import Mask, drop
from lora.layers import View, apply
from lora.methods._lowrank import LowRank, LowRankConfig


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LowRankConfig):
    """Settings of DoRA: those of LoRA."""


class DoRA(LowRank):
    """W' = m V / ‖V‖, V = W + (lora_alpha / r) B A.  DoRA, Liu et al. 2024, arXiv:2402.09353,
    eq. 5.

    ‖V‖ (out,) is the length of each row of V; it gets no gradient (section 4.3). b' = b: the bias
    is no part of W, and is not scaled.
    lora_A, lora_B as LoRA's
    lora_magnitude_vector (out,)  m; ‖W‖ of W at the injection, so W' = W at step 0
    Cost: r·(in+out) + out parameters. The lengths are had without V: 2·r·in·out FLOP a step;
    dropout costs a second product with W.
    """

    name = "dora"
    paper = "arXiv:2402.09353"
    when = "At small ranks, where LoRA falls short of full fine-tuning; dropout doubles its step."
    Config = DoRAConfig
    states: ClassVar = {"use_dora": True}
    variants: ClassVar = {
        "rslora": {"r": 3, "lora_alpha": 7.0, "use_rslora": True},
        "bias=all": {"r": 3, "lora_alpha": 7.0, "bias": "all"},
        "pissa": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "pissa"},
    }

    config: DoRAConfig

    def __init__(self, view: View, config: DoRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.lora_magnitude_vector = self.new(view, view.out_features)

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        super().fill(view, generator)
        W, _ = view.read()
        dtype = self.lora_magnitude_vector.dtype
        self.lora_magnitude_vector.copy_(torch.linalg.vector_norm(W, dim=1, dtype=dtype))

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        return super().size(view, config, module) + view.out_features

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        V = W + self.update()
        return self.factor(torch.linalg.vector_norm(V.detach(), dim=1))[:, None] * V, b

    def factor(self, length: Tensor) -> Tensor:
        """m / ‖V‖ (out,); of a row of zeros, which stays one, 1 / ‖V‖ is taken as 1."""
        factor: Tensor = self.lora_magnitude_vector / torch.where(length > 0, length, 1.0)
        return factor

    def compute(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        W, b = view.read()
        with fused.without_autocast(W):  # in which a row's length would be off by a percent
            factor = self.factor(self.lengths(W))
        fast = fused.possible(view, x)
        own = self.lora_A, self.lora_B, self.scaling
        if mask is not None and fast:
            return fused.dora(view, x, b, *own, factor, mask, self.start)
        y: Tensor
        if mask is not None:
            y = view.module(x)
            found = y + (factor - 1) * apply(view, drop(x, mask), W)
            return (found + factor * self.updated(view, x, mask)).to(y.dtype)
        if fast:
            (y,) = fused.low_rank(x, [fused.Update(view, None, *own, self.start)], None)
            found = factor * y
        else:
            y = apply(view, x, W)
            found = factor * (y + self.updated(view, x, None))
        return (found if b is None else found + b).to(y.dtype)

    @torch.no_grad()
    def lengths(self, W: Tensor) -> Tensor:
        """‖W + s(BA − B₀A₀)‖ of each row, (out,), from thin products.

        ‖W‖² + 2s rowsum(B ∘ W Aᵀ) + s² rowsum(B A Aᵀ ∘ B). Where the terms cancel to less than a
        tenth, the rounding of that sum would show: those rows are had from V itself.
        """
        dtype = self.lora_A.dtype
        if torch.compiler.is_compiling() or W.is_meta:  # which follow no data
            whole: Tensor = torch.linalg.vector_norm(W + self.update(), dim=1)
            return whole
        A: Tensor = self.lora_A
        B: Tensor = self.scaling * self.lora_B
        if self.starts_away:
            A = torch.cat([A, self.start_A])
            B = torch.cat([B, -self.scaling * self.start_B], dim=1)
        W = W.to(dtype)
        own = torch.linalg.vector_norm(W, dim=1).square()
        update = ((B @ (A @ A.T)) * B).sum(dim=1)
        square = own + 2 * (B * (W @ A.T)).sum(dim=1) + update
        cancelled = (square < 0.1 * (own + update)).nonzero().flatten()
        if len(cancelled):
            square[cancelled] = (W[cancelled] + B[cancelled] @ A).square().sum(dim=1)
        lengths: Tensor = square.sqrt()
        return lengths
