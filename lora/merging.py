"""Merges adapters into the base weights, checks what that does to the output, and undoes it.

    W' = W + ΔW, computed in float32 at least, stored in the base's dtype

merge() keeps the original parameters, so that restore() brings back the same bits. Subtracting ΔW
again would not: W' is rounded.
"""

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
from lora.targets import walk
from lora.wrappers import AdaptedLayer


@dataclass(frozen=True)
class Certificate:
    """What a merge did to the model's output on a probe. `str(certificate)` is one line."""

    layers: int  # how many were merged
    dtype: torch.dtype  # of the merged weights; the coarsest if they have several
    untied: tuple[str, ...]  # layers whose weight was tied to another layer's and no longer is
    largest_difference: float | None  # between outputs before and after; None without a probe
    largest_output: float | None  # absolute, before the merge
    tolerance: float | None  # as passed, or SLACK times the change that rounding W' causes

    def __str__(self) -> str:
        lines = [f"merged {self.layers} layers in {str(self.dtype).removeprefix('torch.')}"]
        if self.untied:
            lines.append(f"untied {', '.join(self.untied)}")
        if self.largest_difference is None:
            lines.append("not certified: no probe was passed")
        else:
            lines.append(
                f"outputs changed by at most {self.largest_difference:.3g}, of"
                f" {self.largest_output:.3g} (tolerance {self.tolerance:.3g})"
            )
        return "; ".join(lines)


DRAWS = 2  # random roundings that _rounding() tries

SLACK = {2: 4, 4: 32, 8: 32}
"""The default tolerance as a multiple of the change that rounding W' causes (see _rounding), by the
bytes of an element. benchmarks/merging.py measures multiples up to 2 in float32, where the
rounding of long sums adds to it, and up to 1.4 in bfloat16, where rounding W' is nearly all."""


