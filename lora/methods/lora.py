"""LoRA: a frozen weight and a trained product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter, AdapterConfig, check, is_number
from lora.layers import View


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA. The update is scaled by lora_alpha / r."""

    training_only: ClassVar[frozenset[str]] = frozenset({"lora_dropout"})

    r: int = 8
    """Rank of the update, at least 1."""
    lora_alpha: float = 8.0
    """Numerator of the scaling lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training, 0 <= p < 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        check("r", self.r, "a whole number of at least 1", whole and self.r >= 1)
        alpha = self.lora_alpha
        check("lora_alpha", alpha, "a positive number", is_number(alpha) and alpha > 0)
        object.__setattr__(self, "lora_alpha", float(alpha))
        p = self.lora_dropout
        check("lora_dropout", p, "a number with 0 <= p < 1", is_number(p) and 0 <= p < 1)


class LoRA(Adapter):
    """W' = W + (lora_alpha / r) B A.  LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3.

    x (..., in) -> y (..., out), dtype of base_layer(x)
    lora_A (r, in)   kaiming_uniform(a=√5); the paper says Gaussian, loralib and PEFT do this
    lora_B (out, r)  zeros, so W' = W at step 0
    Both are made in float32 at least, whatever the base's dtype.
    Cost: r·(in+out) parameters; 2·r·(in+out) FLOP per token.   Raises: ConfigError if r < 1.
    """

    name = "lora"
    paper = "arXiv:2106.09685"
    Config = LoRAConfig
    peft_type = "LORA"
    additive = True
    example: ClassVar = {"r": 3, "lora_alpha": 7.0}
    keys: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    neutral: ClassVar = {
        "bias": "none",
        "fan_in_fan_out": ...,  # follows from the layer's kind
        "qalora_group_size": ...,  # read under use_qalora only
        "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # these leave W alone
        "loftq_config": ...,  # settings of inits
        "eva_config": ...,
        "corda_config": ...,
        "lora_ga_config": ...,
        "layers_pattern": ...,  # read under layers_to_transform only
        "megatron_core": ...,  # read under megatron_config only
    }

    config: LoRAConfig

    def __init__(self, view: View, config: LoRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        weight, _ = view.parameters()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        like = torch.empty(0, device=weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(like.new_empty(config.r, view.in_features))
        self.lora_B = nn.Parameter(like.new_empty(view.out_features, config.r))
        self.scaling = config.lora_alpha / config.r
        self.lora_dropout = config.lora_dropout

    def fill(self, generator: Callable[[str], torch.Generator]) -> None:
        start = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator("lora_A"))
        self.lora_A.copy_(start)
        self.lora_B.zero_()

    @classmethod
    def size(cls, in_features: int, out_features: int, bias: bool, config: LoRAConfig) -> int:
        return config.r * (in_features + out_features)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.scaling * (self.lora_B @ self.lora_A), b

    def delta(self, view: View, x: Tensor, mask: Tensor | None) -> Tensor:
        dropped = (x if mask is None else x * mask).to(self.lora_A.dtype)
        h = F.linear(dropped, self.lora_A)  # (..., r)
        return self.scaling * F.linear(h, self.lora_B)

    def compute(self, view: View, x: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = view.module(x)
        return (y + self.delta(view, x, mask)).to(y.dtype)
