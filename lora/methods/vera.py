"""VeRA: two frozen random matrices shared by all layers, and two trained vectors per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.adapter import Adapter
from lora.declared import is_number
from lora.kernels import Fast
from lora.kernels.vera import VeRAKernel
from lora.layers import View
from lora.method import Shares
from lora.settings import AdapterConfig, check, probability, whole_number


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Settings of VeRA."""

    training_only: ClassVar[frozenset[str]] = frozenset({"vera_dropout", "d_initial"})

    r: int = 256
    """Rank of the shared matrices, at least 1. Larger than LoRA's, since they do not train."""
    d_initial: float = 0.1
    """Initial value of λ_d, the trained vector between the two matrices."""
    projection_prng_key: int = 0
    """Seed of the shared matrices."""
    save_projection: bool = True
    """Save the shared random matrices too. Otherwise they are drawn again from their seed,
    --projection-prng-key, when the adapter is loaded."""
    vera_dropout: float = 0.0
    """Probability of dropping an element of the update's input in training, 0 <= p < 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("r", self.r)
        whole_number("projection_prng_key", self.projection_prng_key, least=0, most=2**63 - 1)
        start = self.d_initial
        small = is_number(start) and 0 < abs(start) <= 1e6
        check("d_initial", start, "a number other than 0, at most a million in size", small)
        probability("vera_dropout", self.vera_dropout)


class VeRA(Shares, Fast, Adapter):
    """W' = W + Λ_b B Λ_d A.  VeRA, Kopiczko et al. 2024, arXiv:2310.11454, eq. 2.

    vera_A (r, largest in), vera_B (largest out, r)  frozen, shared by all layers: Kaiming uniform,
    seeded by projection_prng_key, drawn on the CPU: the values that PEFT draws there. A layer uses
    the first `in` columns of vera_A and the first `out` rows of vera_B.
    vera_lambda_d (r,)    diagonal of Λ_d; initially d_initial
    vera_lambda_b (out,)  diagonal of Λ_b; zeros, so W' = W at step 0
    Cost: r + out parameters per layer; 2·r·(in+out) FLOP per token.
    """

    name = "vera"
    paper = "arXiv:2310.11454"
    when = "If the files must be tiny, with accuracy close to LoRA's."
    Config = VeRAConfig
    peft_type = "VERA"
    learning_rate = 3e-2
    additive = True
    example: ClassVar = {"r": 5, "d_initial": 0.7}
    variants: ClassVar = {"unsaved": {"r": 5, "d_initial": 0.7, "save_projection": False}}
    unfiled = frozenset({"exclude_modules"})
    neutral: ClassVar = {"bias": "none", "fan_in_fan_out": ..., "init_weights": ...}
    exempt: ClassVar = {
        "another_seed_other_bits": "its only random values are seeded by projection_prng_key"
    }

    # Shares registers these on every layer, as one parameter for all of them.
    vera_A: Tensor  # noqa: N815
    vera_B: Tensor  # noqa: N815

    def __init__(self, view: View, config: VeRAConfig, module: str) -> None:
        super().__init__(view, config, module)
        self.vera_lambda_d = self.new(view, config.r)
        self.vera_lambda_b = self.new(view, view.out_features)
        self.dropout = config.vera_dropout
        self.width = view.in_features

    @classmethod
    def shared(cls, views: Sequence[View], config: VeRAConfig) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        shapes = {
            "vera_A": (config.r, max(view.in_features for view in views)),
            "vera_B": (max(view.out_features for view in views), config.r),
        }
        bounds = {name: math.sqrt(3) * math.sqrt(2) / math.sqrt(s[1]) for name, s in shapes.items()}
        return {
            name: torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(
                -bounds[name], bounds[name], generator=generator
            )
            for name, shape in shapes.items()
        }

    @classmethod
    def saves_shared(cls, config: VeRAConfig) -> bool:
        return config.save_projection

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.vera_lambda_d.fill_(self.config.d_initial)
        self.vera_lambda_b.zero_()

    @classmethod
    def size(cls, view: View, config: VeRAConfig, module: str) -> int:
        return config.r + view.out_features

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns this layer's part of the shared matrices: A (r, in) and B (out, r)."""
        return self.vera_A[:, : self.width], self.vera_B[: len(self.vera_lambda_b)]

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.matrices()
        return W + self.vera_lambda_b[:, None] * (B @ (self.vera_lambda_d[:, None] * A)), b

    def kernel(self, view: View) -> VeRAKernel:
        return VeRAKernel(view, *self.matrices(), self.vera_lambda_d, self.vera_lambda_b)
