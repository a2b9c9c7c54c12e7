"""The fast path: one autograd.Function per equation, each beside it.

What autograd would keep of an update is a copy of the input for every cast and every dropout, and
what it would do is add whole activations that a product could have been added into. Here forward
keeps x by reference, h = x Aᵀ (tokens, r), the two thin factors as it multiplied with them, and for
dropout a bit an element; backward makes the rest again. A frozen weight gets no gradient; those of
A and B are summed in float32 whatever the base's dtype is. Under autocast everything is computed in
its dtype, from frozen weights that are cast once and not at every step.

The specification is lora.adapter's; the contract holds values and gradients to it. Where a Function
cannot go the composition of plain operations does the work, knowingly: `possible`. Its first
derivatives are all there are: a second backward is a TrainingError.

    Shapes    x (..., in)   W (out, in) frozen   b (out,)   A (r, in)   B (out, r)   y (..., out)
    m         the dropout mask, 1 where an element stays; c = 1 / (1 − p)
    g         the gradient of y; tokens = the product of x's leading dimensions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from lora.errors import TrainingError
from lora.kernels.dropout import Mask, drop_, dropped
from lora.layers import View, in_pieces

Start = tuple[Tensor, Tensor] | None  # A₀ (r, in), B₀ (out, r), frozen
Factors = tuple[tuple[Tensor, Tensor], ...]  # A (r, in) and s Bᵀ (r, out), by way
Way = tuple[Tensor, Tensor]  # gh (tokens, r), A (r, in)

PART = 256  # tokens
FEW = 2**17  # elements that the cache holds anyway

_off: ContextVar[bool] = ContextVar("_off", default=False)
_casts: Any = WeakIdKeyDictionary()  # a frozen weight -> (what it was cast from, the cast)


@contextmanager
def off() -> Iterator[None]:
    """Compute by plain operations within: for second derivatives, and for comparison."""
    before = _off.set(True)
    try:
        yield
    finally:
        _off.reset(before)


def possible(view: View, x: Tensor) -> bool:
    """Whether a Function can compute the layer, and gives what calling the layer would.

    A subclass of nn.Linear with its own forward is called: FalconLinear rounds its product before
    it adds the bias.
    """
    module = view.module
    called = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return unseen(view.module) and not (
        called
        or torch.compiler.is_compiling()  # the compiler fuses plain operations itself
        or _off.get()
        or view.of_ids  # ids have no gradient, and a table no product
        or x.is_nested
        or view.parameters()[0].requires_grad
        or in_pieces(view.parameters()[0])  # called by itself, and not by the block that joins them
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._are_functorch_transforms_active()  # per-sample gradients, Hessians
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def unseen(module: nn.Module) -> bool:
    """Whether nothing happens at a call of the module but its class's forward."""
    return not (
        module._forward_hooks  # somebody looks at its output
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # replaced, as accelerate does to fetch an offloaded weight
    )


