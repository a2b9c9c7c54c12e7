"""Computes how certain scores are: intervals of means, tests of differences, and sentences on them.

bootstrap       means and differences of methods, each with one or several seeds
mcnemar         the exact test for one run each
holm, groups    many differences at once
"""

from __future__ import annotations

import itertools
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lora.errors import DataError

if TYPE_CHECKING:  # numpy and scipy load where they compute: `lora train --help` needs neither
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

SIGNIFICANT = 0.05  # a p-value below this shows a difference
POWER = 0.8  # how often a study should detect a difference of `smallest`


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Returns the p-value of McNemar's exact test, for two models on the same rows.

    first, second: whether each model's prediction is right, row by row. Only the rows that one of
    them has right count. If the models are equally good, each has half of those rows.
    """
    from scipy.stats import binomtest

    counts = Counter(zip(first, second, strict=True))
    only_first, only_second = counts[True, False], counts[False, True]
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def difference(
    name: str, other: str, points: float, p: float, limits: tuple[float, float] | None = None
) -> str:
    """Returns the result of a test in words.

    points: by how much `name` is better. limits: the ends of the interval of points, if known.
    """
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    if p >= SIGNIFICANT:
        span = f" ({limits[0]:+.1f} to {limits[1]:+.1f} points)" if limits else ""
        return f"no difference shown{span}, {shown}"
    better, sign = (name, 1) if points > 0 else (other, -1)
    low, high = sorted(sign * limit for limit in limits or (points, points))
    span = f" ({low:.1f} to {high:.1f})" if limits else ""
    return f"{better} is better by {abs(points):.1f} points{span}, {shown}"


def majority(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Returns the accuracy on `held_out` of always predicting the most frequent label of `train`.

    Of equally frequent labels, the first in the alphabet is predicted.
    """
    counts = Counter(train)
    most = min(counts, key=lambda label: (-counts[label], label))
    return sum(label == most for label in held_out) / len(held_out)


@dataclass(frozen=True)
class Mean:
    """The mean score of a method, with its 95 % interval.

    With one seed, the interval takes only the choice of the test rows into account.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean score of one method less that of another, with its 95 % interval.

    With one seed, the choice of the seed is not taken into account: another run may differ by more.
    """

    value: float
    low: float
    high: float
    p: float  # of this difference alone, or with Holm's correction: see `Bootstrap.differences`
    test: Literal["McNemar", "bootstrap"]
    smallest: float  # the smallest difference that such a study detects with a probability of POWER


@dataclass(frozen=True)
class _Method:
    """The scores of a method, and the two variances of its mean that its seeds tell."""

    scores: Array  # (seeds, rows)
    by_row: Array  # (rows,): means over the seeds
    mean: float
    seeds: float  # A of `bootstrap`: variance of the run means / seeds; 0 with one seed
    interaction: float  # E of `bootstrap`: the part of A that is seed x row noise; 0 with one seed


