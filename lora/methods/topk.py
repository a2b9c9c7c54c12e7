"""The last layers train, the first stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora.layers import backbone, inside
from lora.method import Selection
from lora.settings import PartialConfig, whole_number


@dataclass(frozen=True, kw_only=True)
class TopKConfig(PartialConfig):
    """Settings of top-k fine-tuning."""

    k: int = 2
    """How many of the last blocks train, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("k", self.k)


class TopK(Selection):
    """W' is W, trained: in the last k blocks, the layers after them, and the head.

    Howard and Ruder 2018, arXiv:1801.06146, section 3.3. The blocks are the longest list of
    modules that is in no other list, or the model's children if there is no list. Embeddings come
    before them.
    """

    name = "topk"
    paper = "arXiv:1801.06146"
    when = "If the task is close to the pretraining and memory is short for full fine-tuning."
    Config = TopKConfig
    peft_type = "TOPK"
    in_peft = False  # PEFT refuses the file by that name
    learning_rate = 3e-4

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: TopKConfig) -> bool:
        modules = dict(model.named_modules())
        lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        outer = [n for n in lists if not any(n != other and inside(n, other) for other in lists)]
        # Of lists of one length the last: the decoder comes after the encoder.
        path = max(reversed(outer), key=lambda n: len(modules[n]._modules), default="")
        blocks = list(modules[path]._modules)
        chosen = tuple(f"{path}.{block}".lstrip(".") for block in blocks[-config.k :])
        if any(inside(name, block) for block in chosen):
            return True
        if inside(name, path):
            return False
        trunk, order = backbone(model), list(dict(model.named_parameters()))
        last = max((i for i, n in enumerate(order) if inside(n, path)), default=-1)
        return order.index(name) > last or (bool(trunk) and not inside(name, trunk))
