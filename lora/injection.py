"""Adapters into a model and out again: match, wrap, freeze, disable, merge, restore, eject.

Every step that can fail is done before the model is touched: `plan` reads, `wrap` writes.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import lora.methods  # noqa: F401  (fills METHODS)
from lora.adapter import (
    AdaptedLayer,
    Adapter,
    AdapterConfig,
    Method,
    MethodConfig,
    SavedModule,
    Selection,
    check,
    check_additive,
    initialise,
    method_of,
)
from lora.errors import ConfigError, MergeError, TargetError
from lora.layers import kind, views


@dataclass(frozen=True)
class Plan:
    """What an injection would do: names by the paths of the model as it was before any."""

    method: type[Method]
    config: MethodConfig
    targets: tuple[str, ...]  # layers to wrap
    saved: tuple[str, ...]  # modules to train as a whole
    selected: tuple[str, ...]  # parameters to train as they are
    trainable: bool = True  # False where it was loaded to act only


@dataclass(frozen=True)
class Report:
    """What an injection did. `str(report)` is its table."""

    plan: Plan
    rows: tuple[tuple[str, int, str, int], ...]  # (what, how many, shape, parameters)
    adapter_parameters: int  # of the method itself, without modules_to_save
    trainable: int  # all parameters that require a gradient
    total: int  # all parameters of the model as it now stands
    note: str = ""

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        lines = [
            f"  {what:<{width}}  ×{many:<4} {shape:<14} {count:>13,}"
            for what, many, shape, count in self.rows
        ]
        share = self.trainable / max(self.total, 1)
        head = f"{self.plan.method.name}: {self.trainable:,} of {self.total:,} parameters"
        return "\n".join([f"{head} train ({share:.2%})", *lines, *filter(None, [self.note])])


def unwrapped(module: nn.Module) -> nn.Module:
    """What stood in the module's place before any injection."""
    if isinstance(module, AdaptedLayer):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) by every path, as if nothing were injected.

    Unlike named_modules it goes to a module reachable by two paths twice, and through a wrapper
    to what it wraps.
    """
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def fits(name: str, entries: str | tuple[str, ...]) -> bool:
    """Whether a module's name fits a regular expression (whole), or names or dotted endings."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in entries)


def check_pattern(field: str, entries: str | tuple[str, ...] | None) -> None:
    """Raise ConfigError where a string is no regular expression."""
    if isinstance(entries, str):
        try:
            re.compile(entries)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{field}={entries[:80]!r} is no regular expression: {error}."
                f" Set --{field.replace('_', '-')}."
            ) from None


