"""Says how sure a measured accuracy is: an interval for one, a test for the difference of two.

Both cover the choice of the test rows only. Neither covers the seed: another run of the same method
may differ by more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SIGNIFICANT = 0.05  # a p-value below this shows a difference


def interval(accuracy: float, rows: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of an accuracy that was measured on this many rows."""
    from scipy.stats import binomtest

    right = min(max(round(accuracy * rows), 0), rows)
    limits = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    return float(limits.low), float(limits.high)


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


def difference(name: str, other: str, points: float, p: float) -> str:
    """Returns the result of a test in words. points: by how much `name` is better."""
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    if p >= SIGNIFICANT:
        return f"no difference shown, {shown}"
    return f"{name if points > 0 else other} is better by {abs(points):.1f} points, {shown}"


def majority(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Returns the accuracy on `held_out` of always predicting the most frequent label of `train`.

    Of equally frequent labels, the first in the alphabet is predicted.
    """
    counts = Counter(train)
    most = min(counts, key=lambda label: (-counts[label], label))
    return sum(label == most for label in held_out) / len(held_out)
