"""Faster ways to compute the methods' equations, all called through `attempt`.

A reader of LoRA can stop here. A method states an equation, `merged(W, b)`, and that is what it
means. A method that inherits `Fast` also names a kernel of this folder, which gives the same values
and gradients in less time and memory; lora.testing proves that they are the same.

    lowrank   LoRA, AdaLoRA    dora   DoRA    vera   VeRA    scale   (IA)³
    linear    the frozen layer whose weight is packed
    dropout   masks of one bit per element   scratch   memory that calls share
    products  what the kernels share    triton    the same for NVIDIA GPUs, in Triton
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora.kernels.dropout import Mask
from lora.kernels.products import KEPT, OFF, check_loaded, off_in_backward, possible
from lora.kernels.products import adapters_constant as adapters_constant
from lora.kernels.products import off as off
from lora.layers import View, in_pieces, plain_call, views


class Fast:
    """A method with a kernel."""

    def kernel(self, view: View) -> Any:
        """An object of this folder with `fused(x, mask)` and `composed(x, mask)`, which give the
        output of the adapted layer; if the method is additive also `delta(x, mask)`. None if
        no kernel computes this layer."""
        raise NotImplementedError


def attempt(
    adapters: Sequence[Any], view: View, x: Tensor, masks: Sequence[Mask | None]
) -> Tensor | None:
    """The output of a layer under its adapters, dtype of the layer's output; None if no kernel
    computes it, and the specification has to."""
    # torch.compile cannot read a ContextVar; under it off() does not apply.
    compiling = torch.compiler.is_compiling()
    if not compiling and (OFF.get() or off_in_backward(x)):
        return None
    kept = None if compiling or torch.is_grad_enabled() else KEPT.get()
    kernels = [_kernel(adapter, view, kept) for adapter in adapters]
    # A sharded weight is gathered by its block, outside of which no kernel may read it.
    if None in kernels or in_pieces(view.parameters()[0]):
        return None
    if len(kernels) == 1 and possible(view, x):
        return kernels[0].fused(x, masks[0])  # type: ignore[no-any-return]
    if not plain_call(view.module):
        check_loaded(adapters, view, x)
    if len(kernels) == 1:
        return kernels[0].composed(x, masks[0])  # type: ignore[no-any-return]
    # Additive adapters: the base layer runs once, each adapter adds its part.
    base: Tensor = view.module(x)
    y = base
    for kernel, mask in zip(kernels, masks, strict=True):
        y = y + kernel.delta(x, mask)
    return y.to(base.dtype)


def constant_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output of an AdaptedLayer without gradients or dropout, inside adapters_constant() and if
    a kernel has a shorter way there; otherwise None."""
    if torch.compiler.is_compiling() or layer.training or OFF.get():
        return None
    if (kept := KEPT.get()) is None:
        return None
    base = layer._modules["base_layer"]  # nn.Module looks its children up in Python
    key = id(layer), id(base), layer.active, x.shape, x.dtype, torch._C._is_any_autocast_enabled()
    if key not in kept:
        view, short = views(base)[0], None
        if len(layer.active) == 1 and possible(view, x):
            kernel = _kernel(layer.adapters[layer.active[0]], view, kept)
            short = kernel.constant(x) if hasattr(kernel, "constant") else None
        kept[key] = layer, base, short  # keeps both alive, so that their ids stay theirs
    short = kept[key][-1]
    # A hook may have been set since.
    return short(x) if short is not None and plain_call(base) else None


def _kernel(adapter: Any, view: View, kept: dict[tuple[Any, ...], Any] | None) -> Any:
    """The adapter's kernel for the layer: the one that is kept, inside adapters_constant()."""
    if kept is None or not isinstance(adapter, Fast):
        return adapter.kernel(view) if isinstance(adapter, Fast) else None
    key = id(adapter), id(view.module)
    if key not in kept:
        kept[key] = adapter, adapter.kernel(view)
    return kept[key][1]
