"""Looks up what is injected in a model: adapters by name, their parts, and their files' tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lora.adapter import Adapter, trained
from lora.errors import ConfigError, MergeError
from lora.layers import View, views
from lora.method import Selection, Shares, TrainsBase
from lora.methods._tokens import Tokens
from lora.targets import Plan, base_buffers, base_paths, unwrapped, walk
from lora.wrappers import AdaptedLayer, SavedModule, Selected


@dataclass(frozen=True)
class Parts:
    """The parts of one adapter in the model, each by the first path that leads to it."""

    adapters: dict[str, Adapter]  # by the names of their layers
    copies: dict[str, nn.Module]  # trained copies of saved modules
    selected: dict[str, nn.Parameter]  # parameters of the base that train or were replaced

    def trained(self, plan: Plan) -> Iterator[nn.Parameter]:
        """Yields the parameters that the adapter trains."""
        for adapter in self.adapters.values():
            yield from trained(adapter)
        for module in self.copies.values():
            yield from module.parameters()
        for name in plan.selected:
            yield self.selected[name]


def with_views(
    model: nn.Module, adapters: Mapping[str, Adapter]
) -> dict[str, tuple[Adapter, View]]:
    """Returns each adapter with the view of its layer, by the layers' names."""
    modules = dict(walk(model))
    return {path: (adapter, views(modules[path])[0]) for path, adapter in adapters.items()}


def injected(model: nn.Module) -> dict[str, Plan]:
    """Returns the plan of each adapter in the model, by the adapter's name."""
    adapters: dict[str, Plan] = model.__dict__.get("lora_adapters", {})
    return adapters


def adapter_parts(model: nn.Module, name: str) -> Parts:
    """Returns the parts of adapter `name` in the model."""
    plan = injected(model)[name]
    layers, saved = wrappers_of(model)
    adapters = {path: layers[path].adapter(name) for path in plan.targets if path in layers}
    copies = {path: saved[path].copies[name] for path in plan.saved if path in saved}
    selected = _selected_parameters(model) if plan.selected or plan.carried else {}
    return Parts(adapters, copies, selected)


def _selected_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the base's parameters that train, or that a file replaced, by name."""
    holder, base = model.__dict__["lora_selected"], dict(base_paths(model))
    return {name: holder.aside.get(name, base[name]) for name in holder.names}


def selections(model: nn.Module) -> list[tuple[nn.Module, Selected]]:
    """Returns (module, its Selected) for each module into which a selection was injected.

    Usually that is the model alone. A part of the model may have been injected into by itself.
    """
    key = "lora_selected"
    return [(part, part.__dict__[key]) for part in model.modules() if key in part.__dict__]


def act(part: nn.Module, selected: Selected, acting: bool) -> None:
    """Put a selection's trained values into the part if `acting`, else the originals."""
    modules, parameters = dict(walk(part)), dict(base_paths(part))
    # A tied parameter is an attribute of several modules. All of them have to change.
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        holders.setdefault(id(parameter), []).append((modules[path], leaf))
    selected.place({name: holders[id(parameters[name])] for name in selected.originals}, acting)


def filed_key(plan: Plan, name: str) -> str:
    """Returns the key, without the prefix, of a base parameter in an adapter's file."""
    path, _, leaf = name.rpartition(".")
    if issubclass(plan.method, Selection):
        return plan.method.key(name) if name in plan.selected else name
    if path in plan.further and not issubclass(plan.method, Tokens):
        return f"{path}.token_adapter.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if path in plan.targets else name


