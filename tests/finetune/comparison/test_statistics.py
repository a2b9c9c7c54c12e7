"""Intervals and tests as published, and their results in words."""

from __future__ import annotations

import pytest

from lora.finetune.comparison.statistics import difference, interval, majority, mcnemar


def test_wilsons_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81/263, 15/148, 0/20, 1/29."""
    for hits, rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert interval(hits / rows, rows) == pytest.approx((low, high), abs=5e-5)
    low, high = interval(1.0, 3)
    assert 0 < low < high == 1.0


def test_mcnemars_test_counts_the_rows_that_one_of_them_has_right() -> None:
    both, first, second, neither = (True, True), (True, False), (False, True), (False, False)

    def p(*counts: int) -> float:
        kinds = (both, first, second, neither)
        pairs = [pair for pair, n in zip(kinds, counts, strict=True) for _ in range(n)]
        return mcnemar([one for one, _ in pairs], [other for _, other in pairs])

    assert p(0, 6, 0, 0) == pytest.approx(2 / 64)
    assert p(100, 6, 0, 100) == p(0, 0, 6, 0) == p(0, 6, 0, 0)
    assert p(5, 4, 4, 5) == pytest.approx(1.0)
    assert p(9, 0, 0, 9) == 1.0


def test_a_difference_in_words() -> None:
    assert difference("lora", "full", -0.4, 0.4) == "no difference shown, p = 0.4"
    assert difference("lora", "full", -1.24, 0.012) == "full is better by 1.2 points, p = 0.012"
    assert difference("lora", "full", 2.0, 1e-9) == "lora is better by 2.0 points, p < 0.001"


def test_the_most_frequent_class_of_train_is_predicted() -> None:
    assert majority(["a", "b", "b"], ["a", "a", "a", "b"]) == 0.25
    assert majority(["b", "a"], ["a", "a", "b"]) == pytest.approx(2 / 3)
