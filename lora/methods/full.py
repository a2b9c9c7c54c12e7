"""Full fine-tuning: trains every parameter of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora.method import Selection
from lora.settings import MethodConfig


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full fine-tuning has no settings."""


class Full(Selection):
    """Trains every parameter of the model: W' is the trained W.

    The original weights are not kept (keeps_base = False), because they would double the memory of
    the method that needs most. So the saved file contains the whole model, and loads on any base of
    the same architecture.
    """

    name = "full"
    paper = "Devlin et al. 2018, arXiv:1810.04805, section 3.2"
    Config = FullConfig
    peft_type = "FULL"
    in_peft = False  # PEFT has no such peft_type
    when = "The reference for all others. With much data, if each task can have its own model."
    learning_rate = 5e-5
    keeps_base = False
    exempt: ClassVar = {
        "disabled_is_base": "the original weights are not kept",
        "restore_is_bit_exact": "the original weights are not kept",
        "base_bits_stay": "the original weights are not kept",
        "another_base_is_found_out": "the file contains the whole model",
    }

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: FullConfig) -> bool:
        return True