def tensors(model: nn.Module, plan: Plan, parts: Parts, to_save: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of an adapter by the keys of its file, without the prefix.

    Those are the model's tensors, which a load fills. With `to_save` they are the tensors that a
    save writes. The two differ if a method saves another form (AdaLoRA, trained tokens).
    """
    result: dict[str, Tensor] = {}
    for name, parameter in parts.selected.items():
        for alias in _filed_names(model, plan, name):
            result[filed_key(plan, alias)] = parameter
    if not plan.method.keeps_base:
        result |= dict(base_buffers(model))  # running statistics move with the weights
    for path, adapter in parts.adapters.items():
        by_key = adapter.tensors_to_save() if to_save else adapter.parameters_by_key()
        for key, tensor in by_key.items():
            if not key.startswith("base_model."):
                result[f"{path}.{key}"] = tensor
            elif isinstance(adapter, Shares) and adapter.saves_shared(plan.config):
                result[key] = tensor
    for path, module in parts.copies.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            result[f"{path}.{name}"] = tensor
    return result


def _filed_names(model: nn.Module, plan: Plan, name: str) -> list[str]:
    """Returns the names under which the file holds a parameter of the base.

    PEFT saves a tied parameter once for each of its names that the method trains.
    """
    if not issubclass(plan.method, TrainsBase) or name not in plan.selected:
        return [name]
    base = dict(base_paths(model))
    return [
        alias
        for alias, parameter in base.items()
        if parameter is base[name]
        and plan.method.selects(alias, alias.rpartition(".")[0] in plan.targets, plan.config)
    ]


def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns the tensors that a save of adapter `name` writes, by key without the prefix."""
    return tensors(model, injected(model)[name], adapter_parts(model, name), to_save=True)


def trained_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters that adapter `name` trains, by their keys in its file."""
    plan, parts = injected(model)[name], adapter_parts(model, name)
    trainable = {id(parameter) for parameter in parts.trained(plan)}
    return {
        key: tensor
        for key, tensor in tensors(model, plan, parts).items()
        if isinstance(tensor, nn.Parameter) and id(tensor) in trainable
    }


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path of the original model: the wrapper, if it is wrapped."""
    module = model
    for leaf in path.split("."):
        child = unwrapped(module)._modules[leaf]
        assert child is not None
        module = child
    return module


def wrapper_at(model: nn.Module, path: str) -> AdaptedLayer:
    """Returns the AdaptedLayer at a path of the original model."""
    wrapper = module_at(model, path)
    assert isinstance(wrapper, AdaptedLayer)
    return wrapper


def wrappers_of(model: nn.Module) -> tuple[dict[str, AdaptedLayer], dict[str, SavedModule]]:
    """Returns every adapted layer and every saved module, each by the first of its paths."""
    named = dict(model.named_modules())
    return (
        {name: m for name, m in named.items() if isinstance(m, AdaptedLayer)},
        {name: m for name, m in named.items() if isinstance(m, SavedModule)},
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. Afterwards every module has the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_known(model: nn.Module, name: str) -> None:
    """Raise ConfigError if the model has no adapter of this name."""
    if name not in injected(model):
        names = ", ".join(injected(model)) or "none"
        raise ConfigError(f"no adapter is named {name!r}. Found: {names}. Call lora.inject first.")


def check_keeps_base(model: nn.Module, verb: str) -> None:
    """Raise MergeError if an adapter's method keeps no originals of the base."""
    # Every part, since a part of the model may have been injected into by itself.
    for part in model.modules():
        for name, planned in injected(part).items():
            if not planned.method.keeps_base:
                raise MergeError(
                    f"{verb}: {planned.method.name} ({name!r}) trains the base itself and keeps no"
                    " originals. Load the base anew."
                )


def check_restored(model: nn.Module, verb: str) -> None:
    """Raise MergeError if the model is merged."""
    if is_merged(model):
        raise MergeError(f"{verb}: the model is merged. Call lora.restore(model) first.")


def is_merged(model: nn.Module) -> bool:
    """True if at least one layer of the model is merged."""
    layers, _ = wrappers_of(model)
    merged = [layer.kept is not None for layer in layers.values()]
    return any(merged) or any(holder.merged for holder in trained_in_place(model))


def trained_in_place(model: nn.Module) -> list[SavedModule | Selected]:
    """Returns what trains without an equation: a merge computes nothing for it."""
    return [*wrappers_of(model)[1].values(), *(selected for _, selected in selections(model))]


def check_enabled(model: nn.Module, verb: str) -> None:
    """Raise MergeError inside `with disabled(model)`, in which the model must stay the base."""
    layers, _ = wrappers_of(model)
    if not all(holder.enabled for holder in (*layers.values(), *trained_in_place(model))):
        raise MergeError(f"{verb}: the adapters are disabled. Leave lora.disabled(model) first.")
