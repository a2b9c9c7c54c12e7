"""What classifiers and generators get wrong: the classes that they confuse, and the rows on which
methods disagree."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from lora.finetune.class_report import ClassReport, class_report
from lora.finetune.data.corpus import sorted_labels
from lora.finetune.report.evidence import Answers


@functools.cache  # the tables and the charts need them
def reports_of(answers: Answers) -> dict[str, ClassReport]:
    """Returns the class report of each method, over the predictions of all its seeds. All have the
    same classes, also those that a method never predicts."""
    true = [reference[0] for reference in answers.references]
    seen = {label for seeds in answers.predictions.values() for seed in seeds for label in seed}
    labels = (*answers.labels, *sorted_labels(seen.union(true).difference(answers.labels)))
    return {
        method: class_report([label for seed in seeds for label in seed], true * len(seeds), labels)
        for method, seeds in answers.predictions.items()
    }


@dataclass(frozen=True)
class Disagreement:
    """A row that some methods have right and others do not, by the majority of their seeds."""

    row: int
    right: dict[str, str]  # method -> what it predicted most often
    wrong: dict[str, str]


def disagreements(answers: Answers) -> list[Disagreement]:
    """Returns the rows on which the methods disagree. The rows that divide the methods most evenly
    come first. There are none in regression, where no prediction is simply right."""
    result = []
    for row in range(len(answers.references)):
        right, wrong = {}, {}
        for method, marks in answers.right.items():
            seeds = list(zip(answers.predictions[method], marks, strict=True))
            hits = [texts[row] for texts, good in seeds if good[row]]
            misses = [texts[row] for texts, good in seeds if not good[row]]
            if len(hits) > len(misses):
                right[method] = Counter(hits).most_common(1)[0][0]
            else:
                wrong[method] = Counter(misses).most_common(1)[0][0]
        if right and wrong:
            result.append(Disagreement(row, right, wrong))
    return sorted(result, key=lambda each: -min(len(each.right), len(each.wrong)))
