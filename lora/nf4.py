"""NF4: weights in four bits, and a linear layer that holds nothing else.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3. A weight is cut into blocks of 64 values.
Each block is scaled by its largest magnitude, absmax, into [-1, 1], where every value becomes the
number of the nearest of 16 levels. The levels are quantiles of a normal distribution, as trained
weights nearly are, so that each is used about equally often; 0, -1 and 1 are among them, exactly.

    codes   c_i = the level nearest to w_i / absmax           4 bits a value
    absmax  a   = max |w_i| of the block                      32 bits a block   -> 4.5 bits a value
    value   w_i ≈ LEVELS[c_i] a

Double quantisation stores absmax in 8 bits: its mean is subtracted, and what is left is scaled in
blocks of 256 and given the nearest of 256 levels, dense near 0. 4 + 8/64 + 32/(64·256) = 4.127.

Layout. Two codes share a byte, the first of them in its high four bits; blocks run along the
flattened weight (out, in), whose last block may be short.

How it differs from bitsandbytes, which made the format: codes, absmax and values are equal bit for
bit, and what it saved is read as it is, without it (from_bitsandbytes). The exception is a block
whose absmax is below 1e-38, which it may flush to 0. There is no CUDA kernel and no C here: a byte
is two codes, so that one look-up in a table of 256 pairs gives two values, and the scale is
multiplied onto them. NaN and infinity are refused by name.

The trade-off: a seventh of float32's memory, for a rounding of about a tenth of the values' spread
and the time to unpack the weight at every product. `NF4Linear` unpacks it into a buffer that all
layers share and keeps none of it for backward.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import layers
from lora.errors import ConfigError, ModelError
from lora.kernels.linear import linear
from lora.kernels.scratch import scratch
from lora.layers import View

# Dettmers et al. 2023, appendix E: quantiles of N(0, 1), scaled to [-1, 1].
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
NESTED = 256  # values of absmax in a block of double quantisation
CHUNK = 2**20  # values unpacked or packed at a time on a processor, whose cache holds them

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = "weight.quant_state.bitsandbytes__nf4"  # of bitsandbytes' files: what is no tensor, in JSON


@dataclass(frozen=True)
class NF4:
    """A tensor in NF4."""

    codes: Tensor  # (⌈values / 2⌉,) uint8, two to a byte, the first in its high bits
    absmax: Tensor  # (blocks,) float32; uint8 under double quantisation
    shape: tuple[int, ...]
    dtype: torch.dtype  # of what was quantised
    block_size: int = 64
    nested_absmax: Tensor | None = None  # (⌈blocks / 256⌉,) float32
    offset: Tensor | None = None  # () float32, the mean of absmax

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """absmax (blocks,) float32"""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        found = dynamic_map(self.absmax.device)[self.absmax.int()]
        found = F.pad(found, (0, -len(found) % NESTED)).view(-1, NESTED)
        found = (found * self.nested_absmax[:, None]).flatten()[: len(self.absmax)]
        return found + self.offset


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = False, name: str = "") -> NF4:
    """w (...), float32, bfloat16 or float16, in NF4.

    Raises ConfigError for a block size that is no even number, ModelError for another dtype and for
    values that are not finite; `name` is what the message calls w.
    """
    if block_size < 2 or block_size % 2:
        raise ConfigError(f"block_size must be an even number, found {block_size}. Set 64.")
    called = name or "the tensor"
    if w.dtype not in DTYPES:
        raise ModelError(f"{called} is {w.dtype}; NF4 takes float32, bfloat16 and float16.")
    flat = w.detach().reshape(-1)
    count = flat.numel()
    whole = count - count % block_size
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=w.device)
    step = _chunk(block_size, w.device)
    for start in range(0, whole, step):
        some = flat[start : min(start + step, whole)].float().view(-1, block_size)
        largest = some.abs().amax(1)
        # The reciprocal, and a quotient for the tail: as bitsandbytes rounds.
        scaled = some * (1.0 / largest.clamp(min=1e-38))[:, None]
        absmax[start // block_size :][: len(largest)] = largest
        codes[start // 2 :][: scaled.numel() // 2] = _packed_codes(scaled.flatten())
    if whole < count:
        tail = flat[whole:].float()
        largest = tail.abs().amax().clamp(min=1e-38)
        absmax[-1] = largest
        scaled = F.pad(tail / largest, (0, len(tail) % 2))
        codes[whole // 2 :] = _packed_codes(scaled)
    if not bool(absmax.isfinite().all()):
        raise ModelError(f"{called} holds NaN or infinity, which NF4 has no level for.")
    found = NF4(codes, absmax, tuple(w.shape), w.dtype, block_size)
    return _doubly(found) if double_quant and count else found


def _packed_codes(scaled: Tensor) -> Tensor:
    """Bytes (n / 2,) of values (n,) in [-1, 1].

    A code is how many midpoints lie below the value. All fifteen comparisons cost less than a
    search (torch.bucketize), which no processor does on several values at once.
    """
    found = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    above = scratch("above", scaled.shape, torch.bool, scaled.device)
    for bound in midpoints().tolist():
        found += torch.gt(scaled, bound, out=above)
    return found[::2].bitwise_left_shift_(4).bitwise_or_(found[1::2])


def _doubly(q: NF4) -> NF4:
    """absmax in 8 bits."""
    offset = q.absmax.mean()
    centred = q.absmax - offset
    padded = F.pad(centred, (0, -len(centred) % NESTED)).view(-1, NESTED)
    largest = padded.abs().amax(1)
    scaled = padded * (1.0 / largest.clamp(min=1e-38))[:, None]
    # To 16 bits first, as bitsandbytes does.
    scaled = ((scaled + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    levels = dynamic_map(scaled.device)
    below = (torch.searchsorted(levels, scaled, right=True) - 1).clamp_(0, 254)
    nearer = (scaled - levels[below + 1]).abs() < (scaled - levels[below]).abs()
    found = torch.where(largest[:, None] > 0, below + nearer, 0)
    codes = found.to(torch.uint8).flatten()[: len(centred)]
    return replace(q, absmax=codes, nested_absmax=largest, offset=offset)


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "") -> NF4:
    """Returns a layer's weight as bitsandbytes saves it in NF4, bit for bit; copies no tensor.

    The keys are those of its files without the layer's name: weight (⌈values / 2⌉, 1) uint8, or the
    same bytes in the dtype of its quant_storage; weight.absmax (blocks,) float32; weight.quant_map
    (16,) float32; STATE, JSON as uint8. If weight.absmax is quantized too, it is uint8, and there
    are weight.nested_absmax (⌈blocks / 256⌉,) and weight.nested_quant_map (256,), float32.

    Raises ModelError for anything else: FP4, 8 bits, other levels or blocks, tensors that are
    missing, too many or of another shape; `name` is what the message calls the weight.
    """

    def refused(found: str) -> ModelError:
        return ModelError(
            f"{name or 'the weight'} is not in NF4 as bitsandbytes saves it: {found}. Pass the"
            " weights as they were before, with --quantize nf4 (in Python, lora.nf4.quantize)."
        )

    state = _bitsandbytes_state(tensors, refused)
    dtype = _check_bitsandbytes_state(state, refused)
    block_size, shape = state["blocksize"], tuple(state["shape"])
    _check_bitsandbytes_tensors(tensors, block_size, math.prod(shape), refused)
    weight, nested, mean = tensors["weight"], tensors.get("weight.nested_absmax"), None
    if nested is not None:
        offset = state["nested_offset"]
        mean = torch.tensor(offset, dtype=torch.float32, device=weight.device)
    codes = weight.view(torch.uint8).flatten()
    q = NF4(codes, tensors["weight.absmax"], shape, dtype, block_size, nested, mean)
    if not bool(q.scales().isfinite().all()):
        raise refused("its absmax holds NaN or infinity")
    return q


Refused = Callable[[str], ModelError]
"""The error that says why bitsandbytes' files of a weight cannot be read."""


