"""What classifiers and generators get wrong: confusions, scores per class, and the rows on which
methods disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora.finetune.metrics import normalise
from lora.finetune.report.evidence import Answers

MATRIX_CLASSES = 20
"""With more classes a confusion matrix cannot be read, and only its largest cells are listed."""


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of a class over all seeds, and its rows in one of them."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


def classes_in(answers: Answers) -> list[str]:
    """Returns the classes that occur in the labels or in the predictions, in order."""
    labels = {reference[0] for reference in answers.references}
    for seeds in answers.predictions.values():
        labels = labels.union(*seeds)
    return sorted(labels, key=lambda label: (not label.isdecimal(), len(label) * label.isdecimal(),
                                             label))  # fmt: skip


def class_scores(answers: Answers, method: str, labels: Sequence[str]) -> list[ClassScores]:
    """Returns the scores of each class, from the rows of all seeds together."""
    from sklearn.metrics import precision_recall_fscore_support

    # Pairs with their counts: sklearn takes long to compare hundreds of thousands of texts.
    counts = confusions(answers, method)
    true, predicted = zip(*counts, strict=True)
    columns = precision_recall_fscore_support(
        true, predicted, labels=list(labels), sample_weight=list(counts.values()), zero_division=0.0
    )
    seeds = len(answers.predictions[method])
    return [
        ClassScores(label, float(p), float(r), float(f), int(rows) // seeds)
        for label, p, r, f, rows in zip(labels, *columns, strict=True)
    ]


def confusions(answers: Answers, method: str) -> Counter[tuple[str, str]]:
    """Returns how often a class was predicted for a row of a class: (true, predicted) -> rows,
    summed over the seeds."""
    true = [reference[0] for reference in answers.references]
    counts: Counter[tuple[str, str]] = Counter()
    for predicted in answers.predictions[method]:
        counts.update(zip(true, predicted, strict=True))
    return counts


@dataclass(frozen=True)
class Disagreement:
    """A row that some methods have right and others do not, by the majority of their seeds."""

    row: int
    right: dict[str, str]  # method -> what it predicted most often
    wrong: dict[str, str]


def disagreements(answers: Answers, task: str) -> list[Disagreement]:
    """Returns the rows on which the methods disagree. The rows that divide the methods most evenly
    come first. There are none in regression, where no prediction is simply right."""
    if task == "regression":
        return []
    same: Callable[[str], str] = str if task == "classification" else normalise
    result = []
    for row, references in enumerate(answers.references):
        expected = {same(text) for text in references}
        right, wrong = {}, {}
        for method, seeds in answers.predictions.items():
            hits = [seed[row] for seed in seeds if same(seed[row]) in expected]
            misses = [seed[row] for seed in seeds if same(seed[row]) not in expected]
            if len(hits) > len(misses):
                right[method] = Counter(hits).most_common(1)[0][0]
            else:
                wrong[method] = Counter(misses).most_common(1)[0][0]
        if right and wrong:
            result.append(Disagreement(row, right, wrong))
    return sorted(result, key=lambda each: -min(len(each.right), len(each.wrong)))
