"""Scores of written answers: those of any text, and those that the included data sets define.

scores_of_answers(sources, answers)   the metrics
right_answers(sources, answers)       whether each answer is right, as exact_match counts
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from lora.finetune.data.corpus import Predicted
from lora.finetune.data.included import metrics_of_answers, named
from lora.finetune.metrics import matches, score


def scores_of_answers(sources: Sequence[str], answers: Predicted) -> dict[str, float]:
    """Returns the metrics of all answers, and with several data sets also `metric/name` of each.

    sources: --data. The exact match of an included data set replaces the usual one. A group of data
    sets gets the metrics that all of them have.
    """
    names = [named(source)[0] for source in sources]
    results: dict[str, float] = {}
    groups = [("", names), *((f"/{name}", [name]) for name in names if len(names) > 1)]
    for suffix, group in groups:
        rows = [row for row in zip(*answers, strict=True) if (row[2] or names[0]) in group]
        if not rows:
            continue
        chosen = Predicted(*zip(*rows, strict=True))
        scores = score("text", chosen.predictions, chosen.references)
        own = _own_scores(sources, group, chosen)
        scores |= {metric: fmean(values) for metric, values in own.items()}
        results |= {f"{metric}{suffix}": value for metric, value in scores.items()}
    return results


def right_answers(sources: Sequence[str], answers: Predicted) -> tuple[bool, ...]:
    """Returns whether each answer is right, as the exact match of all of them counts."""
    own = _own_scores(sources, [named(source)[0] for source in sources], answers)
    if own:
        return tuple(map(bool, own["exact_match"]))
    return tuple(map(matches, answers.predictions, answers.references))


def _own_scores(
    sources: Sequence[str], group: Collection[str], answers: Predicted
) -> dict[str, list[float]]:
    """Returns the score of each answer by the metrics that all data sets of a group define. Empty
    if one of them defines none."""
    own = metrics_of_answers(sources)
    if not set(group) <= own.keys():
        return {}
    return {
        metric: [
            max(own[task or named(sources[0])[0]][metric](text, right) for right in texts)
            for text, texts, task in zip(*answers, strict=True)
        ]
        for metric in sorted(set.intersection(*(set(own[name]) for name in group)))
    }
