"""Dropout's mask: one bit an element, made from cheap random bits.

    u₁ u₂ … u₁₆   random bits of an element, u₁ the first behind the point of a number U in [0, 1)
    kept where U < 1 − p, with 1 − p as 0.d₁ d₂ … d₁₆ in binary. From the last digit to the first:
    m = u ∧ m where d is 0,   m = ¬u ∨ m where d is 1   (u is as random as ¬u, and stands for it)

Bits that decide for one element in 256 need not be its own: u₉ … u₁₆ are shared by its row. So an
element is dropped with p to within 2⁻¹⁶, the elements of a row are independent but for that, and an
element costs eight random bits and one to keep: F.dropout needs ten times the time for its mask,
and keeps a byte (docs/performance.md).

    bits (n, in) int16, n = ⌈tokens / 16⌉, where bit k of row i is for the token k n + i: two shifts
    make the mask of n rows of it, as −1, all of whose bits are 1, or 0

On a CPU the random bits are SplitMix64's, which all threads make, from a seed that torch's default
generator draws; elsewhere they are that generator's own. Recomputation in activation checkpointing
draws them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.scratch import scratch

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # int64 wraps around, as the source's uint64 does
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))

PLANES = 16  # bits of a word
BLOCK = 2**23  # bytes
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


@dataclass(frozen=True, eq=False)
class Mask:
    """Which elements of x (tokens, in) stay, each with probability 1 − p."""

    p: float
    bits: Tensor

    @property
    def scale(self) -> float:
        """1 / (1 − p), by which what stays is to be scaled."""
        return 1.0 / (1.0 - self.p)

    def blocks(self, tokens: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, in) by parts, in memory that the next uses: −1 what stays, 0 the others.

        Integers of the size of `dtype`, whose parts of x are of a size for a processor's cache.
        """
        groups, width = self.bits.shape
        kind, size = INTEGERS[dtype.itemsize], 8 * dtype.itemsize
        bits = self.bits.to(kind)
        device, most = self.bits.device, BLOCK // max(1, groups * width * dtype.itemsize)
        some = max(1, min(PLANES, most)) if device.type == "cpu" else PLANES
        for first in range(0, PLANES, some):
            start, stop = first * groups, min((first + some) * groups, tokens)
            if start < stop or first == 0:  # one part of no rows at least
                last = size - 1 - first  # the bit of a plane becomes the sign, then all bits
                left = torch.arange(last, last - some, -1, dtype=kind, device=device)
                keep = scratch("mask", (some, groups, width), kind, device)
                torch.bitwise_left_shift(bits, left[:, None, None], out=keep)
                keep >>= size - 1
                yield slice(start, stop), keep.view(some * groups, width)[: stop - start]

    def keep(self, x: Tensor) -> Tensor:
        """1 where the element stays and 0 where it is dropped, shape, dtype and device of x."""
        found = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
        for part, keep in self.blocks(len(found), x.dtype):
            found[part] = -keep
        return found.view(x.shape)

    def scaled(self, x: Tensor) -> Tensor:
        """The mask that multiplies x: keep / (1 − p), in float32 at least.

        1 / (1 − p) rounded to bfloat16 would bias every update.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.keep(x).to(wide) * self.scale


def draw(p: float, x: Tensor) -> Mask:
    """A mask for x, from random bits of its own."""
    groups, width = -(-math.prod(x.shape[:-1]) // PLANES), x.shape[-1]
    found = random(2 * groups * (width + 1), x.device).view(torch.int16)
    rows, elements = found[: 8 * groups].view(8, groups, 1), found[8 * groups :]
    digits = min(round((1 - p) * 2**16), 2**16 - 1)
    bits = torch.zeros_like(rows[0])
    for place, u in enumerate((*rows, *elements.view(8, groups, width))):
        bits = u.bitwise_or_(bits) if digits >> place & 1 else u.bitwise_and_(bits)
    return Mask(p, bits.clone())


def drop(x: Tensor, mask: Mask | None) -> Tensor:
    """m ∘ x, m scaled; x where nothing is dropped."""
    return x if mask is None else x * mask.scaled(x)


def dropped(rows: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """keep ∘ rows (tokens, in), keep a part of blocks(), in memory that the next call uses."""
    found = scratch("rows", rows.shape, dtype, rows.device)
    if rows.dtype != dtype:
        return drop_(found.copy_(rows), keep)
    torch.bitwise_and(rows.view(keep.dtype), keep, out=found.view(keep.dtype))
    return found


def drop_(rows: Tensor, keep: Tensor) -> Tensor:
    """Zeros over the rows (tokens, in) where keep, a part of blocks(), is 0."""
    if torch._C._functorch.is_legacy_batchedtensor(rows):  # batched gradients show no bits
        return rows.mul_(-keep)
    bits = rows.view(keep.dtype)
    bits &= keep
    return rows


def random(count: int, device: torch.device) -> Tensor:
    """Random bits, (count,) int64, by torch's default generator of the device."""
    if device.type != "cpu":
        return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None)
    return random_words(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"), count)


def random_words(seed: Tensor, count: int) -> Tensor:
    """(count,) int64, every byte of them uniform: SplitMix64 from its state `seed`, () int64.

    Steele et al. 2014, figure 16.
    """
    z = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    torch.add(seed, z, alpha=GAMMA, out=z)
    shifted = scratch("shifted", (count,), torch.int64, seed.device)
    for bits, factor in ROUNDS:
        torch.bitwise_right_shift(z, bits, out=shifted)
        # torch copies the sign into the places that a shift leaves.
        z.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))
        if factor != 1:
            z.mul_(factor)
    return z
