"""Divides rows into train, dev and test.

Rows that belong together, such as copies of a text, stay in one split: a model that has seen a text
knows its answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def groups_by(rows: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Groups the rows with equal keys, in the order of the first of each."""
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def divided(groups: Sequence[list[T]]) -> dict[str, list[T]]:
    """Divides groups of rows 80/10/10 at random, in the same way each time."""
    order = [*groups]
    random.Random(0).shuffle(order)  # not the run's seed: the splits stay the same
    tenth = max(1, len(order) // 10)
    parts = {"test": order[:tenth], "dev": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {split: [*itertools.chain(*part)] for split, part in parts.items()}


def without_tenth(groups: Sequence[list[T]]) -> tuple[list[T], list[T]]:
    """Returns the rows of train and of dev: every tenth group is dev, of fewer groups the last.
    Train is empty if there is one group. No shuffle: the rows stay in their order."""
    step = min(10, max(len(groups), 1))
    kept = [group for i, group in enumerate(groups, 1) if i % step]
    return [*itertools.chain(*kept)], [*itertools.chain(*groups[step - 1 :: step])]
