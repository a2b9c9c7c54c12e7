"""What a classifier confuses: scores of each class, the confusion matrix, and a warning if it
predicts a single class.

    report = class_report(predictions, references, labels, names)
    scores, report = scores_of_file(Path("run/predictions.jsonl"))
    print(report)         # two tables in Markdown
    report.as_dict()      # for lora eval --json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.finetune.answers import scores_of_answers
from lora.finetune.comparison.tables import markdown
from lora.finetune.config import read_toml
from lora.finetune.data.corpus import (
    LONGEST_LABEL,
    MOST_CLASSES,
    read_predictions,
    sorted_labels,
)
from lora.finetune.metrics import leading, score
from lora.finetune.record import summary_of

CONFUSIONS_LISTED = 20


@dataclass(frozen=True)
class ClassRow:
    """The scores of one class."""

    label: str
    name: str  # the label again if the class has no name
    precision: float  # 0 if the class is never predicted
    recall: float  # 0 if the class has no row
    f1: float
    rows: int

    @property
    def shown(self) -> str:
        """The label, or name and label: positive (1)."""
        label = self.label[:LONGEST_LABEL]
        return label if self.name == self.label else f"{self.name} ({label})"


@dataclass(frozen=True)
class ClassReport:
    """The scores of each class, and how often each label was predicted as each class."""

    classes: tuple[ClassRow, ...]
    matrix: tuple[tuple[int, ...], ...]  # [label][prediction], in the order of `classes`

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as lora eval --json prints it."""
        return {"classes": [asdict(row) for row in self.classes], "confusion": self.matrix}

    def __str__(self) -> str:
        tables = [markdown(self._score_rows())]
        if len(self.classes) <= MOST_CLASSES:
            tables.append("rows: the labels; columns: the predictions\n")
            tables.append(markdown(self._matrix_rows()))
        elif confusions := self._confusion_rows():
            tables.append("the most frequent confusions\n")
            tables.append(markdown([("label", "prediction", "rows"), *confusions]))
        return f"{tables[0]}\n{''.join(tables[1:])}"

    def _score_rows(self) -> list[tuple[str, ...]]:
        head = ("class", "precision", "recall", "F1", "rows")
        return [head, *(
            (each.shown, f"{each.precision:.4f}", f"{each.recall:.4f}", f"{each.f1:.4f}",
             str(each.rows))
            for each in self.classes
        )]  # fmt: skip

    def _matrix_rows(self) -> list[tuple[str, ...]]:
        head = ("", *(each.shown for each in self.classes))
        rows = zip(self.classes, self.matrix, strict=True)
        return [head, *((each.shown, *map(str, counts)) for each, counts in rows)]

    def _confusion_rows(self) -> list[tuple[str, ...]]:
        """Returns the pairs of a label and a wrong prediction that occur most often."""
        pairs = [
            (count, label.shown, prediction.shown)
            for label, counts in zip(self.classes, self.matrix, strict=True)
            for prediction, count in zip(self.classes, counts, strict=True)
            if count and label is not prediction
        ]
        pairs.sort(key=lambda pair: -pair[0])
        return [(label, other, str(count)) for count, label, other in pairs[:CONFUSIONS_LISTED]]


def class_report(
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    names: Sequence[str] = (),
) -> ClassReport:
    """Returns the scores of each class, in the order of the labels, by scikit-learn.

    Classes that occur and are not among the labels come last. names: what to show for the labels.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    others = {*predictions, *references} - {*labels}
    order = [*labels, *sorted_labels(others)]
    # Each pair once, with its count: sklearn takes long to compare many texts.
    pairs = Counter(zip(references, predictions, strict=True))
    true, predicted = zip(*pairs, strict=True)
    counts = list(pairs.values())
    scores = precision_recall_fscore_support(
        true, predicted, labels=order, sample_weight=counts, zero_division=0.0
    )
    named = dict(zip(labels, names))
    classes = tuple(
        ClassRow(label, named.get(label, label), float(precision), float(recall), float(f1),
                    int(rows))
        for label, precision, recall, f1, rows in zip(order, *scores, strict=True)
    )  # fmt: skip
    matrix = confusion_matrix(true, predicted, labels=order, sample_weight=counts).tolist()
    return ClassReport(classes, tuple(map(tuple, matrix)))


def scores_of_file(
    path: Path, task: str | None = None
) -> tuple[dict[str, float], ClassReport | None]:
    """Returns the scores of a file of predictions; of a classifier also those of each class.

    The task, the order of the labels and their names are those of the run in whose folder the file
    is. Default: classification. Raises DataError or RunError.
    """
    complete = (path.parent / "summary.json").is_file()
    if task is None:
        task = summary_of(path.parent)["task"] if complete else "classification"
    answers = read_predictions(path)
    predictions, references, _ = answers
    config = path.parent / "config.toml"
    needed = task != "regression" or config.is_file()  # numbers are scored without it
    table = read_toml(config) if complete and needed else {}
    if task == "text" and complete:  # as the run counted
        return leading(scores_of_answers(table["data"], answers), table.get("metric", "")), None
    scores = leading(score(task, predictions, references), table.get("metric", ""))
    if task != "classification":
        return scores, None
    first = [texts[0] for texts in references]
    labels, names = table.get("labels", ()), table.get("class_names", ())
    return scores, class_report(predictions, first, labels, names)


def single_class(
    predictions: Sequence[str], references: Sequence[str], split: str, rate: float, weighted: bool
) -> str:
    """Returns a warning if every row of a split is predicted as one class although others occur,
    else "". rate: the learning rate. weighted: whether the classes have weights already."""
    if len({*predictions}) != 1 or len({*references}) == 1:
        return ""
    right = sum(map(str.__eq__, predictions, references)) / len(references)
    weights = "" if weighted else " If the classes differ in size, try --class-weights balanced."
    return (
        f"all {len(predictions)} rows of {split} are predicted {predictions[0]!r}, which is right"
        f" for {right:.0%}: the model does not tell the classes apart. Try another --learning-rate"
        f" than {rate:g}, such as {rate / 5:.1g} or {rate * 5:.1g}, or more --epochs.{weights}"
    )
