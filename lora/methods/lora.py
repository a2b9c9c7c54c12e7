"""LoRA: a frozen weight and a trained product of two thin matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.errors import ConfigError
from lora.kernels.dropout import Mask
from lora.kernels.fused import Update
from lora.layers import View
from lora.methods._lowrank import LowRank, LowRankConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Settings of LoRA. The update is scaled by lora_alpha / r."""

    lora_bias: bool = False
    """B has a bias, which the update adds scaled to the layer's own."""


class LoRA(LowRank):
    """W' = W + (lora_alpha / r) B A.  LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3.

    x (..., in) -> y (..., out), dtype of base_layer(x)
    lora_A (r, in)   kaiming_uniform(a=√5); the paper says Gaussian, loralib and PEFT do this
    lora_B (out, r)  zeros, so W' = W at step 0
    lora_B_bias (out,) with lora_bias: b' = b + (lora_alpha / r) lora_B_bias, zeros at step 0
    Both are made in float32 at least, whatever the base's dtype. Other starts: _lowrank.
    Cost: r·(in+out) parameters; 2·r·(in+out) FLOP per token.   Raises: ConfigError if r < 1.
    """

    name = "lora"
    paper = "arXiv:2106.09685"
    when = "The first to try: small, fast, merges away, and every tool reads it."
    Config = LoRAConfig
    states: ClassVar = {"use_dora": False}
    additive = True
    variants: ClassVar = {
        "rslora": {"r": 3, "lora_alpha": 7.0, "use_rslora": True},
        "patterns": {"r": 3, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 5.0}},
        "lora_bias": {"r": 3, "lora_alpha": 7.0, "lora_bias": True},
        "bias=all": {"r": 3, "lora_alpha": 7.0, "bias": "all"},
        "bias=lora_only": {"r": 3, "lora_alpha": 7.0, "bias": "lora_only"},
        "gaussian": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "gaussian"},
        "pissa": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "pissa"},
        "pissa_niter_4": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "pissa_niter_4"},
        "olora": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "olora"},
        "lora-fa": {"r": 3, "lora_alpha": 7.0, "use_lorafa": True},
        "lora+": {"r": 3, "lora_alpha": 7.0, "loraplus_lr_ratio": 16.0},
    }

    config: LoRAConfig

    def __init__(self, view: View, config: LoRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.lora_B_bias = None
        if config.lora_bias:
            if view.of_ids:
                raise ConfigError(f"lora_bias: {module} is an Embedding, which has no bias.")
            self.lora_B_bias = self.new(view, view.out_features)
            self.keys = {**self.keys, "lora_B_bias": "lora_B.bias"}

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        super().fill(view, generator)
        if self.lora_B_bias is not None:
            self.lora_B_bias.zero_()

    @classmethod
    def exemption(cls, clause: str, config: Any, bias: bool) -> str | None:
        if config.lora_bias and not bias:
            return "lora_bias: there is no bias to merge it into"
        return super().exemption(clause, config, bias)

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        bias = view.out_features if config.lora_bias else 0
        return super().size(view, config, module) + bias

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.update(), self.shifted(b)

    def shifted(self, b: Tensor | None) -> Tensor | None:
        """b' (out,)"""
        if self.lora_B_bias is None:
            return b
        shift: Tensor = self.scaling * self.lora_B_bias
        return shift if b is None else b + shift

    def delta(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        y, shift = self.updated(view, x, mask), self.shifted(None)
        return y if shift is None else y + shift

    def low_rank(self, view: View) -> Update:
        b = self.shifted(view.parameters()[1])
        return Update(view, b, self.lora_A, self.lora_B, self.scaling, self.start)
