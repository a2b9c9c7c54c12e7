"""The fast path: one autograd.Function per equation, each beside it.

What autograd would keep of an update is a copy of the input for every cast and every dropout, and
what it would do is add whole activations that a product could have been added into. Here forward
keeps x by reference, h = x Aᵀ (tokens, r), and for dropout the mask's seed; backward makes the rest
again. A frozen weight gets no gradient; those of A and B are summed in float32 whatever the base's
dtype is. Under autocast everything is computed in its dtype, from frozen weights that are cast once
and not at every step.

The specification is lora.adapter's; the contract holds values and gradients to it. Where a Function
cannot go the composition of plain operations does the work, knowingly: `possible`. Its first
derivatives are all there are: a second backward is a TrainingError.

    Shapes    x (..., in)   W (out, in) frozen   b (out,)   A (r, in)   B (out, r)   y (..., out)
    m         the dropout mask, 1 where an element stays; c = 1 / (1 − p)
    g         the gradient of y; tokens = the product of x's leading dimensions
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lora.dropout import Mask
from lora.errors import TrainingError
from lora.layers import View

Start = tuple[Tensor, Tensor] | None  # A₀ (r, in), B₀ (out, r), frozen
Way = tuple[Tensor, Tensor, float]  # gh (tokens, r), A (r, in), s

PART = 256  # tokens

_off = False
_casts: Any = WeakIdKeyDictionary()  # a frozen weight -> (what it was cast from, the cast)


@contextmanager
def off() -> Iterator[None]:
    """Compute by plain operations within: for second derivatives, and for comparison."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def possible(view: View, x: Tensor) -> bool:
    """Whether a Function can compute the layer, and gives what calling the layer would."""
    module = view.module
    return not (
        _off
        or view.of_ids  # ids have no gradient, and a table no product
        or x.is_nested
        or view.parameters()[0].requires_grad
        or module._forward_hooks  # somebody looks at the layer's own output
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # replaced, as accelerate does to fetch an offloaded weight
        or torch.compiler.is_compiling()  # the compiler fuses plain operations itself
        or torch._C._are_functorch_transforms_active()  # per-sample gradients, Hessians
        or torch._C._get_tracing_state() is not None
    )


