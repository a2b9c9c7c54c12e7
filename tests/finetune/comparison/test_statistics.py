"""Intervals and tests as published or as scipy has them, and their results in words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.coverage import runs, shares
from lora.errors import DataError
from lora.finetune.comparison.statistics import (
    bootstrap,
    difference,
    groups,
    holm,
    majority,
    mcnemar,
)

SEED = st.integers(0, 2**32 - 1)
EXAMPLES = settings(deadline=None, max_examples=50)  # no test asserts a time


def right(hits: int, rows: int) -> Any:
    """The scores (1, rows) of a run with so many right rows."""
    return np.arange(rows)[None] < hits


def test_wilsons_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81/263, 15/148, 0/20, 1/29."""
    for hits, rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        mean = bootstrap({"lora": right(hits, rows)}).mean("lora")
        assert (mean.low, mean.high) == pytest.approx((low, high), abs=5e-5)
    mean = bootstrap({"lora": right(3, 3)}).mean("lora")
    assert 0 < mean.low < mean.high == pytest.approx(1.0)


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
    words = "no difference shown (-1.1 to +0.2 points), p = 0.4"
    assert difference("lora", "full", -0.4, 0.4, (-1.1, 0.24)) == words
    limits = (-2.1, 0.1)
    words = "full is better by 1.2 points (-0.1 to 2.1), p = 0.04"
    assert difference("lora", "full", -1.2, 0.04, limits) == words
    assert difference("lora", "full", 2.0, 1e-9) == "lora is better by 2.0 points, p < 0.001"


def test_the_most_frequent_class_of_train_is_predicted() -> None:
    assert majority(["a", "b", "b"], ["a", "a", "a", "b"]) == 0.25
    assert majority(["b", "a"], ["a", "a", "b"]) == pytest.approx(2 / 3)


def approximately(*values: float) -> Any:
    return pytest.approx(values, rel=1e-9, abs=1e-12)


def right_or_wrong(seed: int, seeds: int, rows: int, accuracy: float = 0.85) -> Any:
    """Scores (seeds, rows) of runs that find the same rows hard."""
    random = np.random.default_rng(seed)
    return runs(random, seeds, accuracy, 0.5, random.standard_normal(rows))


@EXAMPLES
@given(SEED, st.integers(2, 300))
def test_one_seed_of_any_scores_is_the_paired_t_test(seed: int, rows: int) -> None:
    first, second = 10 * np.random.default_rng(seed).standard_normal((2, 1, rows))
    result = bootstrap({"first": first, "second": second})
    expected = scipy.stats.ttest_rel(first[0], second[0])
    ours = result.difference("first", "second")
    assert (ours.p, ours.low, ours.high) == approximately(
        expected.pvalue, *expected.confidence_interval()
    )
    mean = result.mean("first")
    limits = scipy.stats.ttest_1samp(first[0], 0).confidence_interval()
    assert (mean.low, mean.high) == approximately(*limits)


@EXAMPLES
@given(SEED, st.integers(2, 10), st.integers(2, 10))
def test_seeds_that_score_every_row_alike_are_welchs_t_test(
    seed: int, first: int, second: int
) -> None:
    random = np.random.default_rng(seed)
    runs = [100 * random.standard_normal((seeds, 1)) for seeds in (first, second)]
    result = bootstrap(dict(zip("ab", (np.tile(run, 50) for run in runs), strict=True)))
    expected = scipy.stats.ttest_ind(*(run[:, 0] for run in runs), equal_var=False)
    ours = result.difference("a", "b")
    assert (ours.p, ours.low, ours.high) == approximately(
        expected.pvalue, *expected.confidence_interval()
    )


@EXAMPLES
@given(st.integers(0, 2000), st.integers(2, 2000))
def test_one_seed_of_right_and_wrong_rows_has_wilsons_interval(hits: int, rows: int) -> None:
    hits = min(hits, rows)
    mean = bootstrap({"lora": right(hits, rows)}).mean("lora")
    wilson = scipy.stats.binomtest(hits, rows).proportion_ci(0.95, "wilson")
    assert (mean.low, mean.high) == pytest.approx(tuple(wilson), abs=1e-9)