def _bitsandbytes_state(tensors: Mapping[str, Tensor], refused: Refused) -> dict[str, Any]:
    """Returns the JSON among the tensors, which has the fields that we know, as the tensors do."""
    if STATE not in tensors:
        raise refused(f"no {STATE}, found {', '.join(sorted(tensors))}")
    try:
        state = json.loads(bytes(tensors[STATE].flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise refused(f"{STATE} is no JSON object")
    keys = {"weight", "weight.absmax", "weight.quant_map", STATE}
    fields = {"quant_type", "blocksize", "dtype", "shape"}
    if "weight.nested_absmax" in tensors:
        keys |= {"weight.nested_absmax", "weight.nested_quant_map"}
        fields |= {"nested_blocksize", "nested_dtype", "nested_offset"}
    odd = [*sorted(keys ^ tensors.keys()), *sorted(fields ^ state.keys())]
    if odd:
        raise refused(f"{odd[0]} is {'missing' if odd[0] in keys | fields else 'one too many'}")
    return state


def _check_bitsandbytes_state(state: Mapping[str, Any], refused: Refused) -> torch.dtype:
    """Raise `refused` unless the fields say NF4. Returns the dtype."""
    block_size, shape, offset = state["blocksize"], state["shape"], state.get("nested_offset", 0.0)
    dtype = next((one for one in DTYPES if str(one) == f"torch.{state['dtype']}"), None)
    whole = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    even = type(block_size) is int and block_size >= 2 and block_size % 2 == 0
    for field, good, wanted in (
        ("quant_type", state["quant_type"] == "nf4", "nf4"),
        ("blocksize", even, "an even number"),
        ("dtype", dtype is not None, "float32, bfloat16 or float16"),
        ("shape", whole, "whole numbers from 1"),
        ("nested_blocksize", state.get("nested_blocksize", NESTED) == NESTED, str(NESTED)),
        ("nested_dtype", state.get("nested_dtype", "float32") == "float32", "float32"),
        ("nested_offset", type(offset) is float, "a number with a point"),
    ):
        if not good:
            raise refused(f"{field} must be {wanted}, found {state[field]!r:.60}")
    assert dtype is not None
    return dtype


def _check_bitsandbytes_tensors(
    tensors: Mapping[str, Tensor], block_size: int, count: int, refused: Refused
) -> None:
    """Raise `refused` unless `count` values are there, in the right shapes and by NF4's levels."""
    weight, blocks = tensors["weight"], -(-count // block_size)
    double = "weight.nested_absmax" in tensors
    sizes = {
        "weight": (weight.dtype, -(-count // (2 * weight.element_size())), 1),
        "weight.absmax": (torch.uint8 if double else torch.float32, blocks),
        "weight.quant_map": (torch.float32, len(LEVELS)),
        "weight.nested_absmax": (torch.float32, -(-blocks // NESTED)),
        "weight.nested_quant_map": (torch.float32, 256),
    }
    for key in sorted(tensors.keys() - {STATE}):
        found = (tensors[key].dtype, *tensors[key].shape)
        if found != sizes[key]:
            raise refused(f"{key} must be {sizes[key]}, found {found}")
    cpu = torch.device("cpu")
    levels = {"weight.quant_map": _levels(), "weight.nested_quant_map": dynamic_map(cpu)}
    for key in sorted(tensors.keys() & levels.keys()):
        if not torch.equal(tensors[key].to(cpu), levels[key]):
            raise refused(f"{key} holds other levels")


def dequantize(q: NF4, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The tensor (shape) in `dtype`, q's own by default; written into `out` where that is given."""
    dtype = q.dtype if dtype is None else dtype
    count = math.prod(q.shape)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or q.codes.is_meta:
        found = reference(q).to(dtype)
        return found if out is None else out.copy_(found)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    flat, device = out.view(-1), q.codes.device
    scales, table = q.scales(), pairs(device)
    whole = count - count % q.block_size
    step = min(_chunk(q.block_size, device), whole)
    # Two float32 values are written as one number of 64 bits, into `out` itself where that can be.
    straight = dtype == torch.float32 and flat.storage_offset() % 2 == 0
    for start in range(0, whole, step or 1):
        end = min(start + step, whole)
        some = flat[start:end].view(-1, q.block_size)
        found = some if straight else scratch("levels", some.shape, torch.float32, device)
        # gather, whose rows the threads divide among them; index_select is one thread's.
        rows = math.gcd(len(some), 64)
        codes = scratch("codes", (rows, (end - start) // 2 // rows), torch.int64, device)
        codes.copy_(q.codes[start // 2 : end // 2].view(codes.shape))
        pair = found.view(-1).view(torch.int64).view(codes.shape)
        torch.gather(table.expand(rows, -1), 1, codes, out=pair)
        torch.mul(found, scales[start // q.block_size : end // q.block_size, None], out=some)
    if whole < count:
        tail = table.index_select(0, q.codes[whole // 2 :].int()).view(torch.float32)
        flat[whole:] = tail[: count - whole] * scales[-1]
    return out


def reference(q: NF4) -> Tensor:
    """The equation: LEVELS[codes] · absmax of the block, (shape) in float32."""
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=1).flatten().int()
    scales = q.scales().repeat_interleave(q.block_size)
    count = math.prod(q.shape)
    levels = _levels().to(codes.device)
    return (levels[codes[:count]] * scales[:count]).view(q.shape)


def _chunk(block_size: int, device: torch.device) -> int:
    """How many values to take at a time: a multiple of the block."""
    return max(1, (CHUNK if device.type == "cpu" else 2**26) // block_size) * block_size


def _levels() -> Tensor:
    """(16,) float32, whatever torch's defaults are."""
    return torch.tensor(LEVELS, dtype=torch.float32, device="cpu")


@functools.cache
def pairs(device: torch.device) -> Tensor:
    """(256,) int64: the two float32 levels of each byte, one after the other in memory."""
    codes, levels = torch.arange(256, device="cpu"), _levels()
    two = torch.stack([levels[codes >> 4], levels[codes & 15]], dim=1)
    return two.view(torch.int64).flatten().to(device)


@functools.cache
def midpoints() -> Tensor:
    """(15,) float32: where the nearest level changes."""
    return (_levels()[:-1] + _levels()[1:]) / 2


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) float32 levels from -1 to 1 for 8 bits: seven decades of magnitude, each of twice as
    many steps as the one below.  Dettmers 2015, arXiv:1511.04561, figure 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = (10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device="cpu").to(device)


def parameters_of(q: NF4) -> dict[str, nn.Parameter]:
    """What an NF4Linear holds, by its names."""
    found = {
        "weight": q.codes,
        "absmax": q.absmax,
        "nested_absmax": q.nested_absmax,
        "offset": q.offset,
    }
    return {
        name: nn.Parameter(tensor, requires_grad=False)
        for name, tensor in found.items()
        if tensor is not None
    }


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with W (out, in) frozen in NF4.

    x (..., in) -> y (..., out) in x's dtype, or autocast's.
    weight (⌈out·in / 2⌉,) uint8, absmax, nested_absmax, offset: as in NF4, parameters that never
    train, so that a state dict, a move and a sharding take them along. bias (out,) or None in
    `dtype`, that of the layer whose place this takes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.block_size = dtype, block_size
        self.nested_absmax: nn.Parameter | None
        self.offset: nn.Parameter | None
        self.bias: nn.Parameter | None
        count = in_features * out_features
        blocks = -(-count // block_size)

        def frozen(dtype: torch.dtype, *shape: int) -> nn.Parameter:
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            return nn.Parameter(zeros, requires_grad=False)

        self.weight = frozen(torch.uint8, -(-count // 2))
        self.absmax = frozen(torch.uint8 if double_quant else torch.float32, blocks)
        nested = frozen(torch.float32, -(-blocks // NESTED)) if double_quant else None
        self.register_parameter("nested_absmax", nested)
        self.register_parameter("offset", frozen(torch.float32) if double_quant else None)
        self.register_parameter("bias", frozen(dtype, out_features) if bias else None)

    @classmethod
    def like(cls, layer: nn.Module, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """One without values, on the meta device, for the place of an nn.Linear or HF Conv1D."""
        (view,) = layers.views(layer)
        _, bias = view.parameters()
        shape = (view.in_features, view.out_features)
        found = cls(*shape, bias is not None, view.dtype, block_size, double_quant, "meta")
        return found.train(layer.training)

    @classmethod
    def of(
        cls, layer: nn.Module, block_size: int = 64, double_quant: bool = True, name: str = ""
    ) -> NF4Linear:
        """An nn.Linear or HF Conv1D quantised; its bias is taken, not copied."""
        W, _ = layers.views(layer)[0].read()
        return cls.over(layer, quantize(W, block_size, double_quant, name))

    @classmethod
    def over(cls, layer: nn.Module, q: NF4) -> NF4Linear:
        """One for the layer's place that holds q, of W's shape; the bias is taken, not copied."""
        (view,) = layers.views(layer)
        found = cls.like(layer, q.block_size, q.double_quant)
        found.hold(q)
        found.register_parameter("bias", view.parameters()[1])
        return found

    def hold(self, q: NF4) -> None:
        """Take a weight that is quantised already, as this layer's settings say."""
        for name, parameter in parameters_of(q).items():
            setattr(self, name, parameter)

    def quantized(self) -> NF4:
        """W as it is held."""
        held = self.weight, self.absmax, self.nested_absmax, self.offset
        return self._of(*map(layers.gathered, held))

    def _of(self, *tensors: Tensor | None) -> NF4:
        codes, absmax, nested_absmax, offset = tensors
        assert codes is not None
        assert absmax is not None
        shape = (self.out_features, self.in_features)
        return NF4(codes, absmax, shape, self.dtype, self.block_size, nested_absmax, offset)

    def dense(self) -> nn.Linear:
        """An nn.Linear with the dequantised weight, in this layer's dtype."""
        device = self.weight.device
        found = nn.Linear(self.in_features, self.out_features, False, device, self.dtype)
        found.weight = nn.Parameter(dequantize(self.quantized()), requires_grad=False)
        found.register_parameter("bias", self.bias)
        return found.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # What a cast casts is the layer's dtype and its bias: statistics in 16 bits are others.
        before = {name: getattr(self, name) for name in ("absmax", "nested_absmax", "offset")}
        tensors = {name: p.data for name, p in before.items() if p is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in tensors.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                now.data = tensor.to(now.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        (view,) = layers.views(self)
        return linear(view, x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, block_size={self.block_size},"
            f" double_quant={self.nested_absmax is not None}"
        )


def quantize_layers(
    model: nn.Module,
    names: Sequence[str],
    block_size: int = 64,
    double_quant: bool = True,
) -> None:
    """Put an NF4Linear in the place of each named layer, wherever else it is reached from too."""
    fresh: dict[int, NF4Linear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if id(layer) not in fresh:
            fresh[id(layer)] = NF4Linear.of(layer, block_size, double_quant, name)
    put(model, fresh)


def dequantize_layers(model: nn.Module) -> int:
    """Put an nn.Linear with the dequantised weight in the place of every NF4Linear; how many.

    Adapters stay on their layers, and can be merged then: into the dequantised base, which is not
    the one that was quantised.
    """
    fresh = {id(m): m.dense() for m in model.modules() if isinstance(m, NF4Linear)}
    put(model, fresh)
    return len(fresh)


def put(model: nn.Module, fresh: Mapping[int, nn.Module]) -> None:
    """Put each module in the place of the one whose id it is under, wherever that is reached."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in fresh:
                parent._modules[name] = fresh[id(child)]


class NF4View(View):
    """The face of an NF4Linear: W is unpacked where it is asked for."""

    module: NF4Linear
    packed = True

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def read(self) -> tuple[Tensor, Tensor | None]:
        return dequantize(self.module.quantized()), layers.gathered(self.parameters()[1])

    def stored(self) -> tuple[Tensor, ...]:
        held = self.module
        found = (held.weight, held.absmax, held.nested_absmax, held.offset)
        return tuple(tensor for tensor in found if tensor is not None)

    def unpacked(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        q = self.module._of(*stored, *[None] * (4 - len(stored)))
        return dequantize(q, dtype, scratch("weight", q.shape, dtype, q.codes.device))


layers.VIEWS[NF4Linear] = NF4View