def autocast_on(x: Tensor) -> bool:
    """Whether autocast chooses dtypes for x; on the meta device there is none to ask."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products of x: autocast's where that is on, which leaves float64 alone."""
    if autocast_on(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _weight(view: View, x: Tensor, dtype: torch.dtype) -> Tensor:
    """W (out, in) as it is, or under autocast in `dtype`, cast once while it stays what it is."""
    weight, _ = view.parameters()
    found = _cast(weight, dtype) if autocast_on(x) and weight.dtype != dtype else weight.detach()
    return found.t() if view.transposed else found


def _cast(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, again only where its version or its memory is another.

    What is written through weight.data bears no version: write to the weight itself.
    """
    if weight.is_inference():  # which count no versions
        return weight.to(dtype)
    state = (weight._version, weight.data_ptr(), weight.device, dtype)
    known = _casts.get(weight)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # an evaluation's cast must serve training too
            known = (state, weight.detach().to(dtype))
        _casts[weight] = known
    cast: Tensor = known[1]
    return cast


def _plain(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: the dtypes are chosen already."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else nullcontext()


def _rows(x: Tensor) -> Tensor:
    """(tokens, features)"""
    return x.reshape(-1, x.shape[-1])


def _summed(left: Tensor, right: Tensor, s: float) -> Tensor:
    """s leftᵀ right, over all tokens, in float32 at least."""
    if left.dtype.itemsize == 2:
        left, right = left.float(), right.float()
    parts = len(left) // PART
    if parts < 2 or left.is_cuda:
        return (left.t() @ right).mul_(s)
    # Two thirds of the time of one product over all of them: a part stays in the cache.
    whole = parts * PART
    found = torch.bmm(
        left[:whole].view(parts, PART, -1).mT, right[:whole].view(parts, PART, -1)
    ).sum(0)
    return found.addmm_(left[whole:].t(), right[whole:]).mul_(s)


def _dropped(rows: Tensor, A: Tensor, mask: Mask | None) -> Tensor:
    """(m ∘ rows) Aᵀ"""
    if mask is None:
        return rows @ A.t()
    h = rows.new_empty(len(rows), len(A))
    for part, keep in mask.blocks(rows):
        torch.mm(keep.mul_(rows[part]), A.t(), out=h[part])
    return h


def _factor(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Bᵀ (r, out), in memory too: g B by its rows takes half the time of g B by its columns."""
    return B.t().to(dtype).contiguous()


def _update(
    rows: Tensor, A: Tensor, Bt: Tensor, s: float, start: Start, mask: Mask | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    """h (tokens, r), and y + s (m ∘ rows) (B A − B₀ A₀)ᵀ, written over y."""
    h = _dropped(rows, A.to(y.dtype), mask)
    if start is None:
        return h, y.addmm_(h, Bt, alpha=s)
    A0, Bt0 = start[0].to(y.dtype), _factor(start[1], y.dtype)
    # Apart, so that the two are the same bits at the start, and leave y's as they are.
    return h, y.add_(h @ Bt - _dropped(rows, A0, mask) @ Bt0, alpha=s)


def _ways(g: Tensor, A: Tensor, Bt: Tensor, s: float, start: Start) -> list[Way]:
    """The ways of g (tokens, out) back through s (B A − B₀ A₀), that of A and B first."""
    found = [(g @ Bt.t(), A.to(g.dtype), s)]
    if start is not None:
        found.append((g @ _factor(start[1], g.dtype).t(), start[0].to(g.dtype), -s))
    return found


def _back(
    ways: list[Way], rows: Tensor | None, mask: Mask | None, gx: Tensor | None
) -> Tensor | None:
    """The first way's gradient of A, s ghᵀ (m ∘ rows); gx is written over with gx + m ∘ Σ s gh A.

    Either of rows and gx may be None, which is not wanted then. The mask is made once for both.
    """
    gh, A, s = ways[0]
    like = gx if rows is None else rows
    if mask is None or like is None:
        for gh_, A_, s_ in ways if gx is not None else ():
            gx.addmm_(gh_, A_, alpha=s_)  # type: ignore[union-attr]
        return None if rows is None else _summed(gh, rows, s)
    wide = torch.promote_types(A.dtype, torch.float32)
    gA = None if rows is None else torch.zeros_like(A, dtype=wide)
    for part, keep in mask.blocks(like):
        for gh_, A_, s_ in ways if gx is not None else ():
            gx[part].addcmul_(gh_[part] @ A_, keep, value=s_)  # type: ignore[index]
        if gA is not None and rows is not None:
            gA.add_(_summed(gh[part], keep.mul_(rows[part]), s))
    return gA


def _once() -> None:
    if torch.is_grad_enabled():  # only where backward was asked for its own graph
        raise TrainingError(
            "a fused layer has first derivatives only, found a backward with create_graph=True."
            " Compute forward and backward within lora.fused.off()."
        )


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + s (m ∘ x) (B A − B₀ A₀)ᵀ, s with c in it

    h  = (m ∘ x) Aᵀ                      (tokens, r)
    gA = s (g B)ᵀ (m ∘ x)   gB = s gᵀ h   gb = Σ g
    gx = g W + s m ∘ (g (B A − B₀ A₀))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float,
        start: Start, mask: Mask | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with _plain(x):
            rows = _rows(x).to(dtype)
            y = F.linear(rows, W, None if b is None else b.to(dtype))
            Bt = _factor(B, dtype)
            h, y = _update(rows, A, Bt, s, start, mask, y)
        kept = x if ctx.needs_input_grad[3] else None  # not under LoRA-FA, whose A is frozen
        ctx.save_for_backward(kept, W, A, Bt, h, None if mask is None else mask.seed)
        ctx.s, ctx.p, ctx.dtype = s, None if mask is None else mask.p, dtype
        ctx.start, ctx.shape, ctx.x_dtype = start, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        x, W, A, Bt, h, seed = ctx.saved_tensors
        needs_x, _, needs_b, _, needs_B, *_ = ctx.needs_input_grad
        mask = None if seed is None else Mask(ctx.p, seed)
        gB = gb = None
        with _plain(grads[0]):
            g = _rows(grads[0])
            gx = g @ W if needs_x else None
            rows = None if x is None else _rows(x).to(ctx.dtype)
            gA = _back(_ways(g, A, Bt, ctx.s, ctx.start), rows, mask, gx)
            if needs_B:
                gB = _summed(h, g, ctx.s).t()
            if needs_b:
                gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        gx = None if gx is None else gx.view(ctx.shape).to(ctx.x_dtype)
        return gx, None, gb, gA, gB, None, None, None, None


def low_rank(
    view: View, x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    mask: Mask | None, start: Start = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b + scaling · (m ∘ x) (B A − B₀ A₀)ᵀ, m scaled, in the layer's dtype; start A₀, B₀."""
    dtype = compute_dtype(x)
    W = _weight(view, x, dtype)
    s = scaling if mask is None else scaling * mask.scale
    y: Tensor = _LowRank.apply(x, W, b, A, B, s, start, mask, dtype)  # type: ignore[no-untyped-call]
    return y


class _DoRA(torch.autograd.Function):
    """y = x Wᵀ + b + c (f ∘ z − q), q = (m ∘ x) Wᵀ, z = q + s (m ∘ x) (B A − B₀ A₀)ᵀ

    DoRA with dropout. f (out,) = magnitude / length, so that (W' − W) (m ∘ x) takes a second
    product with W.   h = (m ∘ x) Aᵀ
    gz = c f ∘ g   gf = c Σ g ∘ z   gA = s (gz B)ᵀ (m ∘ x)   gB = s gzᵀ h
    gx = g W + m ∘ ((gz − c g) W + s gz (B A − B₀ A₀))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float,
        start: Start, f: Tensor, mask: Mask, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with _plain(x):
            rows = _rows(x).to(dtype)
            y = F.linear(rows, W, None if b is None else b.to(dtype))
            kept = mask.keep(rows).mul_(rows)
            q = F.linear(kept, W)
            Bt = _factor(B, dtype)
            h, z = _update(kept, A, Bt, s, start, None, q.clone())
            y = (y + mask.scale * (f * z - q)).to(dtype)
        ctx.save_for_backward(x, W, A, Bt, h, f, z, mask.seed)
        ctx.s, ctx.p, ctx.dtype, ctx.start = s, mask.p, dtype, start
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        x, W, A, Bt, h, f, z, seed = ctx.saved_tensors
        needs_x, _, needs_b, needs_A, needs_B, _, _, needs_f, *_ = ctx.needs_input_grad
        mask = Mask(ctx.p, seed)
        gx = dropped = gB = gb = gf = None
        with _plain(x):
            g = _rows(grads[0])
            gz = (mask.scale * f * g).to(ctx.dtype)
            rows = _rows(x).to(ctx.dtype)
            keep = mask.keep(rows)
            if needs_x:
                dropped = torch.sub(gz, g, alpha=mask.scale) @ W
            kept = keep * rows if needs_A else None
            gA = _back(_ways(gz, A, Bt, ctx.s, ctx.start), kept, None, dropped)
            if needs_B:
                gB = _summed(h, gz, ctx.s).t()
            if needs_b:
                gb = g.sum(0, dtype=f.dtype)
            if needs_f:
                gf = mask.scale * (g * z).sum(0, dtype=f.dtype)
            if dropped is not None:
                gx = (g @ W).addcmul_(dropped, keep).view(x.shape).to(x.dtype)
        return gx, None, gb, gA, gB, None, None, gf, None, None


def dora(
    view: View, x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, factor: Tensor,
    mask: Mask, start: Start = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b + (factor ∘ (W + scaling · (B A − B₀ A₀)) − W) (m ∘ x), m scaled."""
    dtype = compute_dtype(x)
    W = _weight(view, x, dtype)
    y: Tensor = _DoRA.apply(x, W, b, A, B, scaling, start, factor, mask, dtype)  # type: ignore[no-untyped-call]
    return y


class _VeRA(torch.autograd.Function):
    """y = x Wᵀ + b + c u ∘ λ_b, u = (h ∘ λ_d) Bᵀ, h = (m ∘ x) Aᵀ, with A and B frozen

    inner = λ_d (r,), outer = λ_b (out,). r is not thin here: u is kept, and x is not.
    gλ_b = c Σ g ∘ u   gv = (c g ∘ λ_b) B   gλ_d = Σ gv ∘ h   gx = g W + m ∘ ((gv ∘ λ_d) A)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, inner: Tensor,
        outer: Tensor, mask: Mask | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        c = 1.0 if mask is None else mask.scale
        with _plain(x):
            rows = _rows(x).to(dtype)
            y = F.linear(rows, W, None if b is None else b.to(dtype))
            A, B = A.to(dtype), B.to(dtype)
            h = _dropped(rows, A, mask)
            u = F.linear((h * inner).to(dtype), B)
            y = y.addcmul_(u, outer.to(dtype), value=c)
        ctx.save_for_backward(W, A, B, inner, outer, h, u, None if mask is None else mask.seed)
        ctx.c, ctx.p, ctx.dtype = c, None if mask is None else mask.p, dtype
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        W, A, B, inner, outer, h, u, seed = ctx.saved_tensors
        needs_x, _, needs_b, *_ = ctx.needs_input_grad
        gx = gb = None
        with _plain(grads[0]):
            g = _rows(grads[0])
            wide = torch.promote_types(g.dtype, torch.float32)
            gv = (ctx.c * outer * g).to(ctx.dtype) @ B
            ginner = (gv * h).sum(0, dtype=wide)
            gouter = ctx.c * (g * u).sum(0, dtype=wide)
            if needs_b:
                gb = g.sum(0, dtype=wide)
            if needs_x:
                gx, mask = g @ W, None if seed is None else Mask(ctx.p, seed)
                _back([((gv * inner).to(ctx.dtype), A, 1.0)], None, mask, gx)
                gx = gx.view(ctx.shape).to(ctx.x_dtype)
        return gx, None, gb, None, None, ginner, gouter, None, None


def vera(
    view: View, x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, inner: Tensor, outer: Tensor,
    mask: Mask | None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b + outer ∘ ((inner ∘ ((m ∘ x) Aᵀ)) Bᵀ), m scaled, in the layer's dtype."""
    dtype = compute_dtype(x)
    y: Tensor = _VeRA.apply(  # type: ignore[no-untyped-call]
        x, _weight(view, x, dtype), b, A, B, inner, outer, mask, dtype
    )
    return y
