"""What a training loop calls: param_groups, penalty, after_step, check_alive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, trained
from lora.errors import TargetError
from lora.inventory import injected, wrapper_at, wrappers_of
from lora.method import Rates, Scheduled
from lora.targets import Plan
from lora.wrappers import AdaptedLayer


def acting(model: nn.Module) -> Iterator[tuple[Plan, list[Adapter]]]:
    """Yields the plan of each active adapter and its parameters on each of its layers."""
    for name, plan in injected(model).items():
        layers = {id(layer): layer for layer in (wrapper_at(model, path) for path in plan.targets)}
        parts = [layer.adapter(name) for layer in layers.values() if name in layer.active]
        if parts:
            yield plan, parts


def param_groups(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Returns (parameters, multiple) groups that hold all trainable parameters of the model.

    A group trains at `multiple` times the learning rate.
    """
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for _, adapters in acting(model):
        for adapter in adapters:
            for multiple, parameters in groups_of(adapter).items():
                groups.setdefault(multiple, []).extend(parameters)
    grouped = {id(p) for parameters in groups.values() for p in parameters}
    groups[1.0] += [p for p in model.parameters() if p.requires_grad and id(p) not in grouped]
    trainable = {
        multiple: [p for p in parameters if p.requires_grad]
        for multiple, parameters in groups.items()
    }
    return [(parameters, multiple) for multiple, parameters in trainable.items() if parameters]


def groups_of(adapter: Adapter) -> dict[float, list[nn.Parameter]]:
    """Returns an adapter's trainable parameters by their multiple of the learning rate."""
    return adapter.param_groups() if isinstance(adapter, Rates) else {1.0: trained(adapter)}


def _scheduled(model: nn.Module) -> Iterator[tuple[type[Scheduled], Plan, list[Adapter]]]:
    """Yields the active, trainable adapters whose method acts on the loss or after steps."""
    for plan, parts in acting(model):
        if issubclass(plan.method, Scheduled) and plan.trainable:
            yield plan.method, plan, parts


def penalty(model: nn.Module) -> Tensor | None:
    """Returns what the active adapters' methods add to the loss, or None if they add nothing."""
    penalties = [method.penalty(parts, plan.config) for method, plan, parts in _scheduled(model)]
    terms = [term for term in penalties if term is not None]
    return torch.stack(terms).sum() if terms else None


def check_steps(model: nn.Module, total: int) -> None:
    """Raise ConfigError if an active adapter cannot be trained in so many steps."""
    for method, plan, _ in _scheduled(model):
        method.check_steps(plan.config, total)


def after_step(model: nn.Module, step: int, total: int) -> None:
    """Let the active adapters' methods act on optimizer step `step` of `total`, from 1. Call it
    after optimizer.step() and before zero_grad()."""
    for method, plan, parts in _scheduled(model):
        method.after_step(parts, plan.config, step, total)


class Watch:
    """Hooks that find adapters which do nothing, in the first forward of each mode.

    An adapter does nothing if the model reads its layer's weight and does not call the layer. Train
    and eval mode are checked separately, since some models take another path in each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.passed: set[bool] = set()  # the modes (model.training) that passed the check
        self.layers, _ = wrappers_of(model)  # once, since a walk through the model is slow
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after)

    @classmethod
    def over(cls, model: nn.Module) -> None:
        """Watch the model. Replaces an earlier Watch."""
        unwatch(model)
        cls(model)

    def before(self, model: nn.Module, args: Any) -> None:
        """Clear the layers' flags, so that they record this forward."""
        if not torch.compiler.is_compiling() and model.training not in self.passed:
            for layer in self.layers.values():
                layer.forget_use()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Raise TargetError if the model read an active layer's weight and did not call it."""
        if torch.compiler.is_compiling() or model.training in self.passed:
            return
        acting = {n: m for n, m in self.layers.items() if m.active and m.enabled and m.kept is None}
        missed = [
            name
            for name, layer in acting.items()
            if layer.was_read and not layer.was_called and _changes_output(layer)
        ]
        if missed:
            raise TargetError(
                f"{len(missed)} of {len(acting)} adapted layers did nothing in this forward,"
                f" {missed[0]} among them: the model reads their weights itself and does not call"
                " them. Leave them out: set --exclude-modules."
            )
        if acting:
            self.passed.add(model.training)


def unwatch(model: nn.Module) -> None:
    """Remove the model's Watch, if it has one."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", 0), Watch)]:
            del hooks[key]


@torch.no_grad()
def _changes_output(layer: AdaptedLayer) -> bool:
    """True if a layer's adapter is trainable, or changes its weight."""
    # An adapter that PEFT trained on an uncalled layer is still at its start: loading it is no
    # error, since it changes nothing in PEFT either.
    if any(p.requires_grad for name in layer.active for p in layer.adapter(name).parameters()):
        return True
    W, _ = layer.view.read()
    W1 = W
    for name in layer.active:
        W1, _ = layer.adapter(name).merged(W1, None)
    return not torch.equal(W1, W)


def check_alive(model: nn.Module) -> None:
    """Raise TargetError if, after a backward, a trainable module has no gradient at all.

    There are two causes. The model does not call the module: WavLM's attention reads its layers'
    weights itself, and T5 calls its embedding by another path than `shared`. Or a reentrant
    checkpoint calls it, which computes no gradients inside if its input requires none.

    A layer that the step did not call is fine if it called the same layer of another block or
    expert: no token was routed to it, or LayerDrop skipped its block.
    """
    layers, saved = wrappers_of(model)
    acting: list[tuple[str, nn.Module]] = [
        (path, layer.adapter(name)) for path, layer in layers.items() for name in layer.active
    ]
    acting += [(path, keeper.current) for path, keeper in saved.items() if keeper.active]
    trained = {path: [p for p in m.parameters() if p.requires_grad] for path, m in acting}
    dead = [path for path, ps in trained.items() if ps and all(p.grad is None for p in ps)]
    # h.0.mlp and h.7.mlp both become h.*.mlp
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
        layer.forget_use()
    if dead:
        flag = "--exclude-modules" if dead[0] in layers else "--modules-to-save without it"
        raise TargetError(
            f"{len(dead)} of {len(trained)} trained modules have no gradient, {dead[0]} among them:"
            " the model does not call them, it reads their weights itself or by another path."
            f" Leave them out: set {flag}. If a reentrant checkpoint calls them, pass it"
            " use_reentrant=False, or use --activation-checkpointing."
        )