def backbone(model: nn.Module) -> str:
    """The path of what was pretrained, "" where that is the whole: the rest are heads."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in model._modules else ""


def targets_of(model: nn.Module, config: AdapterConfig, saved: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the layers that config.target_modules means.

    Layers inside a saved module, and excluded ones, are left alone. A layer reached by two paths
    is meant, and left alone, by both. Raises TargetError where an entry matches nothing, or
    matches what no view exists for.
    """
    modules = {name: module for name, module in walk(model) if name}
    wanted, excluded = config.target_modules, config.exclude_modules
    check_pattern("target_modules", wanted)
    check_pattern("exclude_modules", excluded)
    out = {id(m) for name, m in modules.items() if any(_inside(name, whole) for whole in saved)}
    for one in _entries(excluded):
        left = {id(module) for name, module in modules.items() if fits(name, one)}
        if not left:
            named = one if isinstance(one, str) else one[0]
            raise TargetError(f"no layer matches exclude_modules entry {named!r}.\n{_offer(model)}")
        out |= left
    free = {name: module for name, module in modules.items() if id(module) not in out}
    if wanted == "all-linear":
        trunk = backbone(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head = None if head is None else unwrapped(head)
        found = tuple(
            name
            for name, module in free.items()
            if kind(module) and module is not head and _inside(name, trunk)
        )
        if not found:
            raise TargetError(f"no layer matches target_modules='all-linear'.\n{_offer(model)}")
        return found
    for entry in _entries(wanted):
        hits = [name for name in free if fits(name, entry)]
        if not hits:
            one = "" if entry is wanted else f" (entry {entry[0]!r})"
            raise TargetError(f"no layer matches target_modules={wanted!r}{one}.\n{_offer(model)}")
        for name in hits:
            if not kind(modules[name]):
                raise TargetError(
                    f"target_modules={wanted!r} matches {name}, a"
                    f" {type(modules[name]).__name__}: no view for it.\n{_offer(model)}"
                )
    meant = {id(module) for name, module in free.items() if fits(name, wanted)}
    return tuple(name for name, module in free.items() if id(module) in meant)


def _entries(entries: str | tuple[str, ...] | None) -> list[str | tuple[str, ...]]:
    """The patterns of a field one by one, each in the form that fits() takes."""
    if entries is None or isinstance(entries, str):
        return [] if entries is None else [entries]
    return [(entry,) for entry in entries]


def _inside(name: str, whole: str) -> bool:
    return not whole or name == whole or name.startswith(whole + ".")


def _offer(model: nn.Module) -> str:
    """What the model has to adapt, and what to try."""
    trunk = backbone(model)
    layers = [(n, m) for n, m in walk(model) if kind(m)]
    inside = Counter(n.rpartition(".")[2] for n, _ in layers if _inside(n, trunk))
    outside = Counter(n for n, _ in layers if not _inside(n, trunk))
    listed = [f"{name} ×{many}" for name, many in (inside + outside).most_common(12)]
    if not listed:
        return f"  {type(model).__name__} has no nn.Linear and no Conv1D."
    best = [name for name, _ in (inside or outside).most_common(2)]
    return (
        f"  {type(model).__name__} has {', '.join(listed)}."
        f" Try --target-modules {' '.join(best)}, or all-linear."
    )


def saved_of(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Paths of the modules that config.modules_to_save means: exact, or dotted endings.

    A module reached by two paths is meant by both.
    """
    modules = {name: module for name, module in walk(model) if name}
    found: dict[int, None] = {}
    for entry in config.modules_to_save:
        hits = [name for name in modules if fits(name, (entry,))]
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise TargetError(
                f"no module matches modules_to_save entry {entry!r}."
                f" {type(model).__name__} has {children}. Set --modules-to-save."
            )
        for name in hits:
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
                raise TargetError(
                    f"modules_to_save={entry!r} is {name}, a {type(modules[name]).__name__}, which"
                    " is never called. Name what it holds."
                )
            found[id(modules[name])] = None
    paths = [name for name, module in modules.items() if id(module) in found]
    return tuple(n for n in paths if not any(n != o and _inside(n, o) for o in paths))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the model as it was before any injection, each parameter once."""
    seen: set[int] = set()
    for name, parameter in _base_paths(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The same by every path: a tied weight has several."""
    for prefix, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the model as it was before any injection: those its files hold."""
    seen: set[int] = set()
    for prefix, module in walk(model):
        for name, buffer in module._buffers.items():
            stays = name not in module._non_persistent_buffers_set
            if buffer is not None and stays and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def plan(model: nn.Module, config: MethodConfig) -> Plan:
    """What injecting config would do. Touches nothing; raises TargetError or ConfigError."""
    method = method_of(config)
    for inner in ("_orig_mod", "module"):
        if inner in model._modules and type(model).__name__ in _OUTER:
            raise ConfigError(
                f"the model is wrapped in {type(model).__name__}: names would not be the model's"
                f" own. Inject into model.{inner}, before it is wrapped."
            )
    if issubclass(method, Selection):
        base = dict(base_parameters(model))
        selected = tuple(name for name in base if method.selects(name, config))
        _check_trainable({name: base[name] for name in selected})
        for name in selected:
            # A load could stop halfway through tensors that cannot be written to.
            shares = any(s == 0 and n > 1 for s, n in zip(base[name].stride(), base[name].shape))
            if base[name].is_inference() or shares:
                raise TargetError(
                    f"{name} cannot be trained in place: it was made in inference mode, or its"
                    " elements share memory. Clone it first."
                )
        return Plan(method, config, (), (), selected)
    assert isinstance(config, AdapterConfig)
    saved = saved_of(model, config)
    modules = dict(walk(model))
    for path in saved:
        _check_trainable({f"{path}.{name}": p for name, p in modules[path].named_parameters()})
        extra = [k for k, t in modules[path].state_dict().items() if not isinstance(t, Tensor)]
        if extra:
            raise TargetError(f"modules_to_save: {path}.{extra[0]} is no tensor: cannot be saved.")
    return Plan(method, config, targets_of(model, config, saved), saved, ())


_OUTER = ("OptimizedModule", "DistributedDataParallel", "DataParallel")


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise TargetError(f"{name} is {parameter.dtype}, which cannot train.")


@dataclass(frozen=True)
class Parts:
    """What an adapter consists of in the model, by the first path of each."""

    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]


def build(model: nn.Module, plan: Plan) -> Parts:
    """The plan's adapters, uninitialised, and its copies of saved modules: not yet in the model.

    Raises ConfigError where they cannot be made.
    """
    modules = dict(walk(model))
    _check_room(plan, [modules[path] for path in plan.targets])
    adapters: dict[int, tuple[str, Adapter]] = {}
    copies: dict[int, tuple[str, nn.Module]] = {}
    path = ""
    try:
        for path in plan.targets:
            module = modules[path]
            if id(module) not in adapters:  # one layer reached by two paths has one adapter
                (view,) = views(module)
                adapter: Adapter = plan.method(view, plan.config, path)  # type: ignore[call-arg, assignment]
                adapters[id(module)] = path, adapter.train(module.training)
        for path in plan.saved:
            module = modules[path]
            if id(module) not in copies:
                copies[id(module)] = path, copy.deepcopy(module)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"no adapter can be made for {path}: {reason}. Lower --r.") from error
    return Parts(dict(adapters.values()), dict(copies.values()))


def _check_room(plan: Plan, targets: list[nn.Module]) -> None:
    """Raise ConfigError where the machine cannot hold the adapters.

    Linux grants memory that is not there, and ends the process when it is written to.
    """
    if not issubclass(plan.method, Adapter):
        return
    need = 0
    for module in {id(module): module for module in targets}.values():
        (view,) = views(module)
        weight, bias = view.parameters()
        if weight.device.type == "cpu":
            sizes = view.in_features, view.out_features, bias is not None
            need += 4 * plan.method.size(*sizes, plan.config)  # float32
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise ConfigError(
            f"no adapter can be made: {plan.method.name} needs {need / 2**30:,.0f} GiB as set, the"
            f" machine has {there / 2**30:,.0f}. Lower --r."
        )


def injected(model: nn.Module) -> dict[str, Plan]:
    """The model's adapters by name, and what injected each."""
    found: dict[str, Plan] | None = model.__dict__.get("lora_adapters")
    return {} if found is None else found


def check_name(name: str) -> None:
    """An adapter's name is a folder's and a module's: letters, digits, _ and - only."""
    good = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
    # nn.ModuleDict has attributes of these names
    check("name", name, "letters, digits, _ and -", good and not hasattr(nn.ModuleDict(), name))


def check_seed(seed: int) -> None:
    """A seed is a whole number: the hash behind the initial values is of its digits."""
    check("seed", seed, "a whole number", isinstance(seed, int) and not isinstance(seed, bool))


def wrap(model: nn.Module, plan: Plan, parts: Parts, name: str) -> None:
    """Put built parts into the model under `name`, activate them, freeze the base."""
    modules = dict(walk(model))
    adapters = {id(modules[path]): adapter for path, adapter in parts.adapters.items()}
    copies = {id(modules[path]): module for path, module in parts.copies.items()}
    if not injected(model):
        # What eject gives back.
        model.__dict__["lora_required"] = {n: p.requires_grad for n, p in _base_paths(model)}
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    fresh: dict[int, AdaptedLayer | SavedModule] = {}
    for path in (*plan.targets, *plan.saved):
        parent, _, leaf = path.rpartition(".")
        held = modules[parent]._modules[leaf]
        assert held is not None
        if not isinstance(held, AdaptedLayer | SavedModule):
            wrapper = AdaptedLayer if path in plan.targets else SavedModule
            held = fresh.setdefault(id(held), wrapper(held))
            modules[parent]._modules[leaf] = held
            if isinstance(modules[parent], nn.TransformerEncoderLayer):
                # In eval it hands its layers' weights to a fused kernel, past any adapter, unless
                # one of them has a hook.
                held.register_forward_pre_hook(_nothing)
        if isinstance(held, AdaptedLayer):
            held.adapters[name] = adapters[id(held.base_layer)]
        else:
            held.copies[name] = copies[id(held.original_module)]
    model.__dict__["lora_adapters"] = {**injected(model), name: plan}
    activate(model, name)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that is there to be seen."""


def owned(model: nn.Module, name: str) -> Parts:
    """The parts of adapter `name` in the model."""
    plan = injected(model)[name]
    modules = dict(walk(model))
    adapters: dict[int, tuple[str, Adapter]] = {}
    copies: dict[int, tuple[str, nn.Module]] = {}
    for path in plan.targets:
        adapters.setdefault(id(modules[path]), (path, wrapper_at(model, path).adapter(name)))
    for path in plan.saved:
        keeper = held_at(model, path)
        assert isinstance(keeper, SavedModule)
        copies.setdefault(id(modules[path]), (path, keeper.copies[name]))
    return Parts(dict(adapters.values()), dict(copies.values()))


def tensors(model: nn.Module, plan: Plan, parts: Parts) -> dict[str, Tensor]:
    """What an adapter's file holds, by its keys less the prefix."""
    found: dict[str, Tensor] = {}
    if plan.selected:
        base = dict(base_parameters(model))
        found |= {name: base[name] for name in plan.selected}
        found |= dict(base_buffers(model))  # running statistics move with the weights
    for path, adapter in parts.adapters.items():
        for name, parameter in adapter.named_parameters():
            found[f"{path}.{adapter.keys.get(name, name)}"] = parameter
    for path, module in parts.copies.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            found[f"{path}.{name}"] = tensor
    return found


def trained_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name`, by their keys in its file."""
    found = tensors(model, injected(model)[name], owned(model, name))
    return {key: tensor for key, tensor in found.items() if isinstance(tensor, nn.Parameter)}


def held_at(model: nn.Module, path: str) -> nn.Module:
    """The module that stands at a path of the original model, wrappers seen."""
    module = model
    for leaf in path.split("."):
        held = unwrapped(module)._modules[leaf]
        assert held is not None
        module = held
    return module


def wrapper_at(model: nn.Module, path: str) -> AdaptedLayer:
    wrapper = held_at(model, path)
    assert isinstance(wrapper, AdaptedLayer)
    return wrapper


def wrappers_of(model: nn.Module) -> tuple[dict[str, AdaptedLayer], dict[str, SavedModule]]:
    """Every adapted layer and every saved module, by one path of each."""
    named = dict(model.named_modules())
    return (
        {name: m for name, m in named.items() if isinstance(m, AdaptedLayer)},
        {name: m for name, m in named.items() if isinstance(m, SavedModule)},
    )


def check_alive(model: nn.Module) -> None:
    """Raise TargetError where, after a backward, a part that trains has no gradient at all.

    Its forward was not called: some modules read their layers' weights themselves (WavLM's
    attention), past any adapter, and T5 calls its embedding by another path than `shared`.
    """
    layers, saved = wrappers_of(model)
    acting: list[tuple[str, nn.Module]] = [
        (path, layer.adapter(name)) for path, layer in layers.items() for name in layer.active
    ]
    acting += [(path, keeper.current) for path, keeper in saved.items() if keeper.active]
    trained = {path: [p for p in m.parameters() if p.requires_grad] for path, m in acting}
    dead = [path for path, own in trained.items() if own and all(p.grad is None for p in own)]
    if dead:
        flag = "--exclude-modules" if dead[0] in layers else "--modules-to-save without it"
        raise TargetError(
            f"{len(dead)} of {len(trained)} trained modules have no gradient, {dead[0]} among them:"
            " the model does not call them, it reads their weights itself or by another path."
            f" Leave them out: set {flag}."
        )


def report_of(model: nn.Module, name: str, note: str = "") -> Report:
    """The table of what adapter `name` is on this model."""
    plan = injected(model)[name]
    parts = owned(model, name)
    groups: dict[tuple[str, str], list[int]] = {}
    for path, adapter in parts.adapters.items():
        wrapper = wrapper_at(model, path)
        shape = f"{wrapper.in_features} -> {wrapper.out_features}"
        groups.setdefault((path.rpartition(".")[2], shape), []).append(_size(adapter))
    if plan.selected:
        sizes = [p.numel() for p in trained_parameters(model, name).values()]
        groups["parameters of the base", ""] = sizes
    own = sum(map(sum, groups.values()))
    for path, module in parts.copies.items():
        groups[f"(saved) {path}", "whole"] = [_size(module)]
    return Report(
        plan=plan,
        rows=tuple((what, len(s), shape, sum(s)) for (what, shape), s in groups.items()),
        adapter_parameters=own,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=_size(model),
        note=note,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def inject(model: nn.Module, config: MethodConfig, name: str = "default", seed: int = 0) -> Report:
    """Put a method's adapters on the layers that config names, in place, and freeze all else.

    The initial values are a function of (seed, layer's name) alone. A head never trains by
    itself: name it in modules_to_save. Raises TargetError or ConfigError, the model untouched.
    """
    check_name(name)
    check_seed(seed)
    planned = plan(model, config)
    check_mix(model, name, planned)
    check_statistics(model, planned)
    parts = build(model, planned)
    for adapter in parts.adapters.values():
        initialise(adapter, seed)
    wrap(model, planned, parts, name)
    return report_of(model, name, _note(model, planned))


def check_mix(model: nn.Module, name: str, planned: Plan) -> None:
    """Raise ConfigError where the model cannot take this adapter beside those it has."""
    present = injected(model)
    if name in present:
        raise ConfigError(
            f"the model has an adapter named {name!r} already. Take another name for this one."
        )
    check_restored(model, f"inject {name!r}")
    _check_enabled(model, f"inject {name!r}")
    layers, saved = wrappers_of(model)
    if not present and (layers or saved):
        raise ConfigError(
            f"{next(iter((*layers, *saved)))} has an adapter that was injected into a part of the"
            " model. Inject into that part, or call lora.eject(part) first."
        )
    if any(issubclass(p.method, Selection) for p in (planned, *present.values())) and present:
        raise ConfigError(
            f"{name!r} cannot join {', '.join(present)}: a method that trains the base stands"
            " alone. Load the base anew."
        )
    for other, plan in present.items():
        for whole, parts in ((planned, plan), (plan, planned)):
            for path in whole.saved:
                for part in (*parts.targets, *parts.saved):
                    if _inside(part, path) and not (part == path and part in parts.saved):
                        raise ConfigError(
                            f"{name!r} cannot join {other!r}: one trains {path} whole, the other"
                            f" changes {part}. Load the base anew, or target other layers."
                        )


def check_statistics(model: nn.Module, planned: Plan) -> None:
    """Raise TargetError where training would move running statistics of the frozen base."""
    if planned.selected:
        return
    for name, module in walk(model):
        tracked = getattr(module, "running_mean", None) is not None
        if tracked and not any(_inside(name, whole) for whole in planned.saved):
            raise TargetError(
                f"{name} ({type(module).__name__}) keeps running statistics, which training would"
                f" move in the frozen base. Name it: modules_to_save=({name!r},)."
            )


def _note(model: nn.Module, planned: Plan) -> str:
    """What saving these modules means where it is not plain to see."""
    notes = []
    names = [name for name, _ in walk(model) if name not in planned.saved]
    for path in planned.saved:
        more = [name for name in names if name.endswith(path) and not name.endswith("." + path)]
        if more:
            notes.append(
                f"PEFT takes modules_to_save={path!r} to mean {', '.join(more)} too, and"
                " cannot read the saved file. Name both where PEFT shall read it."
            )
    places: dict[int, list[str]] = {}
    for name, parameter in _base_paths(model):
        places.setdefault(id(parameter), []).append(name)
    for tied in places.values():
        copied = [name for name in tied if any(_inside(name, path) for path in planned.saved)]
        if copied and len(copied) < len(tied):
            left = [name for name in tied if name not in copied]
            notes.append(f"{copied[0]} trains apart from {left[0]}, which it was tied to.")
    return "\n".join(notes)


def init(model: nn.Module, seed: int, name: str = "default") -> None:
    """Fill adapter `name` anew, as after a start on the meta device and `to_empty`.

    Its modules_to_save begin again as copies of the base's.
    """
    check_seed(seed)
    _known(model, name)
    check_restored(model, "init")
    parts, modules = owned(model, name), dict(walk(model))
    for adapter in parts.adapters.values():
        initialise(adapter, seed)
    for path, module in parts.copies.items():
        module.load_state_dict(modules[path].state_dict())


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters, and no others, act and train. Several must be additive: deltas sum."""
    names = tuple(dict.fromkeys(names))
    for name in names:
        _known(model, name)
    check_restored(model, "activate")
    check_additive(names, [injected(model)[name].method for name in names])
    layers, saved = wrappers_of(model)
    for path, keeper in saved.items():
        both = [name for name in names if name in keeper.copies]
        if len(both) > 1:
            raise MergeError(
                f"adapters {', '.join(both)} cannot be active together: each has its own {path}."
                " Activate one of them."
            )
    for layer in layers.values():
        layer.active = tuple(name for name in names if name in layer.adapters)
    for keeper in saved.values():
        keeper.active = tuple(name for name in names if name in keeper.copies)
    for name, planned in injected(model).items():
        for parameter in trained_parameters(model, name).values():
            parameter.requires_grad_(name in names and planned.trainable)


def _known(model: nn.Module, name: str) -> None:
    if name not in injected(model):
        found = ", ".join(injected(model)) or "none"
        raise ConfigError(f"no adapter is named {name!r}. Found: {found}. Call lora.inject first.")


def _keeps_base(model: nn.Module, verb: str) -> None:
    # A part of the model may have been injected into by itself.
    for part in model.modules():
        for name, planned in injected(part).items():
            if not planned.method.keeps_base:
                raise MergeError(
                    f"{verb}: {planned.method.name} ({name!r}) trains the base itself and keeps no"
                    " originals. Load the base anew."
                )


def check_restored(model: nn.Module, verb: str) -> None:
    """Raise MergeError where the model is merged."""
    layers, _ = wrappers_of(model)
    if any(layer.kept is not None for layer in layers.values()):
        raise MergeError(f"{verb}: the model is merged. Call lora.restore(model) first.")


def _check_enabled(model: nn.Module, verb: str) -> None:
    """Raise MergeError inside `with disabled(model)`, whose promise the verb would break."""
    layers, saved = wrappers_of(model)
    if not all(wrapper.enabled for wrapper in (*layers.values(), *saved.values())):
        raise MergeError(f"{verb}: the adapters are disabled. Leave lora.disabled(model) first.")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base, bit for bit: adapters and saved modules do not act."""
    _keeps_base(model, "disabled")
    check_restored(model, "disabled")
    layers, saved = wrappers_of(model)
    wrappers: list[AdaptedLayer | SavedModule] = [*layers.values(), *saved.values()]
    before = [wrapper.enabled for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.enabled = False
        yield
    finally:
        for wrapper, enabled in zip(wrappers, before, strict=True):
            wrapper.enabled = enabled


def merge(model: nn.Module) -> None:
    """Put W' in W's place in every adapted layer, in the base's dtype, from float32.

    The originals are kept by reference for restore(). Raises MergeError, the model untouched,
    where a weight is tied to another layer or W' is not finite.
    """
    _keeps_base(model, "merge")
    check_restored(model, "merge")
    _check_enabled(model, "merge")
    layers, _ = wrappers_of(model)
    modules = {id(module): module for _, module in walk(model)}.values()
    users = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    merged: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer in layers.items():
        if not layer.active:
            continue
        if users[id(layer.view.parameters()[0])] > 1:
            raise MergeError(
                f"merge: the weight of {name} is tied to another module's, which would change"
                " with it. Leave it out of target_modules, or untie the two first."
            )
        merged[name] = layer.merged()
        if not all(bool(t.isfinite().all()) for t in merged[name] if t is not None):
            raise MergeError(f"merge: W' of {name} is not finite in {layer.weight.dtype}.")
    for name, pair in merged.items():
        layers[name].merge(pair)


def restore(model: nn.Module) -> None:
    """Undo merge, bit for bit, from the kept originals."""
    _keeps_base(model, "restore")
    layers, _ = wrappers_of(model)
    for layer in layers.values():
        layer.restore()


def eject(model: nn.Module) -> None:
    """Leave a plain model: merged it computes what the adapted one did, unmerged it is the base.

    Every parameter requires a gradient again that did before the first injection.
    """
    inside = [part for part in model.modules() if injected(part) and part is not model]
    if inside:
        names = [name for name, part in model.named_modules() if part is inside[0]]
        raise MergeError(
            f"eject: the adapters are those of the part {names[0]}. Call"
            f" lora.eject(model.{names[0]})."
        )
    if not injected(model):
        return
    layers, saved = wrappers_of(model)
    is_merged = any(layer.kept is not None for layer in layers.values())
    wrappers = {id(w) for w in (*layers.values(), *saved.values())}
    places = [
        (parent, leaf, child)
        for parent in {id(m): m for _, m in walk(model)}.values()
        for leaf, child in parent._modules.items()
        if id(child) in wrappers
    ]
    for parent, leaf, child in places:
        if isinstance(child, AdaptedLayer):
            plain = child.base_layer
        else:
            assert isinstance(child, SavedModule)
            plain = child.current if is_merged else child.original_module
        parent._modules[leaf] = plain
    required = model.__dict__.pop("lora_required")
    del model.__dict__["lora_adapters"]
    for name, parameter in _base_paths(model):
        parameter.requires_grad_(required.get(name, parameter.requires_grad))
