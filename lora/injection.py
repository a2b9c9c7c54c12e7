"""Adapters into a model and out again: wrap, freeze, disable, merge, restore, eject.

Every step that can fail is done before the model is touched: targets.plan_of reads, `wrap` writes.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora import nf4, ties
from lora.adapter import (
    SHORTHANDS,
    AdaptedLayer,
    Adapter,
    MethodConfig,
    SavedModule,
    Selected,
    Selection,
    check,
    check_additive,
    forward,
    initialise,
    is_number,
)
from lora.errors import CheckpointError, ConfigError, MergeError, TargetError
from lora.kernels import siblings
from lora.kernels.fused import compute_dtype
from lora.layers import VIEWS, View, gathered, inside, kind, views
from lora.methods._tokens import Tokens
from lora.nf4 import NF4Linear, put
from lora.targets import (
    Plan,
    base_buffers,
    base_parameters,
    base_paths,
    beside_saved,
    peft_saves_too,
    plan_of,
    uncalled,
    unwrapped,
    walk,
)


@dataclass(frozen=True)
class Report:
    """What an injection did. `str(report)` is its table."""

    plan: Plan
    rows: tuple[tuple[str, int, str, int], ...]  # (what, how many, shape, parameters)
    adapter_parameters: int  # of the method itself, without modules_to_save
    trainable: int  # all parameters that require a gradient
    total: int  # all parameters of the model as it now stands
    left: tuple[tuple[str, int], ...] = ()  # layers that are not adapted, or cannot be
    note: str = ""

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        lines = [
            f"  {what:<{width}}  ×{many:<4} {shape:<14} {count:>13,}"
            for what, many, shape, count in self.rows
        ]
        share = self.trainable / max(self.total, 1)
        head = f"{self.plan.method.name}: {self.trainable:,} of {self.total:,} parameters"
        left = ", ".join(f"{what} ×{many}" for what, many in self.left)
        tail = [f"  left alone: {left}" if left else "", self.note]
        return "\n".join([f"{head} train ({share:.2%})", *lines, *filter(None, tail)])


@dataclass(frozen=True)
class Parts:
    """What an adapter consists of in the model, by the first path of each."""

    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]
    selected: dict[str, nn.Parameter]  # of the base, by its names


def build(model: nn.Module, plan: Plan) -> Parts:
    """The plan's adapters, uninitialised, and its copies of saved modules: not yet in the model.

    Raises ConfigError where they cannot be made.
    """
    modules = dict(walk(model))
    _check_room(plan, {path: modules[path] for path in plan.targets})
    adapters: dict[int, tuple[str, Adapter]] = {}
    copies: dict[int, tuple[str, nn.Module]] = {}
    path = ""
    try:
        for path in plan.targets:
            module = modules[path]
            if id(module) not in adapters:  # one layer reached by two paths has one adapter
                (view,) = views(module)
                make: Any = plan.further.get(path, plan.method)
                adapter: Adapter = make(view, plan.config, path)
                adapters[id(module)] = path, adapter.train(module.training)
        for path in plan.saved:
            module = modules[path]
            if id(module) not in copies:
                copies[id(module)] = path, copy.deepcopy(module)
        _join(plan, with_views(model, dict(adapters.values())))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"no adapter can be made for {path}: {reason}. Lower --r.") from error
    base = dict(base_paths(model))
    selected = {name: base[name] for name in (*plan.selected, *plan.carried)}
    return Parts(dict(adapters.values()), dict(copies.values()), selected)


def with_views(
    model: nn.Module, adapters: Mapping[str, Adapter]
) -> dict[str, tuple[Adapter, View]]:
    """Each adapter with the view of the layer that it is for, by the layers' names."""
    modules = dict(walk(model))
    return {path: (adapter, views(modules[path])[0]) for path, adapter in adapters.items()}


def _join(plan: Plan, placed: Mapping[str, tuple[Adapter, View]]) -> None:
    """Give the adapters what several have in common, as one parameter, and freeze what is not to
    train. Again after to_empty, which makes each adapter's parameters anew."""
    adapters = [adapter for adapter, _ in placed.values()]
    if not adapters:
        return
    like = next(adapters[0].parameters())
    for name, values in adapters[0].shared([v for _, v in placed.values()], plan.config).items():
        one = nn.Parameter(values.to(like), requires_grad=False)
        for adapter in adapters:
            adapter.register_parameter(name, one)
            adapter.frozen |= {name}
            adapter.keys = {**adapter.keys, name: f"base_model.{name}"}
    for adapter in adapters:
        if adapter.leader:
            adapter.follow(placed[adapter.leader][0])
        for name in adapter.frozen:
            adapter.get_parameter(name).requires_grad_(False)


