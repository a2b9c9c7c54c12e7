"""Dequantizes NF4 in one pass: reads half a byte a value, and writes the value. Ampere and newer.

A program takes a tile of (blocks, bytes of a block), so that the scale of a block is computed once.
lora.nf4 explains the format. The values are bit-equal to those of lora.nf4.reference: each product
and each sum is rounded on its own, which enable_fp_fusion=False keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # bytes of codes that a program takes


@triton.jit
def _write_values(
    codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr,
    count, block_size,
    NESTED: tl.constexpr,  # absmax values in a block of double quantization; 0 without it
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,  # bytes of a block, rounded up to a power of 2; of a longer one a part
):  # fmt: skip
    """out[i] = levels[code i] · absmax[i // block_size]"""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    valid = block * block_size < count
    absmax = tl.load(absmax_ptr + block, mask=valid, other=0)
    if NESTED > 0:
        nested = tl.load(nested_ptr + block // NESTED, mask=valid, other=0.0)
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)

    start = (block * block_size)[:, None]
    byte = (tl.program_id(1) * HALF + tl.arange(0, HALF))[None, :]
    inside = (2 * byte < block_size) & (start + 2 * byte < count)
    codes = tl.load(codes_ptr + start // 2 + byte, mask=inside, other=0).to(tl.int32)
    # The first value of a pair is in the high bits.
    levels = tl.interleave(tl.load(levels_ptr + (codes >> 4)), tl.load(levels_ptr + (codes & 15)))

    column = (tl.program_id(1) * 2 * HALF + tl.arange(0, 2 * HALF))[None, :]
    inside = (column < block_size) & (start + column < count)
    values = levels * absmax[:, None]
    tl.store(out_ptr + start + column, values.to(out_ptr.dtype.element_ty), mask=inside)


def write_values(
    codes: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Writes the values into `out`, contiguous, of any floating dtype.

    nested is None, or nested_absmax, offset, the levels of absmax, and the size of its blocks.
    """
    half = min(TILE, triton.next_power_of_2(block_size // 2))
    blocks = TILE // half
    grid = triton.cdiv(len(absmax), blocks), triton.cdiv(block_size, 2 * half)
    nested_absmax, offset, absmax_levels, size = nested or (absmax, absmax, absmax, 0)
    tensors = codes, absmax, nested_absmax, offset, absmax_levels, levels, out
    if out.numel():
        with torch.cuda.device_of(out):
            _write_values[grid](
                *tensors, out.numel(), block_size, size, blocks, half,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
