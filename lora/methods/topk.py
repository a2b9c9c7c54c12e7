"""Top-k fine-tuning: trains the last k blocks and the head."""

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
    """Number of the last blocks to train, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("k", self.k)


class TopK(Selection):
    """Trains every parameter of the last k blocks, of the layers after them, and of the head.

    Howard and Ruder 2018, arXiv:1801.06146, section 3.3. The blocks are the longest nn.ModuleList
    or nn.Sequential that is not inside another one. If the model has none, its children count as
    the blocks. The embeddings stay frozen, since they come before the blocks.
    """

    name = "topk"
    paper = "arXiv:1801.06146"
    when = "If the task is close to the pretraining, with too little memory for full fine-tuning."
    Config = TopKConfig
    peft_type = "TOPK"
    in_peft = False  # PEFT has no such peft_type
    learning_rate = 3e-4

    @classmethod
    def selects(cls, name: str, model: nn.Module, config: TopKConfig) -> bool:
        modules = dict(model.named_modules())
        lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        outer = [n for n in lists if not any(n != other and inside(n, other) for other in lists)]
        # Of several lists with the same length the last: a decoder comes after its encoder.
        path = max(reversed(outer), key=lambda n: len(modules[n]._modules), default="")
        blocks = list(modules[path]._modules)
        chosen = tuple(f"{path}.{block}".lstrip(".") for block in blocks[-config.k :])
        if any(inside(name, block) for block in chosen):
            return True
        if inside(name, path):
            return False
        # What the model registers after the blocks, such as the last norm, follows them.
        trunk, order = backbone(model), list(dict(model.named_parameters()))
        last = max((i for i, n in enumerate(order) if inside(n, path)), default=-1)
        return order.index(name) > last or (bool(trunk) and not inside(name, trunk))
