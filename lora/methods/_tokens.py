"""Trains some rows of an embedding. The rest of the table is frozen."""

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


def token_ids(field: str, value: Any) -> Any:
    """Returns ids, or ids by layer, as tuples. Raises ConfigError for an empty list or a repeated
    id."""
    if isinstance(value, dict):
        value = {name: tuple(ids) for name, ids in value.items()}
    lists = list(value.values()) if isinstance(value, dict) else [value] if value != () else []
    good = all(ids and len(set(ids)) == len(ids) for ids in lists)
    check(field, value, "distinct ids, or lists of them by layer", good)
    return value


class Tokens(Follower, Rates, Adapter):
    """W' = W except for the rows of the given ids, which train.  PEFT's trainable_token_indices.

    trainable_tokens_delta (n, dim)   initially W's rows, so W' = W at step 0. In spite of PEFT's
    name it holds the rows themselves, not what is added to them. An adapter on a layer that is tied
    to the embedding (`leader`) uses the rows of the embedding's adapter.
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
                " layer's rows train, so that PEFT would compute another output. Train the whole"
                f" layer instead: modules_to_save=({module!r},)."
            )
        self.by_column = view.transposed
        self.numbers = tuple(ids)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.trainable_tokens_delta = self.new(view, len(ids), dim)

    @staticmethod
    def shape(view: View) -> tuple[int, int]:
        """Returns (vocab, dim), whichever way the layer stores its weight."""
        shape = view.out_features, view.in_features
        return shape[::-1] if view.transposed else shape

    def follow(self, leader: Tokens) -> None:
        """Use the rows of the adapter on the layer to which this adapter's layer is tied."""
        self.trainable_tokens_delta = leader.trainable_tokens_delta

    def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.ids.copy_(torch.tensor(self.numbers))  # again, since to_empty() clears buffers
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

    def parameters_by_key(self) -> dict[str, Tensor]:
        return {} if self.leader else super().parameters_by_key()


def token_layers(
    model: nn.Module, modules: Mapping[str, nn.Module], indices: Any
) -> dict[str, Make]:
    """Returns a function that makes the adapter, for each layer that trainable_token_indices names.

    `indices` holds ids of the input embedding, or ids by the endings of layers' names. The rules
    are PEFT's, so that a file means the same in both. If config.tie_word_embeddings is true, the
    layers that _tied_weights_keys ties to the input embedding use its trained rows. The exception:
    if `indices` gives tied layers different ids, each of them trains its own rows.
    """
    if not indices:
        return {}
    table = input_embedding(model)
    names = [name for name, module in modules.items() if name and module is table]
    if not isinstance(indices, Mapping):
        if not names:
            raise TargetError(
                f"trainable_token_indices: {type(model).__name__} names no input embedding. Set a"
                " mapping from the layer's name to its ids."
            )
        indices = {names[0]: indices}
    followers = followers_of(model, modules, table)
    tied_layers = [*(names[:1] if followers else []), *followers]
    tied_ends = [end for end in indices if any(_peft_matches(end, name) for name in tied_layers)]
    differ = any(indices[end] != indices[tied_ends[0]] for end in tied_ends)
    # Entries that repeat the embedding's ids for a tied layer say what holds anyway.
    redundant = followers if len(tied_ends) > 1 and not differ else []
    ids_of: dict[str, tuple[int, ...]] = {}
    for end, ids in indices.items():
        hits = [name for name in modules if name and name.endswith(end)]
        if not hits or not all(kind(modules[name]) for name in hits):
            raise TargetError(f"trainable_token_indices: {end!r} names no embedding of the model.")
        for hit in hits if end not in redundant else ():
            if ids_of.setdefault(hit, tuple(ids)) != tuple(ids):
                raise TargetError(
                    f"trainable_token_indices: {hit} has two lists of ids, {list(ids_of[hit])} and"
                    f" {list(ids)} (as {end!r}). Give it one."
                )
    makes: dict[str, Make] = {hit: partial(Tokens, ids=ids) for hit, ids in ids_of.items()}
    leader = next((name for name in names if name in ids_of), None)
    if leader and not differ:
        for name in modules:
            if name not in makes and any(name.endswith(follower) for follower in followers):
                makes[name] = partial(Tokens, ids=ids_of[leader], leader=leader)
    if not makes:
        raise TargetError(
            f"trainable_token_indices: {', '.join(indices)} are tied to {names[0]}, which is not"
            f" named. Name {names[0]} too."
        )
    return makes


def _peft_matches(end: str, name: str) -> bool:
    """True if PEFT matches an entry of trainable_token_indices with a tied layer's name."""
    return name.endswith(end) or end in name.split(".")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Returns the module that get_input_embeddings() gives, unwrapped; None if there is none."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # which transformers' vision models raise
        return None
    for attribute in ("base_layer", "original_module"):
        table = getattr(table, attribute, table)
    return table


def followers_of(
    model: nn.Module, modules: Mapping[str, nn.Module], table: nn.Module | None
) -> list[str]:
    """Returns the names of the layers that transformers ties to the input embedding.

    As in PEFT they come from config.tie_word_embeddings and _tied_weights_keys, not from comparing
    weights.
    """
    config = getattr(model, "config", None)
    tied = config.get("tie_word_embeddings") if isinstance(config, Mapping) else getattr(
        config, "tie_word_embeddings", False
    )  # fmt: skip
    keys = getattr(model, "_tied_weights_keys", None)
    if not tied or keys is None or table is None:
        return []
    if not isinstance(keys, Mapping):  # older transformers list the tied weights without sources
        return sorted({key.rpartition(".")[0] for key in keys})
    weight = table._parameters.get("weight")
    sources = {f"{n}.weight" for n, m in modules.items() if m._parameters.get("weight") is weight}
    followers = set()
    for prefix, module in modules.items():
        for target, source in (getattr(module, "_tied_weights_keys", None) or {}).items():
            if (f"{prefix}.{source}" if prefix else source) in sources:
                target = target.rpartition(".")[0]
                followers.add(f"{prefix}.{target}" if prefix else target)
    return sorted(followers)
