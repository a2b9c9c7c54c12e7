"""Clauses on what a method computes: values, gradients, dtypes, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, specification
from lora.errors import ConfigError, MergeError
from lora.injection import activate, inject
from lora.inventory import trained_parameters, wrappers_of
from lora.kernels import Fast, attempt, off
from lora.kernels.dropout import Mask, draw
from lora.layers import View
from lora.merging import merge
from lora.method import Method
from lora.settings import MethodConfig
from lora.testing._requirements import require, require_near, require_raise, require_same
from lora.testing._toys import (
    Case,
    Toy,
    injected_toy,
    input_of,
    make_mergeable,
    perturb,
    to_float32,
    trains_base,
)

Compute = Callable[[Tensor, Mask | None], Tensor]
"""Computes the layer's output from an input and a dropout mask."""


def identity_at_the_start(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Right after injection, the model computes what the base does, and W' has W's shape."""
    model, x = injected_toy(config, case), input_of(case)
    for layer in wrappers_of(model)[0].values():
        W, b = layer.view.read()
        found = layer.adapter(*layer.active).merged(W, b)
        pair = isinstance(found, tuple) and len(found) == 2
        require(pair, f"merged(W, b) must return a pair, (W', b'), found {type(found).__name__}")
        shape, wanted = tuple(found[0].shape), tuple(W.shape)
        require(shape == wanted, f"merged(W, b) returns a W' of {shape}, and W is {wanted}")
    require_near(model(x), Toy(case).eval()(x), "output after injection")


def merged_is_forward(method: type[Method], config: MethodConfig, case: Case) -> None:
    """After the adapter's parameters change, the merged model's output equals the adapted one's."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    make_mergeable(model)
    before = model(x)
    require(not torch.equal(before, Toy(case).eval()(x)), "moved parameters change nothing")
    merge(model)
    require_near(model(x), before, "merged output")


def sixteen_bits_stay_near_float32(method: type[Method], config: MethodConfig, case: Case) -> None:
    """With a 16-bit base, the outputs before and after merging are close to those of the same
    weights in float32."""
    if case.dtype.itemsize != 2:
        return
    model, x = injected_toy(config, case, moved=True), input_of(case)
    expected = copy.deepcopy(model).float()(to_float32(x)).detach()
    make_mergeable(model)
    eps = torch.finfo(case.dtype).eps
    for how in ("forward", "merged"):
        if how == "merged":
            merge(model)
        off = float((model(x).float() - expected).detach().abs().max() / expected.abs().max())
        require(off <= 4 * eps, f"{how}: off by {off / eps:.1f} eps of the largest output")


def adapters_are_held_in_float32(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The adapter's parameters are float32, whatever the base's dtype."""
    for name, layer in wrappers_of(injected_toy(config, case))[0].items():
        for key, parameter in layer.adapter("default").named_parameters():
            require(parameter.dtype == torch.float32, f"{name}.{key} is {parameter.dtype}")


def active_together(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Two adapters of an additive method add up, before and after merging. Two of another method
    are refused."""
    assert issubclass(method, Adapter)
    model, x = injected_toy(config, case, moved=True), input_of(case)
    if trains_base(model):
        with require_raise(ConfigError, "a second adapter beside trained parameters of the base"):
            inject(model, config, name="two", seed=1)
        return
    inject(model, config, name="two", seed=1)
    perturb(model, "two", size=0.2)
    model.eval()
    if not method.additive:
        with require_raise(MergeError, "two adapters that do not add up"):
            activate(model, "default", "two")
        return
    layer = model.first
    deltas = []
    for name in ("default", "two"):
        activate(model, name)
        deltas.append(layer(x).float() - layer.base_layer(x).float())  # type: ignore[operator]
    activate(model, "default", "two")
    expected = layer.base_layer(x).float() + deltas[0] + deltas[1]  # type: ignore[operator]
    require_near(layer(x), expected.to(case.dtype), "two active adapters", k=32)
    before = model(x)
    make_mergeable(model)
    merge(model)
    require_near(model(x), before, "two merged adapters", k=32)


def _specified(adapter: Adapter, view: View) -> Compute:
    """Returns a function that computes the layer's output by the specification."""
    return lambda x, mask: specification([adapter], view, x, [mask])


def _output(adapter: Adapter, view: View) -> Compute:
    """Returns a function that computes the layer's output as AdaptedLayer does."""

    def output(x: Tensor, mask: Mask | None) -> Tensor:
        y = attempt([adapter], view, x, [mask])
        return specification([adapter], view, x, [mask]) if y is None else y

    return output


def _by_kernel(adapter: Any, view: View, method: str) -> Compute:
    """Returns a function that calls a method of the adapter's kernel."""
    return lambda x, mask: getattr(adapter.kernel(view), method)(x, mask)


def fast_is_specification(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A kernel's outputs and gradients equal those of the equation in float64, with and without
    dropout."""
    assert issubclass(method, Adapter)
    model = injected_toy(config, replace(case, dtype=torch.float64), moved=True).train()
    layers, _ = wrappers_of(model)
    for name, layer in layers.items():
        adapter, view = layer.adapter("default"), layer.view

        pairs = [("y", _output(adapter, view), _specified(adapter, view))]
        if isinstance(adapter, Fast) and adapter.kernel(view) is not None:
            pairs.append(("plain y", _by_kernel(adapter, view, "composed"), pairs[0][2]))
            if method.additive:  # the kernel then also serves several adapters on one layer
                delta = partial(adapter.delta, view)
                pairs.append(("delta", _by_kernel(adapter, view, "delta"), delta))
        wide: Any = {"dtype": torch.float64, "device": case.device}
        for shape in ((7,), (1,), (0,), (2, 9), (1, 1, 3)):
            g = torch.randn(*shape, view.out_features, **wide)  # the gradient of y
            parameters = adapter.named_parameters()
            inputs: dict[str, Tensor] = {n: p for n, p in parameters if n not in adapter.frozen}
            masks: list[Mask | None] = [None]
            if view.of_ids:
                x = torch.randint(0, view.in_features, shape, device=case.device)
            else:
                x = torch.randn(*shape, view.in_features, **wide, requires_grad=True)
                inputs["x"] = x
                masks.append(draw(0.5, x))
            for mask in masks:
                for kind, fast, slow in pairs:
                    actual, expected = fast(x, mask), slow(x, mask)
                    label = f"{name}, {shape}, {'no mask' if mask is None else 'mask'}: {kind}"
                    require_near(actual, expected, label, k=1024)
                    for key, gradient, expected_gradient in zip(
                        inputs,
                        torch.autograd.grad(actual, list(inputs.values()), g),
                        torch.autograd.grad(expected, list(inputs.values()), g),
                        strict=True,
                    ):
                        message = f"{label}: gradient of {key}"
                        require_near(gradient, expected_gradient, message, k=1024)


def gradients_in_its_dtype(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Gradients are close to those of the same weights in float32, with and without autocast."""
    model, x = injected_toy(config, case, moved=True).train(), input_of(case)
    in_float32 = copy.deepcopy(model).float()

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).float().square().mean().backward()
        trained = trained_parameters(model, "default").items()
        return {name: p.grad.float() for name, p in trained if p.grad is not None}

    expected = gradients(in_float32, to_float32(x))
    for autocast in (False, True):
        if autocast and case.dtype == torch.float16:
            continue  # autocast to bfloat16 over float16 norms is refused by torch itself
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual = gradients(model, x)
        eps = torch.finfo(torch.bfloat16 if autocast else case.dtype).eps
        for name, gradient in actual.items():
            off = float((gradient - expected[name]).abs().max() / expected[name].abs().max())
            label = f"gradient of {name}{' under autocast' if autocast else ''}"
            require(off <= max(8 * eps, 1e-5), f"{label}: off by {off:.2g}")


def dropout_is_the_mask_alone(method: type[Method], config: MethodConfig, case: Case) -> None:
    """In train mode, a layer computes its equation with the dropout mask that it draws. In eval
    mode, nothing is dropped."""
    model = injected_toy(config, case, moved=True)
    layers, _ = wrappers_of(model)
    layer = layers["first"]
    x = input_of(case)
    adapter = layer.adapter("default")
    require_near(layer(x), _specified(adapter, layer.view)(x, None), "eval", k=32)
    adapter.dropout = 0.0
    layer.train()
    require_near(
        layer(x), _specified(adapter, layer.view)(x, None), "training without dropout", k=32
    )
    adapter.dropout = 0.5
    layer.train()
    torch.manual_seed(5)
    output = layer(x)
    torch.manual_seed(5)
    mask = adapter.draw_mask(x)
    if case.kind == "Embedding":
        require(mask is None, "ids are dropped")
        return
    assert mask is not None
    values = set(mask.scaled(x).flatten().tolist())
    require_near(output, _specified(adapter, layer.view)(x, mask), "training", k=32)
    require(values == {0.0, 2.0}, "a mask of p = 0.5 has values 0 and 2")
    again = adapter.draw_mask(x)
    same = again is None or torch.equal(again.keep(x), mask.keep(x))
    require(not same, "the same mask at every step")


def output_dtype(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The output has the dtype of the base's output, with and without autocast."""
    model, base, x = injected_toy(config, case, moved=True), Toy(case).eval(), input_of(case)
    require(model(x).dtype == base(x).dtype, "dtype differs from the base's")
    if case.dtype == torch.float16:
        return  # autocast to bfloat16 over float16 norms is refused by torch itself
    expected = copy.deepcopy(model).float()(to_float32(x)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x).detach()
        require(output.dtype == base(x).dtype, "dtype under autocast differs from the base's")
    off = float((output.float() - expected).abs().max() / expected.abs().max())
    require(off <= 8 * torch.finfo(torch.bfloat16).eps, f"off by {off:.3f} under autocast")


def a_hook_below_runs_once(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A hook on the base layer runs once a call, by the kernel and by the specification."""
    for moved in (False, True):
        layer, x = wrappers_of(injected_toy(config, case, moved))[0]["first"], input_of(case)
        plain, heard = layer(x), list[Any]()
        layer.base_layer.register_forward_hook(lambda _, __, y, heard=heard: heard.append(y.shape))
        for context in (nullcontext(), off()):
            heard.clear()
            with context:
                require_near(layer(x), plain, "output with a hook on the base layer")
            require(heard == [plain.shape], f"the hook on the base layer saw {heard}")


def gradient_checkpointing(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Recomputation draws the same mask, so the gradients have the same bits."""
    from torch.utils.checkpoint import checkpoint

    model = injected_toy(config, case, moved=True).train()
    for layer in wrappers_of(model)[0].values():
        layer.adapter("default").dropout = 0.3
    trained = trained_parameters(model, "default")
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(7)
        x = input_of(case)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.float().square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        model.zero_grad()
    for name in trained:
        require_same(gradients[1][name], gradients[0][name], f"gradient of {name}")


def torch_compile(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The whole model compiles to one graph (aot_eager), with the same output."""
    if replace(case, device="cpu") != Case("Linear", True, torch.float32):
        return  # a compilation takes seconds, and the cases share this code
    model, x = injected_toy(config, case, moved=True), input_of(case)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    require_near(compiled(x), model(x), "compiled output")
