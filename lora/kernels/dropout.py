"""Dropout masks: drawn from eight random bits per element, and stored as one bit per element.

An element stays if a random number U in [0, 1) is below 1 − p. Both have 16 binary digits:

    U = 0.u₁ u₂ … u₁₆     1 − p = 0.d₁ d₂ … d₁₆

The comparison U < 1 − p goes from the last digit to the first, starting with m = 0:

    if d is 0:  m = ¬u ∧ m        if d is 1:  m = ¬u ∨ m

u is as random as ¬u, so the code leaves the negation out. Each step is one bitwise operation on
whole words, so a word of 16 bits decides for 16 elements at once.

The digits after the eighth matter for one element in 256, so the elements of a row share u₉ … u₁₆.
An element is therefore dropped with probability p to within 2⁻¹⁶, and the elements of a row are
independent except for those shared digits. An element costs eight random bits, and one bit to keep.
F.dropout takes ten times as long for its mask and keeps a byte (docs/performance.md).

    bits (n, in) int16, n = ⌈tokens / 16⌉. Bit k of row i belongs to token k n + i, so that bit k of
    all words is the mask of n consecutive tokens. Two shifts turn it into integers that are −1,
    whose bits are all 1, or 0.

On a CPU the random bits come from SplitMix64, which runs on all threads. Its seed comes from
torch's default generator. A GPU that runs Triton makes the same mask from the same seed. On other
devices torch's generator of the device draws the bits. Activation checkpointing restores the state
of the generators before it recomputes, and so draws the same mask again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels import triton
from lora.kernels.scratch import scratch

# Constants of SplitMix64. They are uint64 in the paper; torch has int64, which wraps around alike.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))

PLANES = 16  # bits of a word
BLOCK = 2**23  # bytes of a mask that a CPU expands at a time, so that it stays in the cache
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


@dataclass(slots=True, eq=False)
class Mask:
    """Which elements of x (tokens, in) stay, each with probability 1 − p."""

    p: float
    bits: Tensor

    @property
    def scale(self) -> float:
        """1 / (1 − p), the factor for the elements that stay."""
        return 1.0 / (1.0 - self.p)

    def blocks(self, tokens: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields the mask in parts: which rows, and (rows, in) integers, −1 to keep and 0 to drop.

        The integers have the size of `dtype`, so that a bitwise and with the bits of x applies
        them. The next part overwrites the memory of this one.
        """
        groups, width = self.bits.shape
        integer, size = INTEGERS[dtype.itemsize], 8 * dtype.itemsize
        bits = self.bits.to(integer)
        device, limit = self.bits.device, BLOCK // max(1, groups * width * dtype.itemsize)
        planes = max(1, min(PLANES, limit)) if device.type == "cpu" else PLANES
        for first in range(0, PLANES, planes):
            start, stop = first * groups, min((first + planes) * groups, tokens)
            if start < stop or first == 0:  # yield once even if there are no rows
                # The left shift moves bit k to the sign; the right shift copies the sign into all
                # other bits.
                highest = size - 1 - first
                shifts = torch.arange(highest, highest - planes, -1, dtype=integer, device=device)
                keep = scratch("mask", (planes, groups, width), integer, device)
                torch.bitwise_left_shift(bits, shifts[:, None, None], out=keep)
                keep >>= size - 1
                yield slice(start, stop), keep.view(planes * groups, width)[: stop - start]

    def keep(self, x: Tensor) -> Tensor:
        """Returns 1 for each element that stays, 0 for others; shape, dtype and device of x."""
        mask = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
        for part, keep in self.blocks(len(mask), x.dtype):
            mask[part] = -keep
        return mask.view(x.shape)

    def scaled(self, x: Tensor) -> Tensor:
        """Returns keep / (1 − p), the mask to multiply x with, in float32 at least."""
        # In bfloat16 the rounding of 1 / (1 − p) would bias every update.
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.keep(x).to(wide) * self.scale


