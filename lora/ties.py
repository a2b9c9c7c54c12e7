"""Tied weights through a merge: which ties it breaks, and what a saved model needs to say so.

transformers ties weights anew when it reads a folder, by config.tie_word_embeddings, and files one
of the weights that share memory. So once a tie is broken the flag has to be false, and every other
place that the flag stood for has to hold, and file, a weight of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lora.errors import MergeError
from lora.targets import base_paths, walk
from lora.wrappers import AdaptedLayer, SavedModule

FLAG = "tie_word_embeddings"
RECORD = "lora_untied"  # of a model: what untie() changed
Pair = tuple[nn.Parameter, nn.Parameter | None]


def broken_ties(
    model: nn.Module, merged: Mapping[int, Pair], copies: Mapping[int, nn.Module]
) -> tuple[str, ...]:
    """Names of the layers whose weight or bias is tied to another's, and would be its own after
    the merge: `merged` has W' and b', `copies` trained modules, by the ids of those they replace.
    """
    base = dict(base_paths(model))
    after = dict(base)
    for path, module in walk(model):
        for leaf, parameter in zip(("weight", "bias"), merged.get(id(module), ()), strict=False):
            if parameter is not None:
                after[f"{path}.{leaf}"] = parameter
        if id(module) in copies:
            for leaf, parameter in copies[id(module)].named_parameters(remove_duplicate=False):
                after[f"{path}.{leaf}"] = parameter
    tied: dict[int, list[str]] = {}
    for path, parameter in base.items():
        tied.setdefault(id(parameter), []).append(path)
    broken = [paths for paths in tied.values() if len({id(after[path]) for path in paths}) > 1]
    moved = [path for paths in broken for path in paths if after[path] is not base[path]]
    return tuple(dict.fromkeys(path.rpartition(".")[0] for path in moved))


def check_flag(model: nn.Module) -> None:
    """Raise MergeError if the model computes something else once its config says untied."""
    for module in model.modules():
        config = getattr(module, "config", None)
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if getattr(config, FLAG, None) is True and code is not None and FLAG in code.co_names:
            raise MergeError(
                f"merge: {type(module).__name__} computes another output if its config says"
                f" {FLAG}=false, which a merged model with an untied weight has to say. Keep the"
                " adapter apart, or train without the head and the embedding."
            )


def untie(model: nn.Module) -> None:
    """Say in the model's config that its embeddings are untied, and give each place that was tied,
    and still is, a parameter of its own. Undone by retie()."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    flagged = {id(c): c for c in configs if getattr(c, FLAG, None) is True}
    if not flagged:
        return
    # T5's config reads any value back as true, and its readers go by what the folder holds.
    changed = [config for config in flagged.values() if _holds(config)]
    for config in changed:
        setattr(config, FLAG, False)
    owners: dict[int, nn.Module] = {}
    placed = []
    for module in {id(m): m for m in _plain(model)}.values():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and owners.setdefault(id(parameter), module) is not module:
                placed.append((module, leaf, parameter))
                own = parameter.detach().clone()
                module._parameters[leaf] = nn.Parameter(own, parameter.requires_grad)
    model.__dict__[RECORD] = changed, placed


def retie(model: nn.Module) -> None:
    """Undo untie()."""
    changed, placed = model.__dict__.pop(RECORD, ([], []))
    for config in changed:
        setattr(config, FLAG, True)
    for module, leaf, parameter in placed:
        module._parameters[leaf] = parameter


def _holds(config: Any) -> bool:
    """Whether a config that says untied is read back from its file as untied."""
    if not hasattr(config, "from_dict"):
        return True
    read: Any = type(config).from_dict(config.to_dict() | {FLAG: False})
    return getattr(read, FLAG, None) is False


def _plain(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the model that eject() leaves after a merge."""
    if isinstance(module, AdaptedLayer):
        module = module.base_layer
    elif isinstance(module, SavedModule):
        module = module.current
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _plain(child)
