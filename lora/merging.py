"""TODO: what this module is."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora import ties
from lora.adapter import call_model
from lora.declared import is_number
from lora.errors import MergeError
from lora.inventory import (
    check_enabled,
    check_keeps_base,
    check_restored,
    evaluating,
    trained_in_place,
    wrappers_of,
)
from lora.kernels.products import compute_dtype, without_autocast
from lora.layers import gathered
from lora.settings import check
from lora.targets import (
    walk,
)
from lora.wrappers import AdaptedLayer


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
    check_keeps_base(model, "merge")
    check_restored(model, "merge")
    check_enabled(model, "merge")
    layers, _ = wrappers_of(model)
    if not layers and not trained_in_place(model):
        raise MergeError("merge: the model has no adapter. Call lora.inject or lora.load first.")
    layers = {name: layer for name, layer in layers.items() if layer.active}
    merged = _merged(model, layers)
    untied = _untied(model, layers, merged, untie)
    before = None if probe is None else output_on(model, probe)
    for name, pair in merged.items():
        put_merged(layers[name], *pair)
    for whole in trained_in_place(model):
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
    merged = {name: merged_parameters(layer) for name, layer in layers.items()}
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
        found = call_model(model, probe)
    found = getattr(found, "logits", found)
    found = (
        found
        if isinstance(found, Tensor)
        else next(iter(found.values() if isinstance(found, Mapping) else found))
    )
    return found.float()


def restore(model: nn.Module) -> None:
    """Undo merge, bit for bit, from the kept originals."""
    check_keeps_base(model, "restore")
    ties.retie(model)
    layers, _ = wrappers_of(model)
    for layer in layers.values():
        put_back(layer)
    for whole in trained_in_place(model):
        whole.merged = False


def merged_parameters(layer: AdaptedLayer) -> tuple[nn.Parameter, nn.Parameter | None]:
    """W' and b' of the active adapters as the layer stores them: in the base's dtype, computed in
    float32 at least."""
    view = layer.view
    weight, bias = view.parameters()
    W, b = view.read()
    wide = torch.promote_types(W.dtype, torch.float32)
    with torch.no_grad(), without_autocast(W):
        W1, b1 = W.to(wide), None if b is None else b.to(wide)
        for name in layer.active:
            # Only additive adapters are active together, so the order does not matter.
            W1, b1 = copy.deepcopy(layer.adapter(name)).to(wide).merged(W1, b1)
        W1 = (W1.T if view.transposed else W1).to(W.dtype, copy=True).contiguous()
        b1 = None if b1 is None else b1.to(W.dtype if b is None else b.dtype, copy=True)
    needs = bias is not None and bias.requires_grad
    return (
        nn.Parameter(W1, requires_grad=weight.requires_grad),
        None if b1 is None else nn.Parameter(b1, requires_grad=needs),
    )


def put_merged(layer: AdaptedLayer, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Put W' and b' into the layer as new parameters, so that what is tied to W does not move. The
    base's own are kept."""
    layer.kept = layer.view.parameters()
    layer.base_layer._parameters["weight"] = weight
    if bias is not None:
        layer.base_layer._parameters["bias"] = bias


def put_back(layer: AdaptedLayer) -> None:
    """Undo put_merged, on the device and in the dtype that the layer has now."""
    if layer.kept is None:
        return
    module = layer.base_layer
    for kept, name in zip(layer.kept, ("weight", "bias"), strict=True):
        if kept is not None:
            now = module._parameters[name]
            assert now is not None
            kept.data = kept.data.to(now.device, now.dtype)
            module._parameters[name] = kept
    layer.kept = None
