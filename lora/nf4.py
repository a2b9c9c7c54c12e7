"""NF4 stores a weight in four bits per value; NF4Linear is a linear layer with such a weight.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3. A weight is cut into blocks of 64 values.
Each block is divided by its largest magnitude, absmax, which scales it into [-1, 1]. Each value is
then replaced by the index of the nearest of 16 levels. Trained weights are close to normally
distributed, and the levels are quantiles of a normal distribution, so that each level is used about
equally often. 0, -1 and 1 are exact levels.

    codes   c_i = the level nearest to w_i / absmax     4 bits per value
    absmax  a   = max |w_i| of the block                32 bits per block   -> 4.5 bits per value
    value   w_i ≈ LEVELS[c_i] a

Double quantization stores absmax itself in 8 bits: subtract its mean, scale blocks of 256 of the
differences, and round them to the nearest of 256 levels, which are dense near 0. That makes
4 + 8/64 + 32/(64·256) = 4.127 bits per value.

Layout. Two codes share a byte, the first in the high four bits. Blocks run along the flattened
weight (out, in). The last block may be short.

bitsandbytes made the format. Codes, absmax and values are bit-equal to those it computes, and
from_bitsandbytes reads weights that it saved, without having it installed. One exception:
bitsandbytes may flush a block whose absmax is below 1e-38 to 0. A byte is two codes, so one look-up
in a table of 256 pairs gives two levels, which are then multiplied by absmax. On an NVIDIA GPU with
Triton, lora.kernels.triton.nf4 does this in one pass, with the same bits.

The trade-off: a seventh of float32's memory, for a rounding error of about a tenth of the values'
standard deviation, and the time to unpack the weight for every matmul. `NF4Linear` unpacks it into
a buffer that all layers share, and saves no unpacked copy for backward.
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
from lora.kernels import triton
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
NESTED = 256  # absmax values in a block of double quantization
CHUNK = 2**20  # values packed or unpacked at a time on a CPU, so that they fit its cache
GPU_CHUNK = 2**26  # the same on a GPU, where only the temporary memory limits it
SMALLEST = 1e-38  # a divisor below it would have an infinite reciprocal in float32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = "weight.quant_state.bitsandbytes__nf4"  # bitsandbytes' key for its JSON metadata


@dataclass(slots=True, eq=False)
class NF4:
    """A tensor in NF4. dequantize() gives its values."""

    codes: Tensor  # (⌈values / 2⌉,) uint8, two to a byte, the first in its high bits
    absmax: Tensor  # (blocks,) float32; uint8 under double quantization
    shape: tuple[int, ...]  # of the tensor before quantization
    dtype: torch.dtype  # of the tensor before quantization
    block_size: int = 64
    nested_absmax: Tensor | None = None  # (⌈blocks / 256⌉,) float32
    offset: Tensor | None = None  # () float32, the mean of absmax

    @property
    def double_quant(self) -> bool:
        """True if absmax is stored in 8 bits."""
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """The absmax of each block, (blocks,) float32, dequantized if it is stored in 8 bits."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        scales = dynamic_map(self.absmax.device).index_select(0, self.absmax.int())
        scales = F.pad(scales, (0, -len(scales) % NESTED)).view(-1, NESTED)
        scales = (scales * self.nested_absmax[:, None]).view(-1)[: len(self.absmax)]
        return scales + self.offset


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = False, name: str = "") -> NF4:
    """Returns w (...), in float32, bfloat16 or float16, as NF4 on the same device.

    Raises ConfigError unless block_size is even, and ModelError if w has another dtype or holds NaN
    or infinity. Messages call w `name`.
    """
    if block_size < 2 or block_size % 2:
        raise ConfigError(f"block_size must be an even number, found {block_size}. Set 64.")
    label = name or "the tensor"
    if w.dtype not in DTYPES:
        raise ModelError(f"{label} is {w.dtype}; NF4 takes float32, bfloat16 and float16.")
    flat = w.detach().reshape(-1)
    count = flat.numel()
    whole = count - count % block_size
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=w.device)
    step = _chunk(block_size, w.device)
    for start in range(0, whole, step):
        blocks = flat[start : min(start + step, whole)].float().view(-1, block_size)
        largest = blocks.abs().amax(1)
        # bitsandbytes multiplies whole blocks by the reciprocal and divides the short last block.
        # The two round differently, and the codes have to be the same bits.
        scaled = blocks * (1.0 / largest.clamp(min=SMALLEST))[:, None]
        absmax[start // block_size :][: len(largest)] = largest
        codes[start // 2 :][: scaled.numel() // 2] = _packed_codes(scaled.flatten())
    if whole < count:
        tail = flat[whole:].float()
        largest = tail.abs().amax().clamp(min=SMALLEST)
        absmax[-1] = largest
        scaled = F.pad(tail / largest, (0, len(tail) % 2))  # an odd count leaves half a byte
        codes[whole // 2 :] = _packed_codes(scaled)
    # NaN and infinity survive abs() and amax(), so absmax shows them without another pass over w.
    if not bool(absmax.isfinite().all()):
        raise ModelError(f"{label} holds NaN or infinity, which NF4 cannot store.")
    q = NF4(codes, absmax, tuple(w.shape), w.dtype, block_size)
    return _double_quantized(q, label) if double_quant and count else q


def _packed_codes(scaled: Tensor) -> Tensor:
    """Returns the codes of values (n,) in [-1, 1], two to a byte: (n / 2,) uint8."""
    # The code of a value is the number of midpoints below it. Fifteen vectorized comparisons cost
    # less than a binary search (torch.bucketize), which CPUs do one value at a time.
    codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    above = scratch("above", scaled.shape, torch.bool, scaled.device)
    for midpoint in midpoints().tolist():
        codes += torch.gt(scaled, midpoint, out=above)
    return codes[::2].bitwise_left_shift_(4).bitwise_or_(codes[1::2])


def _double_quantized(q: NF4, label: str) -> NF4:
    """Returns q with its absmax in 8 bits. Raises ModelError if their mean overflows."""
    offset = q.absmax.mean()
    if not bool(offset.isfinite()):
        raise ModelError(
            f"{label}: the mean of its blocks' largest values is more than float32 holds. Scale the"
            " weight, or quantize it without double_quant."
        )
    centred = q.absmax - offset
    padded = F.pad(centred, (0, -len(centred) % NESTED)).view(-1, NESTED)
    largest = padded.abs().amax(1)
    scaled = padded * (1.0 / largest.clamp(min=SMALLEST))[:, None]
    # bitsandbytes rounds to 16 bits before it looks for the level, and so changes some codes.
    scaled = ((scaled + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    levels = dynamic_map(scaled.device)
    below = (torch.searchsorted(levels, scaled, right=True) - 1).clamp_(0, 254)
    nearer_above = (scaled - levels[below + 1]).abs() < (scaled - levels[below]).abs()
    # If all differences of a block are 0, so is its scale, and any code gives the same value.
    nearest = torch.where(largest[:, None] > 0, below + nearer_above, 0)
    codes = nearest.to(torch.uint8).flatten()[: len(centred)]
    return replace(q, absmax=codes, nested_absmax=largest, offset=offset)


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "") -> NF4:
    """Returns a weight that bitsandbytes saved in NF4, bit-equal, without copying a tensor.

    `tensors` maps the keys of one layer, without the layer's name, to the file's tensors:

        weight                   (⌈values / 2⌉, 1) uint8, or its bytes in the quant_storage dtype
        weight.absmax            (blocks,) float32; uint8 under double quantization
        weight.quant_map         (16,) float32
        STATE                    JSON as uint8
        weight.nested_absmax     (⌈blocks / 256⌉,) float32, under double quantization only
        weight.nested_quant_map  (256,) float32, under double quantization only

    Raises ModelError for anything else: FP4, 8 bits, other levels, other block sizes, a missing or
    an unexpected tensor, or one of another shape. Messages call the weight `name`.
    """

    def refused(reason: str) -> ModelError:
        return ModelError(
            f"{name or 'the weight'} is not in NF4 as bitsandbytes saves it: {reason}. Pass the"
            " unquantized weights with --quantize nf4 (in Python, lora.nf4.quantize)."
        )

    state = _bitsandbytes_state(tensors, refused)
    dtype = _check_bitsandbytes_state(state, refused)
    block_size, shape = state["blocksize"], tuple(state["shape"])
    _check_bitsandbytes_tensors(tensors, block_size, math.prod(shape), refused)
    weight, nested, mean = tensors["weight"], tensors.get("weight.nested_absmax"), None
    if nested is not None:
        offset = state["nested_offset"]
        mean = torch.tensor(offset, dtype=torch.float32, device=weight.device)
    codes = weight.view(torch.uint8).flatten()  # quant_storage only labels the bytes otherwise
    q = NF4(codes, tensors["weight.absmax"], shape, dtype, block_size, nested, mean)
    if not bool(q.scales().isfinite().all()):
        raise refused("its absmax holds NaN or infinity")
    return q


Refused = Callable[[str], ModelError]
"""Makes the error from the reason why a weight of bitsandbytes cannot be read."""


def _bitsandbytes_state(tensors: Mapping[str, Tensor], refused: Refused) -> dict[str, Any]:
    """Returns the JSON metadata. Raises `refused` unless it has the known fields, and `tensors` the
    known keys."""
    if STATE not in tensors:
        raise refused(f"no {STATE}, found {', '.join(sorted(tensors))}")
    try:
        state = json.loads(bytes(tensors[STATE].flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise refused(f"{STATE} is not a JSON object")
    keys = {"weight", "weight.absmax", "weight.quant_map", STATE}
    fields = {"quant_type", "blocksize", "dtype", "shape"}
    if "weight.nested_absmax" in tensors:
        keys |= {"weight.nested_absmax", "weight.nested_quant_map"}
        fields |= {"nested_blocksize", "nested_dtype", "nested_offset"}
    wrong = [*sorted(keys ^ tensors.keys()), *sorted(fields ^ state.keys())]
    if wrong:
        raise refused(f"{wrong[0]} is {'missing' if wrong[0] in keys | fields else 'unexpected'}")
    return state


def _check_bitsandbytes_state(state: Mapping[str, Any], refused: Refused) -> torch.dtype:
    """Returns the dtype of the quantized weight. Raises `refused` unless the fields say NF4."""
    block_size, shape, offset = state["blocksize"], state["shape"], state.get("nested_offset", 0.0)
    dtype = next((d for d in DTYPES if str(d) == f"torch.{state['dtype']}"), None)
    # type(...) is int, since JSON's true is an int to isinstance.
    sizes_good = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    even = type(block_size) is int and block_size >= 2 and block_size % 2 == 0
    for field, good, wanted in (
        ("quant_type", state["quant_type"] == "nf4", "nf4"),
        ("blocksize", even, "an even number"),
        ("dtype", dtype is not None, "float32, bfloat16 or float16"),
        ("shape", sizes_good, "a list of integers of at least 1"),
        ("nested_blocksize", state.get("nested_blocksize", NESTED) == NESTED, str(NESTED)),
        ("nested_dtype", state.get("nested_dtype", "float32") == "float32", "float32"),
        ("nested_offset", type(offset) is float, "a number with a decimal point"),
    ):
        if not good:
            raise refused(f"{field} must be {wanted}, found {state[field]!r:.60}")
    assert dtype is not None
    return dtype


def _check_bitsandbytes_tensors(
    tensors: Mapping[str, Tensor], block_size: int, count: int, refused: Refused
) -> None:
    """Raise `refused` unless the tensors have the shapes of `count` values and NF4's levels."""
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
        actual = (tensors[key].dtype, *tensors[key].shape)
        if actual != sizes[key]:
            raise refused(f"{key} must be {sizes[key]}, found {actual}")
    cpu = torch.device("cpu")
    levels = {"weight.quant_map": _levels(), "weight.nested_quant_map": dynamic_map(cpu)}
    for key in sorted(tensors.keys() & levels.keys()):
        if not torch.equal(tensors[key].to(cpu), levels[key]):
            raise refused(f"{key} holds other levels than NF4's")


def dequantize(q: NF4, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Returns the values (shape) in `dtype`, by default that of the tensor that was quantized.

    Writes them into `out` if it is given.
    """
    dtype = q.dtype if dtype is None else dtype
    count = math.prod(q.shape)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or q.codes.is_meta:  # a tracer must not see scratch memory
        values = reference(q).to(dtype)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    flat, device = out.view(-1), q.codes.device
    if triton.usable(device) and _in_words(q, count):
        _dequantize_on_gpu(q, flat)
        return out
    scales, table = q.scales(), pairs(device)
    whole = count - count % q.block_size
    step = min(_chunk(q.block_size, device), whole)
    # A look-up writes two float32 levels as one int64. `out` can take them directly if it is
    # float32 and starts at a multiple of 8 bytes; otherwise they go through scratch memory.
    direct = dtype == torch.float32 and flat.storage_offset() % 2 == 0
    for start in range(0, whole, step or 1):
        end = min(start + step, whole)
        blocks = flat[start:end].view(-1, q.block_size)
        levels = blocks if direct else scratch("levels", blocks.shape, torch.float32, device)
        # gather splits its rows among threads; index_select would run on one thread.
        rows = math.gcd(len(blocks), 64)
        codes = scratch("codes", (rows, (end - start) // 2 // rows), torch.int64, device)
        codes.copy_(q.codes[start // 2 : end // 2].view(codes.shape))
        level_pairs = levels.view(-1).view(torch.int64).view(codes.shape)
        torch.gather(table.expand(rows, -1), 1, codes, out=level_pairs)
        torch.mul(levels, scales[start // q.block_size : end // q.block_size, None], out=blocks)
    if whole < count:
        tail = table.index_select(0, q.codes[whole // 2 :].int()).view(torch.float32)
        flat[whole:] = tail[: count - whole] * scales[-1]
    return out


def _in_words(q: NF4, count: int) -> bool:
    """True if the codes are whole words of 32 bits, each of one block, as those of a layer are."""
    return q.block_size % 8 == 0 == count % 8 and q.codes.storage_offset() % 4 == 0


def _dequantize_on_gpu(q: NF4, out: Tensor) -> None:
    """Writes the values into `out`, (values,), by a Triton kernel."""
    from lora.kernels.triton.nf4 import write_values  # loads Triton

    nested, device = None, q.codes.device
    if q.nested_absmax is not None and q.offset is not None:
        nested = q.nested_absmax, q.offset, dynamic_map(device), NESTED
    write_values(q.codes, q.absmax, nested, levels_on(device), q.block_size, out)


def reference(q: NF4) -> Tensor:
    """Returns LEVELS[codes] · absmax of the block, (shape) float32: the equation, unoptimized."""
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=1).flatten().int()
    scales = q.scales().repeat_interleave(q.block_size)
    count = math.prod(q.shape)
    levels = _levels().to(codes.device)
    return (levels[codes[:count]] * scales[:count]).view(q.shape)


def _chunk(block_size: int, device: torch.device) -> int:
    """Returns how many values to convert at a time, a multiple of block_size."""
    limit = CHUNK if device.type == "cpu" else GPU_CHUNK
    return max(1, limit // block_size) * block_size


def _levels() -> Tensor:
    """Returns LEVELS, (16,) float32 on the CPU."""
    # Both are stated, since a caller may have changed torch's default dtype and device.
    return torch.tensor(LEVELS, dtype=torch.float32, device="cpu")


@functools.cache
def levels_on(device: torch.device) -> Tensor:
    """Returns LEVELS on the device, (16,) float32."""
    return _levels().to(device)


@functools.cache
def pairs(device: torch.device) -> Tensor:
    """Returns, for each byte, its two float32 levels as the bits of one int64: (256,) int64."""
    byte, levels = torch.arange(256, device="cpu"), _levels()
    high_and_low = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return high_and_low.view(torch.int64).flatten().to(device)


@functools.cache
def midpoints() -> Tensor:
    """Returns the midpoints between neighbouring levels, (15,) float32."""
    return (_levels()[:-1] + _levels()[1:]) / 2


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """Returns the levels of an 8-bit absmax, (256,) float32 from -1 to 1, sorted.

    They cover seven decades of magnitude; each decade has twice as many levels as the one below.
    Dettmers 2015, arXiv:1511.04561, figure 1.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = (10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu").to(device)


def parameters_of(q: NF4) -> dict[str, nn.Parameter]:
    """Returns the parameters of an NF4Linear with this weight, by name, frozen."""
    tensors = {
        "weight": q.codes,
        "absmax": q.absmax,
        "nested_absmax": q.nested_absmax,
        "offset": q.offset,
    }
    return {
        name: nn.Parameter(tensor, requires_grad=False)
        for name, tensor in tensors.items()
        if tensor is not None
    }


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with W (out, in) frozen in NF4.

    x (..., in) -> y (..., out) in x's dtype, or autocast's.
    weight (⌈out·in / 2⌉,) uint8, absmax, nested_absmax and offset are the tensors of NF4. They are
    frozen parameters, so that state_dict(), to() and sharding include them.
    bias (out,) or None, in `dtype`, the dtype of the layer that this one replaces.
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
        """Returns an NF4Linear on the meta device to replace an nn.Linear or HF Conv1D."""
        (view,) = layers.views(layer)
        _, bias = view.parameters()
        shape = (view.in_features, view.out_features)
        replacement = cls(*shape, bias is not None, view.dtype, block_size, double_quant, "meta")
        return replacement.train(layer.training)

    @classmethod
    def of(
        cls, layer: nn.Module, block_size: int = 64, double_quant: bool = True, name: str = ""
    ) -> NF4Linear:
        """Returns an nn.Linear or HF Conv1D quantized; it shares the layer's bias."""
        W, _ = layers.views(layer)[0].read()
        return cls.over(layer, quantize(W, block_size, double_quant, name))

    @classmethod
    def over(cls, layer: nn.Module, q: NF4) -> NF4Linear:
        """Returns an NF4Linear with weight q to replace `layer`; it shares the layer's bias."""
        (view,) = layers.views(layer)
        replacement = cls.like(layer, q.block_size, q.double_quant)
        replacement.set_weight(q)
        replacement.register_parameter("bias", view.parameters()[1])
        return replacement

    def set_weight(self, q: NF4) -> None:
        """Set the weight to q, which has this layer's shape, block_size and double_quant."""
        for name, parameter in parameters_of(q).items():
            setattr(self, name, parameter)

    def quantized(self) -> NF4:
        """Returns W as NF4. If the layer is sharded, gathers it first."""
        tensors = self.weight, self.absmax, self.nested_absmax, self.offset
        return self.assembled(*map(layers.gathered, tensors))

    def assembled(self, *tensors: Tensor | None) -> NF4:
        """Returns an NF4 of this layer's settings from the tensors of its parameters."""
        codes, absmax, nested_absmax, offset = tensors
        assert codes is not None
        assert absmax is not None
        shape = (self.out_features, self.in_features)
        return NF4(codes, absmax, shape, self.dtype, self.block_size, nested_absmax, offset)

    def dense(self) -> nn.Linear:
        """Returns an nn.Linear with the dequantized weight, frozen, in this layer's dtype."""
        device = self.weight.device
        layer = nn.Linear(self.in_features, self.out_features, False, device, self.dtype)
        layer.weight = nn.Parameter(dequantize(self.quantized()), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # nn.Module calls this for to(), half() and the like. A cast changes the layer's dtype and
        # its bias. The scales stay in float32: in 16 bits every weight would change.
        before = {name: getattr(self, name) for name in ("absmax", "nested_absmax", "offset")}
        tensors = {name: p.data for name, p in before.items() if p is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in tensors.items():
            parameter = getattr(self, name)
            if parameter.dtype != tensor.dtype:
                parameter.data = tensor.to(parameter.device)
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
    """Replace each named layer by an NF4Linear, at every path by which the model reaches it."""
    replacements: dict[int, NF4Linear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if id(layer) not in replacements:
            replacements[id(layer)] = NF4Linear.of(layer, block_size, double_quant, name)
    put(model, replacements)


def dequantize_layers(model: nn.Module) -> int:
    """Replace every NF4Linear by an nn.Linear with the dequantized weight; returns their number.

    Adapters stay on their layers and can then be merged. They merge into the dequantized weights,
    which differ from the original ones by the rounding.
    """
    replacements = {id(m): m.dense() for m in model.modules() if isinstance(m, NF4Linear)}
    put(model, replacements)
    return len(replacements)


def put(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules of the model, at every path; `replacements` maps a module's id to the new
    one."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


class NF4View(View):
    """The View of an NF4Linear. It unpacks W each time that a caller reads it."""

    module: NF4Linear
    packed = True

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def read(self) -> tuple[Tensor, Tensor | None]:
        return dequantize(self.module.quantized()), layers.gathered(self.parameters()[1])

    def stored(self) -> tuple[Tensor, ...]:
        parameters = layers.own_parameters(self.module)
        tensors = [parameters.get(name) for name in ("weight", "absmax", "nested_absmax", "offset")]
        return tuple(tensor for tensor in tensors if tensor is not None)

    def unpacked(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        q = self.module.assembled(*stored, *[None] * (4 - len(stored)))
        # Scratch memory is valid until the next layer unpacks: the kernels use W at once.
        return dequantize(q, dtype, scratch("weight", q.shape, dtype, q.codes.device))


layers.VIEWS[NF4Linear] = NF4View
