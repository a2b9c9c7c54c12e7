"""How often the intervals of comparisons contain the true value, in simulated studies.

python -m benchmarks.coverage [--studies 4000] [--json FILE]

A study is two methods with accuracies of 85 % and 84 %, each trained with some seeds and scored on
the same rows. A run has a row right if

    level + shift of the run + 2 · difficulty of the row for the method + noise > 0

where all but the level are normal, and the difficulties for the two methods are correlated. With
the factor 2, two runs of one method disagree on about 10 % of the rows. Per hundred studies:

    mean        the interval of the first method's mean contains its accuracy
    difference  the interval of the methods' difference contains that of their accuracies
    resampled   so do the percentiles of 1,000 resamples of seeds and rows, without corrections
    a_a         a difference is reported between the first method and itself with other seeds
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import write
from lora.finetune.comparison.statistics import SIGNIFICANT, bootstrap

SEEDS, ROWS, POINTS = (1, 2, 3, 5, 10), (200, 500, 2000), (0.0, 0.3, 1.0, 3.0)
CORRELATIONS = (0.5, 0.8)
FIRST, SECOND = 0.85, 0.84  # accuracies
DIFFICULTY = 2.0  # standard deviation of the rows' difficulties; that of the noise is 1
RESAMPLES = 1000
RESAMPLED = 500  # studies: resampling takes most of the time, and is here for comparison only

Array = NDArray[np.float64]
Cell = tuple[int, int, float, float]  # seeds, rows, points, correlation


def study(random: np.random.Generator, cell: Cell) -> dict[str, Array]:
    """Returns the scores (seeds, rows) of the two methods, and of the first trained again.

    points: the standard deviation of a method's accuracy over the seeds, in points.
    """
    seeds, rows, points, correlation = cell
    shared, *apart = random.standard_normal((3, rows))
    first, second = (
        math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * each for each in apart
    )
    return {
        "first": runs(random, seeds, FIRST, points, first),
        "second": runs(random, seeds, SECOND, points, second),
        "again": runs(random, seeds, FIRST, points, first),
    }


def runs(
    random: np.random.Generator, seeds: int, accuracy: float, points: float, difficulty: Array
) -> Array:
    """Returns the scores (seeds, rows) of a method, whose mean over all seeds is `accuracy`."""
    normal = NormalDist()
    quantile, spread = normal.inv_cdf(accuracy), math.hypot(1, DIFFICULTY)
    shift = points / 100 * spread / normal.pdf(quantile)
    level = quantile * math.hypot(spread, shift)
    shifts = shift * random.standard_normal((seeds, 1))
    noise = random.standard_normal((seeds, difficulty.size), dtype=np.float32)
    return (level + shifts + DIFFICULTY * difficulty + noise > 0).astype(float)


@functools.cache
def row_weights(rows: int) -> NDArray[np.float32]:
    """Returns the share of each row in each resample (resamples, rows)."""
    random = np.random.default_rng(1)
    counts = random.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    return (counts / rows).astype(np.float32)  # whose products take half of the time


def percentiles(random: np.random.Generator, scores: Mapping[str, Array]) -> tuple[float, float]:
    """Returns the uncorrected interval: percentiles of the resampled first less second."""
    means = []
    for name in ("first", "second"):
        seeds, rows = scores[name].shape
        by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        by_row = row_weights(rows) @ scores[name].astype(np.float32).T
        means.append((by_row * by_seed).sum(1))
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return float(low), float(high)


def shares(cell: Cell, studies: int) -> dict[str, float]:
    """Returns how many of a hundred studies are as the module's text says."""
    random = np.random.default_rng([round(10 * value) for value in cell])
    counts, resampled = Counter[str](), min(studies, RESAMPLED)
    for number in range(studies):
        scores = study(random, cell)
        result = bootstrap(scores)
        mean, difference = result.mean("first"), result.difference("first", "second")
        counts["mean"] += mean.low <= FIRST <= mean.high
        counts["difference"] += difference.low <= FIRST - SECOND <= difference.high
        counts["a_a"] += result.difference("first", "again").p < SIGNIFICANT
        if number < resampled:
            low, high = percentiles(random, scores)
            counts["resampled"] += low <= FIRST - SECOND <= high
    return {
        name: round(100 * counts[name] / (resampled if name == "resampled" else studies), 1)
        for name in ("mean", "difference", "resampled", "a_a")
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--studies", type=int, default=4000)
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    every = itertools.product(SEEDS, ROWS, POINTS, CORRELATIONS)
    # One seed tells nothing about other seeds.
    cells = [cell for cell in every if cell[0] > 1 or not cell[2]]
    table = []
    with ProcessPoolExecutor() as pool:
        found = pool.map(shares, cells, itertools.repeat(given.studies))
        for cell, counted in zip(cells, found, strict=True):
            settings = dict(zip(("seeds", "rows", "points", "correlation"), cell, strict=True))
            row = {**settings, **counted}
            if not table:
                print(*(f"{head:>11}" for head in row))
            print(*(f"{value:>11}" for value in row.values()), flush=True)
            table.append(row)
    if given.json:
        write(given.json, {"studies": given.studies, "cells": table})


if __name__ == "__main__":
    main()
