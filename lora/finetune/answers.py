"""Scores of written answers: those of any text, and those that the included data sets define.

scores_of_answers(sources, answers)   the metrics
scores_by_row(sources, answers, ...)  the scores of which a metric is the mean
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from lora.errors import DataError
from lora.finetune.data.corpus import Predicted
from lora.finetune.data.included import common_metrics, metrics_of_answers, named
from lora.finetune.metrics import leading, matches, score

Answered = tuple[str, Sequence[str], str]  # prediction, references, name of the data set


def scores_of_answers(sources: Sequence[str], answers: Predicted) -> dict[str, float]:
    """Returns the metrics of all answers, and with several data sets also `metric/name` of each.

    sources: --data. The exact match of an included data set replaces the usual one. A group of data
    sets gets the metrics that all of them have. Raises DataError if an answer is of none of them.
    """
    names, rows = _rows(sources, answers)
    results: dict[str, float] = {}
    groups = [("", names), *((f"/{name}", [name]) for name in names if len(names) > 1)]
    for suffix, group in groups:
        chosen = [row for row in rows if row[2] in group]
        if not chosen:
            continue
        texts, references, _ = zip(*chosen, strict=True)
        own = _own_scores(sources, group, chosen)
        scores = {metric: fmean(values) for metric, values in own.items()}
        scores |= {k: v for k, v in score("text", texts, references).items() if k not in own}
        scores = leading(scores, "exact_match") if own else scores
        results |= {f"{metric}{suffix}": value for metric, value in scores.items()}
    return results


def scores_by_row(
    sources: Sequence[str], answers: Predicted, metric: str
) -> tuple[float, ...] | None:
    """Returns the scores of the answers of which exact_match, or a metric of an included data set,
    is the mean; None for other metrics. Raises DataError if an answer is of none of the data sets.
    """
    names, rows = _rows(sources, answers)
    if metric in (own := _own_scores(sources, names, rows)):
        return tuple(own[metric])
    if metric != "exact_match":
        return None
    return tuple(float(matches(text, texts)) for text, texts, _ in rows)


def _rows(sources: Sequence[str], answers: Predicted) -> tuple[list[str], list[Answered]]:
    """Returns the data sets' names, and the answers with the name of the data set of each."""
    names = [named(source)[0] for source in sources]
    tasks = list(answers.tasks)
    if len(names) == 1:  # the answers of a single data set do not name it
        tasks = names * len(tasks)
    elif unknown := {task or "no data set" for task in tasks} - set(names):
        raise DataError(
            f"a prediction is of {min(unknown)}, and the run's data sets are {', '.join(names)}."
            " Restore the run's predictions.jsonl."
        )
    return names, list(zip(answers.predictions, answers.references, tasks, strict=True))


def _own_scores(
    sources: Sequence[str], group: Collection[str], rows: Sequence[Answered]
) -> dict[str, list[float]]:
    """Returns the score of each row by the metrics that all data sets of a group define. Empty if
    one of them defines none."""
    own = metrics_of_answers(sources)
    return {
        metric: [
            max(own[name][metric](text, right) for right in texts) for text, texts, name in rows
        ]
        for metric in common_metrics(own, group)
    }
