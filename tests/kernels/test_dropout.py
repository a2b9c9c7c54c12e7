"""The random bits of dropout: a published generator, uniform in every byte, at the exact rate."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lora.kernels.dropout import draw, drop_, dropped, random, random_words


def test_the_words_are_splitmix64s() -> None:
    """Its first outputs from 1234567, as published (rosettacode.org, Pseudo-random_numbers)."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert [word % 2**64 for word in random_words(torch.tensor(1234567), 5).tolist()] == published


@pytest.mark.parametrize("position", range(8))
def test_every_byte_of_a_word_is_uniform(position: int) -> None:
    found = torch.cat([random_words(torch.tensor(seed * 7919), 50_000) for seed in range(8)])
    values = found.view(torch.uint8).view(-1, 8)[:, position]
    counts = torch.bincount(values.int(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 24, 768])
def test_bytes_are_independent_of_those_before(lag: int) -> None:
    found = random_words(torch.tensor(5), 1_000_000).view(torch.uint8).int()
    pairs = torch.bincount(found[:-lag] * 256 + found[lag:], minlength=65536)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("p", [0.5, 0.1, 0.05, 1 / 3, 0.003, 0.998])
@pytest.mark.parametrize("columns", [8, 768, 13])
def test_the_rate_is_exact(p: float, columns: int) -> None:
    x = torch.empty(4_000_000 // columns, columns)
    torch.manual_seed(0)
    kept = draw(p, x).keep(x)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    # The last half of the digits is a row's own: the rate of rows varies by 1/256.
    spread = math.sqrt((p * (1 - p) + columns / 256**2 / 4) / x.numel())
    assert abs(1 - kept.double().mean().item() - p) < 4 * spread
    for byte in range(min(columns, 8)):
        rate = 1 - kept[:, byte::8].double().mean().item()
        count = kept[:, byte::8].numel()
        assert abs(rate - p) < 5 * math.sqrt((p * (1 - p) + columns / 256**2 / 4) / count)
    for plane in kept.split(-(-len(kept) // 16)):  # the bits of a word
        rate = 1 - plane.double().mean().item()
        assert abs(rate - p) < 5 * math.sqrt((p * (1 - p) + columns / 256**2 / 4) / plane.numel())


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 2**-16, 1 - 2**-16, 0.9999, 1e-9])
def test_an_element_stays_where_its_sixteen_bits_are_below_1_minus_p(
    p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the rate is that of the numbers below, of 65,536: nearer to p than that fraction."""
    x = torch.empty(1600, 24)
    given = random(2 * 100 * 25, x.device)
    monkeypatch.setattr("lora.kernels.dropout.random", lambda count, *_: given.clone()[:count])
    kept = draw(p, x).keep(x)
    words_ = given.view(torch.int16)
    rows, own = words_[:800].view(8, 100, 1), words_[800:].view(8, 100, 24)
    # the k-th bit of each word is the k-th hundred of rows'; a bit stands for its opposite
    places = torch.cat([rows.expand(8, 100, 24), own]).int()
    planes = torch.stack([1 - (places >> k & 1) for k in range(16)], dim=1)  # (16, 16, 100, 24)
    number = (planes * 2 ** torch.arange(16).view(16, 1, 1, 1)).sum(0).view(1600, 24)
    below = min(round((1 - p) * 65536), 65535)
    assert torch.equal(kept, (number < below).float())
    assert abs(1 - below / 65536 - p) <= 2**-16


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_independent(p: float) -> None:
    """Of one row, one column, and one word: both dropped in p² of the pairs."""
    x = torch.empty(16 * 256, 768)
    torch.manual_seed(1)
    gone = 1 - draw(p, x).keep(x).double()
    for pairs in (gone[:, :-1] * gone[:, 1:], gone[:-1] * gone[1:], gone[:-256] * gone[256:]):
        spread = math.sqrt(p**2 * (1 - p**2) / pairs.numel())
        assert abs(pairs.mean().item() - p**2) < 5 * spread + 1 / 256**2


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
    monkeypatch.setattr("lora.kernels.dropout.BLOCK", 5 * 2 * 8 * 2)
    rows = torch.empty(30, 8)
    mask = draw(0.5, rows)  # words of 2 rows
    wanted = [10, 10, 10]
    assert [len(keep) for _, keep in mask.blocks(30, torch.bfloat16)] == wanted
    assert [part.stop - part.start for part, _ in mask.blocks(30, torch.bfloat16)] == wanted
    assert [len(keep) for _, keep in mask.blocks(30, torch.float32)] == [4] * 7 + [2]
    none = draw(0.5, rows[:0])
    assert [len(keep) for _, keep in none.blocks(0, torch.float32)] == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_dropped_is_zero_and_the_rest_is_as_it_was(dtype: torch.dtype) -> None:
    rows = torch.randn(37, 5).to(dtype)
    rows[0] = math.inf
    mask = draw(0.5, rows)
    wanted = torch.where(mask.keep(rows) == 1, rows, 0)
    for part, keep in mask.blocks(37, dtype):
        assert torch.equal(drop_(rows[part].clone(), keep), wanted[part])
        assert torch.equal(dropped(rows[part], keep, dtype), wanted[part])  # overwrites keep


def test_the_bits_come_from_the_default_generator() -> None:
    x = torch.empty(400, 8)
    torch.manual_seed(3)
    one, two = draw(0.5, x), draw(0.5, x)
    torch.manual_seed(3)
    assert torch.equal(draw(0.5, x).bits, one.bits)
    assert not torch.equal(one.bits, two.bits)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (1,), (5,), (2, 0, 4)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert draw(0.5, x).keep(x).shape == shape
