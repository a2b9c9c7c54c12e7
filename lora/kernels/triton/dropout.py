"""Dropout masks on a GPU, and the matmuls with A and B that apply them while they read x.

The bits of a mask are those that lora.kernels.dropout draws on a CPU from the same seed, in the
same layout: bits (n, in) int16, n = ⌈tokens / 16⌉, bit k of row i for token k n + i. A tile of a
product takes `GROUPS` rows of bits, which are 16 · GROUPS tokens.

    draw_bits        the mask; one pass, an eighth of a byte an element
    mask_product     h = (m ∘ x) Aᵀ      reads x once and writes no dropped copy
    grad_of_factor   gA = ghᵀ (m ∘ x)    the same; the sum is in float32
    grad_of_input    gx = m ∘ (gh A)     writes gx once

Sums over more tokens or inputs than a program takes are written in parts and then added in a fixed
order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = tl.constexpr(16)  # bits, each for another token
# SplitMix64's, as in lora.kernels.dropout
STEP = tl.constexpr(0x9E3779B97F4A7C15)
FACTOR1 = tl.constexpr(0xBF58476D1CE4E5B9)
FACTOR2 = tl.constexpr(0x94D049BB133111EB)
FOUR = tl.constexpr(0x0001000100010001)  # times 16 bits: the same in all four words of 64

COLUMNS = 1024  # numbers of 64 bits that a program of _draw makes at most
# A tile of a product has 16 · GROUPS tokens and INPUTS inputs, by the bytes of an element. With
# these sizes no rank spills registers, and three stages fit the shared memory of small GPUs.
GROUPS, INPUTS = 2, {2: 128, 4: 32}
PROGRAMS = 4  # programs that each multiprocessor of the GPU should get


@triton.jit
def _word(seed, index):
    """Output `index` of SplitMix64 from the state `seed`, uint64."""
    z = seed.to(tl.uint64) + (index + 1).to(tl.uint64) * STEP
    z = (z ^ (z >> 30)) * FACTOR1
    z = (z ^ (z >> 27)) * FACTOR2
    return z ^ (z >> 31)


# An argument that is 1 would otherwise be compiled in as a constant, which has no .to().
@triton.jit(do_not_specialize=["seed", "digits", "groups", "quarter"])
def _draw(bits_ptr, seed, digits, groups, quarter, COLUMNS: tl.constexpr):
    """Row program_id(0) of the bits, four words of 16 bits at a time; quarter = in / 4."""
    i, groups = tl.program_id(0).to(tl.int64), groups.to(tl.int64)
    shared = tl.zeros((1,), tl.uint64)
    for plane in tl.static_range(8):
        place = plane * groups + i + tl.zeros((1,), tl.int64)
        u = (_word(seed, place // 4) >> (16 * (place % 4)).to(tl.uint64)) & 0xFFFF
        shared = tl.where((digits >> plane) & 1 != 0, u | shared, u & shared)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bits = tl.zeros((COLUMNS,), tl.uint64) + shared * FOUR
    for plane in tl.static_range(8):
        u = _word(seed, 2 * groups + (plane * groups + i) * quarter + column)
        bits = tl.where((digits >> (8 + plane)) & 1 != 0, u | bits, u & bits)
    tl.store(bits_ptr + i * quarter + column, bits.to(tl.int64), mask=column < quarter)


@triton.jit
def _tokens(i, tokens, groups):
    """The tokens of rows i (GROUPS,) of the bits, and which of them there are: (16, GROUPS)."""
    token = tl.arange(0, WORD)[:, None] * groups + i[None, :]
    return token.to(tl.int64), (token < tokens) & (i < groups)[None, :]


@triton.jit
def _stays(bits_ptr, i, column, groups, width):
    """Which elements stay, (16, GROUPS, INPUTS)."""
    inside = (i < groups)[:, None] & (column < width)[None, :]
    words = tl.load(bits_ptr + i[:, None] * width + column[None, :], mask=inside, other=0)
    plane = tl.arange(0, WORD)[:, None, None]
    return (words.to(tl.int32)[None, :, :] >> plane) & 1 != 0


@triton.jit
def _kept(x_ptr, token, valid, keep, column, width, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    """m ∘ x of a tile, (ROWS, INPUTS)."""
    inside = valid[:, :, None] & (column < width)[None, None, :]
    x = tl.load(x_ptr + token[:, :, None] * width + column[None, None, :], mask=inside, other=0.0)
    return tl.reshape(tl.where(keep, x, 0.0), (ROWS, INPUTS))


@triton.jit
def _thin(token, valid, rank, ROWS: tl.constexpr, RANK: tl.constexpr):
    """Where the rows of these tokens are in h (tokens, rank), and whether: (ROWS, RANK)."""
    token, valid = tl.reshape(token, (ROWS,)), tl.reshape(valid, (ROWS,))
    r = tl.arange(0, RANK)
    return token[:, None] * rank + r[None, :], valid[:, None] & (r < rank)[None, :]


@triton.jit
def _mask_product(
    x_ptr, A_ptr, bits_ptr, h_ptr, tokens, groups, width, rank, part,
    GROUPS: tl.constexpr, INPUTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Part program_id(1) of h = (m ∘ x) Aᵀ: the sum over `part` inputs."""
    ROWS: tl.constexpr = WORD * GROUPS
    i = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    token, valid = _tokens(i, tokens, groups)
    r = tl.arange(0, RANK)
    start = tl.program_id(1) * part
    h = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(start, tl.minimum(start + part, width), INPUTS):
        column = first + tl.arange(0, INPUTS)
        keep = _stays(bits_ptr, i, column, groups, width)
        x = _kept(x_ptr, token, valid, keep, column, width, ROWS, INPUTS)
        inside = (r < rank)[:, None] & (column < width)[None, :]
        A = tl.load(A_ptr + r[:, None] * width + column[None, :], mask=inside, other=0.0)
        h = tl.dot(x, tl.trans(A), h, input_precision="ieee")
    place, inside = _thin(token, valid, rank, ROWS, RANK)
    place += tl.program_id(1).to(tl.int64) * tokens * rank
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_of_factor(
    gh_ptr, x_ptr, bits_ptr, gA_ptr, tokens, groups, width, rank, part,
    GROUPS: tl.constexpr, INPUTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Part program_id(1) of gA = ghᵀ (m ∘ x): the sum over `part` rows of bits."""
    ROWS: tl.constexpr = WORD * GROUPS
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    start = tl.program_id(1) * part
    gA = tl.zeros((RANK, INPUTS), tl.float32)
    for first in range(start, tl.minimum(start + part, groups), GROUPS):
        i = first + tl.arange(0, GROUPS)
        token, valid = _tokens(i, tokens, groups)
        keep = _stays(bits_ptr, i, column, groups, width)
        x = _kept(x_ptr, token, valid, keep, column, width, ROWS, INPUTS)
        place, inside = _thin(token, valid, rank, ROWS, RANK)
        gh = tl.load(gh_ptr + place, mask=inside, other=0.0)
        gA = tl.dot(tl.trans(gh), x.to(gh.dtype), gA, input_precision="ieee")
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (column < width)[None, :]
    place = (tl.program_id(1) * rank + r)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(gA_ptr + place, gA, mask=inside)


@triton.jit
def _grad_of_input(
    gh_ptr, A_ptr, bits_ptr, gx_ptr, tokens, groups, width, rank,
    GROUPS: tl.constexpr, INPUTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile of gx = m ∘ (gh A)."""
    ROWS: tl.constexpr = WORD * GROUPS
    i = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    token, valid = _tokens(i, tokens, groups)
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    r = tl.arange(0, RANK)
    place, inside = _thin(token, valid, rank, ROWS, RANK)
    gh = tl.load(gh_ptr + place, mask=inside, other=0.0)
    inside = (r < rank)[:, None] & (column < width)[None, :]
    A = tl.load(A_ptr + r[:, None] * width + column[None, :], mask=inside, other=0.0)
    gx = tl.dot(gh, A, input_precision="ieee").to(gx_ptr.dtype.element_ty)
    gx = tl.reshape(gx, (WORD, GROUPS, INPUTS))
    keep = _stays(bits_ptr, i, column, groups, width)
    place = token[:, :, None] * width + column[None, None, :]
    inside = valid[:, :, None] & (column < width)[None, None, :]
    tl.store(gx_ptr + place, tl.where(keep, gx, 0.0), mask=inside)


def draw_bits(seed: int, digits: int, groups: int, width: int, device: torch.device) -> Tensor:
    """Returns the bits of a new mask, (groups, width) int16, width a multiple of 4."""
    bits = torch.empty(groups, width, dtype=torch.int16, device=device)
    if bits.numel():
        columns = min(COLUMNS, triton.next_power_of_2(width // 4))
        grid = (groups, triton.cdiv(width // 4, columns))
        with torch.cuda.device_of(bits):
            _draw[grid](
                bits.view(torch.int64), seed, digits, groups, width // 4, columns,
                enable_fp_fusion=False,
            )  # fmt: skip
    return bits


def mask_product(rows: Tensor, A: Tensor, bits: Tensor) -> Tensor:
    """(m ∘ rows) Aᵀ: rows (tokens, in), A (r, in) -> (tokens, r), all in the dtype of rows."""
    rows, A = rows.contiguous(), A.contiguous()
    (tokens, width), rank = rows.shape, len(A)
    options = _options(rank, rows.dtype)
    tiles = triton.cdiv(len(bits), GROUPS)
    parts, steps = _split(tiles, triton.cdiv(width, options["INPUTS"]), rows.device)
    dtype = rows.dtype if parts == 1 else torch.float32
    h = torch.empty(parts, tokens, rank, dtype=dtype, device=rows.device)
    sizes = tokens, len(bits), width, rank, steps * options["INPUTS"]
    with torch.cuda.device_of(rows):
        _mask_product[(tiles, parts)](rows, A, bits, h, *sizes, **options)
    return h[0] if parts == 1 else h.sum(0).to(rows.dtype)


def grad_of_factor(gh: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
    """ghᵀ (m ∘ rows): gh (tokens, r), rows (tokens, in) -> (r, in) float32."""
    gh, rows = gh.contiguous(), rows.contiguous()
    (tokens, width), rank = rows.shape, gh.shape[1]
    options = _options(rank, torch.promote_types(gh.dtype, rows.dtype))
    tiles = triton.cdiv(width, options["INPUTS"])
    parts, steps = _split(tiles, triton.cdiv(len(bits), GROUPS), rows.device)
    gA = torch.empty(parts, rank, width, dtype=torch.float32, device=rows.device)
    sizes = tokens, len(bits), width, rank, steps * GROUPS
    with torch.cuda.device_of(rows):
        _grad_of_factor[(tiles, parts)](gh, rows, bits, gA, *sizes, **options)
    return gA[0] if parts == 1 else gA.sum(0)


def grad_of_input(gh: Tensor, A: Tensor, bits: Tensor) -> Tensor:
    """m ∘ (gh A): gh (tokens, r), A (r, in) -> (tokens, in), all in the dtype of gh."""
    gh, A = gh.contiguous(), A.contiguous()
    (tokens, rank), width = gh.shape, A.shape[1]
    options = _options(rank, gh.dtype)
    gx = torch.empty(tokens, width, dtype=gh.dtype, device=gh.device)
    grid = triton.cdiv(len(bits), GROUPS), triton.cdiv(width, options["INPUTS"])
    with torch.cuda.device_of(gh):
        _grad_of_input[grid](gh, A, bits, gx, tokens, len(bits), width, rank, **options)
    return gx


def _options(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """The sizes of a tile, and how the compiler divides it."""
    return {
        "GROUPS": GROUPS,
        "INPUTS": INPUTS[dtype.itemsize],
        "RANK": max(16, triton.next_power_of_2(rank)),  # tensor cores multiply at least 16 columns
        "num_warps": 8,
        "num_stages": 3,
        "enable_fp_fusion": True,  # stated, since Triton's default changes
    }


def _split(tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts to divide a sum of `steps` so that tiles · parts programs fill the GPU,
    and the steps of a part."""
    wanted = min(steps, triton.cdiv(programs(device), tiles))
    length = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, length), length


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs fill the GPU."""
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)
