"""LoRA: a frozen weight and a trained product of two thin matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.errors import ConfigError
from lora.kernels.lowrank import LowRankKernel
from lora.layers import View
from lora.methods._lowrank import VARIANTS, LowRank, LowRankConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Settings of LoRA. The update is scaled by lora_alpha / r."""

    lora_bias: bool = False
    """Give B a trainable bias. It is scaled like the update and added to the layer's output.
    (--bias trains biases of the base.)"""


class LoRA(LowRank):
    """W' = W + (lora_alpha / r) B A.  LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3.

    x (..., in) -> y (..., out), dtype of base_layer(x)
    lora_A (r, in)   kaiming_uniform(a=√5), as in loralib and PEFT; the paper says Gaussian
    lora_B (out, r)  zeros, so W' = W at step 0
    lora_B_bias (out,) with lora_bias: b' = b + (lora_alpha / r) lora_B_bias, zeros at step 0
    Cost: r·(in+out) parameters; 2·r·(in+out) FLOP per token.   Raises: ConfigError if r < 1.
    """

    name = "lora"
    paper = "arXiv:2106.09685"
    when = "Try this first: small, fast, merges into the base, and every tool reads it."
    Config = LoRAConfig
    additive = True
    states: ClassVar = {"use_dora": False}
    variants = VARIANTS

    config: LoRAConfig

    def __init__(self, view: View, config: LoRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.lora_B_bias = None
        if config.lora_bias:
            if view.of_ids:
                raise ConfigError(f"lora_bias: {module} is an Embedding, which has no bias.")
            self.lora_B_bias = self.new(view, view.out_features)
            self.keys = {**self.keys, "lora_B_bias": "lora_B.bias"}

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.lora_B_bias is not None:
            b = self.scaling * self.lora_B_bias + (0.0 if b is None else b)
        return W + self.update(), b

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        super().fill(view, generator)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        bias = view.out_features if config.lora_bias else 0
        return super().size(view, config, module) + bias

    def kernel(self, view: View) -> LowRankKernel:
        shift = None if self.lora_B_bias is None else self.scaling * self.lora_B_bias
        return LowRankKernel(
            view, self.lora_A, self.lora_B, self.scaling, start=self.start, shift=shift
        )

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        if config.lora_bias and not bias:
            return "lora_bias cannot be merged into a layer without a bias"
        return super().exemption(clause, config, bias)
