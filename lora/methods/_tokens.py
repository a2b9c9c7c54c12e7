"""Trained rows of an embedding: a few tokens learn, the rest of the table stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, check
from lora.errors import TargetError
from lora.layers import View, fits, kind

Make = Callable[[View, Any, str], Adapter]


class Tokens(Adapter):
    """W' = W, but for the rows of some ids, which train.  PEFT's trainable_token_indices.

    trainable_tokens_delta (n, dim)   the rows in the base's place, not what is added to them; W's
    own, so W' = W at step 0. On a layer that is tied to the table the same rows act.
    Cost: n·dim parameters; a copy of the table at every step.
    """

    ids: Tensor
    keys = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}

    def __init__(self, view: View, config: Any, module: str, ids: Sequence[int]) -> None:
        super().__init__(view, config, module)
        weight, _ = view.parameters()
        good = all(0 <= number < len(weight) for number in ids)
        check("trainable_token_indices", ids, f"ids below the {len(weight)} of {module}", good)
        self.by_column = view.transposed
        self.numbers = tuple(ids)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.trainable_tokens_delta = self.new(view, len(ids), weight.shape[1])

    def follow(self, leader: Tokens) -> None:
        """Act with the rows of the adapter on the layer that this one's is tied to."""
        self.trainable_tokens_delta = leader.trainable_tokens_delta
        self.leader = leader.module_name

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.ids.copy_(torch.tensor(self.numbers))  # which to_empty takes away
        W, _ = view.read()
        self.trainable_tokens_delta.copy_((W.T if self.by_column else W)[self.ids])

    @classmethod
    def size(cls, view: View, config: Any, module: str) -> int:
        raise NotImplementedError  # the ids are not in the config by layer

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        stored = W.T if self.by_column else W  # (vocab, dim)
        rows = self.trainable_tokens_delta.to(W.dtype)
        stored = stored.index_copy(0, self.ids, rows)
        return stored.T if self.by_column else stored, b

    def param_groups(self) -> dict[float, list[nn.Parameter]]:
        return {} if self.leader else super().param_groups()

    def placed(self) -> dict[str, Tensor]:
        return {} if self.leader else super().placed()


def token_layers(model: nn.Module, modules: Mapping[str, nn.Module], asked: Any) -> dict[str, Make]:
    """What makes the adapter of each layer that trainable_token_indices means, and of those tied
    to it, by name. `asked` are ids of the input embedding, or of layers by name or dotted ending.
    """
    if not asked:
        return {}
    if not isinstance(asked, Mapping):
        table = getattr(model, "get_input_embeddings", lambda: None)()
        table = getattr(table, "base_layer", table)
        names = [name for name, module in modules.items() if module is table]
        if not names:
            raise TargetError(
                f"trainable_token_indices: {type(model).__name__} names no input embedding. Set a"
                " mapping of the layer's name to its ids."
            )
        asked = {names[0]: asked}
    found: dict[str, Make] = {}
    for end, ids in asked.items():
        hits = [name for name in modules if name and fits(name, (end,))]
        if not hits or not all(kind(modules[name]) for name in hits):
            raise TargetError(f"trainable_token_indices: {end!r} names no embedding of the model.")
        for hit in hits:
            weight = modules[hit].weight
            tied = [n for n, m in modules.items() if m._parameters.get("weight") is weight]
            for name in (hit, *tied):
                found.setdefault(name, partial(Tokens, ids=tuple(ids)))
    return found