@EXAMPLES
@given(SEED, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_one_seed_each_of_right_and_wrong_rows_has_mcnemars_test(
    seed: int, first: float, second: float
) -> None:
    random = np.random.default_rng(seed)
    rows = {"first": random.random((1, 300)) < first, "second": random.random((1, 300)) < second}
    ours = bootstrap(rows).difference("first", "second")
    only_first = int((rows["first"] & ~rows["second"]).sum())
    differ = int((rows["first"] != rows["second"]).sum())
    assert ours.test == "McNemar"
    tail = scipy.stats.binom.cdf(min(only_first, differ - only_first), differ, 0.5)
    assert ours.p == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_resampling_rows_and_seeds_has_the_variance_that_is_corrected(seeds: int) -> None:
    """The pigeonhole bootstrap, drawn, is R (n-1)/n + A (S-1)/S + E (n-1)(S-1)/(nS)."""
    rows, resamples = 100, 20_000
    scores = right_or_wrong(0, seeds, rows, 0.7)
    random = np.random.default_rng(1)
    by_row = random.multinomial(rows, np.full(rows, 1 / rows), resamples) / rows
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    drawn = ((by_row @ scores.T) * by_seed).sum(1)

    r, a = scores.mean(0).var(ddof=1) / rows, scores.mean(1).var(ddof=1) / seeds
    residuals = scores - scores.mean(0) - scores.mean(1)[:, None] + scores.mean()
    e = (residuals**2).sum() / ((rows - 1) * (seeds - 1)) / (rows * seeds)
    shrunk, part = (rows - 1) / rows, (seeds - 1) / seeds
    # The standard error of a variance of 20,000 draws is 1 %, a little more with heavy tails.
    assert drawn.var() == pytest.approx(shrunk * r + part * a + shrunk * part * e, rel=0.06)

    method = bootstrap({"lora": scores, "other": -scores}).methods["lora"]
    assert (method.seeds, method.interaction) == approximately(a, e)


def test_one_seed_agrees_with_scipys_bootstrap() -> None:
    first, second = (right_or_wrong(0, 1, 500, accuracy)[0] for accuracy in (0.8, 0.85))
    expected = scipy.stats.bootstrap(
        (first - second,), np.mean, method="percentile", rng=np.random.default_rng(0)
    )
    ours = bootstrap({"a": [first], "b": [second]}).difference("a", "b")
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval), abs=2e-3)


@EXAMPLES
@given(SEED, st.integers(1, 4), st.integers(1, 4))
def test_a_difference_has_a_sign_and_no_order_of_rows(seed: int, first: int, second: int) -> None:
    scores = {"a": right_or_wrong(seed, first, 200), "b": right_or_wrong(seed, second, 200, 0.8)}
    there, back = (bootstrap(scores).difference(*pair) for pair in ("ab", "ba"))
    assert (there.value, there.low, there.high) == approximately(-back.value, -back.high, -back.low)
    assert (there.p, there.smallest) == approximately(back.p, back.smallest)
    order = np.random.default_rng(seed).permutation(200)
    mixed = bootstrap({name: each[:, order] for name, each in scores.items()})
    again = mixed.difference("a", "b")
    assert (again.low, again.high, again.p) == approximately(there.low, there.high, there.p)
    assert there.low <= there.value <= there.high
    if there.test == "bootstrap":
        assert (there.p < 0.05) == (there.low > 0 or there.high < 0)


def test_methods_that_agree_on_every_row_are_not_equal_for_certain() -> None:
    ones = np.ones((3, 400))
    result = bootstrap({"a": ones, "b": ones})
    both = result.difference("a", "b")
    assert both.low < 0 == both.value < both.high
    assert both.p == 1.0
    mean = result.mean("a")
    wilson = scipy.stats.binomtest(400, 400).proportion_ci(0.95, "wilson")
    assert (mean.low, mean.high) == pytest.approx(tuple(wilson), abs=1e-4)
    equal = bootstrap({"a": 7 * ones, "b": 7 * ones}).difference("a", "b")
    assert (equal.low, equal.high, equal.p) == (0, 0, 1)


@EXAMPLES
@given(SEED, st.integers(3, 10))
def test_the_smallest_difference_is_shown_four_times_in_five(seed: int, seeds: int) -> None:
    scores = {"a": right_or_wrong(seed, seeds, 500), "b": right_or_wrong(seed + 1, seeds, 500)}
    ours = bootstrap(scores).difference("a", "b")
    half = ours.high - ours.value
    # The degrees of freedom, from the two quantiles of t whose sum `smallest` is.
    freedom = scipy.optimize.brentq(
        lambda nu: (
            scipy.stats.t.ppf(0.8, nu) / scipy.stats.t.ppf(0.975, nu) - ours.smallest / half + 1
        ),
        1.0,
        1e6,
    )
    critical = scipy.stats.t.ppf(0.975, freedom)
    power = scipy.stats.nct.sf(critical, freedom, critical * ours.smallest / half)
    assert power == pytest.approx(0.8, abs=0.03)


