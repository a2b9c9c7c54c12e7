"""BitFit: trains the biases and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora.layers import fits
from lora.method import Selection
from lora.settings import PartialConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(PartialConfig):
    """Settings of BitFit."""

    small: bool = False
    """Train only the biases of the queries and of the first feed-forward layer, as in the paper."""


class BitFit(Selection):
    """b' is the trained b. W' = W.  BitFit, Ben Zaken et al. 2022, arXiv:2106.10199, section 3.

    Trains all biases: 0.09 % of BERT-base. With `small`, only those of the query projections and of
    the first layer of each feed-forward block: 0.04 %.
    """

    name = "bitfit"
    paper = "arXiv:2106.10199"
    when = "With an encoder and little to medium data, if nothing may be added to the model."
    Config = BitFitConfig
    learning_rate = 4e-3
    peft_type = "BITFIT"
    in_peft = False  # PEFT has no such peft_type

    QUERIES = ("query", "q_lin", "q_proj", "q", "query_proj")
    MIDDLES = ("intermediate.dense", "ffn.lin1", "fc1", "wi", "wi_0", "wi_1", "up_proj")

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: BitFitConfig) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or not config.small:
            return leaf == "bias"
        return fits(module, cls.QUERIES + cls.MIDDLES)
