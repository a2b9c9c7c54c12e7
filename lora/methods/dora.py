"""DoRA: trains the length and the direction of each weight row separately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.kernels.dora import DoRAKernel
from lora.layers import View
from lora.methods._lowrank import LowRank, LowRankConfig


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LowRankConfig):
    """Settings of DoRA: those of LoRA."""


class DoRA(LowRank):
    """W' = m V / ‖V‖, V = W + (lora_alpha / r) B A.  DoRA, Liu et al. 2024, arXiv:2402.09353,
    eq. 5.

    ‖V‖ (out,) is the length of each row of V; it gets no gradient (section 4.3). b' = b: the bias
    is not part of W and is not scaled.
    lora_A, lora_B as LoRA's
    lora_magnitude_vector (out,)  m; initially ‖W‖, so W' = W at step 0
    Cost: r·(in+out) + out parameters. The kernel computes the lengths without V: 2·r·in·out FLOP a
    step. With dropout, DoRA needs a second matmul with W, here and in PEFT.
    """

    name = "dora"
    paper = "arXiv:2402.09353"
    when = "If LoRA at a small rank falls short of full. Dropout nearly doubles a step's time."
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
        length = torch.linalg.vector_norm(V.detach(), dim=1)
        # A row of zeros has no direction. It stays zero, instead of 0 / 0.
        return (self.lora_magnitude_vector / torch.where(length > 0, length, 1.0))[:, None] * V, b

    def kernel(self, view: View) -> DoRAKernel:
        m = self.lora_magnitude_vector
        return DoRAKernel(view, self.lora_A, self.lora_B, self.scaling, m, self.start)