@dataclass(frozen=True)
class Bootstrap:
    """The means of several methods on the same rows, and how sure they and their differences are.

    Made by `bootstrap`, which states the equations.
    """

    methods: Mapping[str, _Method]
    bounded: bool  # all scores are from 0 to 1

    def mean(self, name: str) -> Mean:
        """Returns a method's mean and its interval.

        Scores from 0 to 1 get Wilson's interval of as many rows as would have this variance, with
        the quantile of t if there are several seeds (Franco, Little, Louis and Slud 2019, J. Survey
        Statistics and Methodology 7(3)): mean ± t error is too short near 0 and 1.
        """
        method = self.methods[name]
        value, one_seed = method.mean, len(method.scores) == 1
        variance, freedom = _variance(method.by_row, [method])
        t = _quantile(math.inf if self.bounded and one_seed else freedom, 0.975)
        center, half = value, t * math.sqrt(variance)
        if self.bounded:
            rows = 1 + value * (1 - value) / variance if variance else method.by_row.size
            shrink = 1 + t**2 / rows
            center = (value + t**2 / (2 * rows)) / shrink
            half = t * math.sqrt(value * (1 - value) / rows + (t / (2 * rows)) ** 2) / shrink
        return Mean(value, center - half, center + half)

    def difference(self, first: str, second: str) -> Difference:
        """Returns the mean of `first` less that of `second`, with McNemar's exact test if both have
        one run of rows that are right or wrong, otherwise with the t test of the bootstrap."""
        from scipy.special import stdtr

        pair = [self.methods[first], self.methods[second]]
        value = pair[0].mean - pair[1].mean
        seeds = [len(method.scores) for method in pair]
        by_row = pair[0].by_row - pair[1].by_row
        counts = all(((m.scores == 0) | (m.scores == 1)).all() for m in pair)
        # Two methods that agree on every row of a small test split are not equal for certain.
        least = 1 / by_row.size**2 if self.bounded and (counts or not by_row.any()) else 0.0
        variance, freedom = _variance(by_row, pair, least)
        error = math.sqrt(variance)
        half = _quantile(freedom, 0.975) * error
        smallest = half + _quantile(freedom, POWER) * error
        limits = value - half, value + half
        if seeds == [1, 1] and counts:
            p = mcnemar(*((method.scores[0] == 1).tolist() for method in pair))
            return Difference(value, *limits, p, "McNemar", smallest)
        p = 2 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
        return Difference(value, *limits, p, "bootstrap", smallest)

    def differences(
        self, pairs: Iterable[tuple[str, str]] | None = None
    ) -> dict[tuple[str, str], Difference]:
        """Returns the difference of each pair of methods, by default of all, with Holm's correction
        of their p-values. The intervals are those of each pair alone."""
        pairs = list(pairs) if pairs is not None else list(itertools.combinations(self.methods, 2))
        single = [self.difference(*pair) for pair in pairs]
        corrected = holm([difference.p for difference in single])
        return {
            pair: replace(difference, p=p)
            for pair, difference, p in zip(pairs, single, corrected, strict=True)
        }


