"""A base whose embeddings have another number of rows than an adapter's tokens call for.

Users of PEFT add tokens to the tokenizer, call model.resize_token_embeddings, and train. The file
then holds the embeddings whole, in one of three places, or rows of them:

    P.weight                            neither adapted nor trained, or trained whole
    P.base_layer.weight                 adapted
    P.token_adapter.base_layer.weight   with trained rows

`resizing` does to a base what they did to theirs. What grew is remembered on the model: the base is
still known by its own rows, and the file of an adapter has to hold the others.
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
"""What a file's keys of an embedding's own parameters have between its path and their names."""


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding and the output head of a transformers model, by every path of each."""
    found = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get, lambda: None)()
        except NotImplementedError:  # transformers' vision models
            layer = None
        if isinstance(layer, nn.Module):
            found.add(id(unwrapped(layer)))
    return {name: module for name, module in walk(model) if name and id(module) in found}


def rows_of(model: nn.Module) -> int | None:
    """The rows of the input embedding, None if the model names none."""
    for module in embeddings(model).values():
        if isinstance(module, nn.Embedding):
            return len(module.weight)
    return None


def filed_rows(
    model: nn.Module, settings: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> int | None:
    """The rows of the embeddings that an adapter's file was made with; None if it does not say.

    `stored` are the file's tensors by their keys less the prefix.
    """
    found = set()
    for path, module in embeddings(model).items():
        # A key, and the axis that has an entry for each token
        keys = {f"{path}{form}.weight": 0 for form in FORMS}
        of_ids = isinstance(module, nn.Embedding)
        keys |= {f"{path}.lora_embedding_A": 1} if of_ids else {f"{path}.lora_B.weight": 0}
        found |= {stored[k].shape[axis] for k, axis in keys.items()
                  if k in stored and stored[k].dim() == 2}  # fmt: skip
    if found:
        return max(found) if len(found) == 1 else None
    most = max(_ids(settings), default=-1)
    there = rows_of(model)
    return most + 1 if there is not None and most >= there else None


def _ids(settings: Mapping[str, Any]) -> Iterable[int]:
    """All ids of tokens that a file's settings train."""
    for key in ("trainable_token_indices", "token_indices"):
        asked = settings.get(key) or ()
        for ids in asked.values() if isinstance(asked, Mapping) else [asked]:
            yield from (n for n in ids if type(n) is int) if isinstance(ids, list | tuple) else ()


def check_rows(model: nn.Module, rows: int | None, where: object) -> None:
    """Raise CheckpointError if the file's embeddings have other rows than the model's."""
    there = rows_of(model)
    if rows is not None and there is not None and rows != there:
        raise CheckpointError(
            f"{where}: the adapter was made on a base with {rows:,} tokens, found one with"
            f" {there:,}. Pass resize_embeddings=True, or on the command line --resize-embeddings:"
            f" it resizes the base's embeddings, as model.resize_token_embeddings({rows}) does."
        )


@contextmanager
def resizing(model: nn.Module, rows: int | None) -> Iterator[None]:
    """Gives the model's embeddings so many rows. If the block raises, the model is as it was."""
    there = rows_of(model)
    if rows is None or there is None or rows == there:
        yield
        return
    tables = ("_modules", "_parameters", "_buffers")
    before = [(m, dict(vars(m)), {t: dict(vars(m)[t]) for t in tables}) for m in model.modules()]
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    config = _text_config(model)
    size = getattr(config, "vocab_size", None)
    try:
        resize(model, rows)
        yield
    except BaseException:
        for module, attributes, held in before:
            vars(module).clear()
            vars(module).update(attributes)
            for table, entries in held.items():
                vars(module)[table].clear()
                vars(module)[table].update(entries)
        for parameter, values in data:
            parameter.data = values
        if config is not None:
            config.vocab_size = size
        raise


def resize(model: nn.Module, rows: int) -> None:
    """Give the model's embeddings so many rows, the new ones the mean of the others.

    By transformers' own method, which knows what else has a row for each token; it draws nothing
    from the process's generators here. Raises ConfigError.
    """
    if injected(model):
        raise ConfigError(
            f"the embeddings cannot be resized to {rows:,} rows under the adapters"
            f" {', '.join(injected(model))}. Resize them before the first adapter is put on."
        )
    call: Any = getattr(model, "resize_token_embeddings", None)
    if call is None:
        raise ConfigError(
            f"{type(model).__name__} has no resize_token_embeddings, as transformers' models have."
            f" Give its embeddings {rows:,} rows yourself, then load the adapter."
        )
    before = {name: len(p) for name, p in base_parameters(model) if p.dim()}
    required = {name: p.requires_grad for name, p in base_paths(model)}
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        call(rows, mean_resizing=False)
    own: dict[str, int] = {}
    for name, parameter in base_parameters(model):
        had = before.get(name)
        if had is not None and parameter.dim() and len(parameter) != had:
            own[name] = had
            if len(parameter) > had and parameter.dim() > 1 and not parameter.is_meta:
                parameter.data[had:] = parameter.data[:had].float().mean(0)
    for name, parameter in base_paths(model):
        parameter.requires_grad_(required[name])
    if own:
        model.__dict__["lora_resized"] = {**own, **resized(model)}


def resized(model: nn.Module) -> dict[str, int]:
    """How many rows the parameters that resize() gave more, or fewer, had before."""
    found: dict[str, int] = model.__dict__.get("lora_resized", {})
    return found


def _text_config(model: nn.Module) -> Any:
    """The config that states the number of tokens, None if there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rows_beyond(model: nn.Module, plan: Plan, parts: Parts) -> dict[str, Tensor]:
    """The resized parameters that an adapter's file has to hold whole, by their keys less the
    prefix: all but those whose new rows it holds as something trained."""
    own = resized(model)
    found: dict[str, Tensor] = {}
    held, modules = dict(base_paths(model)), dict(walk(model))
    adapters = {id(modules[path]): adapter for path, adapter in parts.adapters.items()}
    filed = {id(held[name]) for name in (*plan.selected, *plan.carried)}
    for alias, parameter in held.items():
        name = next((n for n in own if held.get(n) is parameter), None)
        if name is None or id(parameter) in filed or any(inside(alias, w) for w in plan.saved):
            continue
        path, _, leaf = alias.rpartition(".")
        rows = adapters.get(id(modules[path]))
        new = {*range(own[name], len(parameter))}
        if leaf == "weight" and isinstance(rows, Tokens) and new and new <= {*rows.numbers}:
            continue
        filed.add(id(parameter))  # tied: once
        found[filed_key(plan, alias)] = parameter
    return found


def check_filed(where: object, missing: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a file leaves out rows of the embeddings that it calls for."""
    if missing:
        raise CheckpointError(
            f"{where}: {min(missing)} is not in the file, whose tokens have rows there that the"
            " base lacks. Save the adapter again with the embeddings: with PEFT,"
            " save_pretrained(..., save_embedding_layers=True)."
        )


def add_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[str], whole: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Add tokens to a transformers tokenizer, and rows for them to the model's embeddings.

    Returns what `trainable_token_indices` has to be for those rows to be trained: ids by layer. A
    layer in `whole` trains as a whole and is left out. A new row is the mean of the rows that the
    token's text had before; a row that the base has room for stays as it is, and so does that of a
    token which the tokenizer knows already. Raises ConfigError.
    """
    if not tokens or not all(tokens) or len(set(tokens)) < len(tokens):
        raise ConfigError(f"add_tokens must be distinct texts, found {list(tokens)}.")
    there = rows_of(model)
    if there is None:
        raise ConfigError(f"{type(model).__name__} names no input embedding to add tokens to.")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(list(tokens))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    if max(ids) >= there:
        resize(model, max(ids) + 1)
    layers: dict[int, str] = {}
    for path, module in embeddings(model).items():
        weight = module._parameters["weight"]
        if weight is None or id(weight) in layers:
            continue
        layers[id(weight)] = path
        for number, old in zip(ids, pieces, strict=True):
            if number >= there and old and not weight.is_meta:
                weight.data[number] = weight.data[old].float().mean(0)
    return {path: ids for path in layers.values() if not fits(path, tuple(whole))}
