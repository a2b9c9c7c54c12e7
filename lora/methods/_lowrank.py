"""What LoRA and DoRA share: B A on a layer, its settings, and the kernel that computes it.

Inits with BA ≠ 0 (pissa, olora, lora_ga) never modify the base weights: their product is
subtracted as a frozen term, W' = W + s (BA − B₀A₀), so that the model begins as the base.
The saved file is an ordinary LoRA of rank 2r: [A; A₀] and [B, −B₀].

If the base is quantized together with the injection (inject(..., pack=names)), pissa, olora and
loftq absorb what rounding loses: the base becomes Q = W − sB₀A₀ in NF4, W' = Q + sBA, and nothing
is subtracted. The model then begins nearer to W than W in NF4 would be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lora.adapter import Adapter
from lora.kernels import Fast
from lora.kernels.lowrank import LowRankKernel
from lora.layers import View
from lora.methods._lowrank_options import LowRankOptions, pick
from lora.methods._starts import decompose, start_at_zero
from lora.methods._tokens import token_ids
from lora.patterns import ENDING, check_pattern
from lora.settings import (
    AdapterConfig,
    check,
    check_count,
    positive,
    probability,
    strength,
    whole_number,
)

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """Settings of a low-rank update. It is scaled by lora_alpha / r."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"lora_dropout", "use_lorafa", "loraplus_lr_ratio"}
    )
    unsaved: ClassVar[frozenset[str]] = frozenset({"use_lorafa", "loraplus_lr_ratio"})

    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 8.0
    """The update is scaled by lora_alpha / r, or with --use-rslora by lora_alpha / √r."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's input, 0 <= p < 1."""
    use_rslora: bool = False
    """Scale by lora_alpha / √r instead of lora_alpha / r, which helps at large ranks
    (arXiv:2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of individual layers, as LAYER RANK pairs, such as q_proj 16. LAYER is a layer's name,
    the last part of its name, or a regular expression. The other layers have the rank --r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """lora_alpha of individual layers, as LAYER ALPHA pairs, like --rank-pattern."""
    init_lora_weights: str = "default"
    """Initialization of A and B: default (A random uniform, B zero), gaussian (A Gaussian, B zero),
    pissa, pissa_niter_N (N iterations of a fast SVD), olora, eva or lora_ga; on a base in 4 bits
    also loftq or loftq_N (N iterations)."""
    bias: Bias = "none"
    """Biases of the base to train: none, lora_only (those of adapted layers), or all."""
    use_lorafa: bool = False
    """LoRA-FA: freeze A and train only B (arXiv:2308.03303)."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: train B at this multiple of the learning rate (arXiv:2402.12354, which uses 16)."""
    trainable_token_indices: tuple[int, ...] | dict[str, list[int]] = ()
    """Ids of tokens whose embedding rows to train in full (from Python, also {layer: ids}). The
    same rows of layers that share the embedding's weight, such as a tied output head, are trained
    with them."""

    def __post_init__(self) -> None:
        init: Any = self.init_lora_weights
        if init is True:  # as PEFT writes the default
            object.__setattr__(self, "init_lora_weights", "default")
        super().__post_init__()
        whole_number("r", self.r)
        strength("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        for name, check_value in (("rank_pattern", whole_number), ("alpha_pattern", strength)):
            pattern = getattr(self, name)
            check_count(name, len(pattern))
            for key, value in pattern.items():
                check_value(f"{name} of {key}", value)
                check_pattern(name, key, ENDING)
        init = self.init_lora_weights
        good = re.fullmatch(
            "default|gaussian|pissa(_niter_[1-9][0-9]*)?|olora|eva|lora_ga|loftq(_[1-9][0-9]*)?",
            init,
        )
        wanted = "default, gaussian, pissa, pissa_niter_N, olora, eva, lora_ga, loftq or loftq_N"
        check("init_lora_weights", init, wanted, bool(good))
        positive("loraplus_lr_ratio", self.loraplus_lr_ratio)
        asked = token_ids("trainable_token_indices", self.trainable_token_indices)
        object.__setattr__(self, "trainable_token_indices", asked)


_MORE = {"r": 3, "lora_alpha": 7.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, **_MORE},
    "patterns": {"r": 3, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 5.0}},
    "lora_bias": {"lora_bias": True, **_MORE},
    "bias=all": {"bias": "all", **_MORE},
    "bias=lora_only": {"bias": "lora_only", **_MORE},
    **{init: {"init_lora_weights": init, **_MORE}
       for init in ("gaussian", "pissa", "pissa_niter_4", "olora")},
    "lora-fa": {"use_lorafa": True, **_MORE},
    "lora+": {"loraplus_lr_ratio": 16.0, **_MORE},
}  # fmt: skip
"""The settings of LoRA under which the contract checks it."""


class LowRank(LowRankOptions, Fast, Adapter):
    """s (BA − B₀A₀), s = lora_alpha / r.

    lora_A (r, in), lora_B (out, r), in float32 at least; start_A, start_B their frozen initial
    values if B A ≠ 0 there.
    """

    config: LowRankConfig
    start_A: Tensor  # noqa: N815
    start_B: Tensor  # noqa: N815

    def __init__(self, view: View, config: LowRankConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.r = pick(config.rank_pattern, module, config.r)
        self.alpha = pick(config.alpha_pattern, module, config.lora_alpha)
        self.scaling = self.alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.dropout = config.lora_dropout
        self.lora_A = self.new(view, self.r, view.in_features)
        self.lora_B = self.new(view, view.out_features, self.r)
        self.set_up(view, config)  # file keys, frozen parameters, buffers of A₀ and B₀

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.check_fresh()
        W, _ = view.read()
        if self.starts_away and self.init != "lora_ga":  # which calibrate fills
            W = W.to(self.lora_A.dtype)
            self.begin(*decompose(self.init, W, self.r, self.scaling, generator("lora_A")))
            return
        std = 1 / self.r if self.init == "gaussian" else None
        start_at_zero(self.lora_A, self.lora_B, view, std, generator(self.random))

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        r: int = pick(config.rank_pattern, module, config.r)
        return r * (view.in_features + view.out_features)

    def update(self) -> Tensor:
        """s (BA − B₀A₀), (out, in)."""
        update: Tensor = self.scaling * (self.lora_B @ self.lora_A)
        # Subtracted from the update, not from W: at step 0 the difference is exactly zero.
        if self.starts_away:
            update = update - self.scaling * (self.start_B @ self.start_A)
        return update

    def kernel(self, view: View) -> Any:
        return LowRankKernel(view, self.lora_A, self.lora_B, self.scaling, start=self.start)