def autocast_on(x: Tensor) -> bool:
    """Whether autocast chooses dtypes for x; on the meta device there is none to ask."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products of x: autocast's where that is on, which leaves float64 alone."""
    if autocast_on(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _stored(view: View, x: Tensor) -> tuple[tuple[Tensor, ...], torch.dtype]:
    """What W is made of, and the dtype of the products of x.

    Under autocast a weight that is not packed is cast to that once, while it stays what it is.
    """
    stored, dtype = view.stored(), compute_dtype(x)
    if autocast_on(x) and not view.packed:
        stored = tuple(part if part.dtype == dtype else _cast(part, dtype) for part in stored)
    return stored, dtype


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, again only where its version or its memory is another.

    What is written through weight.data bears no version: write to the weight itself.
    """
    if weight.is_inference():  # which count no versions
        return weight.to(dtype)
    # The reference to the storage keeps its identity from being given to another.
    memory = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    state = (weight._version, memory, weight.storage_offset(), dtype)
    known = _casts.get(weight)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # an evaluation's cast must serve training too
            known = (state, weight.detach().to(dtype))
        _casts[weight] = known
    cast: Tensor = known[1]
    return cast


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: the dtypes are chosen already."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else nullcontext()


def _rows(x: Tensor) -> Tensor:
    """(tokens, features)"""
    return x.reshape(-1, x.shape[-1])


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (..., out) of (tokens, out). Outside of the Functions, so that y may be written over."""
    return y.view(*x.shape[:-1], y.shape[-1])


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, over all tokens, in float32 at least."""
    if right.dtype == left.dtype == torch.bfloat16 and right.device.type == "cpu":
        # Summed in float32, rounded where it is written: the second product is what that dropped.
        # A copy of right in float32 would cost more than both.
        found = left.t() @ right
        rest = torch.addmm(found, left.t(), right, beta=-1)
        return found.float().add_(rest)
    wide = torch.promote_types(right.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    parts = len(left) // PART
    if parts < 2 or right.numel() < FEW or left.is_cuda:
        return left.t() @ right
    # Two thirds of the time of one product over all of them: a part stays in the cache.
    whole = parts * PART
    found = torch.bmm(
        left[:whole].view(parts, PART, -1).mT, right[:whole].view(parts, PART, -1)
    ).sum(0)
    return found if whole == len(left) else found.addmm_(left[whole:].t(), right[whole:])


def _dropped(rows: Tensor, A: Tensor, mask: Mask | None) -> Tensor:
    """(m ∘ rows) Aᵀ"""
    if mask is None:
        return rows @ A.t()
    h = rows.new_empty(len(rows), len(A))
    for part, keep in mask.blocks(len(rows), rows.dtype):
        torch.mm(dropped(rows[part], keep, rows.dtype), A.t(), out=h[part])
    return h


def _factors(A: Tensor, B: Tensor, s: float, start: Start, dtype: torch.dtype) -> Factors:
    """A and s Bᵀ, A₀ and −s B₀ᵀ: what both forward and backward multiply with.

    The transposed one in memory too: the products with it take half the time.
    """
    found = [(A, B, s), *([] if start is None else [(*start, -s)])]
    return tuple((A.to(dtype), (s * B).to(dtype).t().contiguous()) for A, B, s in found)


def _stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _updated(y: Tensor, ways: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """y (tokens, out) written over with y + h s Bᵀ − h₀ s B₀ᵀ; a way is h (tokens, r), s Bᵀ."""
    (h, up), *start = ways
    if not start:
        return y.addmm_(h, up)
    ((h0, up0),) = start
    # Apart, so that the two are the same bits at the start, and leave y's as they are.
    return y.add_(h @ up + h0 @ up0)


def _back(
    ways: Sequence[Way], rows: Tensor | None, mask: Mask | None, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The first way's gradient of A, ghᵀ (m ∘ rows), where there are rows; and m ∘ Σ gh A (tokens,
    in), which is for g W to be added onto: that costs less than the other way round."""
    (gh, A), *more = ways
    gx = gA = None
    if needs_x:
        gx = gh @ A
        for other, A0 in more:
            gx.addmm_(other, A0)
    if mask is None:
        return None if rows is None else _summed(gh, rows), gx
    for part, keep in mask.blocks(len(gh), gh.dtype):
        if gx is not None:
            drop_(gx[part], keep)
        if rows is not None:
            some = _summed(gh[part], dropped(rows[part], keep, gh.dtype))
            gA = some if gA is None else gA.add_(some)
    return gA, gx


def _save(
    ctx: Any, x: Tensor, dtype: torch.dtype, mask: Mask | None, *groups: Sequence[Tensor | None]
) -> None:
    """Keep what backward needs; tensors by autograd's hands, so that a checkpoint drops them."""
    ctx.dtype, ctx.shape, ctx.x_dtype = dtype, x.shape, x.dtype
    ctx.p, bits = (0.0, None) if mask is None else (mask.p, mask.bits)
    ctx.sizes = [len(group) for group in groups]
    ctx.save_for_backward(bits, *chain.from_iterable(groups))


def _saved(ctx: Any) -> tuple[Mask | None, list[tuple[Any, ...]]]:
    """The mask, and the groups as _save() had them."""
    bits, *rest = ctx.saved_tensors
    found = iter(rest)
    groups = [tuple(islice(found, size)) for size in ctx.sizes]
    return None if bits is None else Mask(ctx.p, bits), groups


def _once() -> None:
    if torch.is_grad_enabled():  # only where backward was asked for its own graph
        raise TrainingError(
            "a fused layer has first derivatives only, found a backward with create_graph=True."
            " Compute forward and backward within lora.kernels.fused.off()."
        )


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, W frozen and unpacked anew for gx = g W"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, view: View, b: Tensor | None, stored: tuple[Tensor, ...],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with without_autocast(x):
            W = view.unpacked(stored, dtype)
            y = F.linear(_rows(x).to(dtype), W, None if b is None else b.to(dtype))
        _save(ctx, x, dtype, None, stored)
        ctx.view = view
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        (g,) = grads
        needs_x, _, needs_b, *_ = ctx.needs_input_grad
        gx = gb = None
        with without_autocast(g):
            if needs_x:
                _, (stored,) = _saved(ctx)
                gx = g @ ctx.view.unpacked(stored, ctx.dtype)
                gx = gx.view(ctx.shape).to(ctx.x_dtype)
            if needs_b:
                gb = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        return gx, None, gb, None, None


def linear(view: View, x: Tensor) -> Tensor:
    """x Wᵀ + b of a packed weight, which backward does not keep."""
    b = view.parameters()[1]
    if not possible(view, x):
        W = view.read()[0]
        return F.linear(x, W if autocast_on(x) else W.to(x.dtype), b)
    y: Tensor = _Linear.apply(x, view, b, *_stored(view, x))  # type: ignore[no-untyped-call]
    return _shaped(y, x)


@dataclass(frozen=True)
class Update:
    """A layer's low-rank update, scaling · (B A − B₀ A₀) onto W; b takes its bias's place."""

    view: View
    b: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    start: Start = None


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + s (m ∘ x) (B A − B₀ A₀)ᵀ of every layer that reads this x, s with c in it

    Their A lie one below the other, so that one product with x is for all; so do their A₀.
    h  = (m ∘ x) Aᵀ                       (tokens, Σ r)
    gA = s (g B)ᵀ (m ∘ x)   gB = s gᵀ h   gb = Σ g
    gx = Σ g W + m ∘ Σ s g (B A − B₀ A₀)  Σ over the layers
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, updates: Sequence[Update], mask: Mask | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output may be of no use to anyone
        stored, dtypes = zip(*(_stored(u.view, x) for u in updates), strict=True)
        c, dtype = 1.0 if mask is None else mask.scale, dtypes[0]
        ctx.layers = [(u.view, c * u.scaling) for u in updates]
        ctx.ranks = [len(u.A) for u in updates]
        with without_autocast(x):
            rows, ys = _rows(x).to(dtype), []
            factors = [_factors(u.A, u.B, c * u.scaling, u.start, dtype) for u in updates]
            downs = [_stacked([A for A, _ in way], 0) for way in zip(*factors, strict=True)]
            hs = [_dropped(rows, A, mask) for A in downs]
            own = zip(*(torch.split(h, ctx.ranks, 1) for h in hs), strict=True)
            ups = [[up for _, up in ways] for ways in factors]
            for u, held, up, h in zip(updates, stored, ups, own, strict=True):
                W, b = u.view.unpacked(held, dtype), None if u.b is None else u.b.to(dtype)
                ys.append(_updated(F.linear(rows, W, b), list(zip(h, up, strict=True))))
        needs_A = any(ctx.needs_input_grad[4::3])  # not under LoRA-FA
        kept = x if needs_A else None
        _save(ctx, x, dtype, mask, (kept, hs[0]), downs, *ups, *stored)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _once()
        mask, ((x, h), downs, *rest) = _saved(ctx)
        ups, stored = rest[: len(grads)], rest[len(grads) :]
        needs_x, _, _, *needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needs)  # of b, A and B, layer by layer
        ghs: list[list[Tensor]] = [[] for _ in downs]
        with without_autocast(h):
            for i, (g, own) in enumerate(zip(grads, torch.split(h, ctx.ranks, 1), strict=True)):
                if g is None:
                    for gh in ghs:
                        gh.append(torch.zeros_like(own))
                    continue
                for gh, up in zip(ghs, ups[i], strict=True):
                    gh.append(g @ up.t())
                if needs[3 * i]:
                    found[3 * i] = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
                if needs[3 * i + 2]:
                    found[3 * i + 2] = ctx.layers[i][1] * _summed(own, g).t().contiguous()
            ways = [(_stacked(gh, 1), A) for gh, A in zip(ghs, downs, strict=True)]
            gA, gx = _back(ways, None if x is None else _rows(x), mask, needs_x)
            for g, (view, _), held in zip(grads, ctx.layers, stored, strict=True):
                if gx is not None and g is not None:
                    gx.addmm_(g, view.unpacked(held, ctx.dtype))
        if gA is not None:
            parts = zip(grads, torch.split(gA, ctx.ranks), strict=True)
            found[1::3] = [None if g is None else part for g, part in parts]
        gx = None if gx is None else gx.view(ctx.shape).to(ctx.x_dtype)
        return gx, None, None, *found