def draw(p: float, x: Tensor) -> Mask:
    """Returns a new random mask for x (..., in)."""
    groups, width = -(-math.prod(x.shape[:-1]) // PLANES), x.shape[-1]
    digits = min(round((1 - p) * 2**16), 2**16 - 1)
    # A CUDA graph that is recorded would keep one seed from the CPU for all its replays.
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if triton.usable(x.device) and width % 4 == 0 and not recorded:
        from lora.kernels.triton.dropout import draw_bits  # loads Triton

        return Mask(p, draw_bits(int(seed()), digits, groups, width, x.device))
    # The int64 are four words each: eight words for each group of 16 tokens, which its elements
    # share, and eight for each element of the group.
    words = random(2 * groups * (width + 1), x.device)
    shared, single = words[: 2 * groups].view(torch.int16), words[2 * groups :]
    last = _compare_digits(
        x.new_zeros(groups, 1, dtype=torch.int16), shared.view(8, groups, 1), digits
    )
    # Four words at a time take less time than one.
    wide = torch.int64 if groups * width % 4 == 0 else torch.int16
    planes = single.view(wide).view(8, 2 * groups * width // wide.itemsize)
    bits = torch.empty_like(planes[0])
    bits.view(torch.int16).view(groups, width).copy_(last)
    bits = _compare_digits(bits, planes, digits >> 8)
    return Mask(p, bits.view(torch.int16).view(groups, width))


def _compare_digits(m: Tensor, u: Tensor, d: int) -> Tensor:
    """Overwrites m with one step of the comparison above for each digit, from the last to the
    first: u (digits, ...) are random words of the shape of m."""
    for place, words in enumerate(u):
        if d >> place & 1:
            m |= words
        else:
            m &= words
    return m


def drop(x: Tensor, mask: Mask | None) -> Tensor:
    """Returns x times the scaled mask; x itself if there is no mask."""
    return x if mask is None else x * mask.scaled(x)


def dropped(rows: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows (tokens, in) in `dtype` with zeros for dropped elements. Nothing is scaled.

    `keep` is a part of Mask.blocks(). The result overwrites it: to write to a third tensor would
    take twice the time.
    """
    if rows.dtype != dtype:
        rows = scratch("rows", rows.shape, dtype, rows.device).copy_(rows)
    # −1 keeps all bits of an element and 0 clears them, without a multiplication.
    keep &= rows.view(keep.dtype)
    return keep.view(dtype)


def drop_(rows: Tensor, keep: Tensor) -> Tensor:
    """Sets dropped elements of rows (tokens, in) to 0; `keep` is a part of Mask.blocks()."""
    if torch._C._functorch.is_legacy_batchedtensor(rows):  # which cannot be viewed as integers
        return rows.mul_(-keep)
    bits = rows.view(keep.dtype)
    bits &= keep
    return rows


def random(count: int, device: torch.device) -> Tensor:
    """Returns random bits, (count,) int64, from torch's default generator of the device."""
    if device.type in ("cpu", "mps"):  # random_() of mps refuses the whole range of int64
        return random_words(seed(), count).to(device)
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None)


def seed() -> Tensor:
    """Returns a state for SplitMix64, () int64, from torch's default generator of the CPU."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def random_words(seed: Tensor, count: int) -> Tensor:
    """Returns the first outputs of SplitMix64 from the state `seed`, () int64: (count,) int64.

    Steele et al. 2014, figure 16. Output i depends on the seed and i alone, so that all of them can
    be computed at once.
    """
    z = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    torch.add(seed, z, alpha=GAMMA, out=z)
    shifted = scratch("shifted", (count,), torch.int64, seed.device)
    for bits, factor in ROUNDS:
        torch.bitwise_right_shift(z, bits, out=shifted)
        # torch shifts the sign in from the left; SplitMix64 needs zeros there.
        z.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))
        if factor != 1:
            z.mul_(factor)
    return z
