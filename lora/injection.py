"""Puts adapters into a model and takes them out: inject, activate, disabled, eject.

Every step that can fail comes before the model is touched: targets.plan_of reads, `wrap` writes.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lora import nf4, ties
from lora.adapter import Adapter, check_additive, initialise
from lora.errors import CheckpointError, ConfigError, MergeError, TargetError
from lora.inventory import (
    Parts,
    act,
    adapter_parts,
    check_enabled,
    check_keeps_base,
    check_known,
    check_restored,
    evaluating,
    injected,
    is_merged,
    selections,
    trained_in_place,
    with_views,
    wrappers_of,
)
from lora.layers import View, gathered, inside, kind, views
from lora.method import Calibrated, Follower, Packs, Shares
from lora.nf4 import NF4Linear, put
from lora.report import Report, notes_on, report_of
from lora.settings import MethodConfig, check
from lora.targets import Plan, base_parameters, base_paths, plan_of, walk
from lora.training import Watch, unwatch
from lora.wrappers import AdaptedLayer, SavedModule, Selected


def inject(
    model: nn.Module,
    config: MethodConfig,
    name: str = "default",
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    pack: Sequence[str] = (),
) -> Report:
    """Put a method's adapters on the layers that config names, in place, and freeze the rest.

    Initial values are a function of (seed, layer's name) alone; inits that start from data (eva,
    lora_ga) also use `batches`: mappings, tuples or tensors that the model takes. A head is not
    trained unless modules_to_save names it. `pack` names linear layers to quantize to NF4, adapted
    or not: some inits absorb what rounding loses (pissa, olora, loftq). Raises TargetError,
    ConfigError or ModelError and then leaves the model untouched.
    """
    check_seed(seed)
    plan = planned_of(model, config, name, batches is not None, bool(pack))
    parts = build(model, plan)  # all that can fail happens on parts outside of the model
    adapters = list(with_views(model, parts.adapters).values())
    if batches is not None or pack:
        _check_whole(model, plan)
    for adapter, view in adapters:
        initialise(adapter, view, seed)
    if batches is not None:
        assert issubclass(plan.method, Calibrated)
        with evaluating(model):  # dropout would disturb what the inputs or gradients show
            plan.method.calibrate(adapters, model, batches)
    return place(model, plan, parts, _packed(model, adapters, pack) if pack else {}, name)


def planned_of(model: nn.Module, config: MethodConfig, name: str, shown: bool, packs: bool) -> Plan:
    """What inject() would do under `name`, with batches (`shown`) or packing layers (`packs`), and
    its errors."""
    check_name(name)
    plan = plan_of(model, config)
    check_mix(model, name, plan)
    check_statistics(model, plan)
    needs = issubclass(plan.method, Calibrated) and plan.method.needs_batches(config)
    if needs != shown:
        then = "needs data: pass batches=[...]" if needs else "takes no batches: remove them"
        raise ConfigError(f"{plan.method.name} {then}. init_lora_weights decides.")
    if issubclass(plan.method, Packs) and plan.method.needs_packing(config) and not packs:
        raise ConfigError(
            f"{plan.method.name}: init_lora_weights needs a base that is quantized with the"
            " adapter. Pass --quantize nf4, or in Python pack=[names of layers]."
        )
    return plan


def build(model: nn.Module, plan: Plan) -> Parts:
    """The plan's adapters, not yet filled, and its copies of saved modules; the model is untouched.

    Raises ConfigError if they cannot be made.
    """
    modules = dict(walk(model))
    adapters: dict[int, tuple[str, Adapter]] = {}
    copies: dict[int, tuple[str, nn.Module]] = {}
    _check_room(plan, modules)
    path = ""
    try:
        for path in plan.targets:
            module = modules[path]
            if hasattr(module, "_hf_hook"):
                _check_loaded(path, module)
            if id(module) not in adapters:  # one layer reached by two paths has one adapter
                make: Any = plan.further.get(path, plan.method)
                adapter: Adapter = make(views(module)[0], plan.config, path)
                adapters[id(module)] = path, adapter.train(module.training)
        for path in plan.saved:
            if id(modules[path]) not in copies:
                copies[id(modules[path])] = path, copy.deepcopy(modules[path])
        _join(plan, with_views(model, dict(adapters.values())))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"no adapter can be made for {path}: {reason}. Lower --r.") from error
    base = dict(base_paths(model)) if plan.selected or plan.carried else {}
    selected = {name: base[name] for name in (*plan.selected, *plan.carried)}
    return Parts(dict(adapters.values()), dict(copies.values()), selected)


def _check_loaded(path: str, module: nn.Module) -> None:
    """Raise TargetError if accelerate has offloaded a layer: its adapter would have no values."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise TargetError(
            f"{path} is offloaded by accelerate, which adapters do not support. Load the base"
            " without offloading, or with quantize='nf4' if it does not fit."
        )


