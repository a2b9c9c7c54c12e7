"""Resizes a base's embeddings to the number of rows that an adapter was made with.

Users of PEFT add tokens to the tokenizer, call model.resize_token_embeddings, and train. The
adapter's file then contains the whole embedding of path P under one of three keys:

    P.weight                            if it is not adapted, or trained as a whole
    P.base_layer.weight                 if it is adapted
    P.token_adapter.base_layer.weight   if some of its rows are trained

`resizing` resizes a base in the same way. The model records the old number of rows. The fingerprint
of the base covers only those, and the file of an adapter has to contain the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora.errors import CheckpointError, ConfigError
from lora.inventory import Parts, filed_key, injected
from lora.layers import fits, inside
from lora.methods._tokens import Tokens
from lora.targets import Plan, base_parameters, base_paths, unwrapped, walk

FORMS = ("", ".base_layer", ".token_adapter.base_layer")
"""What may stand in a file's key between an embedding's path and the name of its parameter."""


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a transformers model's input embedding and output head, by all their paths."""
    ids = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get, lambda: None)()
        except NotImplementedError:  # which transformers' vision models raise
            layer = None
        if isinstance(layer, nn.Module):
            ids.add(id(unwrapped(layer)))
    return {name: module for name, module in walk(model) if name and id(module) in ids}


def rows_of(model: nn.Module) -> int | None:
    """Returns the number of rows of the input embedding, None if the model has none."""
    for module in embeddings(model).values():
        if isinstance(module, nn.Embedding):
            return len(module.weight)
    return None


