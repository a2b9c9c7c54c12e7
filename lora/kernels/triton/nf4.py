"""Dequantizes NF4 in one pass: reads half a byte per value, and writes the value. Ampere and newer.

lora.nf4 explains the format. The values are bit-equal to those of lora.nf4.reference: each product
and each sum is rounded on its own, which enable_fp_fusion=False keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = tl.constexpr(8)  # in a word of 32 bits; a thread writes them together
WORDS_PER_PROGRAM = 512


@triton.jit
def _write_values(
    words_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr,
    count, words_in_block,
    NESTED: tl.constexpr,  # absmax values in a block of double quantization; 0 without it
    WORDS: tl.constexpr,
):  # fmt: skip
    """out[i] = levels[code i] · absmax[i // block_size]; count words of codes"""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    valid = word < count
    block = word // words_in_block
    absmax = tl.load(absmax_ptr + block, mask=valid, other=0)
    if NESTED > 0:
        nested = tl.load(nested_ptr + block // NESTED, mask=valid, other=0.0)
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)
    codes = tl.load(words_ptr + word, mask=valid, other=0)
    # Bytes come lowest first, and the first code of a byte is in its high bits.
    i = tl.arange(0, VALUES)
    shift = 8 * (i // 2) + 4 * (1 - i % 2)
    code = (codes[:, None] >> shift[None, :]) & 15
    values = tl.load(levels_ptr + code) * absmax[:, None]
    place = word[:, None] * VALUES + i[None, :]
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def write_values(
    codes: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Writes the values into `out`, contiguous, of any floating dtype.

    The number of values and block_size are multiples of 8, and the codes begin at one of 4 bytes.
    nested is None, or nested_absmax, offset, the levels of absmax, and the size of its blocks.
    """
    words = codes.view(torch.int32)
    nested_absmax, offset, absmax_levels, size = nested or (absmax, absmax, absmax, 0)
    tensors = words, absmax, nested_absmax, offset, absmax_levels, levels, out
    if len(words):
        with torch.cuda.device_of(out):
            _write_values[(triton.cdiv(len(words), WORDS_PER_PROGRAM),)](
                *tensors, len(words), block_size // 8, size, WORDS_PER_PROGRAM,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