def merge(
    model: nn.Module, untie: bool = False, probe: Any = None, tolerance: float | None = None
) -> Certificate:
    """Replace W by W' in every adapted layer. restore() undoes it.

    `probe` is a batch that the model takes. If it is given, merge() compares the model's output on
    it before and after, in eval mode, and raises MergeError if any element changed by more than
    `tolerance`. By default that is SLACK times the change that rounding the weights causes,
    measured with this model and probe. If a weight is tied to another layer's, `untie` gives the
    merged layer a weight that is not; without it that is a MergeError. A merge that raises leaves
    the model as it was.
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
    # The checks on the weights are done: up to here nothing has changed.
    before = None if probe is None else output_on(model, probe)
    for name, pair in merged.items():
        put_merged(layers[name], *pair)
    # Saved modules and selected parameters already hold their trained values: nothing to compute.
    for holder in trained_in_place(model):
        holder.merged = True
    if untied:
        ties.untie(model)
    # Judge the whole merge by the coarsest dtype: its rounding is the largest.
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
    """Returns the largest change of the output, the largest output before, and the tolerance.

    Raises MergeError if the change is larger than the tolerance.
    """
    after = output_on(model, probe)
    change, largest = float((after - before).abs().max()), float(before.abs().max())
    reason = "as set"
    if tolerance is None:
        times, short = SLACK[dtype.itemsize], str(dtype).removeprefix("torch.")
        tolerance = times * _rounding(model, layers, probe, after, dtype)
        reason = f"{times} times what rounding in {short} changes them by"
    if not change <= tolerance:  # true for NaN too
        raise MergeError(
            f"merge: outputs on the probe changed by {change:.3g}, of {largest:.3g} at most; the"
            f" tolerance is {tolerance:.3g}, {reason}. The model is not merged. Keep the adapter"
            f" unmerged, or accept the change: set tolerance (--tolerance) above {change:.3g}."
        )
    return change, largest, tolerance


@torch.no_grad()
def _rounding(
    model: nn.Module, layers: Sequence[AdaptedLayer], probe: Any, after: Tensor, dtype: torch.dtype
) -> float:
    """Returns how much the merged model's output changes if each merged weight is rounded once.

    W' is W + ΔW, and each of the two is rounded, so an element of W' is off by up to
    eps · (|W| + |W' − W|), up or down. This function adds random errors of that size to the weights
    and measures the output. A constant could not replace the measurement: how much a small error
    grows on its way through the layers depends on the model. Returns the largest of DRAWS draws,
    and at least one rounding of the largest output.
    """
    generator = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, AdaptedLayer)
        assert layer.kept is not None
        (x,) = (*args, *kwargs.values())
        weight, original = layer.base_layer._parameters["weight"], layer.kept[0]
        assert weight is not None
        merged[layer] = weight
        # Under autocast the products round more coarsely than the stored weight.
        computed = compute_dtype(x) if x.is_floating_point() else weight.dtype
        eps = max(torch.finfo(computed).eps, torch.finfo(weight.dtype).eps)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        step = torch.rand(weight.shape, generator=generator, device="cpu").to(wide) * 2 - 1
        moved = wide + eps * step * (original.abs() + (wide - original).abs())
        layer.base_layer._parameters["weight"] = nn.Parameter(moved.to(weight.dtype), False)

    def bring_back(layer: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(layer, AdaptedLayer)
        layer.base_layer._parameters["weight"] = merged.pop(layer)

    # Hooks, so that only one layer at a time holds a second copy of its weight.
    merged: dict[AdaptedLayer, nn.Parameter] = {}
    hooks = [layer.register_forward_pre_hook(move, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(bring_back, always_call=True) for layer in layers]
    try:
        changes = [float((output_on(model, probe) - after).abs().max()) for _ in range(DRAWS)]
        return max(*changes, torch.finfo(dtype).eps * float(after.abs().max()))
    finally:
        for hook in hooks:
            hook.remove()


def _merged(
    model: nn.Module, layers: Mapping[str, AdaptedLayer]
) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """Returns W' and b' of each layer by name. Raises MergeError if one cannot be merged.

    Layers that share a weight also share W' if it is the same for all of them, so that the tie
    survives the merge.
    """
    packed = [name for name, layer in layers.items() if layer.view.packed]
    if packed:
        raise MergeError(
            f"merge: the weight of {packed[0]} is in NF4, and rounding W' to NF4 would lose the"
            " update. Call lora.nf4.dequantize_layers(model) first, then merge."
        )
    merged = {name: merged_parameters(layer) for name, layer in layers.items()}
    for name, (weight, bias) in merged.items():
        if bias is not None and layers[name].view.parameters()[1] is None:
            raise MergeError(
                f"merge: the update of {name} has a bias, the layer has none to merge it into."
                " Keep the adapter unmerged, or train with lora_bias=False."
            )
        if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
            raise MergeError(
                f"merge: W' of {name} holds NaN or infinity in {weight.dtype}. Load the base in a"
                " wider dtype."
            )
    modules = {id(module): module for _, module in walk(model)}.values()
    users = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        W, b = layer.view.parameters()
        groups.setdefault(id(W), []).append(name)
        weight, bias = merged[name]
        if bias is not None and users[id(b)] > 1 and torch.equal(bias, gathered(b)):
            merged[name] = weight, None  # the bias does not change, so the tie can stay
    for shared, names in groups.items():
        first = merged[names[0]][0]
        if users[shared] == len(names) and all(torch.equal(merged[n][0], first) for n in names):
            merged |= {name: (first, merged[name][1]) for name in names}
    return merged


def _untied(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    merged: Mapping[str, tuple[nn.Parameter, nn.Parameter | None]],
    untie: bool,
) -> tuple[str, ...]:
    """Returns the names of the layers whose ties the merge breaks.

    Raises MergeError if there are any and `untie` is False, or if the model needs the tie.
    """
    _, saved = wrappers_of(model)
    untied = ties.broken_ties(
        model,
        {id(layers[name].base_layer): pair for name, pair in merged.items()},
        {id(keeper.original_module): keeper.current for keeper in saved.values() if keeper.active},
    )
    if untied and not untie:
        raise MergeError(
            f"merge: the weight of {untied[0]} is tied to another module's, which would change with"
            " it. To merge into an untied copy, call lora.merge(model, untie=True), or lora merge"
            " --untie."
        )
    if untied:
        ties.check_flag(model)
    return untied


def output_on(model: nn.Module, probe: Any) -> Tensor:
    """Returns the model's logits for a probe, or its first output if it has none, in float32."""
    with evaluating(model), torch.no_grad():
        output = call_model(model, probe)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    logits: Tensor = output.float()
    return logits


def restore(model: nn.Module) -> None:
    """Undo merge(): put the original parameters back, with the same bits."""
    check_keeps_base(model, "restore")
    ties.retie(model)
    layers, _ = wrappers_of(model)
    for layer in layers.values():
        put_back(layer)
    for holder in trained_in_place(model):
        holder.merged = False


def merged_parameters(layer: AdaptedLayer) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Returns W' and b' of the layer's active adapters, in the base's dtype and orientation.

    Computed in float32 at least, so that W' is rounded once.
    """
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
    """Install W' and b' in the layer and keep its original parameters in `layer.kept`."""
    # New parameters, not new values: a module whose weight is tied to W must keep W.
    layer.kept = layer.view.parameters()
    layer.base_layer._parameters["weight"] = weight
    if bias is not None:
        layer.base_layer._parameters["bias"] = bias


def put_back(layer: AdaptedLayer) -> None:
    """Undo put_merged, on the device and in the dtype that the layer has now."""
    if layer.kept is None:
        return
    module = layer.base_layer
    for original, name in zip(layer.kept, ("weight", "bias"), strict=True):
        if original is not None:
            current = module._parameters[name]
            assert current is not None
            original.data = original.data.to(current.device, current.dtype)
            module._parameters[name] = original
    layer.kept = None
