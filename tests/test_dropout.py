"""The random bits of dropout: a published generator, uniform in every byte, at the exact rate."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lora.dropout import Mask, draw, words


def test_the_words_are_splitmix64s() -> None:
    """Its first outputs from 1234567, as published (rosettacode.org, Pseudo-random_numbers)."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert [word % 2**64 for word in words(torch.tensor(1234567), 5).tolist()] == published


@pytest.mark.parametrize("position", range(8))
def test_every_byte_of_a_word_is_uniform(position: int) -> None:
    found = torch.cat([words(torch.tensor(seed * 7919), 50_000) for seed in range(8)])
    values = found.view(torch.uint8).view(-1, 8)[:, position]
    counts = torch.bincount(values.int(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 24, 768])
def test_bytes_are_independent_of_those_before(lag: int) -> None:
    found = words(torch.tensor(5), 1_000_000).view(torch.uint8).int()
    pairs = torch.bincount(found[:-lag] * 256 + found[lag:], minlength=65536)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("p", [0.5, 0.1, 0.05, 1 / 3, 0.003, 0.998])
@pytest.mark.parametrize("columns", [8, 768, 13])  # whole words in a row, and parts of them
def test_the_rate_is_exact(p: float, columns: int) -> None:
    x = torch.empty(4_000_000 // columns, columns)
    torch.manual_seed(0)
    kept = draw(p, x).keep(x)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    # A row's threshold is one of two that are 1/256 apart: the rate of rows varies by that.
    spread = math.sqrt((p * (1 - p) + columns / 256**2 / 4) / x.numel())
    assert abs(1 - kept.double().mean().item() - p) < 4 * spread
    for byte in range(min(columns, 8)):
        rate = 1 - kept[:, byte::8].double().mean().item()
        count = kept[:, byte::8].numel()
        assert abs(rate - p) < 5 * math.sqrt((p * (1 - p) + columns / 256**2 / 4) / count)


@pytest.mark.parametrize("p", [0.1, 0.5, 2**-16, 1 - 2**-16, 0.9999])
def test_the_rate_is_within_2_to_the_minus_24(p: float) -> None:
    """By counting: of 256 bytes and 65,536 fractions, those that drop."""
    sure = int(p * 256)
    left = round((p * 256 - sure) * 65536)
    dropped = (sure * 65536 + left) / 2**24
    assert abs(dropped - p) <= 2**-24
    # and the mask goes by those two numbers: a row has one of the two thresholds
    x = torch.empty(20_000, 64)
    seed = torch.tensor(11)
    found = words(seed, len(x) * 9).view(len(x), 9)  # eight words of bytes, one of threshold
    bytes_ = found[:, :8].contiguous().view(torch.uint8).int()
    limits = sure + (found[:, 8:] & 0xFFFF < left).int()
    assert torch.equal(Mask(p, seed).keep(x), (bytes_ >= limits).float())


def test_masks_of_one_seed_are_one_whatever_the_dtype() -> None:
    x = torch.empty(3, 5, 7)
    mask = draw(0.5, x)
    wanted = mask.keep(x)
    assert wanted.shape == x.shape
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(mask.keep(x.to(dtype)), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_scale_is_exact_whatever_the_dtype(dtype: torch.dtype) -> None:
    x = torch.empty(64, 64, dtype=dtype)
    mask = draw(0.3, x)
    assert mask.scale == pytest.approx(1 / 0.7, rel=1e-12)
    found = mask.scaled(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, mask.keep(x).to(found.dtype) / 0.7)


def test_blocks_are_no_larger_than_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.dropout.BLOCK", 32)
    rows = torch.empty(10, 8)
    mask = draw(0.5, rows)
    assert [len(keep) for _, keep in mask.blocks(rows)] == [4, 4, 2]
    assert [len(keep) for _, keep in mask.blocks(rows[:0])] == [0]


def test_the_seed_comes_from_the_default_generator() -> None:
    x = torch.empty(4, 8)
    torch.manual_seed(3)
    one, two = draw(0.5, x), draw(0.5, x)
    torch.manual_seed(3)
    assert int(draw(0.5, x).seed) == int(one.seed) != int(two.seed)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (1,), (5,), (2, 0, 4)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert draw(0.5, x).keep(x).shape == shape
