"""The names of classes, in all that a run writes; their weights, against scikit-learn's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)

from lora.finetune.classes import class_weights
from lora.finetune.config import parse_run
from lora.finetune.data.corpus import Corpus, Example


def corpus_of(labels: list[str], classes: tuple[str, ...]) -> Corpus:
    rows = tuple(Example("text", None, label) for label in labels)
    return Corpus("data", "classification", classes, rows, rows, ())


@given(st.lists(st.sampled_from("abcd"), min_size=1))
@settings(deadline=None)
def test_balanced_is_scikit_learns(labels: list[str]) -> None:
    classes = tuple(sorted({*labels}))
    weights = class_weights(parse_run(["--class-weights", "balanced"]), corpus_of(labels, classes))
    wanted = compute_class_weight("balanced", classes=np.array(classes), y=np.array(labels))
    assert weights == pytest.approx(wanted.tolist())


def test_weights_follow_the_order_of_the_labels() -> None:
    corpus = corpus_of(["a", "b"], ("b", "a", "c"))
    assert class_weights(parse_run(["--class-weights", "a", "2", "c", "0.5"]), corpus) == (
        1,
        2,
        0.5,
    )
    assert class_weights(parse_run(["--class-weights", "balanced"]), corpus) == (1, 1, 1)
    assert class_weights(parse_run([]), corpus) == ()


def test_what_cannot_be_weighted_is_named_before_the_base_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data", data(tmp_path / "data"), "--base", tmp_path / "none")
    numbers = tmp_path / "numbers.tsv"
    rows = (f"a text, number {i}\t{i / 7}\n" for i in range(20))
    numbers.write_text("text\tlabel\n" + "".join(rows))
    for arguments, words in {
        (
            *flags,
            "--class-weights",
            "x",
            2,
        ): "names 'x', which is no label of the data. Labels: 0, 1.",
        (*flags, "--class-weights", "0", 0): "--class-weights [0] must be more than 0",
        (*flags, "--class-names", "a", "b", "c"): "3 given, but the data has 2 labels: 0, 1. Give",
        (
            *flags,
            "--class-names",
            "1",
            "0",
        ): "'1' would be the name of the label '0', but is another",
        (*flags, "--class-names", "a", "a"): "--class-names must be distinct",
        (*flags, "--label-smoothing", 1): "--label-smoothing must be less than 1",
    }.items():
        assert lora("train", *arguments) == 2
        assert words in capsys.readouterr().err
    for flag in (
        ("--class-names", "a", "b"), ("--class-weights", "balanced"), ("--label-smoothing", 0.1)
    ):  # fmt: skip
        assert lora("plan", "--data", numbers, *flag) == 2
        said = capsys.readouterr().err
        assert f"{flag[0]} has no effect with --task regression. Remove it." in said


def test_the_weights_are_shown_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: Any = ("--class-weights", "0", 2, "--class-weights", "1", 0.5)
    assert lora("data", "preview", "--data", data(tmp_path / "data"), *weights) == 0
    assert "data: weights in the training loss: 0 2, 1 0.5\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def named_run(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run whose classes have names: 0 is bad, 1 is good."""
    folder = tmp_path_factory.mktemp("named")
    flags = ("--base", base, "--data", data(folder / "data"), "--r", 2, "--epochs", 1)
    names = ("--labels", 1, 0, "--class-names", "good", "bad")
    assert lora("train", *flags, *names, "--run-dir", folder / "run") == 0
    return folder / "run"


NAMES = {"1": "good", "0": "bad"}


def test_predictions_have_the_label_and_its_name(
    named_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the run, of its model, and of its adapter without the run."""
    lines = (named_run / "predictions.jsonl").read_text().splitlines()
    shutil.copytree(named_run / "adapter", tmp_path / "adapter")
    for source in (named_run, tmp_path / "adapter"):
        assert lora("predict", source, "--text", "a fine film", "a dull film") == 0
        lines += capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 24 + 2 + 2
    assert all(row["prediction_name"] == NAMES[row["prediction"]] for row in rows)


def test_data_keeps_its_labels(
    named_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the scores of the adapter without the run, and for a training that starts from it."""
    shutil.copytree(named_run / "adapter", tmp_path / "adapter")
    assert lora("eval", tmp_path / "adapter", "--data", named_run.parent / "data") == 0
    assert "test: 24 rows, by class: good (1) 12, bad (0) 12" in capsys.readouterr().err
    flags = ("--data", named_run.parent / "data", "--labels", 1, 0, "--epochs", 1)
    run = tmp_path / "run"
    assert lora("train", *flags, "--adapter", tmp_path / "adapter", "--run-dir", run) == 0
    assert "prediction_name" not in (run / "predictions.jsonl").read_text()


def test_a_merged_model_has_the_names(named_run: Path, tmp_path: Path) -> None:
    assert lora("merge", named_run, "--output", tmp_path / "merged") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "bad"}
    assert config["label2id"] == {"good": 0, "bad": 1}
    assert config["data_labels"] == ["1", "0"]


def test_many_classes_are_counted_by_the_largest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.tsv"
    rows = [f"text {i} {j}\tclass{i}\n" for i in range(30) for j in range(i + 3)]
    path.write_text("text\tlabel\n" + "".join(rows))
    (tmp_path / "dev.tsv").write_text("text\tlabel\na text\tclass4\n")
    weights = ("--class-weights", "balanced")
    assert lora("data", "preview", "--data", tmp_path, *weights) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "data: train: 525 rows, by class: class29 32, class28 31, class27 30,"
    )
    assert lines[1].endswith(", class22 25, and 22 more classes of 3 to 24")
    assert lines[3].endswith(", and 10 more")