def bootstrap(scores: Mapping[str, ArrayLike]) -> Bootstrap:
    """Returns how sure the means of several methods are, by a bootstrap of rows and seeds.

    scores   by method, each (seeds, rows): the score of every test row in every run. All methods
             have the same rows in the same order; the number of seeds may differ.

    Rows are crossed with seeds: all runs, of all methods, share them. The pigeonhole bootstrap
    (Owen 2007, Ann. Appl. Stat. 1(2), doi 10.1214/07-AOAS122) resamples both, and a mean over n
    rows and S seeds then has, with infinitely many resamples, the variance

        R (n-1)/n + A (S-1)/S + E (n-1)(S-1)/(nS)

        R = variance of the row means / n      A = variance of the run means / S
        E = residual mean square / (nS), of the analysis of variance with rows and seeds

    R and A each contain the seed x row noise, which E estimates, so it is counted three times, and
    (S-1)/S takes a third of A away at 3 seeds (Davison and Hinkley 1997, Bootstrap Methods and
    Their Application, §3.8). Both are corrected here, and no resamples are drawn, since for means
    they would add random error only:

        V = max(R - E, 0) + max(A, E/2)         ν = V² / (R²/(n-1) + A²/(S-1))

    and mean ± t_ν √V (Satterthwaite 1946). For a difference, R is that of the row-wise differences,
    so that rows which are hard for both methods cancel, and A and E are sums over both methods.
    Run means that agree better than their own noise allows are luck, so that A counts at least half
    of E: all of it covers too much, nothing calls two methods different whose seeds happen to
    agree. With one seed A = E = 0: the result takes only the rows into account.

    In simulated studies (benchmarks/coverage.py) the intervals contain the true value in 94 to 96 %
    of studies with 3 to 10 seeds, and in 92 to 97 % with 2, depending on how much the seeds vary.

    Raises DataError.
    """
    import numpy as np

    arrays = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
            raise DataError(
                f"the scores of {name} have the shape {array.shape}. Pass (seeds, rows), with at"
                " least one seed and two rows."
            )
        if not np.isfinite(array).all():
            raise DataError(f"the scores of {name} hold NaN or infinity. Pass finite scores.")
    rows = {name: array.shape[1] for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        raise DataError(f"the methods have different numbers of rows: {shown}. Pass the same rows.")
    bounded = all(array.min() >= 0 and array.max() <= 1 for array in arrays.values())
    return Bootstrap({name: _decomposed(array) for name, array in arrays.items()}, bounded)


def _decomposed(scores: Array) -> _Method:
    """Returns the scores of a method with their means, and A and E of `bootstrap`."""
    seeds, rows = scores.shape
    by_row, by_run, mean = scores.mean(0), scores.mean(1), float(scores.mean())
    if seeds == 1:
        return _Method(scores, by_row, mean, 0.0, 0.0)
    residuals = scores - by_row - by_run[:, None] + mean
    mean_square = float((residuals**2).sum()) / ((seeds - 1) * (rows - 1))
    run_variance = float(by_run.var(ddof=1))
    return _Method(scores, by_row, mean, run_variance / seeds, mean_square / (rows * seeds))


def _variance(by_row: Array, methods: Sequence[_Method], least: float = 0.0) -> tuple[float, float]:
    """Returns V and ν of `bootstrap`.

    by_row: the row means of the method, or of the difference of two. least: R is at least this.
    """
    rows = max(float(by_row.var(ddof=1)) / by_row.size, least)
    parts = [max(method.seeds, method.interaction / 2) for method in methods]
    variance = max(rows - sum(method.interaction for method in methods), 0.0) + sum(parts)
    uncertainty = rows**2 / (by_row.size - 1) + sum(
        part**2 / (len(method.scores) - 1)
        for part, method in zip(parts, methods, strict=True)
        if part
    )
    return variance, variance**2 / uncertainty if uncertainty else math.inf


def _quantile(freedom: float, probability: float) -> float:
    """Returns the quantile of Student's t."""
    from scipy.special import ndtri, stdtrit

    finite = math.isfinite(freedom)
    return float(stdtrit(freedom, probability) if finite else ndtri(probability))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values with Holm's correction, in the given order.

    If those below 0.05 are called different, then the chance of one false call or more among all of
    them is at most 5 %.  Holm 1979, Scand. J. Statistics 6(2).
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def groups(means: Mapping[str, float], p_values: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """Returns the letters of each method: between two with a common one, no difference is shown.

    means     of each method; the letter a goes to the group that holds the best of them
    p_values  of each pair, in either order, after Holm's correction

    Two methods may share a letter with a third and none with each other. This is the compact letter
    display of Piepho 2004 (J. Comp. Graph. Statistics 13(2)): each letter is a largest set of
    methods of which no two differ, and letters that say nothing more than the others are left out.
    """
    names = sorted(means, key=lambda name: (-means[name], name))
    differ = {frozenset(pair) for pair, p in p_values.items() if p < SIGNIFICANT}
    sets = [set(names)] if names else []
    for pair in sorted(differ, key=lambda pair: sorted(map(names.index, pair))):
        # No set may hold both: one copy goes on without the first, another without the second.
        split = [kept - {name} for kept in sets if pair <= kept for name in pair]
        sets = [kept for kept in sets if not pair <= kept]
        for candidate in split:  # absorbed, if another set says as much
            if not any(candidate <= kept for kept in sets):
                sets = [kept for kept in sets if not kept <= candidate] + [candidate]
    sets.sort(key=lambda kept: sorted(map(names.index, kept)))
    for candidate in reversed(list(sets)):  # left out, if other letters show each of its pairs
        others = [kept for kept in sets if kept is not candidate]
        shared = [{*pair} for pair in itertools.combinations_with_replacement(candidate, 2)]
        if all(any(pair <= kept for kept in others) for pair in shared):
            sets = others
    letters = [*string.ascii_letters, *(f"({number})" for number in range(53, len(sets) + 1))]
    return {
        name: "".join(letter for letter, kept in zip(letters, sets, strict=False) if name in kept)
        for name in means
    }