class _Whole(torch.autograd.Function):
    """y = x W'ᵀ + b, W' = W + s (B A − B₀ A₀), of every layer that reads this x, nothing dropped

    Where W' is small beside the tokens: to make it costs less than to add h Bᵀ to their outputs and
    gh A to their gradients.   gx = Σ g W'   gA = s (g B)ᵀ x   gB = s gᵀ (x Aᵀ)   gb = Σ g
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, updates: Sequence[Update], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scalings = [u.scaling for u in updates]
        with without_autocast(x):
            rows, ys, merged = _rows(x), [], []
            for u in updates:
                W, A, B = u.view.unpacked(u.view.stored(), x.dtype), u.A, u.B
                if u.start is None:
                    merged.append(torch.addmm(W, B, A, alpha=u.scaling))
                else:  # apart, so that the two are the same bits at the start
                    A0, B0 = u.start
                    merged.append(torch.add(W, B @ A - B0 @ A0, alpha=u.scaling))
                ys.append(F.linear(rows, merged[-1], None if u.b is None else u.b.to(x.dtype)))
            needs_A, needs_B = any(ctx.needs_input_grad[3::3]), any(ctx.needs_input_grad[4::3])
            # Under LoRA-FA h is kept, which is thin, and no input.
            h = rows @ _stacked([u.A for u in updates], 0).t() if needs_B and not needs_A else None
        factors = [(u.A, u.B) for u in updates]
        _save(ctx, x, x.dtype, None, (x if needs_A else None, h), merged, *factors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _once()
        _, ((x, h), merged, *factors) = _saved(ctx)
        needs_x, _, *needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needs)  # of b, A and B, layer by layer
        gx, rows, ranks = None, None if x is None else _rows(x), [len(A) for A, _ in factors]
        with without_autocast(merged[0]):
            if rows is not None:
                h = rows @ _stacked([A for A, _ in factors], 0).t()
            ghs: list[Tensor] = []
            for i, g in enumerate(grads):
                _, B = factors[i]
                if g is None:
                    ghs.append(B.new_zeros(math.prod(ctx.shape[:-1]), ranks[i]))
                    continue
                ghs.append(g @ B)
                if needs[3 * i]:
                    found[3 * i] = g.sum(0)
                if needs[3 * i + 2]:
                    found[3 * i + 2] = ctx.scalings[i] * _summed(g, torch.split(h, ranks, 1)[i])
                if needs_x:
                    gx = g @ merged[i] if gx is None else gx.addmm_(g, merged[i])
            if rows is not None:
                parts = torch.split(_summed(_stacked(ghs, 1), rows), ranks)
                for i, (g, part) in enumerate(zip(grads, parts, strict=True)):
                    found[3 * i + 1] = None if g is None else ctx.scalings[i] * part
        return None if gx is None else gx.view(ctx.shape), None, *found


SMALL = 6
"""How often what _LowRank adds to outputs has to be what W' has, for W' to be made."""


def _small(x: Tensor, updates: Sequence[Update]) -> bool:
    """Whether W' of every layer is small beside the tokens, and loses nothing by its dtype."""
    dtype, tokens = x.dtype, x.numel() // max(1, x.shape[-1])
    return compute_dtype(x) == dtype and all(
        u.A.dtype == u.B.dtype == dtype != torch.bfloat16 != torch.float16
        and (u.view.packed or u.view.dtype == dtype)
        and SMALL * u.view.in_features * u.view.out_features
        <= tokens * (u.view.in_features + u.view.out_features)
        for u in updates
    )


