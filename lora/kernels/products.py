"""What the kernels share: when they apply, the dtype of matmuls, and matmuls with A and B.

    Shapes    x (..., in)   W (out, in) frozen   b (out,)   A (r, in)   B (out, r)   y (..., out)
    m         the dropout mask, 1 for an element that stays; c = 1 / (1 − p)
    g         the gradient of y; tokens = the product of x's leading dimensions

Under autocast a kernel computes everything in autocast's dtype. Frozen weights are cast once, not
at every step. Gradients of A and B are summed in float32, whatever the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from lora.errors import ModelError, TrainingError
from lora.kernels import triton
from lora.kernels.dropout import Mask, drop_, dropped
from lora.layers import View, in_pieces, plain_call

Start = tuple[Tensor, Tensor] | None  # A₀ (r, in), B₀ (out, r), frozen
Factors = tuple[tuple[Tensor, Tensor], ...]  # A (r, in) and s Bᵀ (r, out) of each product
Thin = tuple[Tensor, Tensor]  # g B (tokens, r) and A (r, in)

PART = 256  # tokens summed at a time: a part of x and of g stays in the cache
FEW = 2**17  # elements: of fewer, all of x stays in the cache anyway
HALVES = (torch.bfloat16, torch.float16)

# A ContextVar, so that a thread or a task that turns kernels off does not do so for others.
OFF: ContextVar[bool] = ContextVar("OFF", default=False)
_off_anywhere: list[None] = []  # as long as the number of threads and tasks inside off()
# Inside adapters_constant(): the ids of an adapter and a base layer -> the adapter and its kernel;
# and what constant_output() made for a layer. They keep what has an id here alive.
KEPT: ContextVar[dict[tuple[Any, ...], tuple[Any, ...]] | None] = ContextVar("KEPT", default=None)
_AS_IT_IS = nullcontext()
# Weak keys: a cast lives as long as the weight that it was made of.
_casts: Any = WeakIdKeyDictionary()  # a frozen weight -> (what it was cast from, the cast)


@contextmanager
def off() -> Iterator[None]:
    """Inside, every layer computes its specification: for second derivatives, and to compare."""
    before = OFF.set(True)
    _off_anywhere.append(None)  # one operation, which threads cannot interleave
    try:
        yield
    finally:
        _off_anywhere.pop()
        OFF.reset(before)


def off_in_backward(x: Tensor) -> bool:
    """True in a backward that runs inside off().

    The backward of an accelerator runs on a thread of autograd, which has no ContextVar of the
    caller. Activation checkpointing calls layers there again, and they must compute as they did.
    """
    return bool(_off_anywhere) and torch._C._current_graph_task_id() != -1 and has_own_thread(x)


def has_own_thread(x: Tensor) -> bool:
    """True if autograd computes the backward of x on a thread of its own. A backward on the CPU or
    the meta device runs on the caller's thread, which has its ContextVars."""
    return not (x.is_cpu or x.is_meta)


@contextmanager
def adapters_constant() -> Iterator[None]:
    """Inside, nobody may write to an adapter or to a weight below one. Calls without gradients
    then share one kernel an adapter, and what the kernel makes of the weights.

    Versions of tensors cannot replace this promise, since fused optimizers raise none.
    """
    before = KEPT.set({})
    try:
        yield
    finally:
        KEPT.reset(before)


def possible(view: View, x: Tensor) -> bool:
    """True if an autograd Function can compute the layer and give what calling the layer would.

    A subclass of nn.Linear with a forward of its own must be called: FalconLinear rounds its
    product before it adds the bias.
    """
    module, weight = view.module, view.parameters()[0]
    overridden = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return plain_call(module) and not (
        overridden
        or torch.compiler.is_compiling()  # the compiler fuses torch operations itself
        or OFF.get()
        or off_in_backward(x)
        or view.of_ids  # ids have no gradient, and a table no product
        or x.is_nested  # has no (tokens, in) view
        or weight.requires_grad  # the kernels give a frozen weight no gradient
        or in_pieces(weight)  # the layer is called on its own, outside the block that gathers it
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._are_functorch_transforms_active()  # per-sample gradients, Hessians
        or torch.autograd.forward_ad._current_level >= 0  # they have no forward-mode derivative
        or torch._C._get_tracing_state() is not None  # torch.jit.trace records torch operations
    )


