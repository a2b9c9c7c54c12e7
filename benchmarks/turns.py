"""Contenders that take turns in one process, and the ratios of what they took."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping

Rounds = list[dict[str, float]]


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """What each contender returns, in each round, in an order that rotates from round to round."""
    names = list(contenders)
    found: Rounds = []
    for turn in range(rounds):
        print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        start = turn % len(names)
        found.append({name: contenders[name]() for name in names[start:] + names[:start]})
    print("\r" + " " * 24, end="\r", file=sys.stderr)
    return found


def median(rounds: Rounds, name: str) -> float:
    """The median of what a contender took."""
    return statistics.median(times[name] for times in rounds)


def ratio(rounds: Rounds, name: str, other: str) -> dict[str, float]:
    """The median, over the rounds, of one contender's over another's, with the quartiles."""
    low, middle, high = statistics.quantiles(
        [times[name] / times[other] for times in rounds], n=4, method="inclusive"
    )
    return {"median": middle, "low": low, "high": high}


def shown(found: Mapping[str, float]) -> str:
    return f"{found['median']:5.2f} [{found['low']:.2f}, {found['high']:.2f}]"