def low_rank(x: Tensor, updates: Sequence[Update], mask: Mask | None) -> list[Tensor]:
    """x Wᵀ + b + scaling · (m ∘ x) (B A − B₀ A₀)ᵀ of each layer that reads x, m scaled, in the
    layer's dtype. Their starts are given for all or for none."""
    tensors = [tensor for u in updates for tensor in (u.b, u.A, u.B)]
    if mask is None and _small(x, updates):
        ys = _Whole.apply(x, updates, *tensors)  # type: ignore[no-untyped-call]
    else:
        ys = _LowRank.apply(x, updates, mask, *tensors)  # type: ignore[no-untyped-call]
    return [_shaped(y, x) for y in ys]


class _DoRA(torch.autograd.Function):
    """y = x Wᵀ + b + c (f ∘ z − q), q = (m ∘ x) Wᵀ, z = q + s (m ∘ x) (B A − B₀ A₀)ᵀ

    DoRA with dropout. f (out,) = magnitude / length, so that (W' − W) (m ∘ x) takes a second
    product with W.   h = (m ∘ x) Aᵀ
    gz = c f ∘ g   gf = c Σ g ∘ z   gA = s (gz B)ᵀ (m ∘ x)   gB = s gzᵀ h
    gx = g W + m ∘ ((gz − c g) W + s gz (B A − B₀ A₀))
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, view: View, b: Tensor | None, A: Tensor, B: Tensor, s: float,
        start: Start, f: Tensor, mask: Mask, stored: tuple[Tensor, ...], dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with without_autocast(x):
            rows, W = _rows(x).to(dtype), view.unpacked(stored, dtype)
            y = F.linear(rows, W, None if b is None else b.to(dtype))
            kept, factors = mask.keep(rows).mul_(rows), _factors(A, B, s, start, dtype)
            q = F.linear(kept, W)
            hs = [kept @ A.t() for A, _ in factors]
            z = _updated(q.clone(), [(h, up) for h, (_, up) in zip(hs, factors, strict=True)])
            y = (y + mask.scale * (f * z - q)).to(dtype)
        own = x if ctx.needs_input_grad[3] else None
        _save(ctx, x, dtype, mask, (own, hs[0], f, z), stored, *factors)
        ctx.view, ctx.s = view, s
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        (g,), (mask, ((x, h, f, z), stored, *factors)) = grads, _saved(ctx)
        needs_x, _, needs_b, _, needs_B, _, _, needs_f, *_ = ctx.needs_input_grad
        gx = gB = gb = gf = None
        assert mask is not None
        with without_autocast(g):
            W, gz = ctx.view.unpacked(stored, ctx.dtype), (mask.scale * f * g).to(ctx.dtype)
            rows = None if x is None else _rows(x).to(ctx.dtype)
            ways = [(gz @ up.t(), A) for A, up in factors]
            gA, _ = _back(ways, rows, mask, False)
            if needs_x:
                _, dropped = _back(ways, None, None, True)
                assert dropped is not None
                dropped.addmm_(torch.sub(gz, g, alpha=mask.scale), W)
                for part, keep in mask.blocks(len(dropped), dropped.dtype):
                    drop_(dropped[part], keep)
                gx = dropped.addmm_(g, W).view(ctx.shape).to(ctx.x_dtype)
            if needs_B:
                gB = ctx.s * _summed(h, gz).t().contiguous()
            if needs_b:
                gb = g.sum(0, dtype=f.dtype)
            if needs_f:
                gf = mask.scale * (g * z).sum(0, dtype=f.dtype)
        return gx, None, gb, gA, gB, None, None, gf, None, None, None


def dora(
    view: View, x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float, factor: Tensor,
    mask: Mask, start: Start = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b + (factor ∘ (W + scaling · (B A − B₀ A₀)) − W) (m ∘ x), m scaled."""
    y: Tensor = _DoRA.apply(  # type: ignore[no-untyped-call]
        x, view, b, A, B, scaling, start, factor, mask, *_stored(view, x)
    )
    return _shaped(y, x)


