"""Trained rows of an embedding: a few tokens learn, the rest of the table stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, trained
from lora.errors import TargetError
from lora.layers import View, kind
from lora.method import Follower, Rates
from lora.settings import check

Make = Callable[[View, Any, str], Adapter]


def token_ids(field: str, asked: Any) -> Any:
    """Ids, or ids by layer, as tuples. Raises ConfigError if there are none, or one comes twice."""
    if isinstance(asked, dict):
        asked = {name: tuple(ids) for name, ids in asked.items()}
    lists = list(asked.values()) if isinstance(asked, dict) else [asked] if asked != () else []
    good = all(ids and len(set(ids)) == len(ids) for ids in lists)
    check(field, asked, "distinct ids, or lists of them by layer", good)
    return asked


class Tokens(Follower, Rates, Adapter):
    """W' = W, but for the rows of some ids, which train.  PEFT's trainable_token_indices.

    trainable_tokens_delta (n, dim)   the rows in the base's place, not what is added to them; W's
    own, so W' = W at step 0. A layer tied to the table acts with the table's adapter's rows.
    Cost: n·dim parameters; a copy of the table at every step.
    """

    ids: Tensor
    keys: Mapping[str, str] = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}

    def __init__(
        self, view: View, config: Any, module: str, ids: Sequence[int], leader: str | None = None
    ) -> None:
        super().__init__(view, config, module)
        self.leader = leader
        rows, dim = self.shape(view)
        good = all(0 <= number < rows for number in ids)
        check("trainable_token_indices", ids, f"ids below the {rows} of {module}", good)
        weight, bias = view.parameters()
        if bias is not None and not bias.is_meta and bool(bias.any()):
            raise TargetError(
                f"trainable_token_indices: {module} has a bias, which PEFT leaves out if the"
                " layer's rows train: the file would mean another output there. Train the layer"
                f" whole: modules_to_save=({module!r},)."
            )
        self.by_column = view.transposed
        self.numbers = tuple(ids)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.trainable_tokens_delta = self.new(view, len(ids), dim)

    @staticmethod
    def shape(view: View) -> tuple[int, int]:
        """(vocab, dim)"""
        shape = view.out_features, view.in_features
        return shape[::-1] if view.transposed else shape

    def follow(self, leader: Tokens) -> None:
        """Act with the rows of the adapter on the layer that this one's is tied to."""
        self.trainable_tokens_delta = leader.trainable_tokens_delta

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
        return {} if self.leader else {1.0: trained(self)}

    def placed(self) -> dict[str, Tensor]:
        return {} if self.leader else super().placed()


def token_layers(model: nn.Module, modules: Mapping[str, nn.Module], asked: Any) -> dict[str, Make]:
    """Returns what makes the adapter of each layer that trainable_token_indices means, by name.

    `asked` holds ids of the input embedding, or of layers by the end of their names. The rules are
    PEFT's, so that one file means the same here and there. If config.tie_word_embeddings is true,
    the layers that _tied_weights_keys ties to an adapted input embedding act with its rows, unless
    `asked` gives tied layers ids that differ: then each trains rows of its own.
    """
    if not asked:
        return {}
    table = input_embedding(model)
    names = [name for name, module in modules.items() if name and module is table]
    if not isinstance(asked, Mapping):
        if not names:
            raise TargetError(
                f"trainable_token_indices: {type(model).__name__} names no input embedding. Set a"
                " mapping of the layer's name to its ids."
            )
        asked = {names[0]: asked}
    followers = followers_of(model, modules, table)
    of_the_tie = [*(names[:1] if followers else []), *followers]
    alike = [end for end in asked if any(_means(end, name) for name in of_the_tie)]
    apart = any(asked[end] != asked[alike[0]] for end in alike)
    together = followers if len(alike) > 1 and not apart else []
    found: dict[str, tuple[int, ...]] = {}
    for end, ids in asked.items():
        hits = [name for name in modules if name and name.endswith(end)]
        if not hits or not all(kind(modules[name]) for name in hits):
            raise TargetError(f"trainable_token_indices: {end!r} names no embedding of the model.")
        for hit in hits if end not in together else ():
            if found.setdefault(hit, tuple(ids)) != tuple(ids):
                raise TargetError(
                    f"trainable_token_indices: {hit} has two lists of ids, {list(found[hit])} and"
                    f" {list(ids)} (as {end!r}). Give it one."
                )
    makes: dict[str, Make] = {hit: partial(Tokens, ids=ids) for hit, ids in found.items()}
    leader = next((name for name in names if name in found), None)
    if leader and not apart:
        for name in modules:
            if name not in makes and any(name.endswith(follower) for follower in followers):
                makes[name] = partial(Tokens, ids=found[leader], leader=leader)
    if not makes:
        raise TargetError(
            f"trainable_token_indices: {', '.join(asked)} are tied to {names[0]}, which is not"
            f" named. Name {names[0]} too."
        )
    return makes


def _means(end: str, name: str) -> bool:
    """Whether PEFT takes an entry of trainable_token_indices for one of a tied layer."""
    return name.endswith(end) or end in name.split(".")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module, unwrapped, that get_input_embeddings() gives; None if there is none."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' vision models
        return None
    for attribute in ("base_layer", "original_module"):
        table = getattr(table, attribute, table)
    return table


def followers_of(
    model: nn.Module, modules: Mapping[str, nn.Module], table: nn.Module | None
) -> list[str]:
    """Names of the layers that transformers ties to the input embedding, as PEFT reads them off
    the model: from config.tie_word_embeddings and _tied_weights_keys, not from the weights."""
    config = getattr(model, "config", None)
    tied = config.get("tie_word_embeddings") if isinstance(config, Mapping) else getattr(
        config, "tie_word_embeddings", False
    )  # fmt: skip
    stated = getattr(model, "_tied_weights_keys", None)
    if not tied or stated is None or table is None:
        return []
    if not isinstance(stated, Mapping):
        return sorted({key.rpartition(".")[0] for key in stated})
    weight = table._parameters.get("weight")
    sources = {f"{n}.weight" for n, m in modules.items() if m._parameters.get("weight") is weight}
    found = set()
    for prefix, module in modules.items():
        for target, source in (getattr(module, "_tied_weights_keys", None) or {}).items():
            if (f"{prefix}.{source}" if prefix else source) in sources:
                target = target.rpartition(".")[0]
                found.add(f"{prefix}.{target}" if prefix else target)
    return sorted(found)
