"""HiRA: multiplies the weight elementwise by a low-rank product, for an update of high rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lora.adapter import Adapter
from lora.layers import View
from lora.methods._starts import start_at_zero
from lora.settings import AdapterConfig, probability, whole_number


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    """Settings of HiRA."""

    training_only: ClassVar[frozenset[str]] = frozenset({"hira_dropout"})
    r: int = 32
    """Rank of the product B A."""
    hira_dropout: float = 0.0
    """Dropout probability of the update's input, 0 <= p < 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("r", self.r)
        probability("hira_dropout", self.hira_dropout)


class HiRA(Adapter):
    """W' = W + W ∘ (B A).  HiRA, Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS, eq. 4.

    hira_A (r, in) kaiming_uniform(a=√5), hira_B (out, r) zeros; on an Embedding A zeros, B N(0, 1).
    """

    name, paper, Config, peft_type = "hira", "openreview:TwJrTz9cRS", HiRAConfig, "HIRA"
    learning_rate = 3e-3
    when = "If LoRA's rank is too low: as many parameters, but an update of high rank. Slower."
    neutral: ClassVar = {"fan_in_fan_out": ..., "init_weights": (True, "gaussian")}

    def __init__(self, view: View, config: HiRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.hira_A = self.new(view, config.r, view.in_features)
        self.hira_B = self.new(view, view.out_features, config.r)
        self.dropout = config.hira_dropout
        self.keys = {f"hira_{m}": f"hira_embedding_{m}" for m in ("AB" if view.of_ids else "")}

    def fill(self, view: View, generator: Callable[[str], Generator]) -> None:
        start_at_zero(self.hira_A, self.hira_B, view, None, generator("hira_A"))

    @classmethod
    def size(cls, view: View, config: HiRAConfig, module: str) -> int:
        return config.r * (view.in_features + view.out_features)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + W * (self.hira_B @ self.hira_A), b