def check_loaded(adapters: Sequence[Any], view: View, x: Tensor) -> None:
    """Raise ModelError if a tensor of the adapters, or W if they read it, has no values.

    accelerate keeps offloaded weights on the meta device, and brings back those of a module while
    it is called. An adapter is part of a layer and is never called.
    """
    read = [tensor for adapter in adapters for tensor in adapter.parameters()]
    if not all(adapter.additive for adapter in adapters):
        read.append(view.parameters()[0])
    if not x.is_meta and any(tensor.is_meta for tensor in read):
        name = adapters[0].module_name
        raise ModelError(
            f"{name}: accelerate has offloaded the layer, so its adapter cannot read its weights."
            " Load the base without offloading, or merge the adapter first: lora.merge, lora.eject."
        )


def autocast_on(x: Tensor) -> bool:
    """True if autocast chooses the dtypes for x; the meta device has no autocast."""
    # The first question answers most calls: to make the name of a device takes a microsecond.
    any_device = torch._C._is_any_autocast_enabled()
    return any_device and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's if it is on, which leaves float64 alone."""
    if autocast_on(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def stored_weight(view: View, x: Tensor) -> tuple[tuple[Tensor, ...], torch.dtype]:
    """The tensors that W is made of, and the dtype of matmuls with x.

    Under autocast a weight that is not packed is cast once, and again only after it was written to.
    """
    stored = view.stored()
    if not autocast_on(x):
        return stored, x.dtype
    dtype = compute_dtype(x)
    if not view.packed:
        stored = tuple(part if part.dtype == dtype else _cast(part, dtype) for part in stored)
    return stored, dtype


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, from the cache unless its version or its memory changed.

    A write through weight.data changes no version: write to the weight itself.
    """
    if weight.is_inference():  # inference tensors count no versions
        return weight.to(dtype)
    # Holding the storage keeps its address from being given to another one.
    memory = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    # load_state_dict and copy_() raise the version. Fused optimizers do not: the weight is frozen.
    state = (weight._version, memory, weight.storage_offset(), dtype)
    known = _casts.get(weight)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # a cast made in evaluation must serve training too
            known = (state, weight.detach().to(dtype))
        _casts[weight] = known
    cast: Tensor = known[1]
    return cast


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off inside: the kernel has chosen the dtypes already."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _AS_IT_IS


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes microseconds even if there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as (tokens, features) in `dtype`."""
    return cast(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), dtype)


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (tokens, out) as (..., out). Outside of the Functions, so that y may be overwritten."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def summed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, summed over all tokens in float32 at least."""
    if right.dtype == left.dtype == torch.bfloat16 and right.device.type == "cpu":
        # The product is summed in float32 and rounded when it is written; the second product gives
        # what the rounding lost. Copies in float32 would cost more than both.
        product = left.t() @ right
        lost = torch.addmm(product, left.t(), right, beta=-1)
        return product.float().add_(lost)
    if right.dtype == left.dtype in HALVES and right.device.type == "cuda":
        # cuBLAS sums 16-bit factors in float32 and writes the sum without rounding it.
        exact: Tensor = torch.mm(left.t(), right, out_dtype=torch.float32)
        return exact
    wide = torch.promote_types(right.dtype, torch.float32)
    left, right = cast(left, wide), cast(right, wide)
    parts = len(left) // PART
    if parts < 2 or right.numel() < FEW or left.device.type != "cpu":
        return left.t() @ right
    # In parts that stay in the cache this takes two thirds of the time of one product.
    whole = parts * PART
    product = torch.bmm(
        left[:whole].view(parts, PART, -1).mT, right[:whole].view(parts, PART, -1)
    ).sum(0)
    return product if whole == len(left) else product.addmm_(left[whole:].t(), right[whole:])


def dropped_product(rows: Tensor, A: Tensor, mask: Mask | None) -> Tensor:
    """(m ∘ rows) Aᵀ"""
    if mask is None:
        return F.linear(rows, A)
    if triton.usable(rows.device) and triton.thin(len(A), rows, A):
        from lora.kernels.triton import dropout  # loads Triton

        return dropout.mask_product(rows, A, mask.bits)
    # In parts, so that the dropped copy of x stays in the cache and is never whole in memory.
    h = rows.new_empty(len(rows), len(A))
    for part, keep in mask.blocks(len(rows), rows.dtype):
        torch.mm(dropped(rows[part], keep, rows.dtype), A.t(), out=h[part])
    return h


def factor_pairs(A: Tensor, B: Tensor, s: float, start: Start, dtype: torch.dtype) -> Factors:
    """A and s Bᵀ, then A₀ and −s B₀ᵀ if B₀ A₀ is subtracted: the factors of forward and backward.

    Bᵀ is made contiguous: matmuls with it then take half the time. On a GPU rows of zeros may
    follow the r rows; the gradients of A and Bᵀ then have as many rows too many.
    """
    pair = _factor_pair(A, B, s, dtype)
    return (pair,) if start is None else (pair, _factor_pair(*start, -s, dtype))