class _VeRA(torch.autograd.Function):
    """y = x Wᵀ + b + c u ∘ λ_b, u = (h ∘ λ_d) Bᵀ, h = (m ∘ x) Aᵀ, with A and B frozen

    inner = λ_d (r,), outer = λ_b (out,). r is not thin here: u is kept, and x is not.
    gλ_b = c Σ g ∘ u   gv = (c g ∘ λ_b) B   gλ_d = Σ gv ∘ h   gx = g W + m ∘ ((gv ∘ λ_d) A)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, view: View, b: Tensor | None, A: Tensor, B: Tensor, inner: Tensor,
        outer: Tensor, mask: Mask | None, stored: tuple[Tensor, ...], dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        c = 1.0 if mask is None else mask.scale
        with without_autocast(x):
            rows, W = _rows(x).to(dtype), view.unpacked(stored, dtype)
            y = F.linear(rows, W, None if b is None else b.to(dtype))
            A, B = A.to(dtype), B.to(dtype)
            h = _dropped(rows, A, mask)
            u = F.linear((h * inner).to(dtype), B)
            y = y.addcmul_(u, outer.to(dtype), value=c)
        _save(ctx, x, dtype, mask, (inner, outer, h, u, A, B), stored)
        ctx.view, ctx.c = view, c
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        (g,), (mask, ((inner, outer, h, u, A, B), stored)) = grads, _saved(ctx)
        needs_x, _, needs_b, *_ = ctx.needs_input_grad
        gx = gb = None
        with without_autocast(g):
            wide = torch.promote_types(g.dtype, torch.float32)
            gv = (ctx.c * outer * g).to(ctx.dtype) @ B
            ginner = (gv * h).sum(0, dtype=wide)
            gouter = ctx.c * (g * u).sum(0, dtype=wide)
            if needs_b:
                gb = g.sum(0, dtype=wide)
            _, gx = _back([((gv * inner).to(ctx.dtype), A)], None, mask, needs_x)
            if gx is not None:
                gx.addmm_(g, ctx.view.unpacked(stored, ctx.dtype))
                gx = gx.view(ctx.shape).to(ctx.x_dtype)
        return gx, None, gb, None, None, ginner, gouter, None, None, None


def vera(
    view: View, x: Tensor, b: Tensor | None, A: Tensor, B: Tensor, inner: Tensor, outer: Tensor,
    mask: Mask | None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b + outer ∘ ((inner ∘ ((m ∘ x) Aᵀ)) Bᵀ), m scaled, in the layer's dtype."""
    y: Tensor = _VeRA.apply(x, view, b, A, B, inner, outer, mask, *_stored(view, x))  # type: ignore[no-untyped-call]
    return _shaped(y, x)