def wrap(model: nn.Module, plan: Plan, parts: Parts, name: str) -> None:
    """Put built parts into the model under `name`, activate them, freeze the base."""
    modules = dict(walk(model))  # as if nothing were injected: the layers themselves
    adapters = {id(modules[path]): adapter for path, adapter in parts.adapters.items()}
    copies = {id(modules[path]): module for path, module in parts.copies.items()}
    if not injected(model):  # eject() brings these flags back
        model.__dict__["lora_required"] = {n: p.requires_grad for n, p in base_paths(model)}
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    wrappers: dict[int, AdaptedLayer | SavedModule] = {}  # one for a layer reached by two paths
    for path in (*plan.targets, *plan.saved):
        parent, _, leaf = path.rpartition(".")
        layer = modules[parent]._modules[leaf]
        assert layer is not None
        if not isinstance(layer, AdaptedLayer | SavedModule):
            wrapper = AdaptedLayer if path in plan.targets else SavedModule
            layer = wrappers.setdefault(id(layer), wrapper(layer))
            modules[parent]._modules[leaf] = layer
        if isinstance(layer, AdaptedLayer):
            layer.adapters[name] = adapters[id(layer.base_layer)]
        else:
            layer.copies[name] = copies[id(layer.original_module)]
        if isinstance(modules[parent], nn.TransformerEncoderLayer):
            keep_from_fusing(layer)
    if parts.selected:
        model.__dict__["lora_selected"] = Selected(parts.selected, plan.method.keeps_base)
    model.__dict__["lora_adapters"] = {**injected(model), name: plan}
    Watch.over(model)
    refuse_whole_saves(model, True)
    activate(model, name)


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters, and no others, act and train. Several must be additive: deltas sum."""
    names = tuple(dict.fromkeys(names))
    for name in names:
        check_known(model, name)
    check_restored(model, "activate")
    layers, saved = wrappers_of(model)
    if len(names) > 1:
        _check_together(model, names)
    for layer in layers.values():
        layer.active = tuple(name for name in names if name in layer.adapters)
    for keeper in saved.values():
        keeper.active = tuple(name for name in names if name in keeper.copies)
    selected = model.__dict__.get("lora_selected")
    if selected is not None:
        selected.active = bool(names)
        act(model, selected, selected.active and selected.enabled)
    for name, plan in injected(model).items():
        for parameter in adapter_parts(model, name).trained(plan):
            parameter.requires_grad_(name in names and plan.trainable)


def _check_together(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise MergeError if adapters of these names cannot be active together."""
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
        both = [name for name in names if name in layer.adapters]
        if len(both) > 1 and not all(layer.adapter(name).additive for name in both):
            raise MergeError(
                f"adapters {', '.join(both)} cannot be active together: on {path} they do not add"
                " up. Activate one of them."
            )


def _join(plan: Plan, adapters: Mapping[str, tuple[Adapter, View]]) -> None:
    """Give adapters the parameters that they share, and freeze what is not trained. Called again
    after to_empty, which makes each adapter's parameters anew."""
    if adapters and issubclass(plan.method, Shares):
        _share(plan, adapters)
    for adapter, _ in adapters.values():
        if isinstance(adapter, Follower) and adapter.leader:
            adapter.follow(adapters[adapter.leader][0])
        for name in adapter.frozen:
            adapter.get_parameter(name).requires_grad_(False)


def _share(plan: Plan, adapters: Mapping[str, tuple[Adapter, View]]) -> None:
    """Register what a method's layers share, as one parameter, with each of its adapters."""
    assert issubclass(plan.method, Shares)
    first = next(iter(adapters.values()))[0]
    like = next(first.parameters())
    shared = plan.method.shared([view for _, view in adapters.values()], plan.config)
    for name, values in shared.items():
        parameter = nn.Parameter(values.to(like), requires_grad=False)
        for adapter, _ in adapters.values():
            adapter.register_parameter(name, parameter)
            adapter.frozen |= {name}
            adapter.keys = {**adapter.keys, name: f"base_model.{name}"}


