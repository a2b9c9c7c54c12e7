"""Dropout's mask as a pure function of a seed, from random bytes.

    word i = the i-th output of SplitMix64 from the seed    Steele et al. 2014, figure 16
    an element is dropped where its byte is below its row's threshold

One byte an element, and what p is beyond 1/256 is left to the rows: with p = 0.1 = 25.6/256 a row's
threshold is 26 with probability 0.6, else 25. So every element is dropped with p to within 2⁻²⁴,
for half of what two bytes cost; those of a row are independent given its threshold. Nothing but the
seed is kept for backward: it regenerates the mask in a fraction of the time that F.dropout needs
for one (docs/performance.md).

The seed comes from torch's default generator of x's device, so that recomputation in activation
checkpointing draws it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # int64 wraps around, as the source's uint64 does
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))

BLOCK = 2**20  # elements


@dataclass(frozen=True)
class Mask:
    """Which elements of x (..., in) stay, each with probability 1 − p."""

    p: float
    seed: Tensor  # () int64

    @property
    def scale(self) -> float:
        """1 / (1 − p), by which what stays is to be scaled."""
        return 1.0 / (1.0 - self.p)

    def keep(self, x: Tensor) -> Tensor:
        """1 where the element stays and 0 where it is dropped, shape, dtype and device of x."""
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return self._keep(rows, 0).view(x.shape)

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """keep(rows) of (tokens, in) in parts that a processor's cache holds, each new memory."""
        count = len(rows) if rows.is_cuda else max(1, BLOCK // max(1, rows.shape[1]))
        for start in range(0, max(1, len(rows)), count):  # one part of no rows at least
            part = slice(start, start + count)
            yield part, self._keep(rows[part], start)

    def _keep(self, rows: Tensor, before: int) -> Tensor:
        """Of rows (tokens, in) that come after `before` others: bytes, and a word of threshold."""
        width = -(-rows.shape[1] // 8) + 1
        seed = self.seed + torch.full_like(self.seed, before * width) * GAMMA
        found = words(seed, len(rows) * width).view(len(rows), width)
        sure = int(self.p * 256)
        left = round((self.p * 256 - sure) * 65536)
        # A threshold of 256 is past the range of a byte.
        kind = torch.uint8 if sure < 255 else torch.int16
        limits = (found[:, -1:] & 0xFFFF).lt(left).to(kind).add_(sure)
        bytes_ = found[:, :-1].view(torch.uint8)[:, : rows.shape[1]]
        return bytes_.ge_(limits).to(rows.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        """The mask that multiplies x: keep / (1 − p), in float32 at least.

        1 / (1 − p) rounded to bfloat16 would bias every update.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.keep(x).to(wide) * self.scale


def draw(p: float, x: Tensor) -> Mask:
    """A mask for x, with a new seed."""
    return Mask(p, torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device))


def drop(x: Tensor, mask: Mask | None) -> Tensor:
    """m ∘ x, m scaled; x where nothing is dropped."""
    return x if mask is None else x * mask.scaled(x)


def words(seed: Tensor, count: int) -> Tensor:
    """Random bits, (count,) int64, every byte of them uniform: SplitMix64 from its state `seed`."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    z = torch.add(seed, counter, alpha=GAMMA)
    shifted = torch.empty_like(z)
    for bits, factor in ROUNDS:
        torch.bitwise_right_shift(z, bits, out=shifted)
        # torch copies the sign into the places that a shift leaves.
        z.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))
        if factor != 1:
            z.mul_(factor)
    return z
