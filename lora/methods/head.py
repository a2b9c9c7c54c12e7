"""A linear probe: trains the head on the frozen features of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora.layers import backbone, inside
from lora.method import Selection
from lora.settings import PartialConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig(PartialConfig):
    """Settings of a linear probe. If the model has no backbone, modules_to_save names its head."""


class Head(Selection):
    """Trains the parameters outside the pretrained backbone.  Linear probe, Alain and Bengio
    2016, arXiv:1610.01644.

    The backbone is the submodule that the model's attribute base_model_prefix names (transformers).
    """

    name = "head"
    paper = "arXiv:1610.01644"
    when = "To see which scores the frozen features reach: the baseline of every comparison."
    Config = HeadConfig
    learning_rate = 5e-3
    peft_type = "HEAD"
    in_peft = False  # PEFT has no such peft_type
    example: ClassVar = {"modules_to_save": ("second",)}

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: HeadConfig) -> bool:
        trunk = backbone(model)
        return bool(trunk) and not inside(name, trunk)