def _check_room(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError if the machine cannot hold the adapters. Linux grants memory that is not
    there, and kills the process when it writes to it."""
    if not issubclass(plan.method, Adapter):
        return
    need = 0
    for module, path in {modules[path]: path for path in plan.targets}.items():
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


def check_name(name: str) -> None:
    """Raise ConfigError if an adapter cannot have this name: it becomes a folder and a module."""
    good = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
    # nn.ModuleDict has attributes of these names
    check("name", name, "letters, digits, _ and -", good and not hasattr(nn.ModuleDict(), name))


def check_seed(seed: int) -> None:
    """Raise ConfigError unless the seed is a whole number."""
    check("seed", seed, "a whole number", isinstance(seed, int) and not isinstance(seed, bool))


def check_mix(model: nn.Module, name: str, plan: Plan) -> None:
    """Raise ConfigError or MergeError if the model cannot take this adapter beside those it has."""
    present = injected(model)
    check_restored(model, f"inject {name!r}")
    check_enabled(model, f"inject {name!r}")
    if present:
        _check_beside(present, name, plan)
        return
    layers, saved = wrappers_of(model)
    if layers or saved:
        raise ConfigError(
            f"{next(iter((*layers, *saved)))} has an adapter that was injected into a part of the"
            " model. Inject into that part, or call lora.eject(part) first."
        )


def _check_beside(present: Mapping[str, Plan], name: str, plan: Plan) -> None:
    """Raise ConfigError if a plan conflicts with the adapters that are there."""
    if name in present:
        raise ConfigError(
            f"the model has an adapter named {name!r} already. Take another name for this one."
        )
    if any(p.selected or p.carried for p in (plan, *present.values())):
        raise ConfigError(
            f"{name!r} cannot join {', '.join(present)}: a method that trains parameters of the"
            " base must be alone. Load the base anew."
        )
    for other, beside in present.items():
        for whole, parts in ((plan, beside), (beside, plan)):
            for path in whole.saved:
                for part in (*parts.targets, *parts.saved):
                    if inside(part, path) and not (part == path and part in parts.saved):
                        raise ConfigError(
                            f"{name!r} cannot join {other!r}: one trains {path} whole, the other"
                            f" changes {part}. Load the base anew, or target other layers."
                        )


def check_statistics(model: nn.Module, plan: Plan) -> None:
    """Raise TargetError if training would change running statistics of the frozen base."""
    if not plan.method.keeps_base:
        return
    for name, module in walk(model):
        tracked = getattr(module, "running_mean", None) is not None
        if tracked and not any(inside(name, whole) for whole in plan.saved):
            raise TargetError(
                f"{name} ({type(module).__name__}) keeps running statistics, which training would"
                f" change in the frozen base. Name it: modules_to_save=({name!r},)."
            )


def _check_whole(model: nn.Module, plan: Plan) -> None:
    """Raise ConfigError if the base's values are not all here."""
    if any(p.is_meta for _, p in base_parameters(model)):
        raise ConfigError(
            f"{plan.method.name}: init_lora_weights needs all of the base's values, found a base"
            " that is sharded over several ranks, or on the meta device. Set --init-lora-weights"
            " default, or load the base whole."
        )


SAVES = ("save_pretrained", "push_to_hub")


def refuse_whole_saves(model: nn.Module, on: bool) -> None:
    """Let save_pretrained, which Trainer calls too, and push_to_hub refuse on every part of the
    model that holds wrappers: what they write would load with random weights."""
    for part in model.modules():
        for name in SAVES:
            if part.__dict__.get(name) is _refuse_to_save:
                del part.__dict__[name]
            wrapped = (isinstance(m, AdaptedLayer | SavedModule) for m in part.modules())
            if on and hasattr(type(part), name) and any(wrapped):
                part.__dict__[name] = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        "save_pretrained: the model holds adapters, under names that from_pretrained does not read:"
        " the layers would load with weights drawn at random. For the adapter call"
        " lora.save(model, folder); for a whole model lora.merge(model) and lora.eject(model)"
        " first. In transformers.Trainer pass callbacks=[lora.AdapterCallback()]."
    )


def keep_from_fusing(layer: nn.Module) -> None:
    """Give a layer of nn.TransformerEncoderLayer a hook. Without one torch hands its weight to a
    fused kernel in eval mode, and skips the adapter."""
    if not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(_do_nothing)


def _do_nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    pass


def place(
    model: nn.Module, plan: Plan, parts: Parts, packed: Mapping[int, nn.Module], name: str
) -> Report:
    """Put built parts into the model, and packed layers in the place of those whose ids they are
    under."""
    wrap(model, plan, parts, name)
    if packed:
        put(model, packed)
        required = model.__dict__["lora_required"]
        for path, parameter in base_paths(model):  # eject() leaves NF4 codes without a gradient
            required[path] = parameter.is_floating_point() and required.get(path, False)
    return report_of(model, name, notes_on(model, plan))


