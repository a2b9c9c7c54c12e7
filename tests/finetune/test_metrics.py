"""Each metric against values worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from lora.errors import DataError
from lora.finetune.data.included import MADE, RATED, answer_metrics
from lora.finetune.data.opinions import OPINIONS
from lora.finetune.demo.tasks import MADE_TASKS
from lora.finetune.metrics import (
    METRICS,
    NO_SHARES,
    OF_RIGHT_ROWS,
    OF_TOKENS,
    Metric,
    bleu,
    classification,
    exact_match,
    is_share,
    leading,
    normalise,
    regression,
    rouge,
    score,
)


def test_classification_by_hand() -> None:
    #            TP TP FN FP TN
    references = ["1", "1", "1", "0", "0"]
    predictions = ["1", "1", "0", "1", "0"]
    found = classification(predictions, references)
    assert found["accuracy"] == pytest.approx(3 / 5)
    # class 1: P = 2/3, R = 2/3, F = 2/3; class 0: P = 1/2, R = 1/2, F = 1/2
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2·1 − 1·1) / √(3·3·2·2)
    assert found["matthews"] == pytest.approx(1 / 6)


def test_three_classes_by_hand() -> None:
    found = classification(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    assert found["accuracy"] == 0.75
    # a: 1; b: P = 1/2, R = 1, F = 2/3; c: P = 1, R = 1/2, F = 2/3
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_a_model_that_says_one_thing_has_no_correlation() -> None:
    assert classification(["1", "1"], ["0", "1"])["matthews"] == 0.0
    assert regression([2.0, 2.0], [1.0, 3.0])["pearson"] == 0.0


def test_regression_by_hand() -> None:
    found = regression([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    # deviations (−4/3, −1/3, 5/3) and (−1, 1, 0): −1/3·1 + 4/3 = 1; norms √(42/9), √2
    assert found["pearson"] == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    # ranks (1, 2, 3) and (1, 3, 2): 1 − 6·2 / (3·8)
    assert found["spearman"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx((0 + 1 + 4) / 3)


def test_bleu_by_hand() -> None:
    # 4 of 5 unigrams, 3 of 4 bigrams, 2 of 3 trigrams, 1 of 2 four-grams; same length
    by_hand = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["the cat sat down here"], [["the cat sat down there"]]) == pytest.approx(by_hand)
    # one word short: brevity penalty e^(1 − 5/4); all that is there matches
    found = bleu(["the cat sat down"], [["the cat sat down there"]])
    assert found == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_bleu_takes_the_best_of_several_references_and_uneven_numbers_of_them() -> None:
    several = [["no match at all here", "the cat sat down"], ["a b c d"]]
    assert bleu(["the cat sat down", "a b c d"], several) == pytest.approx(100)


def test_rouge_by_hand() -> None:
    found = rouge(["the cat sat"], [["the cat ran fast"]])
    # unigrams: 2 of 3, 2 of 4; bigrams: 1 of 2, 1 of 3; longest common subsequence 2
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge(["the cat"], [["dogs", "the cat"]])["rouge1"] == 1.0


@pytest.mark.parametrize(
    ("references", "first"),
    [
        ([["yes"], ["no"]], "exact_match"),
        ([["one two three four five"]], "exact_match"),
        ([["one two three four five six"]], "rougeL"),
        ([["no"], ["no", "one two three four five six", "a b c d e f"]], "rougeL"),  # 2 of 4
        ([["no"], ["no"], ["one two three four five six"]], "exact_match"),
        ([["Он сказал, что придёт завтра утром домой"]], "bleu"),  # rougeL would be 0
        ([["Él dijo que vendría mañana por la mañana"]], "rougeL"),
    ],
)
def test_long_answers_are_compared_by_rouge(references: list[list[str]], first: str) -> None:
    scores = score("text", ["x"] * len(references), references)
    assert next(iter(scores)) == first
    assert sorted(scores) == ["bleu", "exact_match", "rouge1", "rouge2", "rougeL"]


def test_every_metric_has_a_name_that_can_be_chosen() -> None:
    known = {*get_args(Metric)} - {""}
    included = [*(MADE + name for name in MADE_TASKS), *(RATED + name for name in OPINIONS)]
    own = {name for source in included for name in answer_metrics(source)}
    assert known == {*own, *OF_TOKENS, *(name for names in METRICS.values() for name in names)}
    assert {*NO_SHARES, *OF_RIGHT_ROWS} <= known
    assert not {*NO_SHARES} & {*OF_RIGHT_ROWS}
    assert is_share("letters")
    assert not is_share("bleu")


def test_the_leading_metric_is_the_first_of_those_there_are() -> None:
    scores = {"accuracy": 0.5, "macro_f1": 0.4}
    assert list(leading(scores, "macro_f1").items()) == [("macro_f1", 0.4), ("accuracy", 0.5)]
    assert list(leading(scores, "")) == list(leading(scores, "bleu")) == ["accuracy", "macro_f1"]


def test_exact_match_normalises_as_squad_does() -> None:
    assert normalise("The  Cat, sat!") == "cat sat"
    assert normalise("an apple a day") == "apple day"
    assert exact_match(["The cat.", "dog", "42"], [["cat"], ["a cat", "the dog"], ["41"]]) == 2 / 3


def test_score_refuses_what_it_cannot_score() -> None:
    with pytest.raises(DataError, match="0 predictions"):
        score("classification", [], [])
    with pytest.raises(DataError, match="2 predictions for 1"):
        score("text", ["a", "b"], [["a"]])
    with pytest.raises(DataError, match="finite"):
        score("regression", ["nan"], [["1"]])
    with pytest.raises(DataError, match="no task 'chess'"):
        score("chess", ["a"], [["a"]])
    with pytest.raises(DataError, match="numbers"):
        score("regression", ["one"], [["1"]])
    assert score("text", ["a b c d"], [["a b c d"]])["bleu"] == pytest.approx(100)