def _factor_pair(A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Scaled, cast and transposed in one pass over B.
    left, right = cast(A, dtype), torch.mul(B.t(), s, out=B.new_empty(B.shape[::-1], dtype=dtype))
    if extra := _rows_to_add(A, dtype):
        left, right = (F.pad(factor, (0, 0, 0, extra)) for factor in (left, right))
    return left, right


def _rows_to_add(A: Tensor, dtype: torch.dtype) -> int:
    """How many rows of zeros A (r, in) gets in matmuls.

    cuBLAS's kernels for 16 bits read 16 bytes at a time. With a rank that is no multiple of 8 it
    takes others, which take two to three times as long (benchmarks/results/gpu/second.json).
    """
    return -len(A) % 8 if A.is_cuda and dtype in HALVES else 0


def updated(y: Tensor | None, hs: Sequence[Tensor], factors: Factors) -> Tensor:
    """y + h s Bᵀ − h₀ s B₀ᵀ, (tokens, out): y is (tokens, out) or (out,), None for 0;
    h = (m ∘ x) Aᵀ (tokens, r)."""
    if len(hs) == 1:
        return hs[0] @ factors[0][1] if y is None else torch.addmm(y, hs[0], factors[0][1])
    # Without y first, so that at the start the two cancel to the last bit.
    update = (hs[0] @ factors[0][1]).add_(hs[1] @ factors[1][1])
    return update if y is None else update.add_(y)


def thin_gradients(
    thin: Sequence[Thin], rows: Tensor | None, mask: Mask | None, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of A, (g B)ᵀ (m ∘ rows), and the update's part of gx, m ∘ Σ (g B) A.

    The first is None without rows, the second without needs_x. The caller adds g W onto gx: that
    costs less than adding this onto g W.
    """
    (gh, A), *more = thin
    rank = sum(len(A) for _, A in thin)
    if mask is not None and triton.usable(gh.device) and triton.thin(rank, gh, rows):
        return _thin_gradients_on_gpu(thin, rows, mask, needs_x)
    gA, gx = None, gh @ A if needs_x else None
    if gx is not None:
        for gh0, A0 in more:
            gx.addmm_(gh0, A0)
    if mask is None:
        return None if rows is None else summed(gh, rows), gx
    # The mask is unpacked once for both gradients.
    for part, keep in mask.blocks(len(gh), gh.dtype):
        if gx is not None:
            drop_(gx[part], keep)
        if rows is not None:
            product = summed(gh[part], dropped(rows[part], keep, gh.dtype))
            gA = product if gA is None else gA.add_(product)
    return gA, gx


def _thin_gradients_on_gpu(
    thin: Sequence[Thin], rows: Tensor | None, mask: Mask, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same by Triton kernels, which read the mask's bits."""
    from lora.kernels.triton import dropout  # loads Triton

    (gh, A), *more = thin
    gA = None if rows is None else dropout.grad_of_factor(gh, rows, mask.bits)
    if more:  # the sum of two products is one of twice the rank
        gh, A = (torch.cat(parts, dim) for parts, dim in zip(zip(*thin), (1, 0), strict=True))
    return gA, dropout.grad_of_input(gh, A, mask.bits) if needs_x else None


def save_for_backward(
    ctx: Any, x: Tensor, dtype: torch.dtype, mask: Mask | None, *groups: Sequence[Tensor | None]
) -> None:
    """Save for backward: tensors in groups, the mask's bits, and what casts gx back."""
    ctx.dtype, ctx.shape, ctx.x_dtype, ctx.sizes = dtype, x.shape, x.dtype, [*map(len, groups)]
    # By save_for_backward and not as attributes: activation checkpointing drops what it saves.
    ctx.p, bits = (0.0, None) if mask is None else (mask.p, mask.bits)
    ctx.save_for_backward(bits, *chain.from_iterable(groups))


def saved(ctx: Any) -> tuple[Mask | None, list[tuple[Any, ...]]]:
    """The mask and the groups that save() was given. Raises TrainingError in a second backward."""
    if torch.is_grad_enabled():  # True only if backward was asked for its own graph
        raise TrainingError(
            "a kernel has first derivatives only, found a backward with create_graph=True."
            " Compute forward and backward inside lora.kernels.off()."
        )
    bits, *rest = ctx.saved_tensors
    tensors = iter(rest)
    groups = [tuple(islice(tensors, size)) for size in ctx.sizes]
    return None if bits is None else Mask(ctx.p, bits), groups
