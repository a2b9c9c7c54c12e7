"""Finds tied weights that a merge separates, and prepares the model so that both weights are saved.

If config.tie_word_embeddings is true, transformers saves only one of the tied weights, and ties
them again when it loads the folder. So if a merge breaks a tie, the flag must become false. The
flag may also stand for ties that the merge leaves whole. With a false flag those would not be tied
again, so each of their places needs its own parameter in the file.
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
RECORD = "lora_untied"  # the attribute of a model that records what untie() changed
Pair = tuple[nn.Parameter, nn.Parameter | None]  # W' and b'


def broken_ties(
    model: nn.Module, merged: Mapping[int, Pair], copies: Mapping[int, nn.Module]
) -> tuple[str, ...]:
    """Returns the names of the layers with a tied weight or bias that the merge would untie.

    `merged` maps the id of a layer to its W' and b'. `copies` maps the id of a module to the
    trained copy that replaces it.
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
    # A tie is broken if its paths no longer lead to one parameter.
    broken = [paths for paths in tied.values() if len({id(after[path]) for path in paths}) > 1]
    replaced = [path for paths in broken for path in paths if after[path] is not base[path]]
    return tuple(dict.fromkeys(path.rpartition(".")[0] for path in replaced))


def check_flag(model: nn.Module) -> None:
    """Raise MergeError if the model's output depends on tie_word_embeddings."""
    # T5 scales its output if the flag is true. Such a forward mentions the flag by name.
    for module in model.modules():
        config = getattr(module, "config", None)
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if getattr(config, FLAG, None) is True and code is not None and FLAG in code.co_names:
            raise MergeError(
                f"merge: {type(module).__name__} computes another output if its config says"
                f" {FLAG}=false, and this merge unties weights, so that it has to. Keep the adapter"
                " unmerged, or train without the head and the embedding."
            )


def untie(model: nn.Module) -> None:
    """Set tie_word_embeddings to false and give every place of a tied weight its own parameter.

    retie() undoes it.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    flagged = {id(c): c for c in configs if getattr(c, FLAG, None) is True}
    if not flagged:
        return
    # T5's config turns any value into true when it is read. There loading depends on which weights
    # the folder holds, and the flag can stay.
    changed = [config for config in flagged.values() if _can_say_untied(config)]
    for config in changed:
        setattr(config, FLAG, False)
    owners: dict[int, nn.Module] = {}
    cloned = []
    for module in {id(m): m for m in _plain(model)}.values():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and owners.setdefault(id(parameter), module) is not module:
                cloned.append((module, leaf, parameter))
                clone = parameter.detach().clone()
                module._parameters[leaf] = nn.Parameter(clone, parameter.requires_grad)
    model.__dict__[RECORD] = changed, cloned


def retie(model: nn.Module) -> None:
    """Undo untie()."""
    changed, cloned = model.__dict__.pop(RECORD, ([], []))
    for config in changed:
        setattr(config, FLAG, True)
    for module, leaf, parameter in cloned:
        module._parameters[leaf] = parameter


def _can_say_untied(config: Any) -> bool:
    """True if a config that is saved with tie_word_embeddings=false is read back so."""
    if not hasattr(config, "from_dict"):
        return True
    read_back: Any = type(config).from_dict(config.to_dict() | {FLAG: False})
    return getattr(read_back, FLAG, None) is False


def _plain(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that remain when eject() removes the wrappers of a merged model."""
    if isinstance(module, AdaptedLayer):
        module = module.base_layer
    elif isinstance(module, SavedModule):
        module = module.current
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _plain(child)
