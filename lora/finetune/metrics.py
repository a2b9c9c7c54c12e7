"""Scores: pure functions of predictions and references.

Accuracies, F1, correlations, ROUGE and exact match are shares in [-1, 1]; BLEU is in [0, 100], as
sacrebleu gives it.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence
from typing import Any

from lora.errors import DataError
from lora.finetune.data.columns import LARGEST_LABEL

SCORED_TASKS = ("classification", "regression", "text")
LOWER = ("perplexity", "mse")  # the better


def score(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """All metrics of a task by name. Each prediction has one reference or, for text, several."""
    if len(predictions) != len(references) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions for {len(references)} references: nothing to score."
        )
    if task == "text":
        return {
            "exact_match": exact_match(predictions, references),
            "bleu": bleu(predictions, references),
            **rouge(predictions, references),
        }
    first = [reference[0] for reference in references]
    if task == "regression":
        try:
            numbers = [[float(value) for value in values] for values in (predictions, first)]
        except ValueError as error:
            raise DataError(f"regression scores need numbers: {error}.") from None
        for value in itertools.chain(*numbers):
            if not abs(value) <= LARGEST_LABEL:
                raise DataError(
                    f"regression scores need finite numbers up to {LARGEST_LABEL:g}, as float32"
                    f" has, found {value:g}. Mend the row, or scale the values."
                )
        return regression(*numbers)
    if task != "classification":
        raise DataError(f"no task {task!r}. Known: {', '.join(SCORED_TASKS)}.")
    return classification(predictions, first)


def classification(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro-F1 over the classes that occur, Matthews correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    one = len({*predictions, *references}) == 1  # no correlation, and sklearn warns
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        "matthews": 0.0 if one else float(matthews_corrcoef(references, predictions)),
    }


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and the mean squared error.

    A constant side has no correlation: 0, for a model that predicts one has learned nothing.
    """
    from scipy.stats import pearsonr, spearmanr

    squared = [(p - r) * (p - r) for p, r in zip(predictions, references, strict=True)]
    flat = min(len(set(predictions)), len(set(references))) < 2
    return {
        "pearson": 0.0 if flat else float(pearsonr(predictions, references).statistic),
        "spearman": 0.0 if flat else float(spearmanr(predictions, references).statistic),
        "mse": sum(squared) / len(squared),
    }


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu at its defaults (13a tokens, exponential smoothing)."""
    import sacrebleu

    most = max(len(found) for found in references)
    # sacrebleu wants the first references of all, then the second ones; None where there is none.
    streams: Any = [
        [found[i] if i < len(found) else None for found in references] for i in range(most)
    ]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, F-measure with stemming, the best reference of each, mean over all.

    rouge-score knows ASCII letters and digits only: text in other scripts scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    best = [scorer.score_multi(list(r), p) for p, r in zip(predictions, references, strict=True)]
    return {name: sum(found[name].fmeasure for found in best) / len(best) for name in names}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions that equal a reference after `normalise`."""
    hits = [
        normalise(prediction) in {normalise(reference) for reference in found}
        for prediction, found in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Rajpurkar et al. 2016, arXiv:1606.05250, the official evaluation script's order of steps.
    """
    text = text.lower()
    text = "".join(character for character in text if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())