def filed_rows(
    model: nn.Module, settings: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> int | None:
    """Returns how many rows the embeddings had when the file was made, None if it does not say.

    `stored` maps the file's keys, without the prefix, to its tensors.
    """
    counts = set()
    for path, module in embeddings(model).items():
        # Each key with the axis of its tensor that has one entry for each token
        keys = {f"{path}{form}.weight": 0 for form in FORMS}
        of_ids = isinstance(module, nn.Embedding)
        keys |= {f"{path}.lora_embedding_A": 1} if of_ids else {f"{path}.lora_B.weight": 0}
        counts |= {stored[k].shape[axis] for k, axis in keys.items()
                   if k in stored and stored[k].dim() == 2}  # fmt: skip
    if counts:
        return max(counts) if len(counts) == 1 else None
    # No tensor shows the number. A trained token that the model has no row for needs at least one
    # row more than its id.
    largest = max(_ids(settings), default=-1)
    rows = rows_of(model)
    return largest + 1 if rows is not None and largest >= rows else None


def _ids(settings: Mapping[str, Any]) -> Iterable[int]:
    """Yields the ids of all tokens that a file's settings train."""
    for key in ("trainable_token_indices", "token_indices"):
        value = settings.get(key) or ()
        for ids in value.values() if isinstance(value, Mapping) else [value]:
            yield from (n for n in ids if type(n) is int) if isinstance(ids, list | tuple) else ()


def check_rows(model: nn.Module, rows: int | None, where: object) -> None:
    """Raise CheckpointError if the file was made on embeddings with another number of rows."""
    actual = rows_of(model)
    if rows is not None and actual is not None and rows != actual:
        raise CheckpointError(
            f"{where}: the adapter was made on a base with {rows:,} tokens, found one with"
            f" {actual:,}. Pass resize_embeddings=True, or on the command line --resize-embeddings:"
            f" it resizes the base's embeddings, as model.resize_token_embeddings({rows}) does."
        )


@contextmanager
def resizing(model: nn.Module, rows: int | None) -> Iterator[None]:
    """Resizes the model's embeddings to `rows`; if the block raises, undoes it."""
    actual = rows_of(model)
    if rows is None or actual is None or rows == actual:
        yield
        return
    # resize_token_embeddings replaces modules, ties them anew and writes the config. To undo all of
    # that, note every attribute of every module, and the memory of every parameter. Nothing is
    # copied: a resize writes to new memory.
    tables = ("_modules", "_parameters", "_buffers")
    before = [(m, dict(vars(m)), {t: dict(vars(m)[t]) for t in tables}) for m in model.modules()]
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    config = _text_config(model)
    size = getattr(config, "vocab_size", None)
    try:
        resize(model, rows)
        yield
    except BaseException:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for table, entries in contents.items():
                vars(module)[table].clear()
                vars(module)[table].update(entries)
        for parameter, values in data:
            parameter.data = values
        if config is not None:
            config.vocab_size = size
        raise


def resize(model: nn.Module, rows: int) -> None:
    """Resize the model's embeddings to `rows`. A new row is the mean of the old ones.

    Calls transformers' resize_token_embeddings, which knows what else has a row for each token. The
    state of the process's random generators does not change. Raises ConfigError if the model has
    adapters or no such method.
    """
    if injected(model):
        raise ConfigError(
            f"the embeddings cannot be resized to {rows:,} rows: the model has the adapters"
            f" {', '.join(injected(model))}. Resize them before the first lora.inject or lora.load."
        )
    call: Any = getattr(model, "resize_token_embeddings", None)
    if call is None:
        raise ConfigError(
            f"{type(model).__name__} has no resize_token_embeddings, as transformers' models have."
            f" Give its embeddings {rows:,} rows yourself, then load the adapter."
        )
    # Compare lengths, since transformers resizes more than the embeddings: a bias of the head too.
    before = {name: len(p) for name, p in base_parameters(model) if p.dim()}
    required = {name: p.requires_grad for name, p in base_paths(model)}
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        # transformers' mean_resizing draws from a distribution; the plain mean below needs no seed.
        call(rows, mean_resizing=False)
    old_rows: dict[str, int] = {}
    for name, parameter in base_parameters(model):
        old = before.get(name)
        if old is not None and parameter.dim() and len(parameter) != old:
            old_rows[name] = old
            if len(parameter) > old and parameter.dim() > 1 and not parameter.is_meta:
                parameter.data[old:] = parameter.data[:old].float().mean(0)
    for name, parameter in base_paths(model):  # transformers makes new parameters
        parameter.requires_grad_(required[name])
    if old_rows:  # the numbers from before the first resize win
        model.__dict__["lora_resized"] = {**old_rows, **resized(model)}


def resized(model: nn.Module) -> dict[str, int]:
    """Returns the number of rows that each parameter resized by resize() had originally."""
    old_rows: dict[str, int] = model.__dict__.get("lora_resized", {})
    return old_rows


def _text_config(model: nn.Module) -> Any:
    """Returns the part of the model's config that has vocab_size, None if it has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rows_beyond(model: nn.Module, plan: Plan, parts: Parts) -> dict[str, Tensor]:
    """Returns the resized parameters that a file must contain, by key without the prefix.

    Those whose new rows the file contains as trained values are left out.
    """
    old_rows = resized(model)
    required: dict[str, Tensor] = {}
    base, modules = dict(base_paths(model)), dict(walk(model))
    adapters = {id(modules[path]): adapter for path, adapter in parts.adapters.items()}
    filed = {id(base[name]) for name in (*plan.selected, *plan.carried)}
    for alias, parameter in base.items():
        name = next((n for n in old_rows if base.get(n) is parameter), None)
        if name is None or id(parameter) in filed or any(inside(alias, p) for p in plan.saved):
            continue
        path, _, leaf = alias.rpartition(".")
        adapter = adapters.get(id(modules[path]))
        new = {*range(old_rows[name], len(parameter))}
        if leaf == "weight" and isinstance(adapter, Tokens) and new and new <= {*adapter.numbers}:
            continue
        filed.add(id(parameter))  # a tied parameter is written once
        required[filed_key(plan, alias)] = parameter
    return required


def check_filed(where: object, missing: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if there are embeddings that the file should contain and does not."""
    if missing:
        raise CheckpointError(
            f"{where}: {min(missing)} is not in the file, and the base lacks the rows that the"
            " adapter's tokens have there. Save the adapter again with the embeddings: with PEFT,"
            " save_pretrained(..., save_embedding_layers=True)."
        )


def add_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[str], whole: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Add tokens to a transformers tokenizer, and rows for them to the model's embeddings.

    Returns the value of `trainable_token_indices` that trains these rows: token ids by layer. A
    layer in `whole` trains as a whole and is left out. A new row is the mean of the rows of the
    tokens into which the tokenizer split the text before. A row that the base already has does not
    change: its embeddings may have spare rows, and the tokenizer may know the token. Raises
    ConfigError.
    """
    if not tokens or not all(tokens) or len(set(tokens)) < len(tokens):
        raise ConfigError(f"add_tokens must be distinct texts, found {list(tokens)}.")
    rows = rows_of(model)
    if rows is None:
        raise ConfigError(
            f"{type(model).__name__} names no input embedding to add tokens to. Leave add_tokens"
            " out."
        )
    # Before the tokens are added: afterwards each text is one token.
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(list(tokens))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    if max(ids) >= rows:
        resize(model, max(ids) + 1)
    layers: dict[int, str] = {}
    for path, module in embeddings(model).items():
        weight = module._parameters["weight"]
        if weight is None or id(weight) in layers:  # tied to an embedding that is done
            continue
        layers[id(weight)] = path
        for token, split in zip(ids, pieces, strict=True):
            if token >= rows and split and not weight.is_meta:
                weight.data[token] = weight.data[split].float().mean(0)
    return {path: ids for path in layers.values() if not fits(path, tuple(whole))}
