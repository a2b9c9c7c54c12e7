"""Metrics: pure functions of predictions and references. score(...) gives all of a task.

Accuracy, F1, ROUGE and exact match are in [0, 1], correlations in [-1, 1], BLEU in [0, 100] as in
sacrebleu.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import string
from collections.abc import Sequence
from typing import Any, Literal

from lora.errors import DataError
from lora.finetune.data.columns import LARGEST_LABEL

METRICS = {
    "classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "text": ("exact_match", "bleu", "rouge1", "rouge2", "rougeL"),
}
"""The metrics of each task's predictions."""
OF_TOKENS = ("perplexity", "token_accuracy")
"""The metrics of texts that need no generated answers."""
Metric = Literal[
    "", "accuracy", "macro_f1", "matthews", "pearson", "spearman", "mse", "exact_match", "bleu",
    "rouge1", "rouge2", "rougeL", "perplexity", "token_accuracy", "named_label", "within_one",
    "letters", "number", "date",
]  # fmt: skip
"""All of them, with those that only some included data sets have; "" for a task's default."""
NO_SHARES = ("matthews", "pearson", "spearman", "mse", "bleu", "perplexity")
"""Metrics that are not from 0 to 1. Tables show the others in percent."""
OF_RIGHT_ROWS = ("accuracy", "exact_match", "named_label", "within_one", "number", "date")
"""Metrics that are the share of right rows."""
LOWER = ("perplexity", "mse")  # metrics that are better if they are lower
LONG = 5
"""Hardly any answer equals a reference of more words, so exact match cannot compare models."""


def signed(metric: str, score: float | None) -> float:
    """Returns a score with the sign that makes larger better; less than any if there is none."""
    if score is None:
        return -math.inf
    return -score if metric in LOWER else score


def is_share(metric: str) -> bool:
    """True for a metric from 0 to 1, which tables show in percent."""
    return metric not in NO_SHARES


def leading(metrics: dict[str, float], name: str) -> dict[str, float]:
    """Returns the metrics with `name` as the first, by which models are compared. As they are if
    there is no such metric."""
    return {name: metrics[name], **metrics} if name in metrics else metrics


def score(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns all metrics of a task by name. The first is the one that models are compared by.

    A text may have several references. If at least half of them have more than LONG words, the
    first metric is rougeL, or bleu in scripts that rougeL does not read, else exact_match. Raises
    DataError if there are no predictions, their number differs from the references', or, in
    regression, a value is not a finite number.
    """
    if len(predictions) != len(references) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions for {len(references)} references. Pass one line with"
            " both for each."
        )
    if task == "text":
        scores = {
            "exact_match": exact_match(predictions, references),
            "bleu": bleu(predictions, references),
            **rouge(predictions, references),
        }
        return leading(scores, _leading_of_texts(references))
    first = [reference[0] for reference in references]
    if task == "regression":
        try:
            numbers = [[float(value) for value in values] for values in (predictions, first)]
        except ValueError as error:
            raise DataError(f"regression scores need numbers: {error}.") from None
        for value in itertools.chain(*numbers):
            if not abs(value) <= LARGEST_LABEL:
                raise DataError(
                    f"regression scores need finite numbers up to {LARGEST_LABEL:g}, the largest"
                    f" float32, found {value:g}. Fix the row, or scale the values."
                )
        return regression(*numbers)
    if task != "classification":
        raise DataError(f"no task {task!r}. Known: {', '.join(METRICS)}.")
    return classification(predictions, first)


def _leading_of_texts(references: Sequence[Sequence[str]]) -> str:
    texts = [text for several in references for text in several]
    if statistics.median_high(len(text.split()) for text in texts) <= LONG:
        return "exact_match"
    letters = "".join(filter(str.isalnum, "".join(texts)))
    return "rougeL" if 2 * sum(map(str.isascii, letters)) >= len(letters) else "bleu"


def classification(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, macro-F1 over the classes that occur, and Matthews correlation."""
    # Imported here, as below: each task would wait for the libraries of all others.
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    # With a single class there is no correlation, and sklearn warns.
    single_class = len({*predictions, *references}) == 1
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        "matthews": 0.0 if single_class else float(matthews_corrcoef(references, predictions)),
    }


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlation, and the mean squared error.

    If the predictions or the references are constant, the correlation is undefined. It is 0 here,
    since a model with constant predictions has learned nothing.
    """
    from scipy.stats import pearsonr, spearmanr

    # A product that is too large is inf; ** 2 would raise OverflowError.
    squared = [(p - r) * (p - r) for p, r in zip(predictions, references, strict=True)]
    constant = min(len(set(predictions)), len(set(references))) < 2
    return {
        "pearson": 0.0 if constant else float(pearsonr(predictions, references).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predictions, references).statistic),
        "mse": sum(squared) / len(squared),
    }


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns sacrebleu's corpus BLEU at its defaults (13a tokenizer, exponential smoothing)."""
    import sacrebleu

    most = max(len(texts) for texts in references)
    # sacrebleu takes the first reference of each prediction, then the second of each, ...; None if
    # a prediction has fewer.
    streams: Any = [
        [texts[i] if i < len(texts) else None for texts in references] for i in range(most)
    ]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the means of rouge_by_row."""
    rows = rouge_by_row(predictions, references)
    return {name: sum(scores) / len(scores) for name, scores in rows.items()}


def rouge_by_row(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
) -> dict[str, list[float]]:
    """Returns each row's F-measure of ROUGE-1, -2 and -L with stemming, by the best reference.

    rouge-score uses ASCII letters and digits only, so text in other scripts scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names, use_stemmer=True)
    best = [scorer.score_multi(list(r), p) for p, r in zip(predictions, references, strict=True)]
    return {name: [float(scores[name].fmeasure) for scores in best] for name in names}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the share of predictions that equal a reference after `normalise`."""
    # Equal to any reference, as SQuAD scores questions with several right answers.
    hits = [matches(text, texts) for text, texts in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def matches(prediction: str, references: Sequence[str]) -> bool:
    """True if a prediction equals one of its references after `normalise`."""
    return normalise(prediction) in set(map(normalise, references))


def normalise(text: str) -> str:
    """Normalises as SQuAD does: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Rajpurkar et al. 2016, arXiv:1606.05250, the official evaluation script's order of steps.
    """
    text = text.lower()
    text = "".join(character for character in text if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())
