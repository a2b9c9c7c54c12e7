"""Clauses on training: which parameters train, how many, and their initial values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.errors import TargetError
from lora.injection import disabled, inject
from lora.inventory import stored_tensors, trained_parameters, wrappers_of
from lora.method import Method
from lora.settings import AdapterConfig, MethodConfig
from lora.targets import base_parameters
from lora.testing._requirements import require, require_same
from lora.testing._toys import Case, Toy, injected_toy, input_of


def base_bits_stay(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The base's bits are unchanged after optimizer steps with weight decay."""
    model = injected_toy(config, case)
    base = {name: p.detach().clone() for name, p in base_parameters(model)}
    _steps(model, case)
    for name, parameter in base_parameters(model):
        if not parameter.requires_grad:
            require_same(parameter.detach(), base[name], f"base parameter {name} after steps")
    with disabled(model):
        for name, parameter in base_parameters(model):
            require_same(
                parameter.detach(), base[name], f"base parameter {name}, disabled after steps"
            )


def _steps(model: nn.Module, case: Case) -> None:
    """Train the model for three steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.train()
    for number in range(3):
        model(input_of(case, seed=number)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def only_the_adapter_trains(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Each of the adapter's parameters gets a gradient, and nothing else requires one."""
    model = injected_toy(config, case, moved=True)
    trained = {id(p) for p in trained_parameters(model, "default").values()}
    model(input_of(case)).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = id(parameter) in trained
        require(parameter.requires_grad == expected, f"{name}: requires_grad is not {expected}")
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        require(has_gradient == expected, f"{name}: {'no gradient' if expected else 'a gradient'}")


def parameter_count(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The number of parameters is the one that the method's size() gives."""
    assert issubclass(method, Adapter)
    assert isinstance(config, AdapterConfig)
    for name, layer in wrappers_of(injected_toy(config, case))[0].items():
        actual = sum(
            p.numel()
            for key, p in layer.adapter("default").parameters_by_key().items()
            if not key.startswith("base_model.")
        )
        expected = method.size(layer.view, config, name)
        require(actual == expected, f"{name}: {actual} parameters, {expected} in closed form")


def same_seed_same_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The same seed gives the same initial bits, whatever random numbers were drawn before and
    whichever other layers are adapted."""
    first, second = _start(config, case, 0, 1), _start(config, case, 0, 99)
    for name in first:
        require_same(second[name], first[name], f"initial value of {name}")
    if issubclass(method, Adapter):
        assert isinstance(config, AdapterConfig)
        part = Toy(case)
        try:
            inject(part, replace(config, target_modules=("second",)))
        except TargetError:
            return  # a setting names the layer that is left out here
        for name, parameter in trained_parameters(part, "default").items():
            if name in first:
                message = f"initial value of {name} without the other layer"
                require_same(parameter.detach(), first[name], message)


def _start(config: MethodConfig, case: Case, seed: int, noise: int) -> dict[str, Tensor]:
    """Returns the initial values of an injection, after `noise` random draws."""
    torch.manual_seed(noise)
    model = Toy(case)
    torch.randn(noise)
    state = torch.get_rng_state()
    inject(model, config, seed=seed)
    require(torch.equal(state, torch.get_rng_state()), "injection moves the default generator")
    return {k: p.detach() for k, p in trained_parameters(model, "default").items()}


def another_seed_other_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Another seed changes at least one saved tensor, unless all are initialized to constants."""
    first, second = (_stored(config, case, seed) for seed in (0, 1))
    constant = all(bool((t == t.flatten()[0]).all()) for t in first.values())
    differs = any(not torch.equal(first[name], second[name]) for name in first)
    require(constant or differs, "the seed changes nothing")


def _stored(config: MethodConfig, case: Case, seed: int) -> dict[str, Tensor]:
    """Returns the tensors that a save right after an injection with this seed writes."""
    model = Toy(case)
    inject(model, config, seed=seed)
    return {k: t.detach() for k, t in stored_tensors(model, "default").items()}
