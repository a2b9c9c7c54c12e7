"""The frozen linear layer, whose weight may be packed: y = x Wᵀ + b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.products import (
    as_rows,
    autocast_on,
    cast,
    possible,
    save_for_backward,
    saved,
    shaped,
    stored_weight,
    without_autocast,
)
from lora.layers import View


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b and gx = g W. W is frozen; backward unpacks it again and keeps no copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, view: View, b: Tensor | None, stored: tuple[Tensor, ...],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        y = product(x, view, b, stored, dtype)
        save_for_backward(ctx, x, dtype, None, stored)  # the codes, an eighth of W in float32
        ctx.view = view
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (_, (stored,)) = grads, saved(ctx)
        needs_x, _, needs_b, *_ = ctx.needs_input_grad
        gx = gb = None
        with without_autocast(g):
            if needs_x:
                gx = g @ ctx.view.unpacked(stored, ctx.dtype)
                gx = cast(gx.view(ctx.shape), ctx.x_dtype)
            if needs_b:
                gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        return gx, None, gb, None, None


def linear(view: View, x: Tensor) -> Tensor:
    """x Wᵀ + b, dtype of x or autocast's. Backward keeps the packed weight alone."""
    b = view.parameters()[1]
    if not possible(view, x):
        W = view.read()[0]
        return F.linear(x, W if autocast_on(x) else W.to(x.dtype), b)
    compute: Any = _Linear.apply if torch.is_grad_enabled() else product
    return shaped(compute(x, view, b, *stored_weight(view, x)), x)


def product(
    x: Tensor, view: View, b: Tensor | None, stored: tuple[Tensor, ...], dtype: torch.dtype
) -> Tensor:
    """y (tokens, out)"""
    with without_autocast(x):
        W = view.unpacked(stored, dtype)
        return F.linear(as_rows(x, dtype), W, None if b is None else cast(b, dtype))