def _check_room(plan: Plan, targets: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError where the machine cannot hold the adapters.

    Linux grants memory that is not there, and ends the process when it is written to.
    """
    if not issubclass(plan.method, Adapter):
        return
    need = 0
    for path, module in {id(module): (path, module) for path, module in targets.items()}.values():
        (view,) = views(module)
        if path not in plan.further and view.parameters()[0].device.type == "cpu":
            need += 4 * plan.method.size(view, plan.config, path)  # float32
    check_memory(need, f"no adapter can be made: {plan.method.name} needs")


def machine_memory() -> int | None:
    """Bytes of memory that the machine has, None if the system does not say (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(need: int, what: str) -> None:
    """Raise ConfigError if `what` needs more bytes than the machine has, as far as it says."""
    memory = machine_memory()
    if memory is not None and need > memory:
        raise ConfigError(
            f"{what} {need / 2**30:,.0f} GiB as set, the machine has {memory / 2**30:,.0f}."
            " Train less: lower --r, fewer --target-modules, or another --method."
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
        model.__dict__["lora_required"] = {n: p.requires_grad for n, p in base_paths(model)}
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
    for path, module in modules.items():
        adapted = [n for n, m in module._modules.items() if isinstance(m, AdaptedLayer)]
        siblings.join(module, path, adapted)
    if parts.selected:
        model.__dict__["lora_selected"] = Selected(parts.selected, plan.method.keeps_base)
    model.__dict__["lora_adapters"] = {**injected(model), name: plan}
    _unwatch(model)
    Watch(model)
    guard(model, True)
    activate(model, name)


WHOLE = ("save_pretrained", "push_to_hub")


def guard(model: nn.Module, on: bool) -> None:
    """Let save_pretrained, which Trainer calls too, and push_to_hub refuse on every part of the
    model that has wrappers: what they wrote would load with weights drawn at random."""
    for part in model.modules():
        own = part.__dict__
        for name in WHOLE:
            if own.get(name) is _refuse_to_save:
                del own[name]
        inner = (
            [m for m in part.modules() if isinstance(m, AdaptedLayer | SavedModule)] if on else []
        )
        if inner:
            own.update({name: _refuse_to_save for name in WHOLE if hasattr(type(part), name)})


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        "save_pretrained: the model holds adapters, under names that from_pretrained does not read:"
        " the layers would load with weights drawn at random. For the adapter call"
        " lora.save(model, folder); for a whole model lora.merge(model) and lora.eject(model)"
        " first. In transformers.Trainer pass callbacks=[lora.AdapterCallback()]."
    )


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
    selected: dict[str, nn.Parameter] = {}
    if plan.selected or plan.carried:
        holder, base = model.__dict__["lora_selected"], dict(base_paths(model))
        selected = {name: holder.aside.get(name, base[name]) for name in holder.names}
    return Parts(dict(adapters.values()), dict(copies.values()), selected)


def selections(model: nn.Module) -> list[tuple[nn.Module, Selected]]:
    """Each part of the model whose own parameters train, and those."""
    key = "lora_selected"
    return [(part, part.__dict__[key]) for part in model.modules() if key in part.__dict__]


def _place(part: nn.Module, selected: Selected, acting: bool) -> None:
    """Let the trained values of a selection act in the part, or the originals."""
    modules, held = dict(walk(part)), dict(base_paths(part))
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, parameter in held.items():
        path, _, leaf = name.rpartition(".")
        places.setdefault(id(parameter), []).append((modules[path], leaf))
    selected.place({name: places[id(held[name])] for name in selected.originals}, acting)


def filed_key(plan: Plan, name: str) -> str:
    """The key in an adapter's file, less the prefix, of a parameter of the base."""
    path, _, leaf = name.rpartition(".")
    if issubclass(plan.method, Selection):
        return plan.method.key(name) if name in plan.selected else name
    if path in plan.further and not issubclass(plan.method, Tokens):
        return f"{path}.token_adapter.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if path in plan.targets else name


def tensors(model: nn.Module, plan: Plan, parts: Parts, stored: bool = False) -> dict[str, Tensor]:
    """The places of what an adapter's file holds, by its keys less the prefix; with `stored` what
    it holds of them."""
    found: dict[str, Tensor] = {}
    held = dict(base_paths(model)) if parts.selected else {}
    for name, parameter in parts.selected.items():
        names = [name]
        if issubclass(plan.method, Adapter) and name in plan.selected:
            # PEFT files what is tied under each of its names.
            names = [
                alias
                for alias, now in held.items()
                if now is held[name]
                and plan.method.selects(
                    alias, alias.rpartition(".")[0] in plan.targets, plan.config
                )
            ]
        for alias in names:
            found[filed_key(plan, alias)] = parameter
    if not plan.method.keeps_base:
        found |= dict(base_buffers(model))  # running statistics move with the weights
    for path, adapter in parts.adapters.items():
        own = adapter.stored() if stored else adapter.placed()
        for key, tensor in own.items():
            at_root = key.startswith("base_model.")
            if not at_root:
                found[f"{path}.{key}"] = tensor
            elif adapter.saves_shared(plan.config):
                found[key] = tensor
    for path, module in parts.copies.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            found[f"{path}.{name}"] = tensor
    return found


def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the file of adapter `name` holds, by its keys less the prefix."""
    return tensors(model, injected(model)[name], owned(model, name), stored=True)


def trained_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters that adapter `name` trains, by their keys in its file."""
    plan, parts = injected(model)[name], owned(model, name)
    found = tensors(model, plan, parts)
    still = {id(parts.selected[name]) for name in plan.carried}
    for adapter in parts.adapters.values():
        still |= {id(p) for key, p in adapter.named_parameters() if key in adapter.frozen}
    return {
        key: tensor
        for key, tensor in found.items()
        if isinstance(tensor, nn.Parameter) and id(tensor) not in still
    }


def acting(model: nn.Module) -> Iterator[tuple[Plan, list[Adapter]]]:
    """What each active adapter of the model is, and its parts on layers."""
    for name, plan in injected(model).items():
        layers = {id(layer): layer for layer in (wrapper_at(model, path) for path in plan.targets)}
        parts = [layer.adapter(name) for layer in layers.values() if name in layer.active]
        if parts:
            yield plan, parts


def param_groups(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Everything that trains, by the multiple of the learning rate that it trains at."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for _, adapters in acting(model):
        for adapter in adapters:
            for multiple, parameters in adapter.param_groups().items():
                groups.setdefault(multiple, []).extend(parameters)
    placed = {id(p) for parameters in groups.values() for p in parameters}
    groups[1.0] += [p for p in model.parameters() if p.requires_grad and id(p) not in placed]
    trained = {
        multiple: [p for p in parameters if p.requires_grad]
        for multiple, parameters in groups.items()
    }
    return [(parameters, multiple) for multiple, parameters in trained.items() if parameters]


def penalty(model: nn.Module) -> Tensor | None:
    """What the active adapters' methods add to the loss, None where nothing."""
    found = [
        plan.method.penalty(parts, plan.config)
        for plan, parts in acting(model)
        if issubclass(plan.method, Adapter) and plan.trainable
    ]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None


def check_steps(model: nn.Module, total: int) -> None:
    """Raise ConfigError where an active adapter cannot be trained in so many steps."""
    for plan, _ in acting(model):
        if issubclass(plan.method, Adapter) and plan.trainable:
            plan.method.check_steps(plan.config, total)


def after_step(model: nn.Module, step: int, total: int) -> None:
    """Let the active adapters' methods act on optimiser step `step` of `total`, from 1; to be
    called after optimizer.step() and before zero_grad()."""
    for plan, parts in acting(model):
        if issubclass(plan.method, Adapter) and plan.trainable:
            plan.method.after_step(parts, plan.config, step, total)


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


class Watch:
    """Hooks on a model that find, in the first forward of each mode, an adapted layer whose weight
    the model reads while it does not call the layer: the adapter does nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.passed: set[bool] = set()  # the modes (training or not) that were found good
        self.layers, _ = wrappers_of(model)  # once: nothing passes while no adapter acts
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after)

    def before(self, model: nn.Module, args: Any) -> None:
        """Let the layers note whether they are called in this forward."""
        if not torch.compiler.is_compiling() and model.training not in self.passed:
            for layer in self.layers.values():
                layer.watch()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Raise TargetError if a layer that acts was read past."""
        if torch.compiler.is_compiling() or model.training in self.passed:
            return
        acting = {n: m for n, m in self.layers.items() if m.active and m.enabled and m.kept is None}
        missed = [
            name
            for name, layer in acting.items()
            if layer.was_read and not layer.was_called and _matters(layer)
        ]
        if missed:
            raise TargetError(
                f"{len(missed)} of {len(acting)} adapted layers did nothing in this forward,"
                f" {missed[0]} among them: the model reads their weights itself and does not call"
                " them. Leave them out: set --exclude-modules."
            )
        if acting:
            self.passed.add(model.training)


def _unwatch(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for place in [p for p, h in hooks.items() if isinstance(getattr(h, "__self__", 0), Watch)]:
            del hooks[place]


@torch.no_grad()
def _matters(layer: AdaptedLayer) -> bool:
    """Whether a layer's adapter trains, or changes its weight: of a file of PEFT's it may not."""
    if any(p.requires_grad for name in layer.active for p in layer.adapter(name).parameters()):
        return True
    W, _ = layer.view.read()
    W1 = W
    for name in layer.active:
        W1, _ = layer.adapter(name).merged(W1, None)
    return not torch.equal(W1, W)


def check_alive(model: nn.Module) -> None:
    """Raise TargetError where, after a backward, a part that trains has no gradient at all.

    Its forward was not called: some modules read their layers' weights themselves (WavLM's
    attention), past any adapter, and T5 calls its embedding by another path than `shared`. Or a
    reentrant checkpoint called it, which takes no gradient inside where its input takes none.
    A layer that was not called in this step, when its like in another block or expert was, is no
    error: no token was routed to it, or its block was left out.
    """
    layers, saved = wrappers_of(model)
    acting: list[tuple[str, nn.Module]] = [
        (path, layer.adapter(name)) for path, layer in layers.items() for name in layer.active
    ]
    acting += [(path, keeper.current) for path, keeper in saved.items() if keeper.active]
    trained = {path: [p for p in m.parameters() if p.requires_grad] for path, m in acting}
    dead = [path for path, own in trained.items() if own and all(p.grad is None for p in own)]
    alive = {re.sub(r"\d+", "*", path) for path in trained if path not in dead}
    idle = [
        path
        for path in dead
        if path in layers
        and not (layers[path].was_called or layers[path].was_read)
        and re.sub(r"\d+", "*", path) in alive
    ]
    dead = [path for path in dead if path not in idle]
    for layer in layers.values():
        layer.watch()
    if dead:
        flag = "--exclude-modules" if dead[0] in layers else "--modules-to-save without it"
        raise TargetError(
            f"{len(dead)} of {len(trained)} trained modules have no gradient, {dead[0]} among them:"
            " the model does not call them, it reads their weights itself or by another path."
            f" Leave them out: set {flag}. Or a checkpoint that is reentrant calls them: pass it"
            " use_reentrant=False, or use --activation-checkpointing."
        )


def report_of(model: nn.Module, name: str, note: str = "") -> Report:
    """The table of what adapter `name` is on this model."""
    plan = injected(model)[name]
    parts = owned(model, name)
    groups: dict[tuple[str, str], list[int]] = {}
    for path, adapter in parts.adapters.items():
        wrapper = wrapper_at(model, path)
        shape = f"{wrapper.in_features} -> {wrapper.out_features}"
        groups.setdefault((path.rpartition(".")[2], shape), []).append(
            sum(p.numel() for own in adapter.param_groups().values() for p in own)
        )
    if plan.selected:
        sizes = [parts.selected[name].numel() for name in plan.selected]
        groups["parameters of the base", ""] = sizes
    own = sum(map(sum, groups.values()))
    for path, module in parts.copies.items():
        groups[f"(saved) {path}", "whole"] = [_size(module)]
    left: Counter[str] = Counter()
    for path, module in walk(model) if plan.targets else ():
        matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
        if path not in plan.targets and not any(inside(path, whole) for whole in plan.saved):
            if kind(module):
                left[path.rpartition(".")[2]] += 1
            elif matrices:  # such as Mixtral's experts
                left[f"{path.rpartition('.')[2]} (no view)"] += 1
    return Report(
        plan=plan,
        rows=tuple((what, len(s), shape, sum(s)) for (what, shape), s in groups.items()),
        adapter_parameters=own,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=_size(model),
        left=tuple(left.items()),
        note=note,
    )


def _size(module: nn.Module) -> int:
    """Parameters; of a packed weight the values that it stands for."""
    found = sum(parameter.numel() for parameter in module.parameters())
    for view in (v for m in module.modules() if type(m) in VIEWS for v in views(m)):
        found += view.out_features * view.in_features - sum(t.numel() for t in view.stored())
    return found


def inject(
    model: nn.Module,
    config: MethodConfig,
    name: str = "default",
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    pack: Sequence[str] = (),
) -> Report:
    """Put a method's adapters on the layers that config names, in place, and freeze all else.

    The initial values are a function of (seed, layer's name) alone, and of `batches` where the
    start is had from data (eva, lora_ga): mappings, tuples or tensors that the model takes. A head
    never trains by itself: name it in modules_to_save. `pack` names linear layers to hold in NF4
    from here on, adapted or not: a start may take up what their rounding leaves (pissa, olora,
    loftq). Raises TargetError, ConfigError or ModelError, the model untouched.
    """
    check_seed(seed)
    planned = planned_of(model, config, name, batches is not None, bool(pack))
    if (batches is not None or pack) and any(p.is_meta for _, p in base_parameters(model)):
        raise ConfigError(
            f"{planned.method.name} starts from all of the base's values as set, found a base that"
            " lies in pieces over several ranks, or on the meta device. Set --init-lora-weights"
            " default, or load the base whole."
        )
    parts = build(model, planned)
    placed = list(with_views(model, parts.adapters).values())
    for adapter, view in placed:
        initialise(adapter, view, seed)
    if batches is not None:
        assert issubclass(planned.method, Adapter)
        with evaluating(model):
            planned.method.calibrate(placed, model, batches)
    return place(model, planned, parts, _packed(model, placed, pack), name)


def planned_of(model: nn.Module, config: MethodConfig, name: str, shown: bool, packs: bool) -> Plan:
    """What inject() would do under `name`: with batches, packing layers, or without; its errors."""
    check_name(name)
    planned = plan_of(model, config)
    check_mix(model, name, planned)
    check_statistics(model, planned)
    needs = issubclass(planned.method, Adapter) and planned.method.needs_batches(config)
    if needs != shown:
        said = "takes no batches as set: leave out batches"
        said = "starts from data: pass batches=[...]" if needs else said
        raise ConfigError(f"{planned.method.name} {said}.")
    if issubclass(planned.method, Adapter) and planned.method.needs_packing(config) and not packs:
        raise ConfigError(
            f"{planned.method.name} starts from a base that is packed with it, as set. Pass"
            " --quantize nf4, or in Python pack=[names of layers]."
        )
    return planned


def place(
    model: nn.Module, planned: Plan, parts: Parts, packed: Mapping[int, nn.Module], name: str
) -> Report:
    """Put built parts, and packed layers by the ids of those whose place they take, into the
    model."""
    wrap(model, planned, parts, name)
    put(model, packed)
    if packed:  # codes take no gradient, when eject gives the model back either
        required = model.__dict__["lora_required"]
        for path, parameter in base_paths(model):
            required[path] = parameter.is_floating_point() and required.get(path, False)
    return report_of(model, name, _note(model, planned))


@torch.no_grad()
def _packed(
    model: nn.Module, placed: Sequence[tuple[Adapter, View]], names: Sequence[str]
) -> dict[int, nn.Module]:
    """The named layers in NF4, by the id of each; adapters' starts take up what that leaves."""
    over = {id(view.module): adapter for adapter, view in placed}
    found: dict[int, nn.Module] = {}
    modules = dict(walk(model))
    for path in names:
        if path not in modules:
            raise TargetError(f"pack: the model has no layer {path!r}.")
        module = modules[path]
        if id(module) in found:
            continue
        (view,) = views(module)
        if view.packed:
            raise TargetError(
                f"pack: {path} is in NF4 already, and what its rounding left is not known. Load the"
                " base as it was before, or leave pack out."
            )
        if view.of_ids:
            raise TargetError(f"pack: {path} is {kind(module)}. Name linear layers.")
        quantize = partial(nf4.quantize, double_quant=True, name=path)
        W, adapter = view.read()[0], over.get(id(module))
        q = quantize(W) if adapter is None else adapter.pack(W, quantize)
        found[id(module)] = NF4Linear.over(module, q)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    if present and any(p.selected or p.carried for p in (planned, *present.values())):
        raise ConfigError(
            f"{name!r} cannot join {', '.join(present)}: what trains parameters of the base stands"
            " alone. Load the base anew."
        )
    for other, plan in present.items():
        for whole, parts in ((planned, plan), (plan, planned)):
            for path in whole.saved:
                for part in (*parts.targets, *parts.saved):
                    if inside(part, path) and not (part == path and part in parts.saved):
                        raise ConfigError(
                            f"{name!r} cannot join {other!r}: one trains {path} whole, the other"
                            f" changes {part}. Load the base anew, or target other layers."
                        )


def check_statistics(model: nn.Module, planned: Plan) -> None:
    """Raise TargetError where training would move running statistics of the frozen base."""
    if not planned.method.keeps_base:
        return
    for name, module in walk(model):
        tracked = getattr(module, "running_mean", None) is not None
        if tracked and not any(inside(name, whole) for whole in planned.saved):
            raise TargetError(
                f"{name} ({type(module).__name__}) keeps running statistics, which training would"
                f" move in the frozen base. Name it: modules_to_save=({name!r},)."
            )


def _note(model: nn.Module, planned: Plan) -> str:
    """What saving these modules means where it is not plain to see."""
    notes = []
    read = uncalled(model)
    if read and getattr(planned.config, "target_modules", None) in SHORTHANDS:
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in read))
        notes.append(f"{ends} left alone: {type(model).__name__} reads their weights itself.")
    taken = peft_saves_too(model, planned.saved) if planned.method.in_peft else []
    filed = beside_saved(model, planned) if taken else {}
    for path in taken:
        own = next(one for one in planned.saved if path.endswith(one))
        held = any(inside(name, path) for name in filed)
        notes.append(
            f"PEFT takes modules_to_save={own!r} to mean {path} too: "
            + (
                "the saved file holds it as the base has it, so that PEFT can read the file."
                if held
                else f"it cannot read the saved file. Set modules_to_save={(path, own)!r} if PEFT"
                " shall read it."
            )
        )
    places: dict[int, list[str]] = {}
    for name, parameter in base_paths(model):
        places.setdefault(id(parameter), []).append(name)
    for tied in places.values():
        copied = [name for name in tied if any(inside(name, path) for path in planned.saved)]
        if copied and len(copied) < len(tied):
            left = [name for name in tied if name not in copied]
            notes.append(f"{copied[0]} trains apart from {left[0]}, which it was tied to.")
    return "\n".join(notes)


def init(model: nn.Module, seed: int, name: str = "default") -> None:
    """Fill adapter `name` anew, as after a start on the meta device and `to_empty`.

    Its modules_to_save begin again as copies of the base's, and what it trains of the base at its
    originals.
    """
    check_seed(seed)
    _known(model, name)
    check_restored(model, "init")
    plan, parts, modules = injected(model)[name], owned(model, name), dict(walk(model))
    if issubclass(plan.method, Adapter) and plan.method.needs_batches(plan.config):
        raise ConfigError(f"{name!r} starts from data. Call lora.eject, and inject with batches=.")
    placed = with_views(model, parts.adapters)
    _join(plan, placed)
    for adapter, view in placed.values():
        initialise(adapter, view, seed)
    for path, module in parts.copies.items():
        held = modules[path].state_dict()
        module.load_state_dict({key: gathered(value) for key, value in held.items()})
    if parts.selected:
        model.__dict__["lora_selected"].begin(parts.selected)


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
    for path, layer in layers.items():
        on = [name for name in names if name in layer.adapters]
        if len(on) > 1 and not all(layer.adapter(name).additive for name in on):
            raise MergeError(
                f"adapters {', '.join(on)} cannot be active together: on {path} they do not add up."
                " Activate one of them."
            )
    for layer in layers.values():
        layer.active = tuple(name for name in names if name in layer.adapters)
    for keeper in saved.values():
        keeper.active = tuple(name for name in names if name in keeper.copies)
    if "lora_selected" in model.__dict__:
        selected = model.__dict__["lora_selected"]
        selected.active = bool(names)
        _place(model, selected, selected.active and selected.enabled)
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
    if _is_merged(model):
        raise MergeError(f"{verb}: the model is merged. Call lora.restore(model) first.")


def _is_merged(model: nn.Module) -> bool:
    layers, _ = wrappers_of(model)
    merged = [layer.kept is not None for layer in layers.values()]
    return any(merged) or any(whole.merged for whole in _wholes(model))


def _wholes(model: nn.Module) -> list[SavedModule | Selected]:
    """What trains without an equation: in place already, a merge has only to mark it."""
    return [*wrappers_of(model)[1].values(), *(selected for _, selected in selections(model))]


def _check_enabled(model: nn.Module, verb: str) -> None:
    """Raise MergeError inside `with disabled(model)`, whose promise the verb would break."""
    layers, _ = wrappers_of(model)
    if not all(holder.enabled for holder in (*layers.values(), *_wholes(model))):
        raise MergeError(f"{verb}: the adapters are disabled. Leave lora.disabled(model) first.")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base, bit for bit: adapters, saved modules and selected parameters
    do not act."""
    _keeps_base(model, "disabled")
    check_restored(model, "disabled")
    layers, _ = wrappers_of(model)
    holders: list[AdaptedLayer | SavedModule | Selected] = [*layers.values(), *_wholes(model)]
    before = [holder.enabled for holder in holders]

    def place() -> None:
        for part, selected in selections(model):
            _place(part, selected, selected.active and selected.enabled)

    try:
        for holder in holders:
            holder.enabled = False
        place()
        yield
    finally:
        for holder, enabled in zip(holders, before, strict=True):
            holder.enabled = enabled
        place()


@dataclass(frozen=True)
class Certificate:
    """What a merge did to the model's output on a probe; `str(certificate)` says it."""

    layers: int  # merged
    dtype: torch.dtype  # of the merged weights, the coarsest
    untied: tuple[str, ...]  # layers whose weight was tied to another's and is their own now
    largest_difference: float | None  # between the outputs before and after; None without a probe
    largest_output: float | None  # before
    tolerance: float | None  # as passed, or SLACK times what rounding W' moves the output by

    def __str__(self) -> str:
        lines = [f"merged {self.layers} layers in {str(self.dtype).removeprefix('torch.')}"]
        if self.untied:
            lines.append(f"untied {', '.join(self.untied)}")
        if self.largest_difference is None:
            lines.append("not certified: no probe was passed")
        else:
            lines.append(
                f"outputs moved by {self.largest_difference:.3g} at most, of"
                f" {self.largest_output:.3g} (tolerance {self.tolerance:.3g})"
            )
        return "; ".join(lines)


DRAWS = 2
SLACK = {2: 4, 4: 32, 8: 32}
"""How many times what rounding moves the output by a merge may move it by, by the bytes of an
element: see _rounding(). benchmarks/merging.py measures up to 2 in float32, where long sums add to
it, and up to 1.4 in bfloat16, where rounding W' is nearly all."""


def merge(
    model: nn.Module, untie: bool = False, probe: Any = None, tolerance: float | None = None
) -> Certificate:
    """Put W' in W's place in every adapted layer, in the base's dtype, from float32.

    The originals are kept for restore(). With a `probe`, a batch that the model takes, its output
    before and after is compared in eval mode, and a merge that moves any number of it by more than
    `tolerance` is refused. Default: SLACK times what rounding moves it by, measured on the model
    and the probe. `untie` gives a layer whose weight is tied to another's one of its own. Raises
    MergeError, the model untouched.
    """
    good = tolerance is None or (is_number(tolerance) and tolerance >= 0)
    check("tolerance", tolerance, "a number of at least 0", good)
    _keeps_base(model, "merge")
    check_restored(model, "merge")
    _check_enabled(model, "merge")
    layers, _ = wrappers_of(model)
    if not layers and not _wholes(model):
        raise MergeError("merge: the model has no adapter. Call lora.inject or lora.load first.")
    layers = {name: layer for name, layer in layers.items() if layer.active}
    merged = _merged(model, layers)
    untied = _untied(model, layers, merged, untie)
    before = None if probe is None else output_on(model, probe)
    for name, pair in merged.items():
        layers[name].merge(*pair)
    for whole in _wholes(model):
        whole.merged = True
    if untied:
        ties.untie(model)
    dtypes = {layer.weight.dtype for layer in layers.values()}
    dtype = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    if before is None:
        return Certificate(len(layers), dtype, untied, None, None, None)
    try:
        moved = _moved(model, [*layers.values()], probe, before, tolerance, dtype)
    except BaseException:
        restore(model)
        raise
    return Certificate(len(layers), dtype, untied, *moved)


def _moved(
    model: nn.Module,
    layers: Sequence[AdaptedLayer],
    probe: Any,
    before: Tensor,
    tolerance: float | None,
    dtype: torch.dtype,
) -> tuple[float, float, float]:
    """How far the merge moved the output at most, of how much, and how far it may: raises
    MergeError if it moved it further."""
    after = output_on(model, probe)
    off, largest, said = float((after - before).abs().max()), float(before.abs().max()), "as set"
    if tolerance is None:
        times, short = SLACK[dtype.itemsize], str(dtype).removeprefix("torch.")
        tolerance = times * _rounding(model, layers, probe, after, dtype)
        said = f"{times} times what rounding in {short} moves them by"
    if not off <= tolerance:
        raise MergeError(
            f"merge: the outputs on the probe moved by {off:.3g}, of {largest:.3g} at most; the"
            f" tolerance is {tolerance:.3g}, {said}. The model is as it was. Keep the adapter"
            f" apart, or accept the move: set tolerance (--tolerance) above {off:.3g}."
        )
    return off, largest, tolerance


@torch.no_grad()
def _rounding(
    model: nn.Module, layers: Sequence[AdaptedLayer], probe: Any, after: Tensor, dtype: torch.dtype
) -> float:
    """How far the merged model's output moves if each merged weight moves by one rounding.

    W' is W + ΔW, each rounded: an element moves by up to eps · (|W| + |W' − W|), up or down. What
    the model makes of that over its depth is what it makes of the other order in which a merged
    layer sums, which no constant knows. The most of DRAWS draws, and at least one rounding of the
    largest output.
    """
    draw = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, AdaptedLayer)
        assert layer.kept is not None
        (x,) = (*args, *kwargs.values())
        own, was = layer.base_layer._parameters["weight"], layer.kept[0]
        assert own is not None
        merged[layer] = own
        computed = compute_dtype(x) if x.is_floating_point() else own.dtype
        eps = max(torch.finfo(computed).eps, torch.finfo(own.dtype).eps)
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        step = torch.rand(own.shape, generator=draw).to(wide) * 2 - 1
        moved = wide + eps * step * (was.abs() + (wide - was).abs())
        layer.base_layer._parameters["weight"] = nn.Parameter(moved.to(own.dtype), False)

    def bring_back(layer: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(layer, AdaptedLayer)
        layer.base_layer._parameters["weight"] = merged.pop(layer)

    merged: dict[AdaptedLayer, nn.Parameter] = {}
    hooks = [layer.register_forward_pre_hook(move, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(bring_back, always_call=True) for layer in layers]
    try:
        moved = [float((output_on(model, probe) - after).abs().max()) for _ in range(DRAWS)]
        return max(*moved, torch.finfo(dtype).eps * float(after.abs().max()))
    finally:
        for hook in hooks:
            hook.remove()


def _merged(
    model: nn.Module, layers: Mapping[str, AdaptedLayer]
) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """W' and b' of each layer. If all that share a weight have the same W', they share that."""
    packed = [name for name, layer in layers.items() if layer.view.packed]
    if packed:
        raise MergeError(
            f"merge: {packed[0]} holds its weight in NF4, which W' would have to be rounded to."
            " Call lora.nf4.dequantize_layers(model) first, and merge into the dequantised base."
        )
    merged = {name: layer.merged() for name, layer in layers.items()}
    for name, (weight, bias) in merged.items():
        if bias is not None and layers[name].view.parameters()[1] is None:
            raise MergeError(
                f"merge: the update of {name} has a bias, the layer has none to merge it into."
                " Keep the adapter apart, or train with lora_bias=False."
            )
        if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
            raise MergeError(f"merge: W' of {name} is not finite in {weight.dtype}.")
    modules = {id(module): module for _, module in walk(model)}.values()
    users = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        W, b = layer.view.parameters()
        groups.setdefault(id(W), []).append(name)
        weight, bias = merged[name]
        if bias is not None and users[id(b)] > 1 and torch.equal(bias, gathered(b)):
            merged[name] = weight, None  # a tied bias that stays is the tied one
    for shared, names in groups.items():
        one = merged[names[0]][0]
        if users[shared] == len(names) and all(torch.equal(merged[n][0], one) for n in names):
            merged |= {name: (one, merged[name][1]) for name in names}
    return merged


def _untied(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    merged: Mapping[str, tuple[nn.Parameter, nn.Parameter | None]],
    untie: bool,
) -> tuple[str, ...]:
    """Names of the layers that the merge unties. Raises MergeError unless it may, and can."""
    _, saved = wrappers_of(model)
    untied = ties.broken_ties(
        model,
        {id(layers[name].base_layer): pair for name, pair in merged.items()},
        {id(keeper.original_module): keeper.current for keeper in saved.values() if keeper.active},
    )
    if untied and not untie:
        raise MergeError(
            f"merge: the weight of {untied[0]} is tied to another module's, which would change with"
            " it. Call lora.merge(model, untie=True), or lora merge --untie, to give it one of its"
            " own."
        )
    if untied:
        ties.check_flag(model)
    return untied


def output_on(model: nn.Module, probe: Any) -> Tensor:
    """The model's logits, or its first output, for a probe, in float32."""
    with evaluating(model), torch.no_grad():
        found = forward(model, probe)
    found = getattr(found, "logits", found)
    found = (
        found
        if isinstance(found, Tensor)
        else next(iter(found.values() if isinstance(found, Mapping) else found))
    )
    return found.float()


def restore(model: nn.Module) -> None:
    """Undo merge, bit for bit, from the kept originals."""
    _keeps_base(model, "restore")
    ties.retie(model)
    layers, _ = wrappers_of(model)
    for layer in layers.values():
        layer.restore()
    for whole in _wholes(model):
        whole.merged = False


def eject(model: nn.Module) -> None:
    """Leave a plain model: merged it computes what the adapted one did, unmerged it is the base.

    Every parameter requires a gradient again that did before the first injection.
    """
    inner = [part for part in model.modules() if injected(part) and part is not model]
    if inner:
        names = [name for name, part in model.named_modules() if part is inner[0]]
        raise MergeError(
            f"eject: the adapters are those of the part {names[0]}. Call"
            f" lora.eject(model.{names[0]})."
        )
    if not injected(model):
        return
    layers, saved = wrappers_of(model)
    is_merged = _is_merged(model)
    if is_merged and any(layer.kept is None and layer.active for layer in layers.values()):
        raise MergeError(
            "eject: the model is merged in part. Call lora.restore(model), or that and lora.merge."
        )
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
    for _, parent in walk(model):
        siblings.part(parent)
    guard(model, False)
    _unwatch(model)
    for _, selected in selections(model):
        _place(model, selected, is_merged and selected.active)
    required = model.__dict__.pop("lora_required")
    for key in ("lora_adapters", "lora_selected", ties.RECORD):
        model.__dict__.pop(key, None)
    for name, parameter in base_paths(model):
        parameter.requires_grad_(required.get(name, parameter.requires_grad))