@torch.no_grad()
def _packed(
    model: nn.Module, adapters: Sequence[tuple[Adapter, View]], names: Sequence[str]
) -> dict[int, nn.Module]:
    """The named layers in NF4, by the id of each; the adapter may correct the rounding."""
    over = {id(view.module): adapter for adapter, view in adapters}
    packed: dict[int, nn.Module] = {}
    modules = dict(walk(model))
    for path in names:
        if path not in modules:
            raise TargetError(f"pack: the model has no layer {path!r}.")
        module = modules[path]
        if id(module) in packed:
            continue
        (view,) = views(module)
        if view.packed:
            raise TargetError(
                f"pack: {path} is in NF4 already, and what its rounding lost is not known. Load the"
                " base as it was before, or leave pack out."
            )
        if view.of_ids:
            raise TargetError(f"pack: {path} is {kind(module)}. Name linear layers.")
        quantize = partial(nf4.quantize, double_quant=True, name=path)
        W, adapter = view.read()[0], over.get(id(module))
        q = adapter.pack(W, quantize) if isinstance(adapter, Packs) else quantize(W)
        packed[id(module)] = NF4Linear.over(module, q)
    return packed


def init(model: nn.Module, seed: int, name: str = "default") -> None:
    """Fill adapter `name` anew, as after a start on the meta device and `to_empty`.

    Its modules_to_save begin again as copies of the base's, and the parameters of the base that it
    trains at their originals.
    """
    check_seed(seed)
    check_known(model, name)
    check_restored(model, "init")
    plan, parts, modules = injected(model)[name], adapter_parts(model, name), dict(walk(model))
    if issubclass(plan.method, Calibrated) and plan.method.needs_batches(plan.config):
        raise ConfigError(f"{name!r} needs data. Call lora.eject, and inject with batches=.")
    adapters = with_views(model, parts.adapters)
    _join(plan, adapters)
    for adapter, view in adapters.values():
        initialise(adapter, view, seed)
    for path, module in parts.copies.items():
        state = modules[path].state_dict()
        module.load_state_dict({key: gathered(value) for key, value in state.items()})
    if parts.selected:
        model.__dict__["lora_selected"].begin(parts.selected)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base, bit for bit: adapters, saved modules and selected parameters
    do not act."""
    check_keeps_base(model, "disabled")
    check_restored(model, "disabled")
    layers, _ = wrappers_of(model)
    holders: list[AdaptedLayer | SavedModule | Selected] = [
        *layers.values(),
        *trained_in_place(model),
    ]
    before = [holder.enabled for holder in holders]

    def place() -> None:
        for part, selected in selections(model):
            act(part, selected, selected.active and selected.enabled)

    try:
        for holder in holders:
            holder.enabled = False
        place()
        yield
    finally:
        for holder, enabled in zip(holders, before, strict=True):
            holder.enabled = enabled
        place()


def eject(model: nn.Module) -> None:
    """Take all wrappers out. A merged model computes what the adapted one did; an unmerged one is
    the base. Every parameter requires a gradient as it did before the first injection."""
    inner = [part for part in model.modules() if injected(part) and part is not model]
    if inner:
        names = [name for name, part in model.named_modules() if part is inner[0]]
        raise MergeError(
            f"eject: the adapters are those of the part {names[0]}. Call"
            f" lora.eject(model.{names[0]})."
        )
    if not injected(model):
        return
    layers, _ = wrappers_of(model)
    merged = is_merged(model)
    if merged and any(layer.kept is None and layer.active for layer in layers.values()):
        raise MergeError(
            "eject: the model is merged in part. Call lora.restore(model), or that and lora.merge."
        )
    for parent in {id(module): module for _, module in walk(model)}.values():
        for leaf, child in list(parent._modules.items()):
            if isinstance(child, AdaptedLayer):
                parent._modules[leaf] = child.base_layer
            elif isinstance(child, SavedModule):
                parent._modules[leaf] = child.current if merged else child.original_module
    refuse_whole_saves(model, False)
    unwatch(model)
    for _, selected in selections(model):
        act(model, selected, merged and selected.active)
    required = model.__dict__.pop("lora_required")
    for key in ("lora_adapters", "lora_selected", ties.RECORD):
        model.__dict__.pop(key, None)
    for name, parameter in base_paths(model):
        parameter.requires_grad_(required.get(name, parameter.requires_grad))