@EXAMPLES
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holms_correction(p_values: list[float]) -> None:
    in_order = sorted(p_values)
    count = len(p_values)
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        smaller = [(count - rank) * other for rank, other in enumerate(in_order) if other <= p]
        assert corrected == min(1.0, max(smaller))


def test_holms_example() -> None:
    """0.01, 0.04, 0.03, 0.005: the example of R's p.adjust in many texts."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == approximately(0.03, 0.06, 0.06, 0.02)
    assert holm([]) == []


@EXAMPLES
@given(SEED, st.integers(0, 13), st.floats(0, 1))
def test_methods_share_a_letter_if_and_only_if_they_cannot_be_told_apart(
    seed: int, count: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    names = [f"m{number}" for number in range(count)]
    means = dict(zip(names, random.random(count).tolist(), strict=True))
    p_values = {
        pair: 0.01 if random.random() < share else 0.5 for pair in itertools.combinations(names, 2)
    }
    letters = groups(means, p_values)
    assert list(letters) == names
    if "(" not in "".join(letters.values()):  # more than 52 letters
        for pair, p in p_values.items():
            assert bool({*letters[pair[0]]} & {*letters[pair[1]]}) == (p >= 0.05)
    assert all(letters.values())
    if names:
        assert "a" in letters[max(names, key=means.__getitem__)]


def test_letters_of_groups() -> None:
    means = {"full": 0.9, "lora": 0.89, "dora": 0.88, "head": 0.7}
    p_values = {
        ("full", "lora"): 0.3, ("full", "dora"): 0.01, ("lora", "dora"): 0.6,
        ("full", "head"): 1e-9, ("lora", "head"): 1e-9, ("dora", "head"): 1e-9,
    }  # fmt: skip
    assert groups(means, p_values) == {"full": "a", "lora": "ab", "dora": "b", "head": "c"}
    assert groups(means, dict.fromkeys(p_values, 1.0)) == dict.fromkeys(means, "a")
    assert groups({"lora": 0.5}, {}) == {"lora": "a"}


def test_all_pairs_are_corrected_together() -> None:
    accuracies = {"full": 0.9, "lora": 0.89, "head": 0.6}
    scores = {name: right_or_wrong(1, 3, 1000, accuracy) for name, accuracy in accuracies.items()}
    result = bootstrap(scores)
    pairs = result.differences()
    single = [result.difference(*pair).p for pair in pairs]
    assert list(pairs) == [("full", "lora"), ("full", "head"), ("lora", "head")]
    assert [pair.p for pair in pairs.values()] == holm(single)
    means = {name: result.mean(name).value for name in scores}
    p_values = {names: pair.p for names, pair in pairs.items()}
    assert groups(means, p_values) == {"full": "a", "lora": "a", "head": "b"}
    one = result.differences([("lora", "head")])["lora", "head"]
    assert one == result.difference("lora", "head")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": [1.0, 0.0]}, "the scores of a have the shape (2,). Pass (seeds, rows)"),
        ({"a": [[1.0]]}, "the shape (1, 1)"),
        ({"a": [[1.0, math.nan]]}, "the scores of a hold NaN or infinity"),
        ({"a": [[1.0, 0.0]], "b": [[1.0, 0.0, 1.0]]}, "different numbers of rows: a 2, b 3."),
    ],
)
def test_scores_that_cannot_be_compared(scores: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        bootstrap(scores)
    assert message in str(error.value)


def test_only_rows_that_count_have_a_least_variance() -> None:
    """That of one row on which the methods differ. Differences of fractions may be smaller."""
    chance = np.random.default_rng(0)
    first = chance.uniform(0.2, 0.8, (1, 50))
    near = bootstrap({"a": first, "b": first + 0.001 * chance.standard_normal((1, 50))})
    assert near.difference("a", "b").high - near.difference("a", "b").low < 0.001
    equal = bootstrap({"a": first, "b": first})
    assert equal.difference("a", "b").high > 0.02
    assert equal.difference("a", "b").p == 1


def test_intervals_hold_the_truth_and_a_method_does_not_differ_from_itself() -> None:
    """benchmarks/coverage.py at one cell; the bounds are 4 standard errors of 600 studies wide."""
    measured = shares((3, 300, 0.5, 0.65), 600)
    error = 100 * math.sqrt(0.05 * 0.95 / 600)
    assert abs(measured["mean"] - 95) < 4 * error
    assert abs(measured["difference"] - 95) < 4 * error
    assert measured["a_a"] < 5 + 4 * error
