"""The learning curves of a method: the mean over its seeds, and the band between the lowest and
the highest seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora.finetune.record import Evaluated, StepRow, metrics_of

POINTS = 60  # at most, of a curve of the training loss


@dataclass(frozen=True)
class Point:
    """A place on a curve."""

    epoch: float
    mean: float
    low: float  # of the seeds
    high: float


def curves(folders: Sequence[Path], metric: str) -> dict[str, list[Point]]:
    """Returns the curves of runs that differ in their seed: "train loss", "dev loss", and the
    metric on dev if it was measured. A curve ends where the first of its seeds ends."""
    training, losses, scores = [], [], []
    for folder in folders:
        rows = metrics_of(folder)
        steps: list[StepRow] = [row for row in rows if row["kind"] == "step"]
        evaluations: list[Evaluated] = [row for row in rows if row["kind"] == "evaluation"]
        training.append(_binned(steps, evaluations))
        losses.append({row["epoch"]: row["dev_loss"] for row in evaluations})
        scores.append(
            {row["epoch"]: row["dev"][metric] for row in evaluations if metric in row["dev"]}
        )
    named = {"train loss": training, "dev loss": losses, metric: scores}
    return {name: points for name, seeds in named.items() if (points := _over_seeds(seeds))}


def _binned(steps: Sequence[StepRow], evaluations: Sequence[Evaluated]) -> dict[float, float]:
    """Returns the mean training loss of at most POINTS spans of equal length, by their last
    epoch."""
    if not steps or not evaluations:
        return {}
    per_epoch = evaluations[0]["step"] / evaluations[0]["epoch"]
    width = -(-steps[-1]["steps"] // POINTS)
    spans = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        round(span[-1]["step"] / per_epoch, 4): statistics.fmean(step["loss"] for step in span)
        for span in spans
    }


def _over_seeds(seeds: Sequence[Mapping[float, float]]) -> list[Point]:
    """Returns a point for each epoch that all seeds have."""
    shared = set.intersection(*(set(seed) for seed in seeds))
    points = []
    for epoch in sorted(shared):
        values = [seed[epoch] for seed in seeds]
        points.append(Point(epoch, statistics.fmean(values), min(values), max(values)))
    return points
