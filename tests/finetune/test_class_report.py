"""The scores of each class and the confusion matrix, against counts by hand; the warning of a
single class."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)

from lora.finetune.class_report import class_report, single_class

PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1)


@given(PAIRS)
@settings(deadline=None)
def test_the_report_counts_pairs_of_label_and_prediction(pairs: list[tuple[str, str]]) -> None:
    report = class_report([p for p, _ in pairs], [r for _, r in pairs], ("c", "a", "b"))
    counts = Counter(pairs)
    assert [each.label for each in report.classes] == ["c", "a", "b"]
    for each, row in zip(report.classes, report.matrix, strict=True):
        assert list(row) == [counts[prediction, each.label] for prediction in "cab"]
        right, predicted = counts[each.label, each.label], sum(p == each.label for p, _ in pairs)
        assert each.rows == sum(row)
        assert each.precision == pytest.approx(right / predicted if predicted else 0)
        assert each.recall == pytest.approx(right / each.rows if each.rows else 0)


def test_names_are_shown_with_their_labels() -> None:
    report = class_report(["1", "1", "0"], ["1", "0", "0"], ("0", "1"), ("bad", "good"))
    assert str(report) == (
        "| class    | precision | recall | F1     | rows |\n"
        "| -------- | --------- | ------ | ------ | ---- |\n"
        "| bad (0)  | 1.0000    | 0.5000 | 0.6667 | 2    |\n"
        "| good (1) | 0.5000    | 1.0000 | 0.6667 | 1    |\n"
        "\n"
        "rows: the labels; columns: the predictions\n"
        "|          | bad (0) | good (1) |\n"
        "| -------- | ------- | -------- |\n"
        "| bad (0)  | 1       | 1        |\n"
        "| good (1) | 0       | 1        |\n"
    )
    assert report.as_dict()["classes"][1] == {
        "label": "1", "name": "good", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3),
        "rows": 1,
    }  # fmt: skip


def test_of_many_classes_the_most_frequent_confusions_are_shown() -> None:
    labels = [str(number) for number in range(30)] * 3
    predictions = [*labels[:30], *(["7"] * 30), *labels[60:]]
    predictions[70] = "11"  # of the label 10
    text = str(class_report(predictions, labels))
    assert "columns: the predictions" not in text
    lines = text.partition("the most frequent confusions\n")[2].splitlines()
    assert len(lines) == 2 + 20
    assert text.index("| 9     ") < text.index("| 10    ")  # numbers in their order
    assert "confusions" not in str(class_report(labels, labels))


def test_a_single_class_is_warned_of() -> None:
    several = ["a", "b", "b", "b"]
    text = single_class(["b"] * 4, several, "dev", 2e-3, weighted=False)
    assert text == (
        "all 4 rows of dev are predicted 'b', which is right for 75%: the model does not tell the"
        " classes apart. Try another --learning-rate than 0.002, such as 0.0004 or 0.01, or more"
        " --epochs. If the classes differ in size, try --class-weights balanced."
    )
    assert "--class-weights" not in single_class(["b"] * 4, several, "dev", 2e-3, weighted=True)
    assert single_class(several, several, "dev", 2e-3, weighted=False) == ""
    assert single_class(["b", "b"], ["a", "a"], "dev", 2e-3, weighted=False) == ""


def test_a_run_that_predicts_one_class_says_so_and_eval_shows_it(
    base: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Class weights so uneven that one class is all that is learned."""
    run = tmp_path / "run"
    flags = ("--base", base, "--data", data(tmp_path / "data"), "--r", 2, "--epochs", 2)
    more = ("--class-weights", 1, 1e6, "--learning-rate", 0.02, "--class-names", "bad", "good")
    assert lora("train", *flags, *more, "--run-dir", run) == 0
    screen = capsys.readouterr().err
    assert screen.count("note: all 24 rows of dev are predicted 'good (1)', which is right") == 1
    assert screen.count("note: all 24 rows of test are predicted 'good (1)', which is right") == 1
    assert "all 24 rows of test" in json.loads((run / "summary.json").read_text())["note"]
    capsys.readouterr()
    printed = []
    for source in (("--run", run), ("--predictions", run / "predictions.jsonl")):
        assert lora("eval", *source) == 0
        scores, _, tables = capsys.readouterr().out.partition("\n\n")
        assert dict(line.split() for line in scores.splitlines())["accuracy"] == "0.5000"
        printed.append(tables)
    assert printed[0] == printed[1]
    for name in ("bad (0) ", "good (1)"):
        assert f"| {name} | 0       | 12       |\n" in printed[0]
    assert lora("eval", run, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["confusion"] == [[0, 12], [0, 12]]
    assert report["accuracy"] == 0.5
    assert [each["name"] for each in report["classes"]] == ["bad", "good"]
